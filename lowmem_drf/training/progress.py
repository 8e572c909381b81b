"""Progress of training: three lines on a terminal that are redrawn with every update, plain lines in a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lowmem_drf.terminal import can_redraw, clock, write_error
from lowmem_drf.training.update import UpdateReport

PLAIN_EVERY_S = 5.0
SMOOTH = 10
"""The shown rates are means over this many updates: the few clips of one say little."""
ASPECTS = {"TA": "text", "Phy": "physics", "VQ": "quality"}
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"


class TrainProgress:
    """Shows the updates of a run. Enter ``live`` around the training."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._console = console
        self._steps = steps
        self._done = done
        self._seconds: list[float] = []
        self._recent: deque[UpdateReport] = deque(maxlen=SMOOTH)
        self._rewards: list[float] = []
        self._cosine: float | None = None
        self.alarm: int | None = None
        """The update at which the alarm began, while it lasts."""
        self._live: Live | None = None
        self._last_line = 0.0
        self._shown: RenderableType = Text("first update …", style="dim")
        self._notice = ""

    @contextmanager
    def live(self) -> Iterator[None]:
        if not can_redraw(self._console):
            yield
            return
        with Live(get_renderable=self._screen, console=self._console, refresh_per_second=4) as self._live:
            yield
        self._live = None

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, report: UpdateReport) -> None:
        self._seconds.append(report.update_s)
        self._recent.append(report)
        self._rewards.append(report.reward)
        self._cosine = self._cosine if report.decoder_cosine is None else report.decoder_cosine
        if self._live is not None:
            self._shown = self._panel(report)
        elif report.step in (self._done + 1, self._steps) or time.monotonic() - self._last_line > PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            self.note(f"update {self._head(report)} | {self._rates()} | {_stages(report)}")

    def notice(self, text: str) -> None:
        """Shows a line from a signal handler."""
        if self._live is not None:
            self._notice = text
        else:
            write_error(text)

    def leave(self, text: str) -> None:
        """Writes the last line of a process that a signal handler is about to end."""
        show_cursor = "\n\x1b[?25h" if self._live is not None else ""
        write_error(show_cursor + text)

    def _screen(self) -> Group:
        return Group(self._shown, Text(self._notice, style="yellow")) if self._notice else Group(self._shown)

    def _panel(self, report: UpdateReport) -> Group:
        bars = ASCII_BARS if self._console.options.ascii_only else BARS
        top = Table.grid(padding=(0, 1))
        top.add_row(ProgressBar(total=self._steps, completed=report.step, width=30), Text(self._head(report)))
        return Group(
            top,
            Text.assemble((sparkline(self._rewards, 30, bars), "cyan"), " ", self._rates()),
            Text(_stages(report), style="dim"),
        )

    def _head(self, report: UpdateReport) -> str:
        warm = self._seconds[1:] or self._seconds  # the first update warms up
        update_s = sum(warm) / len(warm)
        eta = clock(update_s * (self._steps - report.step))
        return f"{report.step}/{self._steps}  {update_s:.2f} s/update  ETA {eta}"

    def _rates(self) -> str:
        shown = [f"reward {_mean([r.reward for r in self._recent]):+.3f}"]
        words = ASPECTS | {name: name for r in self._recent for name in r.reward_by_aspect if name not in ASPECTS}
        for name, word in words.items():
            if values := [r.reward_by_aspect[name] for r in self._recent if name in r.reward_by_aspect]:
                shown.append(f"{word} {_mean(values):+.3f}")
        if judged := [r.oracle for r in self._recent if r.oracle]:
            rates = [f"{name} {_mean([row[name] for row in judged]):.0%}" for name in ("all", "physics", "quality")]
            shown.append("oracle: " + " ".join(rates))
        if self._cosine is not None:
            shown.append(f"tiny decoder's cosine {self._cosine:.2f}")
        if self.alarm is not None:
            shown.append(f"ALARM since update {self.alarm}")
        return "  ".join(shown)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _stages(report: UpdateReport) -> str:
    seconds = "  ".join(f"{name} {value:.2f} s" for name, value in report.stage_s.items())
    return f"{seconds}  peak {max(report.stage_peak_gib.values()):.2f} GiB"


def sparkline(values: list[float], width: int, bars: str = BARS) -> str:
    """``values`` as a curve of ``width`` characters, each the mean of its share."""
    size = max(1, -(-len(values) // width))
    means = [_mean(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in means).ljust(width)
