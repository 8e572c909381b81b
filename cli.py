"""The command line. Commands are short and import inside, so that ``--help`` needs no torch."""

if __name__ == "__main__":
    import runpy

    runpy.run_module("lowmem_drf", run_name="__main__")  # as python -m lowmem_drf, which ends the process

import functools
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from lowmem_drf.errors import DEBUG, BadInputError, explain, quoted
from lowmem_drf.terminal import lost_output, printable, quiet_streams
from lowmem_drf.texts import expanded

try:
    import typer
    from typer.core import TyperGroup
except Exception as error:  # the first import that may fail: what ``_reports_errors`` does for all others
    sys.exit(f"Error: {explain(error)[0]}")


class _Commands(TyperGroup):
    """Refuses empty arguments: an empty path would be the current folder, an empty preset the default one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, argument in pairwise(["", *args]):
            if not argument or re.fullmatch(r"--[\w-]+=", argument):
                name = argument.removesuffix("=") or before
                what = name if name.startswith("-") else f"the argument after {name}" if name else "an argument"
                cure = "Is a variable of the shell not set? Give a value, or leave the option out."
                typer.echo(printable(f"Error: {what} is empty. {cure}"), err=True)
                raise typer.Exit(2)
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
presets_app = typer.Typer(no_args_is_help=True, help="The presets: list, show, copy.")
app.add_typer(presets_app, name="presets")


def _option(help_: str, *names: str, **settings: Any) -> Any:
    """An option that is not set by default; ``help_`` says what happens then."""
    return typer.Option(*names, help=help_, show_default=False, **settings)


Preset = Annotated[str | None, _option("A preset's name or a TOML file. Default: as train chooses.")]
PromptFile = Annotated[Path | None, _option("A prompt file: txt (one prompt a line) or jsonl.", "--prompts")]
Run = Annotated[
    Path | None,
    typer.Argument(metavar="[RUN]", help="A run's folder. Default: the latest under runs/.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override any key of the configuration; repeatable."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that was edited or made in another way.")]
Best = Annotated[bool, typer.Option("--best", help="The update that the run's watch found best, not the last one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


NO_DOCSTRINGS = (
    "Python leaves docstrings out (-OO, PYTHONOPTIMIZE=2), and transformers cannot be imported without them. "
    "Run it with -O or PYTHONOPTIMIZE=1, or unset PYTHONOPTIMIZE."
)


def _example(*lines: str) -> str:
    return "[bold]Example:[/bold] " + "  ·  ".join(f"[cyan]{line}[/cyan]" for line in lines)


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Prints errors to stderr in a few lines, with the cure. Exit code 1: the work failed; 2: bad input; 130:
    interrupted. ``--debug`` adds the traceback."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        from lowmem_drf.libraries import hush

        hush()
        with _interrupts() as got:
            try:
                if sys.flags.optimize > 1 and not command.__name__.startswith("presets"):
                    raise BadInputError(NO_DOCSTRINGS)
                command(*args, **{name: _path(value) for name, value in kwargs.items()})
            except (Exception, KeyboardInterrupt) as error:
                if isinstance(error, typer.Exit):
                    raise
                if DEBUG in _flags:
                    traceback.print_exception(error)
                made_of_it = got and not isinstance(error, KeyboardInterrupt)
                message, code = explain(KeyboardInterrupt() if made_of_it else error)
                print(printable(message if code == 130 else f"Error: {message}"), file=sys.stderr)
                exec("")  # Python ends by SIGINT if KeyboardInterrupt left a library's exec(), as of a dataclass, last
                raise typer.Exit(code) from error
        if lost := lost_output():
            print(f"The output is not complete: {lost}", file=sys.stderr)
            raise typer.Exit(0 if command.__name__ == "train" else 1)  # what train is asked for are files

    return guarded


def _path(value: Any) -> Any:
    """A path with ``~`` replaced, which shells leave alone in ``--lora=~/file``; any other value as it is."""
    if isinstance(value, tuple):
        return tuple(map(_path, value))
    return expanded(value) if isinstance(value, Path) else value


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Inside the block Ctrl-C raises KeyboardInterrupt, and is noted: a library that is being imported may make another
    error of it."""
    got: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        got.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored: the command was started in the background
        yield got
        return
    signal.signal(signal.SIGINT, on_signal)
    try:
        yield got
    finally:
        signal.signal(signal.SIGINT, before)


def _version(wanted: bool) -> None:
    if wanted:
        from lowmem_drf import __version__

        print(f"lowmem-drf {__version__}")
        raise typer.Exit


