"""Strategies for damaged files: bytes changed, JSON and TOML with values that break parsers, safetensors headers that
lie, boxes of an MP4 moved. All start from valid files, because nearly all random bytes are refused at the first one."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

Bytes = st.SearchStrategy[bytes]

_MARK = "@raw:"
RAW = (
    *("1" * 5000, "-" + "9" * 5000, "1e999", "-1e999", "NaN", "Infinity", "-0", "1" * 400, "0x" + "f" * 5000, "1e-400"),
    *("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 60 + "]" * 60, "[" * 3000, "{a=" * 3000),
    *(r'"\ud800"', r'"\udc00\ud800"', r'"\u0000"', r'"\u009b31m"', r'"\u001b[2J"', '"\x9b"', '"\x00"', "'\\'", '"', ""),
    *("nan", "-inf", "true", "null", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:60Z", "{a = {}}", "[[], {}]"),
    *(
        '"' + "x" * 20000 + '"',
        '"' + "a/" * 3000 + '"',
        '"~nobody/x.toml"',
        '"\ufeff"',
        '"\\"',
        '"""',
        "a." * 200 + "b",
    ),
)
"""What is put in the place of a value, as it stands in the file."""
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "\0", "\x9b", "\x1b[31m", "yes", "TA", "x" * 3000, "../" * 400, "a\nb\n" * 9, "~nobody", "🙂"]
    ),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXTS, st.sampled_from(RAW).map(_MARK.__add__)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)


def dumped(value: Any) -> str:
    """JSON in which ``@raw:`` texts stand as they are, and an object given as a list of pairs may repeat keys."""
    if isinstance(value, str) and value.startswith(_MARK):
        return value[len(_MARK) :]
    if isinstance(value, dict | tuple):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ",".join(f"{json.dumps(key)}:{dumped(inner)}" for key, inner in pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumped, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@st.composite
def changed(draw: st.DrawFn, value: Any, depth: int = 5) -> Any:
    """The JSON value with something in it replaced, left out, or there twice."""
    if not depth or not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    if isinstance(value, list):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(changed(value[at], depth - 1)), *value[at + draw(st.integers(0, 1)) :]]
    key = draw(st.sampled_from(list(value)))
    what = draw(st.sampled_from(["deeper"] * 4 + ["gone", "twice", "renamed"]))
    if what == "deeper":
        return value | {key: draw(changed(value[key], depth - 1))}
    rest = {name: inner for name, inner in value.items() if name != key}
    if what == "gone":
        return rest
    other = draw(changed(value[key], depth - 1))
    return tuple([*value.items(), (key, other)]) if what == "twice" else rest | {draw(TEXTS): value[key]}


ENCODINGS = st.sampled_from(["utf-8"] * 60 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])


@st.composite
def encoded(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    return draw(texts).encode(draw(ENCODINGS), "replace")


TOKENS = (
    b"\0",
    b"\xff",
    b"\n",
    b'"',
    b"[" * 3000,
    b"1" * 5000,
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xc2\x9b",
    b"\x1b[2J",
)
WORDS = st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])


