"""Small calls of every operator, in a file for each family of operators. A file has three functions, and may have a
fourth:

    cases(dtype)            many shapes, compared with the CPU
    plain(N, dtype)         one of each operator, of N rows
    small()                 float64, for finite differences and compute-sanitizer
    watched(torch_products) more for compute-sanitizer; torch_products: also those whose products torch makes
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

FAMILIES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def of(family: str, function: str, *arguments) -> list:
    """The cases that a family's function gives; none where it has no such function."""
    found = getattr(import_module(f"families.{family}"), function, lambda *_: [])(*arguments)
    for case in found:
        case.family = family
    return found


def of_all(function: str, *arguments) -> list:
    return [case for family in FAMILIES for case in of(family, function, *arguments)]
