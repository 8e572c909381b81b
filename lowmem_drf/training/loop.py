"""The training loop: take prompts, update, log, save, sample."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf.assembly.assemble import Models
from lowmem_drf.config import to_toml
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.errors import Ended, LowmemError, NonFiniteError, disk_full
from lowmem_drf.files import text_hash, write_text
from lowmem_drf.method.reward import Spread
from lowmem_drf.models.lora.adapter import load_lora_state, lora_norm, lora_parameters, lora_scale, lora_state
from lowmem_drf.models.tiny.decoder_check import DecoderCheck
from lowmem_drf.prompts import Cursor, PromptStream, fingerprint
from lowmem_drf.questions.file import to_json
from lowmem_drf.schema import Config
from lowmem_drf.scoring.evaluate import Trial
from lowmem_drf.scoring.oracle_rates import oracle_for
from lowmem_drf.scoring.watch import Watch
from lowmem_drf.shortage import during, let_go, shortage_of
from lowmem_drf.terminal import hangup, is_called, showing
from lowmem_drf.training.checkpoint import (
    CURE,
    Checkpoint,
    checkpoint_folder,
    good_step,
    load_checkpoint,
    resume_command,
    save_checkpoint,
    saved_step,
    set_damaged_aside,
)
from lowmem_drf.training.finished import Finished
from lowmem_drf.training.manifest import fixed_settings, require_prompts
from lowmem_drf.training.metrics import Metrics, open_trackers
from lowmem_drf.training.pace import Pace
from lowmem_drf.training.previews import write_previews
from lowmem_drf.training.progress import TrainProgress
from lowmem_drf.training.run_folder import claim
from lowmem_drf.training.skips import Skips, broken, stopped
from lowmem_drf.training.trainer import make_trainer
from lowmem_drf.training.update import Skipped, SkippedUpdate, UpdateReport, update
from lowmem_drf.types import OnUpdate, Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console


def train(
    config: Config,
    run: Path,
    models: Models,
    prompts: Sequence[Prompt],
    questions: Mapping[str, Sequence[Question]],
    previews: Sequence[Prompt],
    console: Console,
    ranks: Ranks = ALONE,
    abort: Callable[[BaseException], None] = lambda error: None,
    watched: Trial | None = None,
    on_update: OnUpdate = lambda row: None,
) -> Models:
    """Trains from the run's last checkpoint, if any, to ``config.steps``. Only rank 0 reads and writes checkpoints.

    Args:
        models: with a fresh LoRA on the transformer.
        questions: by prompt id.
        previews: prompts of the clips in ``samples/``, already encoded in ``models``.
        abort: see ``make_trainer``.
        watched: clips that are looked at every ``log.watch_every`` updates (``scoring/alarm.py``).
        on_update: called by rank 0. What it raises ends the run too.

    Returns:
        The models with the tuned LoRA.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the current update was finished and saved; ``Ended`` by ``on_update``, also
            after that.
        BadInputError: the prompts differ from those of the run's checkpoint.
        LowmemError: the run's folder was deleted; the update was saved there again.
        NonFiniteError: too many updates in a row were skipped (the last good weights are saved), or the optimizer made
            a weight NaN or infinite (nothing is saved).
    """
    checkpoint = ranks.from_chief(_restored(run, prompts) if ranks.chief else None)
    if checkpoint:
        load_lora_state(models.transformer, checkpoint.lora)
    trainer, models = make_trainer(config, models, abort)
    cursor, done, spread, skips = Cursor(), 0, Spread(), Skips(config)
    if checkpoint:
        if checkpoint.optimizer:  # there is none where every update so far was skipped
            trainer.unpack(checkpoint.optimizer)
        cursor, done, spread = checkpoint.cursor, checkpoint.step, Spread(seen=dict(checkpoint.spread))
        skips = Skips(config, checkpoint.skipped)
    lora = lora_parameters(models.transformer)
    check = DecoderCheck(config.model, checkpoint.tiny_cosine if checkpoint else None)
    stream = PromptStream(prompts, config.seed, cursor, config.skip_prompts)
    own = fingerprint(prompts)  # now: images may change while it trains
    asked_hash = text_hash(to_json({prompt.text: questions[prompt.id] for prompt in prompts}))
    judge = oracle_for(config, [prompt.text for prompt in prompts])
    metrics = Metrics(run, done, open_trackers(config, run)) if ranks.chief else None
    progress = TrainProgress(console, config.steps, done)
    watch = Watch(config, run, models, watched, ranks, done)

    def save(step: int, cursor: Cursor | None = None) -> None:
        with trainer.whole():
            weights = lora_state(models.transformer)
        state = trainer.pack(), cursor or stream.cursor, own, spread.seen, skips.saved
        now = Checkpoint(step, weights, *state, fixed_settings(config), asked_hash, check.fell, config.steps)
        if ranks.chief:
            save_checkpoint(run, now, config.used_alpha(step), config.log.keep, watch.best)
        ranks.barrier()  # no process may end before the checkpoint is written

    def used(step: int) -> AbstractContextManager[None]:
        of = checkpoint.steps if checkpoint and step == checkpoint.step else 0  # a resumed run may have more of them
        return lora_scale(models.transformer, config.strength(step, of))

    def look(step: int) -> None:
        with used(step):
            with trainer.whole():
                size = lora_norm(models.transformer)
            said = watch.look(step, size)
        if said:
            progress.note(said)

    def show(step: int) -> None:
        with used(step):
            folder = write_previews(config, run, models, previews, step, ranks)
        if metrics:
            metrics.clips(step, folder)

    if check.why:
        progress.note(check.why)
    finished = Finished(trainer, done, cursor)
    pace = Pace(models.device)
    try:
        if done == 0 and config.log.sample_every and config.log.sample_first:  # "auto": nothing was planned
            with during("previews"), showing(console):
                show(0)
        with during("watch"), showing(console):
            if said := watch.begin():
                progress.note(said)
            if watch.missed(done):
                look(done)
        progress.alarm = watch.began
        with progress.live(), _finish_on_interrupt(progress, run, ranks) as asked:
            for step in range(done, config.steps):
                scales = spread.scales() if config.critic.normalize else {}
                batch = stream.take(config.batch)
                report: UpdateReport | Skipped
                parts = models.parts(lora, check.uses(step))
                try:
                    report = update(config, models, parts, trainer, step, batch, questions, judge, scales, ranks)
                    skips.add(None)
                    spread.add(report.reward_by_question)
                    if said := check.look(report.step, report.decoder_cosine):
                        progress.note(said)
                except SkippedUpdate as error:
                    report = error.report
                    progress.note(skips.add(error))
                except NonFiniteError as error:
                    raise broken(config, run, error) from error
                if ranks.any(metrics is not None and metrics.gone()):
                    again = not (run / "config.toml").exists()  # else another run began there
                    with claim(run, progress.note, resume=again) if ranks.chief else nullcontext():
                        save(report.step)
                        if ranks.chief:
                            write_text(run / "config.toml", to_toml(config))
                    raise LowmemError(_deleted(run, report.step))
                ended = _told(on_update, metrics.write(report)) if metrics else None
                finished = Finished(trainer, report.step, stream.cursor)
                last = report.step == config.steps
                looks = watch.is_due(report.step, last)
                if saved := last or looks or skips.too_many or report.step % config.log.checkpoint_every == 0:
                    save(report.step)
                if isinstance(report, UpdateReport):  # after the save, and it raises nothing (terminal.QuietStream)
                    watch.rewards.append(report.reward)
                    progress.update(report)
                    if slow := pace.add(report.step, report.update_s):
                        progress.note(slow)
                if skips.too_many:
                    raise stopped(config, run, skips, len(prompts))
                stop = ranks.any(bool(asked or ended))
                if looks and not stop:
                    with during("watch"):
                        look(report.step)
                    progress.alarm = watch.began
                if config.log.sample_every and not stop and (last or report.step % config.log.sample_every == 0):
                    with during("previews"):
                        show(report.step)
                if stop or ranks.any(bool(asked)):  # Ctrl-C may also come during the samples
                    if not saved:
                        save(report.step)
                    if ended:
                        raise ended
                    cure = "The run is complete." if last else f"Go on with: {resume_command(run)}"
                    raise KeyboardInterrupt(f"Interrupted after update {report.step}; it is saved. {cure}")
                if config.optim.stop == "alarm" and watch.began == report.step and not last:
                    progress.note(f'It ends here (optim.stop = "alarm"). To go on: {resume_command(run)}')
                    break
            if metrics and metrics.skipped:
                progress.note(f'{metrics.skipped} of {config.steps} updates were skipped: "skipped" in metrics.jsonl')
    except Exception as error:
        if (shortage := shortage_of(error)) and config.engine == "single":
            let_go(error)
            shortage.lost = finished.rescue(saved_step(run), save)
            error.shortage = shortage  # type: ignore[attr-defined]
        if disk_full(error):
            alone = config.engine == "single"  # saving is the work of all processes
            raise LowmemError(_full(error, run, finished.rescue(saved_step(run), save) if alone else "")) from error
        raise
    finally:
        if metrics:
            metrics.close()
    return models


def _told(on_update: OnUpdate, row: Mapping[str, Any]) -> BaseException | None:
    """Calls it. Returns what the run is to end with once this update is saved, if it is to end."""
    try:
        return Ended() if on_update(row) is False else None
    except Exception as error:
        return error


def _restored(run: Path, prompts: Sequence[Prompt]) -> Checkpoint | None:
    """The run's last good checkpoint, if any. Later ones, which are damaged, are renamed."""
    if not (step := good_step(run)):
        return None
    checkpoint = load_checkpoint(checkpoint_folder(run, step))
    require_prompts(run, prompts, checkpoint.prompts)
    if checkpoint.cursor.index >= len(prompts):
        raise LowmemError(f"the checkpoint of update {step} of {run} is damaged. {CURE}")
    set_damaged_aside(run, step)
    return checkpoint


