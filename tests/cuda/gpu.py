"""Everything that needs a GPU, in one report: build, registrations, tests, benchmarks, compute-sanitizer.

    python3 tests/cuda/gpu.py [--limit SECONDS] [--build FOLDER]

It needs what this Python has (torch with CUDA, pybind11, pytest and mmbal's dependencies), nvcc, CMake and ninja, and
no network. Each part has a limit of its own, so that one that hangs costs no other. The report is printed and, with all
output of all parts, written to $OUT (or build/gpu): report.txt, logs.txt. The exit status is 1 where a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("tests/cuda")


class Report:
    def __init__(self, folder: Path, logs: Path, limit: float):
        self.folder, self.logs, self.end = folder, logs, time.monotonic() + limit
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        self.file = (folder / "report.txt").open("w")
        self.summary: list[tuple[str, str, float]] = []

    def write(self, text: str):
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()

    def done(self, name: str, state: str, seconds: float):
        self.summary.append((name, state, seconds))

    def failed(self) -> bool:
        return any(state.startswith("FAILED") for _, state, _ in self.summary)

    def finish(self):
        self.write("\n== summary")
        for name, state, seconds in self.summary:
            self.write(f"{name:28} {seconds:6.1f} s  {state}")
        with (self.folder / "logs.txt").open("w") as all_logs:
            for log in sorted(self.logs.iterdir(), key=lambda path: path.stat().st_mtime):
                all_logs.write(f"\n== {log.stem}\n{log.read_text(errors='replace')}")


class Part:
    """A command in a process group of its own, its output in a file."""

    def __init__(self, report: Report, name: str, command: list[str], limit: float, environment: dict[str, str]):
        self.report, self.name = report, name
        self.limit = min(limit, report.end - time.monotonic() - 3)
        self.log = report.logs / (name.replace(" ", "-") + ".log")
        self.start = time.monotonic()
        self.process = None
        if self.limit > 3:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=self.log.open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, tail: int) -> bool:
        if not self.process:
            self.report.write(f"\n== {self.name}: not run: no time left")
            self.report.done(self.name, "not run: no time left", 0)
            return False
        try:
            code = self.process.wait(max(0.1, self.limit - (time.monotonic() - self.start)))
            state = "ok" if code == 0 else f"FAILED with status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # the session that was started above
            state = f"FAILED: stopped after {self.limit:.0f} s"
        lines = self.log.read_text(errors="replace").splitlines()
        self.report.write(f"\n== {self.name}: {state}")
        if len(lines) > tail:
            self.report.write(f"... {len(lines) - tail} lines before, in logs.txt")
        self.report.write("\n".join(lines[-tail:]))
        self.report.done(self.name, state, time.monotonic() - self.start)
        return state == "ok"


def has_gpu() -> bool:
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def build(report: Report, folder: Path, limit: float, environment: dict[str, str]) -> bool:
    """The package as pip would lay it out, in folder/package: no pip, no network."""
    configure = [
        *("cmake", "-S", ".", "-B", str(folder), "-G", "Ninja", "--log-level=WARNING"),
        *("-DMMBAL_TORCH=ON", "-DMMBAL_OPENMP=OFF", "-DMMBAL_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90"),
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    targets = ["mmbal_torch", "mmbal_core_module", "mmbal_cuda"]
    if not Part(report, "configure", configure, 60, environment).wait(15):
        return False
    command = ["cmake", "--build", str(folder), "-j", str(os.cpu_count() or 2), "--target", *targets]
    if not Part(report, "build", command, limit, environment).wait(15):
        return False
    package = folder / "package" / "mmbal"
    shutil.copytree(ROOT / "torch_ext" / "mmbal", package, dirs_exist_ok=True)
    for library in [*folder.glob("libmmbal_*.so"), *folder.glob("_core.*.so")]:
        shutil.copy2(library, package)
    return True


def only_our_kernels() -> list[str]:
    """The option's name has changed from version to version."""
    text = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True).stdout
    for option in ("--kernel-regex", "--kernel-name", "--filter"):
        if option in text:
            return [option, "kns=mmbal"]
    return []


