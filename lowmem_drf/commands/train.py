"""``lowmem-drf train``: makes or resumes a run, trains, and prints the final table."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf import __version__
from lowmem_drf.config import load_config, to_toml
from lowmem_drf.distributed.ranks import ALONE, Ranks, end_process, join, require_platform, started_processes
from lowmem_drf.errors import DEBUG, BadInputError, Ended, LowmemError, quoted
from lowmem_drf.files import text_hash, write_text
from lowmem_drf.models.rewards.users import find_maker, is_entry
from lowmem_drf.planner.cards import Card, card_named, parse_vram, room_of
from lowmem_drf.preset_files import chosen_preset, preset_card, preset_path, require_card
from lowmem_drf.prompts import fingerprint, without
from lowmem_drf.schema import Config
from lowmem_drf.shortage import allocator_settings, during
from lowmem_drf.terminal import is_called, make_console, showing
from lowmem_drf.texts import one_line, toml_value
from lowmem_drf.training.checkpoint import good_step, last_manifest, resume_command, saved_step
from lowmem_drf.training.manifest import MAY_CHANGE, fixed_settings, require_prompts, same_setting
from lowmem_drf.training.run_folder import RUNS, claim, default_output, find_run, saved_config, with_absolute_paths
from lowmem_drf.types import OnUpdate, Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.assembly.assemble import Models
    from lowmem_drf.scoring.evaluate import Trial


def train_command(
    preset: str | None,
    prompts: Path | None,
    output: Path | None,
    steps: int | None,
    seed: int | None,
    resume: bool,
    overrides: Sequence[str],
    dry_run: bool,
    num_processes: int | None = None,
    init_lora: Path | None = None,
    vram: str | None = None,
    on_update: OnUpdate | None = None,
) -> Path:
    """Resolves the configuration, then prints it (``dry_run``), or trains and compares base and tuned model. Returns
    the run's folder.

    Starts the processes of a run of several, unless a launcher has: then this process is one of them.

    Args:
        on_update: of the Python API (``loop.train``). A run that it ends is not compared.
    """
    count = started_processes() or num_processes
    flags = {
        "prompts": None if prompts is None else toml_value(str(prompts)),
        "steps": steps,
        "seed": seed,
        "processes": count,
        "memory.vram_gib": None if vram is None else parse_vram(vram),
    }
    overrides = [*overrides, *(f"{key}={value}" for key, value in flags.items() if value is not None)]
    if resume and init_lora is not None:
        raise BadInputError("--init-lora does not go with --resume: the run goes on from its own LoRA. Leave it out.")
    if resume:
        name, (run, config, done) = "", _resumed(preset, output, overrides)
        origin = f"resumed after update {done}"
    else:
        name, why = (preset, "") if preset is not None else chosen_preset()
        if init_lora is not None:
            from lowmem_drf.training.lora_file import overrides_from

            overrides = [*overrides_from(name, overrides, init_lora), *overrides]
        run, config = output or default_output(name), with_absolute_paths(load_config(name, overrides))
        origin = f"preset {name}{why}"
    if dry_run:
        if os.environ.get("RANK", "0") == "0":
            _print(config, name or str(run), preset_card(preset_path(name)) if name else "")
        return run
    if not resume:
        require_card(name, config)
    if is_called():
        _require_one_process(config, on_update)
    if config.engine != "single":
        require_platform()
    chosen = ["--resume"] if resume else ["--preset", name]
    begin = ["train", *chosen, "--output", str(run), *(word for text in overrides for word in ("-s", text))]
    if config.processes > 1 and not started_processes():
        from lowmem_drf.distributed.launch import launch

        command = [sys.executable, "-m", "lowmem_drf", *([DEBUG] if DEBUG in sys.argv else []), *begin]
        if code := launch(config.processes, command, lambda: _advice(run)):
            if is_called():
                raise LowmemError(f"a process of the run failed, and said why on stderr (exit code {code}).")
            raise SystemExit(code)
        return run
    if config.engine == "single":
        from lowmem_drf.shared.out_of_memory import surviving

        with suppress(Ended), surviving(config, run, begin, MAY_CHANGE):
            start(config, run, resume, origin, on_update=on_update)
        return run
    from lowmem_drf.distributed.launch import failing_together

    with failing_together(lambda: _advice(run)) as fail:
        ranks = join(config.device)
        run = ranks.from_chief(run)  # the name contains the time
        with suppress(Ended):
            start(config, run, resume, origin, ranks, fail, on_update)
        ranks.leave()
    if started_processes() and not is_called():
        end_process()
    return run


def _require_one_process(config: Config, on_update: OnUpdate | None) -> None:
    """Raises BadInputError for what would end a Python program's own process, or cannot call it."""
    if config.memory.on_oom == "adapt":
        raise BadInputError(
            'memory.on_oom = "adapt" goes on in a new process, which a Python program does not become. Set "stop", '
            "and call train(resume=True) with the settings that the error names."
        )
    if on_update and config.processes > 1:
        raise BadInputError("on_update is called in a run of one process. Leave it out, or set processes = 1.")


