"""Notices when a reward goes on rising while clips get worse, without anybody who knows the truth.

While a run trains, clips of fixed prompts and seeds are measured again and again (``watch.py``): by questions that
training does not ask, and by what needs no critic. Each measure has a *band*, from what the base's own clips differ
by; held-out answers by aspect may not fall back from the run's own best by more. A look is *suspect* if two measures
are outside of their bands and the reward has risen, or the answers to held-out questions are worse than the base's. Two
suspect looks in a row are the alarm, or one with three measures outside. Diversity far outside counts as two: no good
run makes clips that are all alike, however right they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lowmem_drf.errors import BadInputError
from lowmem_drf.files import write_text

Band = tuple[float | None, float | None]
"""Lowest and highest value; ``None``: open."""

FILE = "watch.jsonl"
OUTSIDE, SURE = 2, 3
"""So many measures outside of their bands make a look suspect; so many are an alarm at once."""


@dataclass(frozen=True)
class Rule:
    """How wide a measure's band is, in standard deviations between the base's prompts."""

    width: float
    low: bool = True
    high: bool = True
    """Whether these ends are closed."""
    least: float = 0.0
    """The smallest standard deviation that counts, in the measure's own unit; at least ``LEAST_SPREAD`` of its mean."""
    far: float = math.inf
    """A value so many times as far below the base's mean as the band reaches counts as two measures outside."""


SCORE = "heldout_reward"
"""By which the best look is chosen; without held-out questions by the reward."""
NOISE = 0.1
"""Of the held-out answers of a look, in standard deviations between the base's prompts."""
LEAST_SPREAD = 0.02
"""As a share of a measure's mean: what hardly differs between the base's clips still has a band."""
HELDOUT = Rule(0.4, high=False)
RULES: dict[str, Rule] = {
    **dict.fromkeys(("heldout_TA", "heldout_Phy", "heldout_VQ"), HELDOUT),
    "diversity": Rule(1.0, high=False, far=1.5),
    "velocity_norm": Rule(2.0),
    "motion": Rule(4.0),
    "freeze": Rule(1.0, low=False, least=0.05),
    "flicker": Rule(7.0, low=False),
    "ti": Rule(1.0),
    "si": Rule(1.0),
    "blur": Rule(1.0, low=False),
    "blocking": Rule(2.0, low=False),
    "noise": Rule(2.0, low=False),
    "saturation": Rule(6.0),
}