@st.composite
def damaged(draw: st.DrawFn, files: Sequence[bytes]) -> bytes:
    """One of the files with up to six changes of its bytes."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 6))):
        at, to = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
        near = slice(at, at + draw(st.integers(1, 8)))
        match draw(st.sampled_from(["bit", "bytes", "word", "token", "gone", "again", "end", "zero"])):
            case "bit" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "bytes":
                data[near] = draw(st.binary(max_size=8))
            case "word":
                size = draw(st.sampled_from([2, 4, 8]))
                data[at : at + size] = (draw(WORDS) & (1 << 8 * size) - 1).to_bytes(
                    size, draw(st.sampled_from(["big", "little"]))
                )
            case "token":
                data[at:at] = draw(st.sampled_from(TOKENS))
            case "gone":
                del data[near if draw(st.booleans()) else slice(at, to)]
            case "again":
                data[to:to] = data[at : min(to, at + 4096)]
            case "end":
                del data[at:]
            case "zero":
                data[near] = bytes(near.stop - near.start)
    return bytes(data)


def files_of(*strategies: Bytes) -> Bytes:
    """Any of them, or a few bytes of any kind."""
    return st.one_of(*strategies * 8, st.binary(max_size=64))


# safetensors


def packed(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = dumped(header).encode("utf-8", "replace")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
} | {**{"U8": 1, "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "C64": 8, "F8_E8M0": 1, "F4": 1, "F6_E2M3": 1, "X9": 3}}
_FLOATS = st.sampled_from([0.0, 1.0, -1.0, 8.0, float("nan"), float("inf"), 1e-30, 3e38, 1e7])


@st.composite
def safetensors(draw: st.DrawFn, tensors: dict[str, tuple[int, ...]], metadata: dict[str, Any]) -> bytes:
    """A file of fp32 tensors with these names and shapes, then up to three tensors replaced by others (kind, shape,
    values, name), and perhaps a header that lies."""
    rows: list[tuple[str, str, list[int], float]] = [(name, "F32", list(shape), 0.5) for name, shape in tensors.items()]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(rows) - 1))
        name, kind, shape, value = rows[at]
        match draw(st.sampled_from(["name", "kind", "shape", "value", "gone", "alpha"])):
            case "name":
                name = draw(
                    st.sampled_from(list(tensors)) | TEXTS | st.sampled_from(["x.lora_A.weight", f"{name}.alpha"])
                )
            case "kind":
                kind = draw(st.sampled_from(list(_SIZES)))
            case "shape":
                shape = draw(st.lists(st.integers(0, 5), max_size=5) | st.just([0, 2**40]) | st.just([1, *shape]))
            case "value":
                value = draw(_FLOATS)
            case "gone":
                kind = ""
            case "alpha":
                name = name.partition(".lora")[0] + ".alpha"
                kind, shape, value = (
                    draw(st.sampled_from(list(_SIZES))),
                    draw(st.sampled_from([[], [1], [2], [0]])),
                    draw(_FLOATS),
                )
        rows[at : at + draw(st.integers(0, 1))] = [(name, kind, shape, value)] if kind else []
        if not rows:
            break
    header: list[tuple[str, Any]] = [("__metadata__", metadata)] if draw(st.booleans()) else []
    data = b""
    for name, kind, shape, value in rows:
        count = 1
        for size in shape:
            count *= size
        raw = (
            struct.pack("<f", value) * count
            if kind == "F32"
            else (draw(WORDS) % 256).to_bytes(1, "big") * count * _SIZES[kind]
        )
        header.append((name, {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}))
        data += raw
    made: Any = tuple(header)
    if draw(st.integers(0, 7)) == 0:
        made = draw(changed(dict(header)))
    length = draw(st.none() | WORDS) if draw(st.integers(0, 9)) == 0 else None
    return packed(made, data, length)


# MP4


def boxes(data: bytes) -> list[tuple[int, int]]:
    """(start, end) of every box, those inside of others too."""
    found, at = [], 0
    inside = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"udta", b"edts", b"dinf"}

    def walk(at: int, end: int) -> None:
        while at + 8 <= end:
            size = max(int.from_bytes(data[at : at + 4], "big"), 8)
            found.append((at, min(at + size, end)))
            if data[at + 4 : at + 8] in inside:
                walk(at + 8, min(at + size, end))
            at += size

    walk(at, len(data))
    return found


@st.composite
def mp4(draw: st.DrawFn, file: bytes) -> bytes:
    """The file with numbers in its boxes changed, or boxes left out, repeated or renamed."""
    data = bytearray(file)
    places = boxes(file)
    for _ in range(draw(st.integers(1, 4))):
        start, end = draw(st.sampled_from(places))
        at = draw(st.integers(start, max(start, min(end, start + 200) - 4)))
        match draw(st.sampled_from(["word", "word", "byte", "again", "gone", "name"])):
            case "word":
                data[at : at + 4] = (draw(WORDS | st.integers(0, 2**32 - 1)) & 0xFFFFFFFF).to_bytes(4, "big")
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "again":
                data[end:end] = data[start:end]
            case "gone":
                del data[start:end]
            case "name":
                data[start + 4 : start + 8] = draw(
                    st.sampled_from([b"free", b"moov", b"stts", b"udta", b"hvcC", b"\xa9too", b"mdat"])
                )
    return bytes(data)
