"""What the scripts of ``bench`` share: their command line, their errors, and the JSON file with their figures."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.versions import versions
from lowmem_drf.errors import LowmemError


def make_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with ``--json``, described by the first line of the module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """``-s key=value``, as in ``lowmem-drf train``."""
    text = "override a key; repeatable"
    parser.add_argument("-s", "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=text)


def reports_errors(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Decorator for a ``main``: a LowmemError is printed to stderr, and its exit code returned."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except LowmemError as error:
            print(f"Error: {error}", file=sys.stderr)
            return error.exit_code

    return wrapped


def save(path: Path | None, result: Mapping[str, Any], *libraries: str) -> None:
    """Writes the result and the versions of these libraries as JSON; does nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**result, "versions": versions(*libraries)}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")


def device_name(device: str) -> str:
    """The card's name, or the CPU's number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
