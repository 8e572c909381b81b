"""The command line. Commands are short and import inside, so that ``--help`` needs no torch."""

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_drf.errors import DEBUG, explain

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
presets_app = typer.Typer(no_args_is_help=True, help="The presets: list, show, copy.")
app.add_typer(presets_app, name="presets")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override any configuration key; repeatable."),
]
Run = Annotated[
    Path | None,
    typer.Argument(metavar="[RUN]", help="A run's folder. Default: the latest under runs/.", show_default=False),
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="A prompt file: txt (one a line) or jsonl.", show_default=False)
]


def _example(*lines: str) -> str:
    return "[bold]Example:[/bold] " + "  ·  ".join(f"[cyan]{line}[/cyan]" for line in lines)


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors on stderr in a few lines with the cure; exit code 1 failed, 2 bad input, 130 interrupted. ``--debug``
    shows where."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of an accelerator that is not used here
        try:
            command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, typer.Exit):
                raise
            if DEBUG in _flags:
                traceback.print_exception(error)
            message, code = explain(error)
            typer.echo(message if code == 130 else f"Error: {message}", err=True)
            raise typer.Exit(code) from error

    return guarded


def _version(wanted: bool) -> None:
    if wanted:
        from lowmem_drf import __version__

        typer.echo(f"lowmem-drf {__version__}")
        raise typer.Exit


@app.callback(epilog=_example("lowmem-drf train", "lowmem-drf sample --compare", "lowmem-drf export-lora"))
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks. Also after any command.")] = False,
    # of the deepspeed launcher; LOCAL_RANK says it too
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Diffusion-DRF on consumer GPUs: fine-tune a text-to-video model with a vision-language model as the critic."""


@app.command(epilog=_example("lowmem-drf train", "lowmem-drf train --prompts prompts.txt --steps 300 -s optim.lr=1e-4"))
@_reports_errors
def train(
    preset: Annotated[
        str | None,
        typer.Option(
            help="A preset's name or a TOML file. Default: toy without a CUDA card, else the largest that fits the card.",
            show_default=False,
        ),
    ] = None,
    prompts: PromptFile = None,
    output: Annotated[
        Path | None, typer.Option(help="The run's folder. Default: runs/<preset>-<time>.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of prompts, noise and LoRA.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --output, or with the latest run.")] = False,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and exit.")] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes, a card each: prompts are split over them (engine zero1, zero2, zero3).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a LoRA with Diffusion-DRF, then show base against tuned."""
    from lowmem_drf.commands.train import train_command

    train_command(preset, prompts, output, steps, seed, resume, set_ or [], dry_run, num_processes)


