"""Clips of a run as data URLs: base and tuned of the same prompt and noise side by side, made small where the page
would become too large."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_drf.errors import BadInputError
from lowmem_drf.files import readable_name
from lowmem_drf.models.weights.sources import READER, TOYWORLD
from lowmem_drf.prompts import named_prompts
from lowmem_drf.reporting.read import Record

BUDGET = 9_500_000
"""Bytes of all clips of a page; as text they take a third more."""
MOST_PROMPTS = 6
AS_IT_IS = 150_000
"""A file of at most so many bytes is not encoded again."""
FORMS = ((640, 22), (640, 26), (480, 28), (400, 32), (320, 36))
"""(longest side, H.264's constant rate factor), from the best to the smallest."""
VISIBLE = 192
"""Pixels that the longer side of a clip has at least: smaller ones are enlarged by repetition."""
SALIENCY = "saliency"
"""Folder in a run's folder: clips beside their saliency, and the critic's answers."""
_PREVIEW = re.compile(r"\d{2,}-.+\.mp4")
_STEP = re.compile(r"step-(\d{6,})")

Made = tuple[bytes, int, int]
"""(MP4, width, height)."""


@dataclass(frozen=True)
class Clip:
    label: str
    url: str = ""
    """Empty: it could not be read, or found no room."""
    width: int = 0
    height: int = 0
    lost: str = ""
    """Why there is no URL."""


@dataclass(frozen=True)
class Row:
    """Clips of one prompt."""

    prompt: str
    clips: Sequence[Clip]


@dataclass(frozen=True)
class Files:
    """Which files are shown together."""

    prompt: str
    files: Sequence[tuple[str, Path]]
    """(label, file)."""


@dataclass(frozen=True)
class Shown:
    """The files that the page shows, and what there is to say about them."""

    rows: Sequence[Files]
    notes: Sequence[str]


class Room:
    """What is left of the budget, for so many clips."""

    def __init__(self, clips: int, nbytes: int = BUDGET) -> None:
        self._clips, self._left = clips, nbytes
        self._form = 0
        """The best of ``FORMS`` that still fits; later clips begin there."""

    def row(self, files: Files) -> Row:
        """Clips of one prompt, in the best form in which all of them fit: their blur is then the models'."""
        share = self._left // max(self._clips, 1) * len(files.files)
        self._clips -= len(files.files)
        found, fits = self._encoded([file for _, file in files.files], share)
        self._left -= sum(len(data) for data, _, _ in found.values())
        why = "this file cannot be read" if fits else "left out: the page would be too large"
        return Row(files.prompt, [_clip(label, found.get(file), why) for label, file in files.files])

    def _encoded(self, files: Sequence[Path], share: int) -> tuple[dict[Path, Made], bool]:
        """What can be read of the files, and whether it fits."""
        made = _each(_as_it_is, files)
        if len(made) == len(files) and _size_of(made) <= share:
            return made, True
        for form, (longest, crf) in list(enumerate(FORMS))[self._form :]:
            made = _each(partial(_encoded, longest=longest, crf=crf), files)
            if _size_of(made) <= share:
                self._form = form
                return made, True
        return {}, False


def previews(record: Record) -> Shown:
    """Base and tuned of every sample prompt; and the best checkpoint's clip where the watch raised its alarm."""
    by_step = {step: files for step, files in _folders(record.run / "samples") if files}
    trained = [step for step in by_step if step]
    columns = [(0, "base")] if 0 in by_step else []
    if record.alarm is not None and record.best in trained and record.best != max(trained):
        columns.append((record.best, f"best, update {record.best}"))
    columns += [(max(trained), f"update {max(trained)}")] if trained else []
    names = list(dict.fromkeys(name for step, _ in columns for name in by_step[step]))
    rows = []
    for name in names[:MOST_PROMPTS]:
        files = [(label, by_step[step][name]) for step, label in columns if name in by_step[step]]
        rows.append(Files(prompt_of(record, name), files))
    notes = []
    if trained and 0 not in by_step:
        notes.append(
            "Update 0 was not sampled (log.sample_first), so the base's clips are missing. To have them beside the "
            "tuned ones: lowmem-drf sample --compare, then lowmem-drf report again."
        )
    if 0 not in by_step:  # also of a run without sample clips of its own
        rows = [*_compared(record), *rows][:MOST_PROMPTS]
    if by_step and not trained:
        notes.append("No update was sampled yet: these are the base's clips.")
    if len(names) > MOST_PROMPTS:
        notes.append(f"{len(names) - MOST_PROMPTS} more prompts are in the run's folder samples/.")
    return Shown(rows, notes)


def tuned(record: Record) -> tuple[int, list[Path]]:
    """The last update that was sampled, and its clips."""
    found = [(step, list(files.values())) for step, files in _folders(record.run / "samples") if files]
    return max(found, default=(0, []))


def saliency_files(record: Record) -> list[tuple[Files, Path]]:
    """The newest clips with saliency: one file each, and its JSON."""
    steps = sorted(_folders(record.run / SALIENCY), reverse=True)
    return [
        (Files(prompt_of(record, name), [(f"update {step}", path)]), path.with_suffix(".json"))
        for step, files in steps[:1]
        for name, path in files.items()
    ]


def embedded(rows: Iterable[Files], room: Room) -> list[Row]:
    return [room.row(row) for row in rows]


def prompt_of(record: Record, name: str) -> str:
    """The prompt of ``01-a-prompt.mp4``: the one whose clip is named so, else the name's words."""
    number = name.partition("-")[0] + "-"
    known = [*record.questions, *_own_prompts(record)]
    fallback = name.removeprefix(number).removesuffix(".mp4").replace("-", " ")
    return next((text for text in known if readable_name(text, number, ".mp4") == name), fallback)


def _own_prompts(record: Record) -> list[str]:
    chosen = record.config.log.sample_prompts
    if not isinstance(chosen, int):
        with suppress(BadInputError):  # a file that is gone
            return [prompt.text for prompt in named_prompts(chosen)]
        return []
    if record.config.prompts not in (TOYWORLD, READER):
        return []
    from lowmem_drf.toy.captions import heldout_prompts

    return heldout_prompts(chosen, seed=0)


def _folders(folder: Path) -> list[tuple[int, dict[str, Path]]]:
    """(update, preview clips by name) of every ``step-000050/`` in a folder."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return [
        (int(match[1]), {p.name: p for p in sorted(path.glob("*.mp4")) if _PREVIEW.fullmatch(p.name) and not _asked(p)})
        for match, path in sorted(found, key=lambda pair: pair[1].name)
    ]


def _asked(path: Path) -> bool:
    """Whether ``lowmem-drf sample`` wrote it (``01-prompt-1a2b3c4d-seed0.mp4``)."""
    return bool(re.search(r"-[0-9a-f]{8}-seed\d+", path.stem))


def _compared(record: Record) -> list[Files]:
    """Clips of ``lowmem-drf sample --compare``: base and tuned in one picture."""
    found = sorted((record.run / "samples").glob("step-*/*-compare*.mp4"), key=lambda p: (p.parent.name, p.name))
    last = found[-1].parent if found else None
    return [
        Files(re.sub(r"^\d+-|-[0-9a-f]{8}-seed.*", "", p.stem).replace("-", " "), [("base and tuned", p)])
        for p in found
        if p.parent == last
    ]


def _clip(label: str, made: Made | None, why: str) -> Clip:
    if not made:
        return Clip(label, lost=why)
    data, width, height = made
    return Clip(label, f"data:video/mp4;base64,{base64.b64encode(data).decode()}", width, height)


def _each(make: Callable[[Path], Made | None], files: Sequence[Path]) -> dict[Path, Made]:
    """Without those that cannot be read, or of which nothing is made."""
    import av

    found: dict[Path, Made] = {}
    for file in files:
        with suppress(OSError, ValueError, IndexError, av.error.FFmpegError):
            if made := make(file):
                found[file] = made
    return found


def _size_of(made: Mapping[Path, Made]) -> int:
    return sum(len(data) for data, _, _ in made.values())


def _as_it_is(file: Path) -> Made | None:
    """(bytes, width, height) of a small file that every browser plays; None for others."""
    import av

    with av.open(str(file)) as container:
        context = container.streams.video[0].codec_context
        size, plays = (context.width, context.height), (context.name, context.pix_fmt) == ("h264", "yuv420p")
    if not plays or max(size) < VISIBLE or file.stat().st_size > AS_IT_IS:
        return None
    return file.read_bytes(), *size


def _encoded(file: Path, longest: int, crf: int) -> Made:
    """Encoded again with a longest side of at most ``longest`` pixels; frame by frame, since a clip may be large."""
    import av

    target = io.BytesIO()
    with av.open(str(file)) as source, av.open(target, "w", format="mp4") as container:
        given = source.streams.video[0]
        rate = given.average_rate or Fraction(8)
        width, height, enlarges = _size(given.codec_context.width, given.codec_context.height, longest)
        stream: Any = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        way = "POINT" if enlarges else "AREA"
        for i, frame in enumerate(source.decode(given)):
            small = frame.reformat(width, height, "yuv420p", interpolation=way)
            small.pts, small.time_base = i, 1 / rate
            container.mux(stream.encode(small))
        container.mux(stream.encode())
    return target.getvalue(), width, height


def _size(width: int, height: int, longest: int) -> tuple[int, int, bool]:
    """(width, height, whether it is enlarged), even."""
    longer = max(width, height)
    scale = -(-VISIBLE // longer) if longer < VISIBLE else min(1, longest / longer)
    return max(2, 2 * round(scale * width / 2)), max(2, 2 * round(scale * height / 2)), scale > 1
