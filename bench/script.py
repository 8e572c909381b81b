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
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.files import require_output, write_text


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        """Refuses a file that is not to be replaced before hours of measuring."""
        options, rest = super().parse_known_args(*given, **named)
        if options.json is not None:
            try:
                require_output(options.json, "--json", _has_figures, options.force, streams=True)
            except BadInputError as error:
                self.error(str(error))
        return options, rest


def make_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with ``--json``, described by the first line of the module's docstring."""
    parser = _Parser(prog=f"python -m {module}", description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--force", action="store_true", help="let --json replace a file that holds no figures")
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
        write_text(path, json.dumps({**result, "versions": versions(*libraries)}, indent=2) + "\n")


def _has_figures(path: Path) -> bool:
    """True for a file that ``save`` wrote."""
    try:
        return "versions" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        return False


def device_name(device: str) -> str:
    """The card's name, or the CPU's number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
