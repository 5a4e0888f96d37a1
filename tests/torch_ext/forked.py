"""Runs a function in a child process that has all modules already, and may be limited or killed."""

import os
import resource
import signal
import traceback
from pathlib import Path


def resident_anonymous() -> float:
    """MiB of memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def run_forked(function, limit_mib=None, seconds=60):
    """The child's exit status (negative: killed by that signal) and the text that ``function`` returned or raised.

    ``limit_mib`` is how much address space it may take beyond what it has.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status, text = 1, ""
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills, also within a library
            signal.alarm(seconds)
            if limit_mib is not None:
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (taken + (limit_mib << 20),) * 2)
            text, status = str(function()), 0
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(writing, text[-4000:].encode("utf-8", "replace"))
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text
