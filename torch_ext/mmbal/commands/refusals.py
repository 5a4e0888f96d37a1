"""How commands end where they cannot do what they were asked for."""

import sys
import warnings
from contextlib import contextmanager

import typer


@contextmanager
def refusals(code: int = 1, interrupted: str = "interrupted"):
    """Errors that name what is wrong with the input are messages, not tracebacks, and end with ``code``; an interrupt
    ends with 130. Warnings are one line each."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
            yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise typer.Exit(130) from None
