"""Registers, spills, stack and shared memory of each CUDA kernel, from what ptxas says while it compiles.

ptxas_report.py compile COMMAND...   runs a compiler and keeps ptxas's remarks beside the object file
ptxas_report.py table FOLDER         prints the table of a build folder; fails where a kernel spills or has a stack
"""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

REMARKS = ".ptxas"


def run_compiler(command: list[str]) -> int:
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    lines = result.stderr.splitlines(keepends=True)
    is_remark = [bool(re.match(r"ptxas info|\s+\d+ bytes stack|$", line.strip("\n"))) for line in lines]
    if "-o" in command:
        kept = "".join(line for line, remark in zip(lines, is_remark, strict=True) if remark)
        Path(command[command.index("-o") + 1] + REMARKS).write_text(kept)
    sys.stderr.write("".join(line for line, remark in zip(lines, is_remark, strict=True) if not remark))
    return result.returncode


def short_name(mangled: str) -> str:
    filt = shutil.which("c++filt")
    if not filt:
        return mangled
    name = subprocess.run([filt, mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"mmbal::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"(>|^\w+)\(.*", r"\1", name)


def read(folder: Path):
    """(file, kernel, architecture) -> registers, shared, stack, spills"""
    table = {}
    for report in sorted(folder.rglob("*" + REMARKS)):
        key = None
        for line in report.read_text().splitlines():
            if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
                key = (report.name.split(".")[0], found[1], found[2])
                table[key] = [0, 0, 0, 0]
            elif found := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
            ):
                if key:
                    table[key][2] = int(found[1])
                    table[key][3] = int(found[2]) + int(found[3])
            elif key and (found := re.search(r"Used (\d+) registers", line)):
                table[key][0] = int(found[1])
                if shared := re.search(r"(\d+) bytes smem", line):
                    table[key][1] = int(shared[1])
    return table


def print_table(folder: Path) -> int:
    table = read(folder)
    if not table:
        print(f"no remarks of ptxas in {folder}")
        return 1
    rows = defaultdict(dict)
    bad = []
    for (file, kernel, architecture), numbers in table.items():
        rows[file, short_name(kernel)][architecture] = numbers
        if numbers[2] or numbers[3]:
            bad.append(
                f"{file}: {short_name(kernel)} for {architecture}: stack {numbers[2]}, spills {numbers[3]} bytes"
            )
    architectures = sorted({architecture for _, _, architecture in table})
    width = max(len(kernel) for _, kernel in rows)
    print("Kernels: registers / static shared memory / stack / spills in bytes; shared memory asked for at the launch")
    print("is not in it")
    print(f"{'file':16} {'kernel':{width}} " + " ".join(f"{a:>16}" for a in architectures))
    for (file, kernel), by_architecture in sorted(rows.items()):
        cells = ["/".join(map(str, by_architecture.get(a, "-"))) for a in architectures]
        print(f"{file:16} {kernel:{width}} " + " ".join(f"{cell:>16}" for cell in cells))
    for line in bad:
        print("NOT ALLOWED:", line)
    return 1 if bad else 0


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    sys.exit(run_compiler(rest) if what == "compile" else print_table(Path(rest[0])))
