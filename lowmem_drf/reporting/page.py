"""The page: gathers what the template shows, renders it, and seals it, so that an edited page is not overwritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_drf import __version__
from lowmem_drf.config import to_toml
from lowmem_drf.files import text_hash, write_text
from lowmem_drf.reporting import clips, settings
from lowmem_drf.reporting.costs import costs, stages
from lowmem_drf.reporting.curves import WIDE, Curve, draw, moving_mean
from lowmem_drf.reporting.figures import ASPECTS, signed, words
from lowmem_drf.reporting.notes import read_notes
from lowmem_drf.reporting.read import Record, as_row, curve, names, number, outside
from lowmem_drf.reporting.verdict import verdict, warnings
from lowmem_drf.scoring.alarm import is_heldout

TEMPLATE = "report.html.jinja"
MOST_TILES, MOST_CURVES, MOST_PROMPTS, MOST_LEFT_OUT = 4, 30, 100, 100
_SEAL = "<!-- made by lowmem-drf report, unchanged: "


def write_report(record: Record, path: Path) -> str:
    """Writes the page. Returns a line about it."""
    shown, salient = clips.previews(record), clips.saliency_files(record)
    room = clips.Room(sum(len(row.files) for row in shown.rows) + len(salient))
    rows = clips.embedded(shown.rows, room)
    maps = zip(clips.embedded([files for files, _ in salient], room), salient, strict=True)
    found = verdict(record)
    html = _template().render(
        version=__version__,
        run=record.run.name,
        record=record,
        verdict=found,
        warnings=warnings(record),
        rows=rows,
        notes=shown.notes,
        saliency=[(row, _answers(told)) for row, (_, told) in maps],
        reward=_reward(record),
        aspects=_by(record, "reward_by_aspect", ASPECTS),
        questions=_by(record, "reward_by_question", {})[:MOST_CURVES],
        watched=_watched(record),
        texts=_texts(record),
        tiles=[*found.figures[:MOST_TILES], *costs(record)],
        stages=stages(record),
        settings=settings.groups(record),
        toml=to_toml(settings.without_folders(record.config)),
        asked=Counter((q.aspect, q.kind) for asked in record.questions.values() for q in asked),
        prompts=list(record.questions.items())[:MOST_PROMPTS],
        left_out=_left_out(record),
        most_left_out=MOST_LEFT_OUT,
        aspect_names=ASPECTS,
    )
    text = html.rstrip() + "\n"
    write_text(path, f"{text}{_SEAL}{text_hash(text)} -->\n")
    count = sum(bool(clip.url) for row in rows for clip in row.clips)
    return f"{count} clips, {path.stat().st_size / 1e6:.1f} MB, needs no network"


def is_own_report(path: Path) -> bool:
    """True for a page that ``write_report`` wrote, and nobody edited."""
    try:
        text, mark, seal = path.read_text("utf-8").rpartition(_SEAL)
    except (OSError, ValueError):
        return False
    return bool(mark) and seal == f"{text_hash(text)} -->\n"


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("lowmem_drf", "reporting")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"signed": signed, "svg": Markup}
    return environment.get_template(TEMPLATE)


def _reward(record: Record) -> Mapping[str, Any] | None:
    """The curve of the whole reward, for a desktop's width and for a phone's."""
    found = _curve(record, "reward", "reward")
    if not found:
        return None
    line = found["curve"]
    return found | {"wide": draw(line, "Reward by update, wide", WIDE), "svg": draw(line, "Reward by update")}


def _by(record: Record, key: str, words: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The curve of every name below an entry of ``metrics.jsonl``."""
    found: list[Mapping[str, Any]] = []
    for name in names(record.updates, key):
        if row := _curve(record, words.get(name, name.replace("_", " ")), key, name):
            svg = draw(row["curve"], f"{row['title']} by update, {key}")
            found.append(row | {"name": name, "svg": svg})
    return found


def _curve(record: Record, title: str, *keys: str) -> dict[str, Any] | None:
    steps, values = curve(record.updates, *keys)
    if not values:
        return None
    shown = moving_mean(values)
    skipped = [row["step"] for row in record.skipped]
    line = Curve(steps, values, record.done, alarm=record.alarm, best=record.best, skipped=skipped)
    return {"title": title, "first": shown[0], "last": shown[-1], "curve": line}


def _watched(record: Record) -> list[Mapping[str, Any]]:
    """The curve of every measure of the watch, with its band; those that left it first."""
    bands = as_row(record.watch[0].get("bands")) if record.watch else {}
    found: list[Mapping[str, Any]] = []
    for name in names(record.watch, "measures"):
        steps, values = curve(record.watch, "measures", name)
        if not values:
            continue
        gone = [row["step"] for row in record.watch if name in outside(row)]
        band = _band(bands.get(name))
        floor = _floor(values, band) if is_heldout(name) else ()
        line = Curve(steps, values, record.done, None if floor else band, floor, gone, False, record.alarm, record.best)
        title = words(name)
        row = {"title": title, "first": values[0], "last": values[-1], "outside": bool(gone), "band": band}
        found.append(row | {"svg": draw(line, f"{title} by update, watched")})
    return sorted(found, key=lambda row: not row["outside"])


def _band(value: object) -> tuple[float | None, float | None] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = map(number, value)
    return None if low is None and high is None else (low, high)


def _answers(file: Path) -> Mapping[str, Any]:
    """What the critic answered about a clip (``ClipScore.as_json``), as far as it can be read."""
    told = read_notes(file)
    found = told.get("questions")
    rows = [as_row(row) for row in found] if isinstance(found, list) else []
    rows = [row for row in rows if number(row.get("p_answer")) is not None and {"text", "answer", "said"} <= row.keys()]
    return {"reward": number(told.get("reward")), "questions": rows}


def _floor(values: Sequence[float], band: tuple[float | None, float | None] | None) -> list[float]:
    """How far held-out answers may fall back from the best so far (``alarm.Alarm``): as the base's band reaches."""
    if not band or band[0] is None:
        return []
    return [max(values[: max(i, 1)]) - (values[0] - band[0]) for i in range(len(values))]


def _texts(record: Record) -> dict[str, str]:
    """Name of a question, as in ``reward_by_question`` -> its text, or the first of several."""
    texts: dict[str, list[str]] = {}
    for question in (question for asked in record.questions.values() for question in asked):
        texts.setdefault(question.name or question.aspect, []).append(question.text)
    return {name: some[0] if len(set(some)) == 1 else f"for example: {some[0]}" for name, some in texts.items()}


def _left_out(record: Record) -> list[Mapping[str, Any]]:
    return list(_rows_left_out(record.left_out or ()))


def _rows_left_out(rows: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    for row in rows:
        questions = row.get("questions")
        for question in questions if isinstance(questions, list) else ():
            yield {"prompt": str(row.get("prompt", "")), "text": "", "why": "", "asked": False, **as_row(question)}