def _print(config: Config, name: str, card: str) -> None:
    """For ``--dry-run``."""
    print(to_toml(config), end="")
    if config.engine != "single":
        _print_zero(config, name, card_named(card))


def _print_zero(config: Config, name: str, card: Card) -> None:
    """DeepSpeed's settings on stdout, as comments behind the configuration's TOML, and on stderr the plan of each
    process."""
    from lowmem_drf.distributed.zero import deepspeed_config
    from lowmem_drf.planner.report import laid_out, planned
    from lowmem_drf.planner.words import print_plan

    trained = "the transformer's engine" if config.engine == "zero3" else "the LoRA's engine"
    engines = {trained: deepspeed_config(config)}
    if config.zero.critic:
        engines["the critic's engine"] = deepspeed_config(config, trains=False)
    for engine, settings in engines.items():
        title = f"DeepSpeed, {engine}, in each of {config.processes} processes:"
        print("\n" + textwrap.indent(f"{title}\n{json.dumps(settings, indent=2)}", "# "), flush=True)
    console, room = make_console(stderr=True, soft_wrap=True), room_of(card.gib, config.memory.vram_gib)
    print_plan(planned(laid_out(config), card, room, console), name, config, console)


def _advice(run: Path) -> str:
    """How to go on after a run of several processes was stopped."""
    if not (saved := saved_step(run)):
        return "No update was saved."
    return f"Update {saved} is saved. Go on with: {resume_command(run)}"


