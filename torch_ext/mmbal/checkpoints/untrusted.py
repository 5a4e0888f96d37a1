"""What every reader of a file that is not trusted needs: opening it, refusing it, quoting from it, reading JSON."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

MEBIBYTE = 1 << 20
TEXT_LIMIT = 16 * MEBIBYTE  # bytes of JSON; an index entry takes about 100, so that this is over 100,000 tensors


class RefusedError(ValueError):
    """A file is not what it must be; the message is a predicate ("has ..."), before which its reader sets the path."""


def shown(value) -> str:
    """A short quotation of something from a file: printable ASCII, at most some 80 characters."""
    if isinstance(value, str):
        return ascii(value if len(value) <= 80 else value[:60] + "...")
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    return f"a value of type {type(value).__name__}"


def shortened(error: BaseException) -> str:
    """The message of a library's error, which may quote the file, cut to one printable line."""
    line = " ".join(str(error).split()) or type(error).__name__
    line = "".join(c if c.isprintable() else "?" for c in line[:300])
    return line if len(line) < 300 else line + "..."


def open_regular(path) -> BinaryIO:
    """Opens a file for reading; refuses folders, devices, sockets and FIFOs (which would wait for a writer)."""
    try:
        # Asked before opening, because opening is enough to act on some devices.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RefusedError("must be a regular file, got a folder, device, socket or FIFO")
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    except FileNotFoundError:
        raise RefusedError("must be a file, got a path where nothing is") from None
    except (OSError, UnicodeEncodeError) as error:
        raise RefusedError(f"cannot be opened: {getattr(error, 'strerror', None) or shortened(error)}") from None
    except ValueError as error:
        raise (
            error if isinstance(error, RefusedError) else RefusedError(f"cannot be opened: {shortened(error)}")
        ) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise RefusedError("must be a regular file, got something else that took its place")
    return file


def read_json(path, limit: int = TEXT_LIMIT) -> dict:
    """The JSON object in the UTF-8 file ``path`` of at most ``limit`` bytes.

    Anything else raises ValueError. Parsing takes at most some 25 bytes of memory for each byte of the file.
    """
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise RefusedError(f"must be JSON of at most {limit} bytes, got more")
        if not data.strip():
            raise RefusedError("must be JSON, got an empty file")
        try:
            value = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise RefusedError("must be JSON in UTF-8, got other bytes") from None
        except RecursionError:
            raise RefusedError("must be JSON, got lists or objects nested too deeply") from None
        except ValueError as error:
            raise RefusedError(f"must be JSON, got text with an error: {shortened(error)}") from None
        if not isinstance(value, dict):
            raise RefusedError(f"must be a JSON object, got {type(value).__name__}")
        return value
    except RefusedError as error:
        raise ValueError(f"{Path(path)} {error}") from None