@app.command(epilog=_example('lowmem-drf sample --prompt "a red circle moves left on a gray background" --compare'))
@_reports_errors
def sample(
    run: Annotated[
        Path | None, typer.Option(help="A run's folder. Default: the latest under runs/.", show_default=False)
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA file in place of the run's.", show_default=False)] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.", show_default=False)] = None,
    prompts: PromptFile = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Base and tuned side by side, from the same noise.")
    ] = False,
    lora_scale: Annotated[float, typer.Option(help="0 is the base model, 1 the tuned one.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="MP4 file, or a folder for several. Default: in the run.", show_default=False)
    ] = None,
) -> None:
    """Write MP4 clips of a run's model, with --compare beside the base model's."""
    from lowmem_drf.commands.sample import sample_command

    sample_command(run, lora, prompt or [], prompts, compare, lora_scale, seed, output)


@app.command(
    "export-lora",
    epilog=_example("lowmem-drf export-lora", "lowmem-drf export-lora runs/toy-1 --format diffusers --dtype fp32"),
)
@_reports_errors
def export_lora(
    run: Run = None,
    step: Annotated[
        int | None, typer.Option(help="The checkpoint's step. Default: the last.", show_default=False)
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="comfyui (diffusers loads it too), diffusers, or kohya (musubi-tuner).")
    ] = "comfyui",
    dtype: Annotated[
        str | None,
        typer.Option(help="bf16, fp16 or fp32. Default: the run's own (ToyWorld: fp32).", show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The file. Default: in the run.", show_default=False)] = None,
    merge: Annotated[
        Path | None, typer.Option(help="Write a whole model with the LoRA merged in here.", show_default=False)
    ] = None,
) -> None:
    """Write the LoRA as one file that ComfyUI and diffusers load; it is verified before it is announced."""
    from lowmem_drf.commands.export_lora import export_run
    from lowmem_drf.training.run_folder import find_run

    typer.echo(export_run(find_run(run), step, format_, dtype, output, merge))


@app.command("eval", epilog=_example("lowmem-drf eval", "lowmem-drf eval runs/toy-1 --prompts heldout.txt --json"))
@_reports_errors
def evaluate(
    run: Run = None,
    prompts: PromptFile = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare base and tuned on held-out prompts: reward, held-out questions, diversity, motion; in ToyWorld the
    oracle's truth."""
    from lowmem_drf.commands.eval import eval_command

    eval_command(run, prompts, json_)


@app.command(
    epilog=_example(
        'lowmem-drf score clip.mp4 --prompt "a red circle moves left on a gray background" --saliency heat.mp4'
    )
)
@_reports_errors
def score(
    video: Annotated[Path, typer.Argument(help="Any video: MP4, MOV, WebM, MKV, GIF.")],
    prompt: Annotated[str, typer.Option(help="What it should show.")],
    saliency: Annotated[
        Path | None,
        typer.Option(help="Write an MP4 that shows where the reward's gradient points.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Whose critic is asked. Default: as train chooses.", show_default=False)
    ] = None,
    critic: Annotated[
        str | None, typer.Option(help="A transformers folder, a Hugging Face id, or toyworld.", show_default=False)
    ] = None,
    quant: Annotated[str | None, typer.Option(help="none or nf4.", show_default=False)] = None,
    frames: Annotated[
        str | None, typer.Option(help='How many frames it sees, or a rate: "fps:2".', show_default=False)
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="yesno, dense, both (the default) or vanilla.", show_default=False)
    ] = None,
    set_: Set = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the critic's answer to every question about a video, and where its gradient points."""
    from lowmem_drf.commands.score import score_command

    score_command(video, prompt, saliency, json_, preset, critic, quant, frames, mode, set_ or [])


@app.command(
    epilog=_example(
        'lowmem-drf questions "a red ball rolls off a table"',
        "lowmem-drf questions --prompts prompts.txt --output questions.json",
    )
)
@_reports_errors
def questions(
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="A prompt.", show_default=False)] = None,
    prompts: PromptFile = None,
    preset: Annotated[
        str | None, typer.Option(help="Whose critic.mode and critic.questions are taken.", show_default=False)
    ] = None,
    set_: Set = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write them as JSON to edit; train -s critic.questions=FILE reads it.", show_default=False),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the questions a prompt gives, or write them to a file to edit."""
    from lowmem_drf.commands.questions import questions_command

    questions_command(prompt, prompts, preset, set_ or [], json_, output)


@app.command(
    epilog=_example(
        "lowmem-drf plan --preset rtx4090", "lowmem-drf plan --preset rtx4090 --vram 16GB -s video.frames=49"
    )
)
@_reports_errors
def plan(
    preset: Annotated[
        str | None, typer.Option(help="A preset's name or a TOML file. Default: as train chooses.", show_default=False)
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option(
            help="The card's memory, for example 24GB. Default: that of the preset's card.", show_default=False
        ),
    ] = None,
    set_: Set = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the peak memory and the time of every stage, without a GPU and without weights; say what to change where
    it does not fit."""
    from lowmem_drf.commands.plan import plan_command

    plan_command(preset, vram, set_ or [], json_)


@app.command(epilog=_example("lowmem-drf bench --preset rtx4090 --vram 24GB", "lowmem-drf bench --preset toy --json"))
@_reports_errors
def bench(
    preset: Annotated[
        str | None, typer.Option(help="A preset's name or a TOML file. Default: as train chooses.", show_default=False)
    ] = None,
    vram: Annotated[
        str | None, typer.Option(help="Let the allocator have no more than this, for example 24GB.", show_default=False)
    ] = None,
    set_: Set = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure one update of a preset at true size with random weights on this machine, beside its plan. Downloads
    nothing."""
    from lowmem_drf.commands.bench import bench_command

    bench_command(preset, vram, set_ or [], json_)


@presets_app.command("list", epilog=_example("lowmem-drf presets list"))
@_reports_errors
def presets_list() -> None:
    """Name, card and purpose of every preset."""
    from lowmem_drf.config import preset_card, preset_summary, presets

    for name, path in presets().items():
        typer.echo(f"{name:<20} {preset_summary(path)}\n{'':<20} GPU: {preset_card(path)}")


@presets_app.command("show", epilog=_example("lowmem-drf presets show toy"))
@_reports_errors
def presets_show(name: Annotated[str, typer.Argument(help="A preset.")]) -> None:
    """Print a preset."""
    from lowmem_drf.config import preset_path

    typer.echo(preset_path(name).read_text(encoding="utf-8"), nl=False)


@presets_app.command(
    "copy", epilog=_example("lowmem-drf presets copy toy mine.toml", "lowmem-drf train --preset mine.toml")
)
@_reports_errors
def presets_copy(
    name: Annotated[str, typer.Argument(help="A preset.")],
    target: Annotated[Path | None, typer.Argument(help="Default: NAME.toml here.", show_default=False)] = None,
) -> None:
    """Copy a preset to edit it."""
    from lowmem_drf.config import copy_preset

    path = copy_preset(name, target)
    typer.echo(f"{path}: edit it, then run: lowmem-drf train --preset {path}")


_flags: set[str] = set()


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if DEBUG in arguments:
        _flags.add(DEBUG)
    app([argument for argument in arguments if argument != DEBUG], prog_name="lowmem-drf")


if __name__ == "__main__":
    main()