def start_tests(report: Report, environment: dict[str, str]) -> Part:
    """In several processes where pytest-xdist is there: what a trap on the device ends is one of them."""
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    options = ["-q", "--durations=8", "-p", "no:cacheprovider", *workers]
    return Part(report, "tests", [sys.executable, "-m", "pytest", str(HERE), *options], 240, environment)


def start_sanitizers(report: Report, environment: dict[str, str]) -> dict[str, Part]:
    """The three tools side by side: each mostly waits for the host. See sanitized.py for what "all" adds."""
    tools = ("memcheck", "racecheck", "initcheck")
    if not shutil.which("compute-sanitizer"):
        for tool in tools:
            report.done(tool, "not run: compute-sanitizer is missing", 0)
        return {}
    # No caching: an access beyond a tensor must not land in another one. Our kernels alone: torch's are torch's.
    watched = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ours = only_our_kernels()
    return {
        tool: Part(
            report,
            tool,
            [
                *("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *ours),
                *(sys.executable, str(HERE / "sanitized.py")),
                *(["all"] if tool == "memcheck" else []),
            ],
            240,
            watched,
        )
        for tool in tools
    }


def finish_sanitizers(report: Report, parts: dict[str, Part]):
    ran = {}
    for tool, part in parts.items():
        passed = part.wait(25)
        text = part.log.read_text(errors="replace") if part.log.exists() else ""
        if "Device not supported" in text or "not supported on this" in text:
            name, _, seconds = report.summary.pop()
            report.done(name, "not run: compute-sanitizer refuses this device", seconds)
        for family in re.findall(r"^ran (\w+)$", text, re.MULTILINE):
            ran.setdefault(family, []).append(f"{tool} {'ok' if passed else 'ran; see above'}")
    report.write("")
    for family, states in ran.items():
        report.write(f"family {family:12} {', '.join(states)}")
    report.write("bfloat16 through torch's grouped product is watched by memcheck alone: see sanitized.py")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=float, default=420, help="seconds for everything")
    parser.add_argument("--build-limit", type=float, default=150, help="seconds for the build")
    parser.add_argument("--build", type=Path, default=Path("build/gpu"))
    parser.add_argument("--skip", nargs="*", default=[], help="parts: tests, bench, sanitizer")
    options = parser.parse_args()
    folder = Path(os.environ.get("OUT") or ROOT / options.build).resolve()
    report = Report(folder, ROOT / options.build / "logs", options.limit)
    # This Python's own tools (cmake, ninja) first, and the CUDA toolkit where its folder is not named.
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    os.environ["PATH"] = os.pathsep.join(places)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    gpu = has_gpu()
    if shutil.which("nvidia-smi"):
        Part(report, "machine", ["nvidia-smi", "-L"], 20, environment).wait(5)
    report.write("" if gpu else "no GPU: what needs one is not run")
    if not build(report, ROOT / options.build, options.build_limit, environment):
        report.finish()
        return 1
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / options.build / "package"), str(ROOT / "tests" / "torch_ext"), environment.get("PYTHONPATH", "")]
    )
    stand_in = ROOT / options.build / "stand_in" / "libtorch_cuda.so"
    cuda = ["--cuda-library", str(ROOT / options.build / "libmmbal_cuda.so")]
    if stand_in.exists():
        cuda += ["--stand-in", str(stand_in)]
    registrations = [sys.executable, str(HERE / "registrations.py"), *cuda]
    Part(report, "registrations", registrations, 120, environment).wait(60)
    info = [sys.executable, "-c", "from mmbal.cli import app; app()", "info"]
    Part(report, "mmbal info", info, 60, environment).wait(60)
    if not gpu:
        for name in ("tests", "benchmarks", "memcheck", "racecheck", "initcheck"):
            report.done(name, "not run: no GPU", 0)
        report.finish()
        return int(report.failed())
    if "bench" not in options.skip:  # alone; what follows shares the GPU
        Part(report, "benchmarks", [sys.executable, str(HERE / "bench_gpu.py"), "90"], 130, environment).wait(80)
    tests = start_tests(report, environment) if "tests" not in options.skip else None
    sanitizers = start_sanitizers(report, environment) if "sanitizer" not in options.skip else {}
    if tests:
        tests.wait(80)
    finish_sanitizers(report, sanitizers)
    report.finish()
    return int(report.failed())


if __name__ == "__main__":
    sys.exit(main())
