"""Text that a user gives: files of a bounded size, JSON and TOML that hold nothing that fails later, and values as a
message shows them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_drf.errors import BadInputError

MOST_BYTES = 64 * 2**20
"""Of a text file. A larger one is no prompt file, and would be in memory several times."""
DEEPEST = 50
"""Levels of a TOML table: most functions that walk a table call themselves."""
_LONG_KEY = re.compile(rf"""(?<![\w"'-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{DEEPEST}}}""")
"""A dotted key of so many parts. tomllib's time and memory grow with the square of their number."""
_CONTROLS = {code: f"\\u{code:04x}" for code in range(127, 160)}


def expanded(path: str | Path) -> Path:
    """A path with ``~`` replaced; as it is if there is no such user, where ``Path.expanduser`` raises RuntimeError."""
    return Path(os.path.expanduser(path))


def read_text(path: Path, what: str, most: int = MOST_BYTES) -> str:
    """The text of a file in UTF-8, without its byte order mark, lines ended by ``\\n``.

    Args:
        what: the file in the words of a message ("prompt file x.txt").

    Raises:
        BadInputError: with the cure. A missing file raises it too, from FileNotFoundError.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(most + 1)
    except FileNotFoundError as error:
        raise BadInputError(f"{what} does not exist. Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        said = error.strerror if isinstance(error, OSError) else error
        raise BadInputError(f"{what} cannot be read: {said}. Check the path and its permissions.") from error
    if len(raw) > most:
        raise BadInputError(f"{what} is larger than {most // 2**20} MiB. Is it the right file? Give a smaller one.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadInputError(f"{what}:{line}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from error
    if "\0" in text:
        raise BadInputError(f"{what} holds zero bytes: it is no text, or UTF-16. Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError also for what Python's own reader takes or breaks at: NaN, halves of a surrogate
    pair, thousands of nested brackets or digits."""
    from pydantic_core import from_json

    try:
        return from_json(text, allow_inf_nan=False)
    except TypeError as error:  # half a surrogate pair in the text itself, from the command line
        raise ValueError("it is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("brackets nested too deeply") from error


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML table. Raises ValueError also for thousands of nested brackets, digits, or parts of a key, for a zero
    character in a text, which no path may hold, and for whole numbers of more than 64 bits."""
    import tomllib

    if _LONG_KEY.search(text):
        raise ValueError(f"a key of {DEEPEST} parts or more")
    try:
        table = tomllib.loads(text)
    except (RecursionError, OverflowError) as error:
        raise ValueError("brackets nested too deeply, or a date out of range") from error
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        if any(isinstance(value, str) and "\0" in value for value in level):
            raise ValueError(r"a text with the character \u0000")
        if any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in level):
            raise ValueError("a whole number of more than 64 bits, which TOML does not have")
        inside = [value for value in level if isinstance(value, dict | list)]
        level = [value for outer in inside for value in (outer.values() if isinstance(outer, dict) else outer)]
    if level:
        raise ValueError(f"more than {DEEPEST} nested brackets or tables")
    return table


def shown(value: object, most: int = 80) -> str:
    """``repr`` of a value, cut so that it fits into a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of hexadecimal digits, thousands of brackets
        return f"a very long {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def one_line(text: str, most: int = 160) -> str:
    """A text of the user's or of a library's, on one line and cut, to stand in a message."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of the names that a file holds, each cut."""
    return ", ".join(one_line(name, 80) for name in names[:most]) + (", …" if len(names) > most else "")


def toml_value(value: Any) -> str:
    """A text, a number or a list of them as TOML writes it. JSON does the same but for characters beyond 16 bit, whose
    escapes TOML refuses."""
    return escaped(json.dumps(value, ensure_ascii=False))


def escaped(written: str) -> str:
    """JSON or TOML in which the control characters that their writers leave (U+007F to U+009F) are escaped too:
    printed, they would command the terminal."""
    return written.translate(_CONTROLS)
