"""The tuned model that ``sample`` and ``eval`` look at: a run's with the LoRA of a checkpoint or of any file, or a
preset's with any LoRA file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.assembly.kernel_choice import saved_choice
from lowmem_drf.assembly.loading import load_models, read_lora_for
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.export.trained_with import as_trained
from lowmem_drf.files import readable_name, short_hash
from lowmem_drf.models.lora.base import left_out
from lowmem_drf.models.lora.levels import require_use
from lowmem_drf.models.lora.reading import lora_file
from lowmem_drf.preset_files import require_card
from lowmem_drf.schema import Config
from lowmem_drf.scoring.alarm import best_step, lasting
from lowmem_drf.terminal import say
from lowmem_drf.training.checkpoint import checkpoint_folder, step_of
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.manifest import refuse_damaged
from lowmem_drf.training.run_folder import find_run, in_one_process, run_config, run_of

if TYPE_CHECKING:
    from lowmem_drf.assembly.assemble import Models
    from lowmem_drf.models.lora.changes import LoraChanges
    from lowmem_drf.types import Prompt


@dataclass(frozen=True)
class Tuned:
    """Which model it is. Nothing is loaded yet."""

    config: Config
    run: Path | None
    """``None``: a preset's."""
    checkpoint: Path | None
    """The folder of the run's checkpoint, if its LoRA is used."""
    lora: LoraChanges | None
    """Of a file."""
    name: str
    """What tells its clips from those of other LoRAs: of a checkpoint or a file, or ``base``."""

    @property
    def has_lora(self) -> bool:
        return self.checkpoint is not None or self.lora is not None

    @property
    def is_merged(self) -> bool:
        """Whether a part of the LoRA is merged into the weights when it is loaded, and cannot be switched off."""
        return bool(self.lora and self.lora.merged())


def choose(
    run: Path | None,
    preset: str | None,
    lora: Path | None,
    overrides: Sequence[str] = (),
    best: bool = False,
    needs_lora: bool = False,
    besides: str = "",
) -> Tuned:
    """Finds the run (``find_run``), unless a preset takes its place, and reads the LoRA file, and says what of it is
    not used.

    Args:
        best: the run's best update, not its last.
        needs_lora: for what a base model alone says nothing about.
        besides: see ``find_run``.

    Raises BadInputError: options that do not go together, no run, no such LoRA, or one for another model.
    """
    if preset is not None and run is not None:
        raise BadInputError("a run and --preset do not go together: a run keeps its own configuration. Leave one out.")
    if preset is not None and lora is None and needs_lora:
        raise BadInputError(
            "a preset has no LoRA of its own to compare or to scale. Name one with --lora FILE; to see the base model: "
            "lowmem-drf sample without --compare and --lora-scale."
        )
    if best and (preset is not None or lora is not None):
        raise BadInputError("--best is an update of a run: it does not go with --preset or --lora.")
    if preset is not None:
        config = in_one_process(load_config(preset, overrides))
        require_card(preset, config)
    else:
        run = find_run(run or (run_of(lora) if lora else None), besides)
        config = run_config(run, overrides)
    if lora is None:
        folder = checkpoint_folder(run, best_step(run) if best else None) if run else None
        if run and folder and not best and (alarm := lasting(run, step_of(folder))):
            say(alarm)
        return Tuned(config, run, folder, None, folder.name if folder else "base")
    refuse_damaged(lora_file(lora))
    read = read_lora_for(config, lora)
    config, trained = as_trained(config, read.metadata, overrides, may_change=run is None)
    for line in (*left_out(read), *trained):
        say(f"{lora}: {line}")
    if read.merged() and config.lora.max_sigma < 1:
        raise BadInputError(
            f"{lora}: a part of it is merged into the weights (LoKr, LoHa, DoRA, norms, biases or convolutions), and "
            f"is there in all steps: lora.max_sigma = {config.lora.max_sigma:g} cannot leave it out. Set it to 1."
        )
    # files of one name in two folders are two LoRAs
    return Tuned(config, run, None, read, readable_name(lora.stem, after=f"-{short_hash(str(lora.resolve()))}"))


def load(
    tuned: Tuned,
    prompts: Sequence[Prompt],
    config: Config | None = None,
    with_critic: bool = True,
    clips: Mapping[str, int] | None = None,
    scale: float = 1.0,
    with_lora: bool = True,
) -> Models:
    """Loads the models as ``load_models``, with the LoRA unless ``with_lora`` is off.

    Args:
        config: in place of the model's own.
        scale: strength of what is merged; ``adapter.lora_scale`` sets that of the rest.
    """
    config, lora = config or tuned.config, tuned.lora if with_lora else None
    if with_lora and tuned.has_lora:
        require_use(config)
    kernels = saved_choice(tuned.run, say)
    models = load_models(
        config, prompts, with_critic=with_critic, clips=clips, lora=lora, lora_scale=scale, kernels=kernels
    )
    if tuned.checkpoint and with_lora:
        load_run_lora(models.transformer, tuned.checkpoint, config)
    return models