def start(
    config: Config,
    run: Path,
    resume: bool,
    origin: str,
    ranks: Ranks = ALONE,
    abort: Callable[[BaseException], None] = lambda error: None,
    on_update: OnUpdate | None = None,
) -> None:
    """Checks all that needs no model, loads the models, and only then writes to the run's folder; then trains.

    Args:
        origin: source of the configuration, in words.
        abort: ends all processes of the run at once (``make_trainer``).
    """
    from lowmem_drf.assembly.assemble import derive_seed, resolve_device, reward_spec, run_prompts
    from lowmem_drf.assembly.check import can_check
    from lowmem_drf.assembly.cudnn import require_fast_vae
    from lowmem_drf.assembly.kernel_choice import KERNELS, record_text, require_kernels, saved_choice
    from lowmem_drf.assembly.loading import import_libraries, load_models
    from lowmem_drf.assembly.questions import draft_questions, needs_writer, require_weights, write_missing
    from lowmem_drf.assembly.references import finish_questions
    from lowmem_drf.export.trained_with import as_trained
    from lowmem_drf.models.lora.adapter import add_lora
    from lowmem_drf.models.lora.init import init_lora
    from lowmem_drf.models.lora.levels import require_use
    from lowmem_drf.models.lora.optimizers import require_optimizer
    from lowmem_drf.planner.report import card_here, require_fit
    from lowmem_drf.questions.file import to_json
    from lowmem_drf.reporting.notes import write_notes
    from lowmem_drf.scoring.evaluate import finish_trial, finish_watched, make_trial
    from lowmem_drf.scoring.watch import BLIND, SEEDS
    from lowmem_drf.training.loop import train
    from lowmem_drf.training.lora_file import lora_to_begin_with
    from lowmem_drf.training.metrics import require_trackers
    from lowmem_drf.training.previews import as_previewed, preview_prompts

    console = make_console(soft_wrap=True, quiet=not ranks.chief)
    prompts = run_prompts(config)
    used = without(prompts, config.skip_prompts)
    if len(prompts) < ranks.count:
        raise BadInputError(
            f"there are {len(prompts)} prompts for {ranks.count} processes: some would get none. "
            f"Give more prompts, or --num-processes {len(prompts)}."
        )
    if resume and (saved := last_manifest(run)):
        require_prompts(run, prompts, saved.prompts)
    draft = draft_questions(config, prompts)
    if not config.trained_rewards:
        require_weights(draft, reward_spec(config))
    ready = _ready_questions(run, config, prompts) if resume and config.critic.weights.asked else {}
    draft |= ready
    log = config.log
    looked_at = log.watch_prompts if log.watch_every else 0
    watched = make_trial(config, used, looked_at, SEEDS) if looked_at else None  # its own: questions hang on prompts
    trial = make_trial(config, used, log.eval_prompts, log.eval_seeds) if log.eval_prompts else None
    if config.optim.stop == "alarm" and watched and len(watched.prompts) < 2:
        raise BadInputError(f'optim.stop = "alarm": {BLIND}')
    require_trackers(log.trackers)
    require_optimizer(config.optim)
    require_use(config)
    for entry in (reward.id for reward in config.rewards.values() if is_entry(reward.id)):
        find_maker(entry)  # before anything is planned or downloaded
    import_libraries(config)
    # of a run that was stopped before its first checkpoint, the file is all that its LoRA consists of
    init = lora_to_begin_with(config, config.lora.targets) if config.lora.init and not saved_step(run) else None
    _, trained = as_trained(config, init.metadata, (), may_change=False) if init else (config, [])
    device = resolve_device(config.device)
    require_fast_vae(config, device)
    require_kernels(config, device)
    rooms = ranks.gather(card_here(config))
    config, plan = ranks.from_chief(require_fit(config, console, rooms) if ranks.chief else (config, None))

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    with claim(run, say, resume) if ranks.chief else nullcontext():
        previews = preview_prompts(config, used)
        if config.critic.writer and needs_writer(config) and ranks.chief:  # cached before the memory is taken
            unwritten = [prompt for prompt in prompts if prompt.id not in ready]
            with during("questions"), showing(console):
                write_missing(config, [*unwritten, *(trial.prompts if trial else ())], None, console)
        tried = [prompt for one in (watched, trial) if one for prompt in one.prompts]
        made_of = (*prompts, *tried, *previews)
        shown = max(len(previews) if log.sample_every else 0, log.eval_prompts * log.eval_seeds, looked_at * SEEDS)
        clips = {"micro_batch": config.micro_batch, "log.eval_batch": min(log.eval_batch, shown)}
        with during("loading"), showing(console):
            kernels = saved_choice(run, say) if resume and ranks.chief else None
            models = load_models(config, made_of, ranks=ranks, clips=clips, kernels=kernels)
            as_previewed(config, models)  # a size that does not fit is said before anything is written
            lora, seed = config.lora, derive_seed(config.seed, "lora")
            add_lora(models.transformer, **lora.adapter, seed=seed)
            if init:
                for line in (init_lora(models.transformer, init), *trained):
                    say(f"{lora.init}: {line}")
            models.awake("critic")
        if ranks.chief or config.zero.critic:  # a partitioned critic runs in all processes together
            with during("questions"):
                done = finish_questions(config, prompts, draft, models.critic, console, ready)
                draft = done.questions
                trial = finish_trial(config, trial, models.critic, console) if trial else None
                watched = finish_watched(config, watched, models.critic, console) if watched else None
            if not config.trained_rewards:
                require_weights(draft, reward_spec(config))
        questions, trial, watched = ranks.from_chief((draft, trial, watched))
        asked = to_json({prompt.text: questions[prompt.id] for prompt in prompts})
        if ranks.chief:
            if resume:
                _require_same_questions(run, prompts, asked)
            write_text(run / "config.toml", to_toml(config))
            if config.critic.weights.asked:
                write_text(run / "questions.json", asked)
            write_notes(run, origin, device, plan.as_json(origin.removeprefix("preset ")) if plan else None)
            if models.kernel_record:
                write_text(run / KERNELS, record_text(models.kernel_record))
            if can_check(config) and not resume:
                done.write(run, prompts)
        _announce(console, config, run, models, prompts, origin)
        models = train(
            config, run, models, prompts, questions, previews, console, ranks, abort,
            watched, on_update or (lambda row: None),
        )  # fmt: skip
        with during("evaluation"):
            _finish(console, config, run, models, trial, ranks)


def _resumed(preset: str | None, output: Path | None, overrides: Sequence[str]) -> tuple[Path, Config, int]:
    """The run to resume, its configuration, and its updates so far. Raises BadInputError if settings differ too much,
    or it is complete."""
    if preset is not None:
        raise BadInputError("--preset does not go with --resume: the run keeps its own configuration. Leave it out.")
    run = find_run(output)
    before, config = saved_config(run), with_absolute_paths(load_config(run / "config.toml", overrides))
    wanted = fixed_settings(config)
    if changed := [key for key, value in fixed_settings(before).items() if not same_setting(wanted[key], value)]:
        raise BadInputError(
            f"{run} cannot go on with another {', '.join(changed)}. "
            f"Start a new run, or change only: {', '.join(MAY_CHANGE)}."
        )
    done = good_step(run, lambda _: None)  # what is damaged is said when the run's folder is claimed
    if done >= config.steps:
        cure = f"To train on: {resume_command(run)} --steps {2 * done}"
        raise BadInputError(f"{run} is complete: {done} of {config.steps} updates. {cure}")
    return run, config, done


