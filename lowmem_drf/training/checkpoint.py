"""Checkpoints: all or nothing on disk, exact on resume.

A checkpoint is written to a hidden folder, flushed to the disk and renamed (``files.written_aside``). A process that
is killed at any moment leaves the earlier checkpoints whole, and at most a hidden folder that the next save removes. On
the CPU a resumed run gives the LoRA bytes of an unbroken one: optimizer moments, random state and prompt cursor are
saved, and all noise is drawn from (seed, update, clip).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowmem_drf.errors import BadInputError, LowmemError, NonFiniteError, quoted
from lowmem_drf.files import discard, written_aside
from lowmem_drf.models.weights.finite import not_finite
from lowmem_drf.prompts import Cursor

if TYPE_CHECKING:
    from torch import Tensor

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


def resume_command(run: Path) -> str:
    """What a message advises, to go on with a run."""
    return f"lowmem-drf train --resume --output {quoted(run)}"


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of the run's complete checkpoints, ascending."""
    found = (_FOLDER.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def checkpoint_folder(run: Path, step: int | None = None) -> Path:
    """The folder of a step's checkpoint, by default of the last. Raises BadInputError if there is none."""
    steps = checkpoint_steps(run)
    if not steps:
        raise BadInputError(f"{run} has no checkpoint yet. Go on training: {resume_command(run)}")
    if step is not None and step not in steps:
        raise BadInputError(f"{run} has no checkpoint of step {step}. Steps: {', '.join(map(str, steps))}")
    return run / "checkpoints" / f"step-{steps[-1] if step is None else step:06d}"


def save_checkpoint(run: Path, checkpoint: Checkpoint, alpha: float, keep: int) -> Path:
    """Writes ``lora.safetensors`` (``alpha`` in its header), ``state.safetensors`` and ``cursor.json``, then deletes
    all but the last ``keep`` checkpoints. Returns the folder. Raises NonFiniteError, and writes nothing, if a tensor
    holds NaN or infinity."""
    from safetensors.torch import save_file

    if lost := not_finite({**checkpoint.lora, **checkpoint.optimizer}):
        what = f"{len(lost)} tensors of LoRA and optimizer hold NaN or infinity (the first: {lost[0]})"
        raise NonFiniteError(f"update {checkpoint.step} is not saved: {what}")
    parent = run / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".step-*"):
        shutil.rmtree(left)
    final = parent / f"step-{checkpoint.step:06d}"
    cursor = {"step": checkpoint.step, **asdict(checkpoint.cursor)}
    cursor |= {"prompts": checkpoint.prompts, "spread": dict(checkpoint.spread), "skipped": checkpoint.skipped}
    with written_aside(final) as aside:
        aside.mkdir()
        # one metadata entry: safetensors writes several in random order, and equal LoRAs must give equal bytes
        save_file(dict(checkpoint.lora), aside / "lora.safetensors", metadata={"alpha": repr(alpha)})
        save_file({**checkpoint.optimizer, **_random_state()}, aside / "state.safetensors")
        (aside / "cursor.json").write_text(json.dumps(cursor, indent=2) + "\n", encoding="utf-8")
    for step in checkpoint_steps(run)[:-keep]:
        discard(parent / f"step-{step:06d}")
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint and restores the global random state. Raises LowmemError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        row = json.loads((folder / "cursor.json").read_text(encoding="utf-8"))
        lora, state = load_file(folder / "lora.safetensors"), load_file(folder / "state.safetensors")
        if lost := not_finite({**lora, **state}):
            raise ValueError(f"{lost[0]} holds NaN or infinity")
        checkpoint = Checkpoint(
            step=row["step"],
            lora=lora,
            optimizer={name: tensor for name, tensor in state.items() if not name.startswith("rng.")},
            cursor=Cursor(row["epoch"], row["index"]),
            prompts=row["prompts"],
            spread={name: (count, mean, variance) for name, (count, mean, variance) in row["spread"].items()},
            skipped=row.get("skipped", 0),  # runs of earlier versions skipped nothing
        )
        torch.set_rng_state(state["rng.cpu"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LowmemError(
            f"the checkpoint {folder} is damaged ({error}). Delete the folder; --resume then takes the one before it."
        ) from error
    if "rng.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng.cuda"])
    return checkpoint


def _random_state() -> dict[str, Tensor]:
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state