def spreads(base: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The standard deviation between prompts of each measure. ``base``: measure -> the base's values, one a prompt. One
    prompt has none."""
    no_rule = Rule(math.inf)
    return {
        name: max(stdev(values), RULES.get(name, no_rule).least, LEAST_SPREAD * abs(fmean(values)))
        for name, values in base.items()
        if len(values) > 1
    }


def bands(means: Mapping[str, float], spread: Mapping[str, float]) -> dict[str, Band]:
    """The band of each measure, from the base's mean and standard deviation."""

    def band(name: str) -> Band:
        rule = RULES.get(name, HELDOUT)
        reach = rule.width * spread[name]
        return means[name] - reach if rule.low else None, means[name] + reach if rule.high else None

    return {name: band(name) for name in dict.fromkeys((*RULES, *filter(is_heldout, spread))) if name in spread}


def is_heldout(name: str) -> bool:
    """Whether a measure may not fall back from its own best: held-out questions by aspect, held-out scalar rewards."""
    return name.startswith("heldout_") and name != SCORE


@dataclass(frozen=True)
class Look:
    """The clips after ``step`` updates: a line of ``watch.jsonl``."""

    step: int
    measures: Mapping[str, float]
    """Means over prompts."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """Of step 0 alone, as ``bands``: standard deviations between the base's prompts."""
    bands: Mapping[str, Band] = field(default_factory=dict)
    reward: float | None = None
    """Of training, mean over the updates since the last look. Of step 0 only where looks begin anew: of the run's first
    look before."""
    outside: Sequence[str] = ()
    suspect: bool = False
    """See the head of this file."""
    worse: bool = False
    """Whether the answers to held-out questions are worse than the base's."""
    alarm: int | None = None
    """The update at which the alarm began, while it lasts."""
    best: int | None = None
    """The update of the best look so far that is not suspect; of step 0 where looks begin anew, of those before."""
    prompts: str = ""
    """Of step 0 alone: a fingerprint. Looks at other prompts cannot be compared."""
    use: str = ""
    """Of step 0 alone: how the LoRA is used in those after it. Others cannot be compared, the base's own can."""


class Alarm:
    """The looks of a run, in order. ``best`` and ``began`` are those of the last one."""

    def __init__(self, looks: Sequence[Look] = ()) -> None:
        self.looks = list(looks)

    @property
    def began(self) -> int | None:
        return self.looks[-1].alarm if self.looks else None

    @property
    def best(self) -> int | None:
        return self.looks[-1].best if self.looks else None

    def begin(self, base: Mapping[str, Sequence[float]], **notes: Any) -> Look:
        """Takes the base's measures, one value a prompt. ``notes``: other fields of its ``Look``."""
        finite = {name: [value for value in values if math.isfinite(value)] for name, values in base.items()}
        finite = {name: values for name, values in finite.items() if values}
        means, spread = {name: fmean(values) for name, values in finite.items()}, spreads(finite)
        return self._add(Look(0, means, spread, bands(means, spread), **notes))

    def add(self, step: int, measures: Mapping[str, float], reward: float) -> Look:
        """Takes a look. ``reward``: see ``Look``; its rise counts from the first look after the base's."""
        outside = [name for name, band in self._bands().items() if not _within(measures.get(name), band)]
        count = sum(2 if self._far(name, measures.get(name)) else 1 for name in outside)
        risen = all(look.reward is None or reward > look.reward for look in self.looks[:2])
        worse = measures.get(SCORE, math.inf) < self._lowest()
        compared = len(self.looks) > 1 or self.looks[0].reward is not None
        suspect = count >= OUTSIDE and (risen or worse) and compared
        alarm = suspect and (count >= SURE or self.looks[-1].suspect)
        began = (self.began or step) if alarm else None
        score = self._score(measures, reward)
        better = math.isfinite(score) and score >= self._most() - self._noise()
        best = step if better and not suspect else self.best
        look = Look(step, dict(measures), reward=reward, outside=outside, suspect=suspect, worse=worse)
        return self._add(replace(look, alarm=began, best=best))

    def _bands(self) -> dict[str, Band]:
        """Those of the base; of the held-out questions, what the best answers so far may fall back by."""
        first = self.looks[0]
        made = dict(first.bands)
        for name in filter(is_heldout, first.bands):
            if (band := made[name])[0] is not None:
                seen = (look.measures.get(name, math.nan) for look in self.looks)
                best = max(filter(math.isfinite, seen))  # the base's own is among them
                made[name] = best - (first.measures[name] - band[0]), None
        return made

    def _far(self, name: str, value: float | None) -> bool:
        """See ``Rule.far``."""
        mean, low = self.looks[0].measures[name], self.looks[0].bands[name][0]
        return value is not None and low is not None and value < mean - RULES.get(name, HELDOUT).far * (mean - low)

    def _lowest(self) -> float:
        """The held-out reward below which clips are worse than the base's."""
        base = self.looks[0]
        return base.measures.get(SCORE, -math.inf) - HELDOUT.width * base.spread.get(SCORE, 0.0)

    def _score(self, measures: Mapping[str, float], reward: float) -> float:
        return measures.get(SCORE, reward)

    def _most(self) -> float:
        """The highest score of the looks so far that are not suspect."""
        sound = (look for look in self.looks[1:] if not look.suspect)
        scores = (self._score(look.measures, look.reward or 0.0) for look in sound)
        return max(filter(math.isfinite, scores), default=-math.inf)

    def _noise(self) -> float:
        """A later update whose score is lower by less counts as the better one: it learned from more. Answers that are
        near to certain (a log-probability of 0) have less noise than the base's."""
        base = self.looks[0]
        nearer = self._most() / base.measures[SCORE] if base.measures.get(SCORE, 0.0) < 0 else math.inf
        return base.spread.get(SCORE, 0.0) * min(NOISE, max(0.0, nearer))

    def _add(self, look: Look) -> Look:
        self.looks.append(look)
        return look


def _within(value: float | None, band: Band) -> bool:
    """A measure that the clips do not have (blur of clips without edges) is outside; NaN too."""
    low, high = band
    return value is not None and (low is None or value >= low) and (high is None or value <= high)


def save_looks(run: Path, looks: Sequence[Look]) -> None:
    """Writes ``watch.jsonl``, whole: it is short."""
    rows = ({key: value for key, value in asdict(look).items() if key in KEPT or _says(value)} for look in looks)
    write_text(run / FILE, "".join(json.dumps(row) + "\n" for row in rows))


KEPT = ("step", "measures", "outside", "alarm")
"""Of every line."""


def _says(value: object) -> bool:
    return value is not None and value is not False and value != {} and value != ""


def read_looks(run: Path, done: int) -> list[Look]:
    """The looks up to update ``done``; none where the file is missing or is not what was written."""
    try:
        rows = (run / FILE).read_text(encoding="utf-8").splitlines()
        looks = [Look(**json.loads(row)) for row in rows]
        return [look for look in looks if look.step <= done] if looks and looks[0].step == 0 else []
    except (OSError, ValueError, TypeError):
        return []


def lasting(run: Path, step: int) -> str:
    """What is to be said of the run's update ``step``: nothing, unless the alarm lasted at the last look until then."""
    looks = read_looks(run, step)
    if not looks or looks[-1].alarm is None:
        return ""
    best = f" Of the updates without it {looks[-1].best} is the best: --best takes that one." if looks[-1].best else ""
    now = f"the clips of update {looks[-1].step} are outside of their bands"
    return f"The alarm of update {looks[-1].alarm} lasts: {now}.{best}"


BEST = Path("checkpoints") / "best"


def mark_best(run: Path, step: int) -> None:
    """Writes ``checkpoints/best``: a text file with the step."""
    (run / BEST).parent.mkdir(parents=True, exist_ok=True)
    write_text(run / BEST, f"{step}\n")


def best_step(run: Path) -> int:
    """The step that ``mark_best`` wrote. Raises BadInputError if there is none."""
    try:
        return int((run / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BadInputError(
            f"{run} has no best update yet: it is known after the first look of a run that is watched "
            "(log.watch_every). Leave --best out for the last update."
        ) from None
