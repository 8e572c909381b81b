"""Updates whose reward or gradient was NaN or infinite, and were skipped: when a run stops for them, and what to do.

All that is advised here can be done on resume (``manifest.MAY_CHANGE``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lowmem_drf.assembly.kernel_choice import as_run
from lowmem_drf.errors import NonFiniteError, quoted
from lowmem_drf.schema import Config
from lowmem_drf.training.checkpoint import checkpoint_steps, resume_command, saved_step
from lowmem_drf.training.update import Cause, Skipped, SkippedUpdate

USUAL_EPS = 1e-8


class Skips:
    """Counts skipped updates. ``in_a_row``: those before the first update of this process."""

    def __init__(self, config: Config, in_a_row: int = 0) -> None:
        self._limit, self._in_a_row = config.optim.max_skipped, in_a_row
        self.last: list[Skipped] = []
        """The ones of this process that were the last in a row."""

    def add(self, error: SkippedUpdate | None) -> str:
        """Counts an update, ``None`` if it was not skipped. Returns a line to print, or nothing."""
        if error is None:
            self._in_a_row, self.last = 0, []
            return ""
        self._in_a_row += 1
        self.last.append(error.report)
        return f"{error}. No weight was changed ({self._in_a_row} in a row; the run stops at {self._limit})."

    @property
    def too_many(self) -> bool:
        return self._in_a_row >= self._limit

    @property
    def saved(self) -> int:
        """For the checkpoint: a run that has stopped for them begins to count anew."""
        return 0 if self.too_many else self._in_a_row


def stopped(config: Config, run: Path, skips: Skips, prompts: int) -> NonFiniteError:
    """The error that ends a run after too many skipped updates, when it has been saved."""
    last = skips.last[-1]
    more = f" --steps {2 * config.steps}" if last.step >= config.steps else ""
    lines = [
        f"{config.optim.max_skipped} updates in a row were skipped, because a reward or gradient was NaN or infinite.",
        f"The last one: {last.skipped}.",
        f"The last good weights are saved. Go on with: {resume_command(run)}{more}",
        f"and one or more of: {'  '.join(advice(as_run(config, run), [line.skipped for line in skips.last], prompts))}",
    ]
    if older := [step for step in checkpoint_steps(run) if step < skips.last[0].step - 1]:
        later = f"the checkpoints after step-{older[-1]:06d} (in {quoted(run / 'checkpoints')})"
        lines.append(f"If that changes nothing, the weights have gone astray: delete {later} and resume.")
    return NonFiniteError("\n".join(lines), last.skipped.stage)


def broken(config: Config, run: Path, error: NonFiniteError) -> NonFiniteError:
    """The error that ends a run whose optimizer made a weight NaN or infinite."""
    lr, eps = f"{config.optim.lr / 4:.2g}", f" -s optim.eps={USUAL_EPS:g}" if config.optim.eps < USUAL_EPS else ""
    if saved := saved_step(run):
        go_on = f"Go on with: {resume_command(run)} -s optim.lr={lr}{eps}"
        kept, cure = f"update {saved} is the last one saved", go_on
    else:
        kept, cure = "nothing was saved before", f"Start a new run with -s optim.lr={lr}{eps}"
    return NonFiniteError(f"{error}. They are not saved; {kept}.\n{cure}", error.stage)


def advice(config: Config, causes: Sequence[Cause], prompts: int) -> list[str]:
    """Options of a resumed run that may cure it. ``prompts``: how many the run has."""
    said = [f"-s optim.lr={config.optim.lr / 4:.2g}"]
    for key in ("rollout_attention", "graded_attention"):
        if getattr(config.kernels, key) != "same":
            said.append(f"-s kernels.{key}=same")
    if (config.kernels.ops, config.kernels.attention) != ("naive", "sdpa"):
        said.append("-s kernels.ops=naive -s kernels.attention=sdpa")
    for stage, key in (("decode", "vae_dtype"), ("vae_backward", "vae_grad_dtype")):
        if any(cause.stage == stage and cause.dtype != "fp32" for cause in causes):
            said.append(f"-s memory.{key}=fp32")
    ids = [prompt for cause in causes for prompt in cause.prompts]
    guilty = sorted(set(ids) | set(config.skip_prompts))
    if len(set(ids)) < len(ids) and len(guilty) < prompts:  # the same ones again, and others are left
        said.append(f"-s {quoted('skip_prompts=' + json.dumps(guilty, ensure_ascii=False))}")
    return said