@app.callback(epilog=_example("lowmem-drf train", "lowmem-drf sample --compare", "lowmem-drf export-lora"))
def _main(
    version: Annotated[
        bool, _option("Print the version and exit.", "--version", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks. Also after any command.")] = False,
    # passed by the deepspeed launcher, and ignored: the environment has LOCAL_RANK too
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Diffusion-DRF on consumer GPUs: fine-tune a text-to-video model with a vision-language model as the critic."""


@app.command(epilog=_example("lowmem-drf train", "lowmem-drf train --prompts prompts.txt --steps 300 -s optim.lr=1e-4"))
@_reports_errors
def train(
    preset: Annotated[
        str | None,
        _option("A preset's name or a TOML file. Default: the largest that fits the CUDA card; toy-fast without one."),
    ] = None,
    prompts: PromptFile = None,
    output: Annotated[Path | None, _option("The run's folder. Default: runs/<preset>-<time>.")] = None,
    steps: Annotated[int | None, _option("Number of updates.")] = None,
    seed: Annotated[int | None, _option("Seed of prompt order, noise and LoRA.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --output, or with the latest run.")] = False,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and exit.")] = False,
    num_processes: Annotated[
        int | None,
        _option("Number of processes, each with a card; prompts are split over them (engine zero1, 2 or 3).", min=1),
    ] = None,
    init_lora: Annotated[
        Path | None, _option("A LoRA file to begin with; its rank, alpha and layers are taken unless -s sets them.")
    ] = None,
    vram: Annotated[
        str | None, _option("Set the run to fit this much of the card, for example 12GB. Default: all that is free.")
    ] = None,
) -> None:
    """Train a LoRA with Diffusion-DRF, then compare base and tuned."""
    from lowmem_drf.commands.train import train_command

    train_command(preset, prompts, output, steps, seed, resume, set_ or [], dry_run, num_processes, init_lora, vram)


@app.command(
    epilog=_example(
        'lowmem-drf sample --prompt "a red circle moves left on a gray background" --compare',
        'lowmem-drf sample --preset rtx4090 --lora style.safetensors --prompt "a corgi surfing a wave"',
    )
)
@_reports_errors
def sample(
    run: Annotated[Path | None, _option("A run's folder. Default: the latest under runs/.")] = None,
    preset: Annotated[
        str | None, _option("In place of a run: a preset's name or a TOML file, to try a LoRA file before training.")
    ] = None,
    lora: Annotated[
        Path | None, _option("A LoRA file to use instead of the run's LoRA; without it a preset shows the base model.")
    ] = None,
    prompt: Annotated[list[str] | None, _option("A prompt; repeatable.")] = None,
    image: Annotated[
        Path | None, _option("An image with which the clips of --prompt begin, of a model that takes one.")
    ] = None,
    prompts: PromptFile = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Base and tuned side by side from the same noise.")
    ] = False,
    lora_scale: Annotated[
        float, typer.Option(help="Strength of the LoRA: 0 is the base model, 1 the tuned one.")
    ] = 1.0,
    best: Best = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    output: Annotated[
        Path | None,
        _option("MP4 file, or a folder for several clips. Default: samples/ in the run, or here with --preset."),
    ] = None,
    set_: Set = None,
    force: Force = False,
) -> None:
    """Generate MP4 clips with a run's LoRA, or with a preset's model and any LoRA file; --compare puts the base model's
    clip beside each."""
    from lowmem_drf.commands.sample import sample_command

    sample_command(
        run, lora, prompt or [], prompts, image, compare, lora_scale, seed, output, force, preset, set_ or [], best
    )


@app.command(
    "export-lora",
    epilog=_example("lowmem-drf export-lora", "lowmem-drf export-lora runs/toy-1 --format diffusers --dtype fp32"),
)
@_reports_errors
def export_lora(
    run: Run = None,
    step: Annotated[int | None, _option("Step of the checkpoint. Default: the last.")] = None,
    best: Best = False,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format", help="comfyui (the default; diffusers loads it too), diffusers, or kohya (musubi-tuner)."
        ),
    ] = None,
    dtype: Annotated[str | None, _option("bf16, fp16 or fp32. Default: the run's dtype (ToyWorld: fp32).")] = None,
    output: Annotated[Path | None, _option("The file to write. Default: in the run.")] = None,
    merge: Annotated[Path | None, _option("Folder for the whole model with the LoRA merged in.")] = None,
    force: Force = False,
) -> None:
    """Write the LoRA as one verified file that ComfyUI and diffusers load."""
    from lowmem_drf.commands.export_lora import export_run
    from lowmem_drf.training.run_folder import find_run

    print(printable(str(export_run(find_run(run), step, format_, dtype, output, merge, force, best))))


@app.command(
    "inspect-lora", epilog=_example("lowmem-drf inspect-lora style.safetensors", "lowmem-drf inspect-lora FILE --json")
)
@_reports_errors
def inspect_lora(
    file: Annotated[Path, typer.Argument(help="A LoRA in safetensors format, or the folder of a peft adapter.")],
    json_: Json = False,
) -> None:
    """Say what a LoRA file is: its model, rank and layers, the size of its changes, and which programs take it as it
    is. Needs no model and no card."""
    from lowmem_drf.commands.inspect_lora import inspect_command

    inspect_command(file, json_)


@app.command(
    "eval",
    epilog=_example(
        "lowmem-drf eval",
        "lowmem-drf eval runs/toy-1 --prompts heldout.txt --json",
        "lowmem-drf eval --preset rtx4090 --lora style.safetensors --prompts heldout.txt",
        "lowmem-drf eval --critic toyworld-reader",
        "lowmem-drf eval --prompts prompts.txt --seeds 5 --export vbench clips",
    ),
)
@_reports_errors
def evaluate(
    run: Run = None,
    prompts: PromptFile = None,
    seeds: Annotated[int | None, _option("Clips of each prompt and model. Default: 2.", min=1, max=1000)] = None,
    critic: Annotated[str | None, _option("A second critic, which training never asked: as critic.id.")] = None,
    export: Annotated[tuple[str, Path] | None, _option("Write all clips for VBench.", metavar="vbench DIR")] = None,
    vbench_scores: Annotated[
        Path | None, _option("A folder of --export: show VBench's scores too.", metavar="DIR")
    ] = None,
    best: Best = False,
    json_: Json = False,
    preset: Annotated[
        str | None, _option("In place of a run: a preset's name or a TOML file, to compare a LoRA file with its base.")
    ] = None,
    lora: Annotated[Path | None, _option("A LoRA file to use instead of the run's LoRA.")] = None,
    set_: Set = None,
) -> None:
    """Compare base and tuned on held-out prompts, with intervals: reward, held-out questions, a second critic,
    measures of the clips, and in ToyWorld the oracle's rates."""
    from lowmem_drf.commands.eval import eval_command

    eval_command(run, prompts, json_, seeds, critic, export, vbench_scores, best, preset, lora, set_ or [])


@app.command(epilog=_example("lowmem-drf report", "lowmem-drf report runs/toy-1 --saliency"))
@_reports_errors
def report(
    run: Run = None,
    output: Annotated[Path | None, _option("The HTML file. Default: report.html in the run.")] = None,
    saliency: Annotated[
        bool, typer.Option("--saliency", help="Load the critic, and show where the reward's gradient points.")
    ] = False,
    force: Force = False,
) -> None:
    """Write one HTML file about a run: verdict, clips of base and tuned, curves with the watch's alarm, questions, time
    and memory. Needs no network, no model and no card."""
    from lowmem_drf.commands.report import report_command

    report_command(run, output, saliency, force)


@app.command(
    epilog=_example(
        'lowmem-drf score clip.mp4 --prompt "a red circle moves left on a gray background" --saliency heat.mp4'
    )
)
@_reports_errors
def score(
    video: Annotated[Path, typer.Argument(help="Any video: MP4, MOV, WebM, MKV, GIF.")],
    prompt: Annotated[str, typer.Option(help="The prompt that the video should match.")],
    saliency: Annotated[Path | None, _option("Write an MP4 that shows where the reward's gradient points.")] = None,
    preset: Annotated[str | None, _option("The preset whose critic is asked. Default: as train chooses.")] = None,
    critic: Annotated[str | None, _option("A transformers folder, a Hugging Face id, or toyworld.")] = None,
    quant: Annotated[str | None, _option("none or nf4.")] = None,
    frames: Annotated[str | None, _option('How many frames the critic sees, or a rate: "fps:2".')] = None,
    mode: Annotated[str | None, _option("yesno, dense, both (the default) or vanilla.")] = None,
    set_: Set = None,
    json_: Json = False,
    force: Force = False,
) -> None:
    """Show the critic's answer to every question about a video, and where the reward's gradient points."""
    from lowmem_drf.commands.score import score_command

    score_command(video, prompt, saliency, json_, preset, critic, quant, frames, mode, set_ or [], force)


@app.command(
    epilog=_example(
        'lowmem-drf questions "a red ball rolls off a table"',
        "lowmem-drf questions --prompts prompts.txt --output questions.json",
        "lowmem-drf questions --prompts prompts.txt --write",
        "lowmem-drf questions --check questions.json",
    )
)
@_reports_errors
def questions(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="A prompt.", show_default=False)] = None,
    prompts: PromptFile = None,
    preset: Annotated[str | None, _option("The preset that sets critic.mode and critic.questions.")] = None,
    set_: Set = None,
    output: Annotated[
        Path | None, _option("Write a JSON file to edit; train reads it with -s critic.questions=FILE.")
    ] = None,
    json_: Json = False,
    write: Annotated[bool, _option("Load the critic, and show the questions that it writes and checks.")] = False,
    check: Annotated[Path | None, _option("Load the critic, and check the questions of this file.")] = None,
    force: Force = False,
) -> None:
    """Show the questions that the critic is asked about a prompt, or write them to a file to edit. Without --write or
    --check no model is loaded."""
    from lowmem_drf.commands.questions import questions_command

    questions_command(prompt, prompts, preset, set_ or [], json_, output, write, check, force)


@app.command(
    epilog=_example(
        "lowmem-drf plan --preset rtx4090", "lowmem-drf plan --preset rtx4090 --vram 16GB -s video.frames=49"
    )
)
@_reports_errors
def plan(
    preset: Preset = None,
    vram: Annotated[str | None, _option("The card's memory, for example 24GB. Default: the preset's card.")] = None,
    share: Annotated[
        float | None, _option("Also the time at this share of the card's arithmetic, 0.6 for all.", min=0.01, max=1.0)
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Predict peak memory and time of every stage, without a GPU and without weights, set to fit the card; say what to
    give up if that does not suffice."""
    from lowmem_drf.commands.plan import plan_command

    plan_command(preset, vram, set_ or [], json_, share)


@app.command(epilog=_example("lowmem-drf bench --preset rtx4090 --vram 24GB", "lowmem-drf bench --preset toy --json"))
@_reports_errors
def bench(
    preset: Preset = None,
    vram: Annotated[
        str | None, _option("Set the run to fit this much memory, for example 24GB, and let it take no more.")
    ] = None,
    updates: Annotated[
        int, typer.Option(min=1, max=1000, help="Updates to run. The first is apart: libraries choose their kernels.")
    ] = 3,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Measure updates of a preset on this machine, at true size with random weights, beside their plan. Downloads
    nothing."""
    from lowmem_drf.commands.bench import bench_command

    bench_command(preset, vram, set_ or [], json_, updates)


@app.command(epilog=_example("lowmem-drf doctor", "lowmem-drf doctor --full"))
@_reports_errors
def doctor(
    full: Annotated[
        bool, typer.Option("--full", help="Measure copies and pinned memory, and try every kernel: a minute or two.")
    ] = False,
    json_: Json = False,
) -> None:
    """Look at this machine: packages, card, kernels, memory, disks, models, and which presets fit; say how to mend what
    is broken. Exit code 1 if something is."""
    from lowmem_drf.commands.doctor import doctor_command

    raise typer.Exit(doctor_command(json_, full))


@presets_app.command("list", epilog=_example("lowmem-drf presets list"))
@_reports_errors
def presets_list() -> None:
    """List every preset with its purpose and its card."""
    from lowmem_drf.preset_files import preset_card, preset_summary, presets

    for name, path in presets().items():
        print(f"{name:<20} {preset_summary(path)}\n{'':<20} GPU: {preset_card(path)}")


@presets_app.command("show", epilog=_example("lowmem-drf presets show toy"))
@_reports_errors
def presets_show(name: Annotated[str, typer.Argument(help="A preset's name or a TOML file.")]) -> None:
    """Print a preset."""
    from lowmem_drf.preset_files import preset_text

    print(printable(preset_text(name)), end="")


@presets_app.command(
    "copy", epilog=_example("lowmem-drf presets copy toy mine.toml", "lowmem-drf train --preset mine.toml")
)
@_reports_errors
def presets_copy(
    name: Annotated[str, typer.Argument(help="A preset's name or a TOML file.")],
    target: Annotated[
        Path | None, typer.Argument(help="The new file. Default: NAME.toml here.", show_default=False)
    ] = None,
    force: Force = False,
) -> None:
    """Copy a preset to a new file to edit."""
    from lowmem_drf.files import replaceable
    from lowmem_drf.preset_files import copy_preset

    path = copy_preset(name, target, force)
    if replaceable(path):
        print(printable(f"{path}: edit it, then run: lowmem-drf train --preset {quoted(path)}"))


_flags: set[str] = set()


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if DEBUG in arguments:
        _flags.add(DEBUG)
    with quiet_streams():
        try:
            app([argument for argument in arguments if argument != DEBUG], prog_name="lowmem-drf")
        except Exception as error:  # raised before a command began: Typer imports pydantic when it reads the options
            from lowmem_drf.libraries import broken

            if DEBUG in _flags or not (message := broken(error)):
                raise
            sys.exit(f"Error: {message}")
