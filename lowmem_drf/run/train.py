"""The training loop: take prompts, update, log, save, sample; again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.reward import Spread
from lowmem_drf.models.lora import load_lora_state, lora_parameters, lora_state
from lowmem_drf.models.optimizers import make_optimizer, pack_optimizer, unpack_optimizer
from lowmem_drf.prompts import Cursor, PromptStream, fingerprint
from lowmem_drf.run.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_steps,
    load_checkpoint,
    save_checkpoint,
)
from lowmem_drf.run.metrics import Metrics
from lowmem_drf.run.parts import Models
from lowmem_drf.run.previews import write_previews
from lowmem_drf.run.progress import TrainProgress
from lowmem_drf.run.truth import oracle_for
from lowmem_drf.run.update import update
from lowmem_drf.schema import Config
from lowmem_drf.types import Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console
    from torch.optim import Optimizer


def train(
    config: Config,
    run: Path,
    models: Models,
    prompts: Sequence[Prompt],
    questions: Mapping[str, Sequence[Question]],
    previews: Sequence[str],
    console: Console,
) -> None:
    """Trains from the run's last checkpoint, or from nothing, to ``config.steps``.

    Args:
        models: with a fresh LoRA on the transformer; it holds the tuned weights afterwards.
        questions: by prompt id.
        previews: the texts of the clips in ``samples/``; encoded in ``models``.

    Raises:
        KeyboardInterrupt: Ctrl-C; the update in progress was finished and saved.
        BadInputError: the prompts are not those of the run's checkpoint.
        NonFiniteError: see ``update``.
    """
    parts = models.parts(lora_parameters(models.transformer))
    optimizer = make_optimizer(config.optim, parts.lora)
    cursor, done, spread = _restore(run, models, optimizer, prompts)
    stream = PromptStream(prompts, config.seed, cursor)
    judge = oracle_for(config, [prompt.text for prompt in prompts])
    metrics, progress = Metrics(run, done), TrainProgress(console, config.steps, done)
    try:
        if done == 0 and config.log.sample_every:
            write_previews(config, run, models, previews, step=0)
        with progress.live(), _finish_on_interrupt(progress, run) as stop:
            for step in range(done, config.steps):
                scales = spread.scales() if config.critic.normalize else {}
                report = update(config, models, parts, optimizer, step, stream.take(config.batch), questions, judge, scales)
                spread.add(report.reward_by_question)
                metrics.write(report)
                progress.update(report)
                last = report.step == config.steps
                if saved := last or report.step % config.log.checkpoint_every == 0:
                    _save(config, run, models, optimizer, report.step, stream.cursor, prompts, spread)
                if config.log.sample_every and not stop and (last or report.step % config.log.sample_every == 0):
                    write_previews(config, run, models, previews, report.step)
                if stop:  # asked at any moment, the samples' included
                    if not saved:
                        _save(config, run, models, optimizer, report.step, stream.cursor, prompts, spread)
                    cure = "The run is complete." if last else f"Go on with: lowmem-drf train --resume --output {run}"
                    raise KeyboardInterrupt(f"Interrupted after update {report.step}; it is saved. {cure}")
    finally:
        metrics.close()


def _restore(run: Path, models: Models, optimizer: Optimizer, prompts: Sequence[Prompt]) -> tuple[Cursor, int, Spread]:
    if not checkpoint_steps(run):
        return Cursor(), 0, Spread()
    checkpoint = load_checkpoint(checkpoint_folder(run))
    if checkpoint.prompts != fingerprint(prompts):
        raise BadInputError(f"the prompts of {run} have changed since its last checkpoint. Restore the file, or start a new run.")
    load_lora_state(models.transformer, checkpoint.lora)
    unpack_optimizer(optimizer, list(lora_state(models.transformer)), checkpoint.optimizer)
    return checkpoint.cursor, checkpoint.step, Spread(seen=dict(checkpoint.spread))


def _save(config: Config, run: Path, models: Models, optimizer: Optimizer, step: int, cursor: Cursor, prompts: Sequence[Prompt], spread: Spread) -> None:
    lora = lora_state(models.transformer)
    checkpoint = Checkpoint(step, lora, pack_optimizer(optimizer, list(lora)), cursor, fingerprint(prompts), spread.seen)
    save_checkpoint(run, checkpoint, config.lora.alpha, config.log.keep)


@contextmanager
def _finish_on_interrupt(progress: TrainProgress, run: Path) -> Iterator[list[int]]:
    """Within the block the first Ctrl-C (or SIGTERM) only fills the list; the second ends the process at once, which costs nothing that is saved."""
    asked: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if asked:
            saved = max(checkpoint_steps(run), default=0)
            progress.leave(f"Stopped at once; update {saved} is the last one saved. Go on with: lowmem-drf train --resume --output {run}")
            os._exit(130)
        asked.append(number)
        progress.notice("Finishing this update, then saving. Press Ctrl-C again to stop at once.")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