def _ready_questions(run: Path, config: Config, prompts: Sequence[Prompt]) -> dict[str, tuple[Question, ...]]:
    """The run's own questions, by prompt id, of the prompts that have none from the user. They were written and
    checked when the run began. The file knows prompts by their text: those of one text that are not asked the same
    are not among them."""
    from lowmem_drf.assembly.questions import writers_of
    from lowmem_drf.questions.file import load_questions

    file = run / "questions.json"
    try:
        saved = load_questions(file) if file.is_file() else {}
    except BadInputError as error:
        raise BadInputError(
            f"the run's own questions cannot be read ({one_line(str(error), 120)}). "
            f"Delete {quoted(file)} and resume: the run makes it again."
        ) from error
    makers = writers_of(config, prompts)
    given: dict[str, set[tuple[tuple[Question, ...], str | None]]] = {}
    for prompt in prompts:
        given.setdefault(prompt.text, set()).add((prompt.questions, prompt.reference_video))
    ours = [p for p in prompts if makers[p.id] in ("phrases", "grammar") and len(given[p.text]) == 1]
    return {prompt.id: saved[prompt.text] for prompt in ours if prompt.text in saved}


def _require_same_questions(run: Path, prompts: Sequence[Prompt], asked: str) -> None:
    """Raises BadInputError if the same prompts have other questions (``to_json``) than those that the run's updates
    asked. The training loop compares the prompts."""
    saved = last_manifest(run)
    if saved and saved.prompts == fingerprint(prompts) and saved.questions not in ("", text_hash(asked)):
        raise BadInputError(
            f"the questions of {run} have changed since it began. Restore the file they come from, or start a new run. "
            f"If {quoted(run / 'questions.json')} was edited, delete it."
        )


def _announce(
    console: Console, config: Config, run: Path, models: Models, prompts: Sequence[Prompt], origin: str
) -> None:
    first = f"lowmem-drf {__version__}: {origin}, on {models.device}, {config.dtype}"
    if config.engine != "single":
        plural = "es" if config.processes > 1 else ""
        first += f", {config.processes} process{plural} under DeepSpeed ({config.engine})"
    graded = f"{config.sampler.graded_steps} of {config.sampler.steps} steps graded"
    if models.expert:
        graded += f" ({config.model.expert}-noise transformer)"
    if models.tiny:
        graded += f", tiny decoder (compared every {config.model.decoder_check_every} updates)"
    clips = f"{len(prompts)} prompts, {config.steps} updates of {config.batch} clips"
    judges = [f"critic {config.critic.mode}"] if models.critic else []
    judges += [f"{name} {reward.id}" for name, reward in config.rewards.items()]
    lines = [first, f"{clips}, {graded}, {', '.join(judges)}", models.kernels, f"run: {run}"]
    if models.device.type == "cuda":
        told = allocator_settings() or "PyTorch's defaults"
        lines.insert(3, f"card's allocator: {told}")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _finish(console: Console, config: Config, run: Path, models: Models, trial: Trial | None, ranks: Ranks) -> None:
    from lowmem_drf.models.lora.adapter import lora_scale
    from lowmem_drf.reporting.notes import write_result
    from lowmem_drf.scoring.alarm import lasting
    from lowmem_drf.scoring.evaluate import compare, describe
    from lowmem_drf.scoring.table import print_table

    if trial:
        console.print(f"\nBase against tuned: {describe(trial)}", highlight=False, markup=False)
        saved = ranks.from_chief(last_manifest(run) if ranks.chief else None)
        done, steps = (saved.step, saved.steps) if saved else (0, 0)  # the alarm may have ended it early
        try:
            with lora_scale(models.transformer, config.strength(done, steps)):
                result = compare(config, models, trial, console, ranks)
        except KeyboardInterrupt:
            later = f"To compare base and tuned: lowmem-drf eval {quoted(run)}"
            raise KeyboardInterrupt(f"Interrupted. Training is over, and all of it is saved. {later}") from None
        print_table(result, console)
        if ranks.chief:
            write_result(run, done, describe(trial), result)
    if ranks.chief and (alarm := lasting(run, saved_step(run))):
        console.print(f"\n{alarm}", highlight=False, markup=False)
    here = run.parent == RUNS
    console.print("Next:", highlight=False)
    for command in (
        "lowmem-drf sample --compare" + ("" if here else f" --run {quoted(run)}"),
        "lowmem-drf export-lora" + ("" if here else f" {quoted(run)}"),
        "lowmem-drf eval" + ("" if here else f" {quoted(run)}"),
        "lowmem-drf report" + ("" if here else f" {quoted(run)}"),
    ):
        console.print(f"  {command}", highlight=False, markup=False)