def _deleted(run: Path, step: int) -> str:
    return (
        f"{run} was deleted or moved while it trained. Update {step} is saved there again, without the earlier metrics "
        f"and samples. Go on with: {resume_command(run)}"
    )


def _full(error: Exception, run: Path, lost: str) -> str:
    saved = saved_step(run)
    kept = f"Update {saved} is the last one saved" if saved else "No update is saved yet"
    return (
        f"the disk is full: {error}\n{kept}{f' ({lost})' if lost else ''}.\n"
        f"Free some space, then go on with: {resume_command(run)}"
    )


@contextmanager
def _finish_on_interrupt(progress: TrainProgress, run: Path, ranks: Ranks) -> Iterator[list[int]]:
    """Inside the block, the first Ctrl-C only fills the list. The second ends the process at once, or the call of the
    Python API; saved updates stay.

    SIGHUP (the session was closed) counts as a first Ctrl-C unless ``nohup`` set it to be ignored, and so does SIGTERM
    in a run of one process; in larger runs launchers use it to end processes that wait for a dead one. Neither counts
    as a second: the end of a session sends several. Only the main thread of a program can catch any.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, frame: object) -> None:
        if asked and number != signal.SIGINT:
            return
        if asked and is_called():
            raise KeyboardInterrupt("Stopped at once.")
        if asked and not ranks.chief:
            os._exit(130)
        if asked:
            again = f"Go on with: {resume_command(run)}"
            progress.leave(f"Stopped at once; update {saved_step(run)} is the last one saved. {again}")
            os._exit(130)
        asked.append(number)
        if ranks.chief:
            progress.notice("Finishing this update, then saving. Press Ctrl-C again to stop at once.")

    numbers = [signal.SIGINT, *hangup(), *([signal.SIGTERM] if ranks.count == 1 else [])]
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
