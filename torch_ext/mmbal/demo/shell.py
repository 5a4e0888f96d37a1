"""Commands of mmbal as a user types them in a folder, and a script of all of them."""

from __future__ import annotations

import io
import os
import shlex
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from mmbal.cli import app
from mmbal.files import replace_file


class CommandError(RuntimeError):
    """A command failed; it has said why."""


class Shell:
    """Runs lines such as "mmbal inspect parent" in `folder`, and shows each with what it puts out."""

    def __init__(self, folder: Path):
        self.folder, self.shown, self.script = folder, None, []

    def comment(self, text: str) -> None:
        """A comment in the script."""
        self.script += ["", f"# {text}"]

    def run(self, line: str, folder: Path | None = None, expected: int = 0) -> str:
        """Output of the command; its exit code must be the expected one."""
        folder = folder or self.folder
        if folder != self.shown:
            print(f"\n$ cd {_short(folder)}", end="")
            self.shown = folder
        print(f"\n$ {line}", flush=True)
        output = io.StringIO()
        try:
            with _inside(folder), redirect_stdout(output):
                code = app(shlex.split(line)[1:], standalone_mode=False) or 0
        finally:
            print(output.getvalue(), end="", flush=True)
        if code == 130:  # typer's, and what commands end with, when they are interrupted
            raise KeyboardInterrupt
        if code != expected:
            raise CommandError(f"{line}: ended with {code}, expected {expected}")
        return output.getvalue()

    def write(self, path: Path, needed: list[str]) -> None:
        """The script at `path`, in a folder above: the same in a new folder, with links to the files `needed`."""
        again = self.folder.relative_to(path.parent) / "again"
        head = [
            "#!/bin/sh",
            "# What `mmbal demo` did with commands. What it did in Python between them, above all training, is said in",
            f"# comments. `sh {path.name}` does the commands again, with the models of that run, in a new folder,",
            f"# {again}.",
            "set -e",
            'cd "$(dirname "$0")"',
            f"mkdir {again}",
            f"cd {again}",
            f"ln -s {' '.join(f'../{name}' for name in needed)} .",
        ]
        text = "\n".join(head + self.script) + "\n"
        replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def _short(folder: Path) -> str:
    """Relative where that is shorter."""
    return min(os.path.relpath(folder), str(folder.absolute()), key=len)


@contextmanager
def _inside(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
