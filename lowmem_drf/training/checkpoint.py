"""Checkpoints: all or nothing on disk, exact on resume.

A checkpoint is written to a hidden folder, flushed to the disk and renamed (``files.written_aside``). A process that
is killed at any moment leaves the earlier checkpoints whole, and at most a hidden folder that the next save removes. On
the CPU a resumed run gives the LoRA bytes of an unbroken one: optimizer moments, random state and prompt cursor are
saved, and all noise is drawn from (seed, update, clip). A checkpoint that is not what was saved (``manifest``) is never
used.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError, LowmemError, NonFiniteError, quoted
from lowmem_drf.files import discard, in_use, written_aside
from lowmem_drf.models.weights.finite import not_finite
from lowmem_drf.prompts import Cursor
from lowmem_drf.terminal import write_error
from lowmem_drf.training.manifest import DamagedError, Manifest, read_manifest, write_manifest

if TYPE_CHECKING:
    from torch import Tensor

CURE = "Delete its folder; --resume then takes the one before it."
_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``step`` updates."""

    step: int
    lora: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    """``optimizers.pack_optimizer``."""
    cursor: Cursor
    prompts: str
    """``prompts.fingerprint``: a resumed run must use the same prompts."""
    spread: Mapping[str, tuple[int, float, float]] = field(default_factory=dict)
    """``reward.Spread.seen``."""
    skipped: int = 0
    """Updates skipped in a row, up to this one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """``manifest.fixed_settings``."""
    questions: str = ""
    """The hash of the questions' file: a resumed run must ask the same."""
    tiny_cosine: float | None = None
    """``DecoderCheck.fell``."""
    steps: int = 0
    """Of how many updates (``Config.steps``, which a resumed run may change); 0: an earlier version did not say."""


