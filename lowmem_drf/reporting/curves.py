"""Curves as inline SVG. Colours are names of the page's style sheet (``var(--line)``), so that they follow its theme,
and text stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL, WIDE = (360, 178), (1120, 270)
"""Width and height in pixels: of a curve among others, and of one across a desktop's page."""
TEXT_PX = 11
MOST_POINTS = 400
"""A longer curve is drawn as means of neighbours."""
_COLORS = {
    name: f"#0000{i:02x}" for i, name in enumerate(("line", "raw", "band", "alarm", "good", "faint", "grid", "warn"), 1)
}
"""Style sheet name -> the colour that stands for it while matplotlib draws."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lowmem-drf",
    "font.size": TEXT_PX,
    "path.simplify_threshold": 0.5,
}
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Curve:
    """One value over the updates."""

    steps: Sequence[int]
    values: Sequence[float]
    last: int
    """Where the axis of updates ends."""
    band: tuple[float | None, float | None] | None = None
    """The range of the base's own spread; an end may be open."""
    floor: Sequence[float] = ()
    """In place of a band: the least value at each step."""
    outside: Sequence[int] = ()
    """Updates whose value is to be marked."""
    smooth: bool = True
    """Draw a moving mean over the values. Else every value is a dot on the line."""
    alarm: int | None = None
    best: int | None = None
    skipped: Sequence[int] = field(default_factory=tuple)


def draw(curve: Curve, said: str, size: tuple[int, int] = SMALL) -> str:
    """The curve as an ``svg`` element.

    ``said``: what it shows, in words, for those who do not see it; different for every curve of a page.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width, height = size
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72))  # SVG's unit is then the pixel
        # 18 pixels on the right: half of a label of four digits
        axes = figure.add_axes((60 / width, 32 / height, 1 - 78 / width, 1 - 40 / height))
        _lines(axes, curve)
        axes.set_xlim(0, max(curve.last, 1))
        round_numbers = [1, 2, 2.5, 5, 10]
        axes.xaxis.set_major_locator(MaxNLocator(5 if size == SMALL else 10, integer=True, steps=round_numbers))
        axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3, steps=round_numbers))
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel("update", color=_COLORS["faint"], labelpad=2)
        axes.tick_params(length=0, pad=5, labelcolor=_COLORS["faint"])
        axes.grid(axis="y", color=_COLORS["grid"], linewidth=1)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(_COLORS["grid"])
        file = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _themed(file.getvalue(), said)


def moving_mean(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours, a twentieth of the run in all."""
    reach = max(1, len(values) // 40)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _lines(axes: Axes, curve: Curve) -> None:
    steps, values = _thinned(curve.steps, curve.values)
    if not curve.smooth:
        axes.plot(steps, values, color=_COLORS["line"], linewidth=2, marker="o", markersize=4, clip_on=False)
        marked = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if s in set(curve.outside)]
        axes.plot(
            *zip(*marked, strict=True), "o", color=_COLORS["alarm"], markersize=6, clip_on=False
        ) if marked else None
    else:
        shown = moving_mean(curve.values)
        axes.plot(steps, values, color=_COLORS["raw"], linewidth=1)
        axes.plot(*_thinned(curve.steps, shown), color=_COLORS["line"], linewidth=2)
    _limits(axes, curve)
    if curve.floor:
        axes.fill_between(curve.steps, curve.floor, axes.get_ylim()[1], color=_COLORS["band"], linewidth=0, zorder=0)
    if curve.band:
        low, high = (end if end is not None else axes.get_ylim()[i] for i, end in enumerate(curve.band))
        axes.axhspan(low, high, color=_COLORS["band"], linewidth=0, zorder=0)
    for step, color, line in ((curve.best, "good", ":"), (curve.alarm, "alarm", "--")):
        if step is not None:
            axes.axvline(step, color=_COLORS[color], linewidth=1.6, linestyle=line)
    if curve.skipped:
        at_the_bottom: Any = axes.get_xaxis_transform()
        color, y = _COLORS["warn"], [0.03] * len(curve.skipped)
        axes.plot(curve.skipped, y, "|", color=color, markersize=8, markeredgewidth=2, transform=at_the_bottom)


def _limits(axes: Axes, curve: Curve) -> None:
    """A few wild updates do not flatten the rest: the hundredth at each end of a noisy curve may be cut off."""
    ordered = sorted(curve.values)
    cut = len(ordered) // 100 if curve.smooth else 0
    ends = [*ordered[cut : len(ordered) - cut], *curve.floor, *(end for end in curve.band or () if end is not None)]
    low, high = min(ends), max(ends)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - room, high + room)


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most ``MOST_POINTS`` points."""
    size = -(-len(values) // MOST_POINTS)
    parts = range(0, len(values), max(size, 1))
    return tuple([sum(row[i : i + size]) / len(row[i : i + size]) for i in parts] for row in (steps, values))  # type: ignore[return-value]


def _themed(svg: bytes, said: str) -> str:
    """Takes out what only a file of its own needs, and puts the page's colours in."""
    for prefix, space in (("", _SVG), ("xlink", _LINK)):
        ElementTree.register_namespace(prefix, space)
    root = ElementTree.fromstring(svg)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for child in [child for child in root if child.tag == f"{{{_SVG}}}metadata"]:
        root.remove(child)
    root.attrib |= {"role": "img", "aria-label": said}
    text = ElementTree.tostring(root, encoding="unicode")
    for name, color in _COLORS.items():
        text = text.replace(color, f"var(--{name})")
    unique = re.sub(r"\W+", "-", said)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{unique}-", text)