def resume_command(run: Path) -> str:
    """What a message advises, to go on with a run."""
    return f"lowmem-drf train --resume --output {quoted(run)}"


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of the run's complete checkpoints, ascending. Their files are not read."""
    found = (_FOLDER.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def saved_step(run: Path) -> int:
    """The step of the last checkpoint, whose files are not read; 0: there is none."""
    return max(checkpoint_steps(run), default=0)


def good_step(run: Path, say: Callable[[str], None] = write_error) -> int:
    """The step of the last checkpoint that is what was saved; 0 if there is none at all. ``say`` is told, in a line,
    of each later one that is not.

    Raises:
        LowmemError: all are damaged, or the last one may not be read.
    """
    damage: list[tuple[int, DamagedError]] = []
    good = 0
    for step in reversed(checkpoint_steps(run)):
        try:
            read_manifest(_folder(run, step))
            good = step
            break
        except DamagedError as error:
            damage.append((step, error))
    if damage and not good:
        step, why = damage[0]
        raise LowmemError(
            f"no checkpoint of {run} can be used: step-{step:06d} is damaged ({why}), and no earlier one is good. "
            f"Start a new run of the same settings: lowmem-drf train --preset {quoted(run / 'config.toml')}"
        )
    for step, why in damage:
        say(f"The checkpoint step-{step:06d} of {run} is damaged ({why}): step-{good:06d} is used.")
    return good


def last_manifest(run: Path) -> Manifest | None:
    """The manifest of the run's last checkpoint that has a whole one, if any. Its other files are not read."""
    for step in reversed(checkpoint_steps(run)):
        with suppress(DamagedError):
            return read_manifest(_folder(run, step), files=False)
    return None


def set_damaged_aside(run: Path, good: int) -> None:
    """Renames the checkpoints after ``good``, which are damaged, so that none of them counts as the last one."""
    for step in checkpoint_steps(run):
        if step > good:
            folder = _folder(run, step)
            aside, number = folder.with_name(f"damaged-{folder.name}"), 1
            while aside.exists():
                number += 1
                aside = folder.with_name(f"damaged-{folder.name}-{number}")
            folder.rename(aside)


def checkpoint_folder(run: Path, step: int | None = None) -> Path:
    """The folder of a step's checkpoint, by default of the last good one (``good_step``).

    Raises:
        BadInputError: there is none.
        LowmemError: it is damaged, or all are.
    """
    steps = checkpoint_steps(run)
    if not steps:
        raise BadInputError(f"{run} has no checkpoint yet. Go on training: {resume_command(run)}")
    if step is not None and step not in steps:
        raise BadInputError(f"{run} has no checkpoint of step {step}. Steps: {', '.join(map(str, steps))}")
    if step is None:
        return _folder(run, good_step(run))
    try:
        read_manifest(_folder(run, step))
    except DamagedError as error:
        others = ", ".join(str(other) for other in steps if other != step)
        cure = f"Take another: {others}." if others else "There is no other."
        raise LowmemError(f"the checkpoint step-{step:06d} of {run} is damaged ({error}). {cure}") from error
    return _folder(run, step)


def save_checkpoint(run: Path, checkpoint: Checkpoint, alpha: float, keep: int, best: int | None = None) -> Path:
    """Writes ``lora.safetensors`` (``alpha`` in its header), ``state.safetensors`` and ``manifest.json``, then deletes
    all but the last ``keep`` checkpoints and that of step ``best``. Returns the folder. Raises NonFiniteError, and
    writes nothing, if a tensor holds NaN or infinity."""
    from safetensors.torch import save_file

    if lost := not_finite({**checkpoint.lora, **checkpoint.optimizer}):
        what = f"{len(lost)} tensors of LoRA and optimizer hold NaN or infinity (the first: {lost[0]})"
        raise NonFiniteError(f"update {checkpoint.step} is not saved: {what}")
    parent = run / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    final = _folder(run, checkpoint.step)
    manifest = Manifest(
        step=checkpoint.step,
        epoch=checkpoint.cursor.epoch,
        index=checkpoint.cursor.index,
        prompts=checkpoint.prompts,
        spread=dict(checkpoint.spread),
        skipped=checkpoint.skipped,
        settings=dict(checkpoint.settings),
        questions=checkpoint.questions,
        tiny_cosine=checkpoint.tiny_cosine,
        steps=checkpoint.steps,
    )
    with written_aside(final) as aside:
        aside.mkdir()
        # one metadata entry: safetensors writes several in random order, and equal LoRAs must give equal bytes
        save_file(dict(checkpoint.lora), aside / "lora.safetensors", metadata={"alpha": repr(alpha)})
        save_file({**checkpoint.optimizer, **_random_state()}, aside / "state.safetensors")
        write_manifest(aside, manifest)
    for step in checkpoint_steps(run)[:-keep]:
        if step == best:
            continue
        try:
            discard(_folder(run, step))
        except OSError as error:
            if not in_use(error):
                raise  # else a program has it open on Windows: the next save tries again
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint and restores the global random state. Raises LowmemError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load  # load_file would keep the files mapped: Windows deletes no such file

    try:
        saved = read_manifest(folder)
        lora, state = (load((folder / f"{name}.safetensors").read_bytes()) for name in ("lora", "state"))
        if lost := not_finite({**lora, **state}):
            raise ValueError(f"{lost[0]} holds NaN or infinity")
        torch.set_rng_state(state["rng.cpu"])
    except (DamagedError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise LowmemError(f"the checkpoint {folder} is damaged ({error}). {CURE}") from error
    if "rng.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng.cuda"])
    optimizer = {name: tensor for name, tensor in state.items() if not name.startswith("rng.")}
    cursor = Cursor(saved.epoch, saved.index)
    rest = saved.prompts, saved.spread, saved.skipped, saved.settings, saved.questions, saved.tiny_cosine
    return Checkpoint(saved.step, lora, optimizer, cursor, *rest, saved.steps)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def _random_state() -> dict[str, Tensor]:
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state
