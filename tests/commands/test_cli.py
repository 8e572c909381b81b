"""The command line: help, exit codes, errors that carry their cure, and every command once on tiny models."""

import errno
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from _root import ROOT
from safetensors import SafetensorError
from safetensors.torch import save_file
from typer.testing import CliRunner

from bench.bad_inputs.refusals import faults
from bench.bad_inputs.rows import ROWS
from lowmem_drf import __version__, cli
from lowmem_drf.config import load_config
from lowmem_drf.video import read_video

PROMPT = "a red circle moves left on a gray background"
COMMANDS = (
    *("train", "sample", "export-lora", "inspect-lora", "eval", "score", "questions", "plan", "bench", "doctor"),
    *("report", "presets list", "presets show", "presets copy"),
)


@pytest.fixture
def run_cli(tmp_path, monkeypatch):
    """Runs a command, words in one text and more after it, in an empty folder. Returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_flags", set())

    def run(command, *more):
        result = CliRunner().invoke(cli.app, [*command.split(), *more])
        return result.exit_code, result.stdout, result.stderr

    return run


def commands():
    group = typer.main.get_command(cli.app)
    flat = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        flat |= {f"{name} {sub}": c for sub, c in inner.items()} if inner else {name: command}
    return flat


def test_help_is_fast_and_loads_no_torch():
    code = (
        "import sys; from lowmem_drf import cli\n"
        "try: cli.main(['--help'])\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        before = sum(os.times()[2:4])  # CPU seconds of children, which other processes on the machine do not change
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        seconds.append(sum(os.times()[2:4]) - before)
        assert done.returncode == 0
        assert done.stderr.strip() == "False"
    assert min(seconds) < 0.5


def test_these_commands_and_no_others():
    assert set(commands()) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_of_that_command(name, run_cli):
    code, out, _ = run_cli(name, "--help")
    assert code == 0
    assert "Example:" in out and f"lowmem-drf {name}" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_at_most_fifteen_lines_and_import_inside(name):
    function = inspect.unwrap(commands()[name].callback)
    body = inspect.getsource(function).split('"""', 2)[2]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15


def test_version(run_cli):
    assert run_cli("--version") == (0, f"lowmem-drf {__version__}\n", "")


def test_the_file_itself_runs():
    done = subprocess.run([sys.executable, "cli.py", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"lowmem-drf {__version__}\n", done.stderr


@pytest.mark.parametrize("preset", ["toy-fast", "rtx3060-sd35"], ids=["the_default", "images"])
def test_dry_run_prints_a_configuration_that_loads_and_writes_nothing(run_cli, tmp_path, preset):
    named = "" if preset == "toy-fast" else f" --preset {preset}"
    code, out, _ = run_cli(f"train{named} --dry-run --steps 7 --seed 3 --vram 12GB -s optim.lr=1e-3")
    assert code == 0
    file = tmp_path / "resolved.toml"
    file.write_text(out, encoding="utf-8")
    assert load_config(file) == load_config(preset, ["steps=7", "seed=3", "memory.vram_gib=12", "optim.lr=1e-3"])
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "part",
    [
        "train --preset toi",
        "train --prompts latin.txt",
        "train --output empty.txt/run",
        "sample",
        "presets copy toy mine",
    ],
)
def test_bad_input_is_one_message_with_its_cure_and_exit_code_2(run_cli, tmp_path, part):
    """One row of each kind of ``bench.bad_inputs``; tests/bench/test_bad_inputs.py runs them all."""
    command, cure = next(row for row in ROWS if row[0].startswith(part))
    (tmp_path / "latin.txt").write_bytes("Mädchen".encode("latin-1"))
    for name in ("empty.txt", "mine.toml"):
        (tmp_path / name).touch()
    code, out, err = run_cli(command)
    assert (out, faults(code, err, cure)) == ("", [])
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt", "latin.txt", "mine.toml"}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Interrupted."),
        (KeyboardInterrupt("Saved."), 130, "Saved."),
        (OSError(28, "No space left on device", "x"), 1, "free disk space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "free disk space"),
        (MemoryError("too big"), 1, "micro_batch=1"),
        (ZeroDivisionError("odd"), 1, "--debug"),
    ],
)
def test_failures_end_in_few_lines_with_their_exit_code(run_cli, monkeypatch, error, code, said):
    def fail(*_):
        raise error

    monkeypatch.setattr("lowmem_drf.commands.train.train_command", fail)
    result = run_cli("train")
    assert result[0] == code
    assert said in result[2] and "Traceback" not in result[2]


def test_debug_shows_the_traceback_wherever_it_stands():
    done = subprocess.run(
        [sys.executable, "cli.py", "presets", "show", "toi", "--debug"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "BadInputError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: there is no preset 'toi'.")


def test_an_interruption_stays_130_under_debug(run_cli, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt("Saved.")

    monkeypatch.setattr("lowmem_drf.commands.train.train_command", interrupt)
    monkeypatch.setattr(cli, "_flags", {cli.DEBUG})
    assert run_cli("train")[0] == 130


def test_an_interruption_that_a_library_makes_an_error_of_stays_one(run_cli, monkeypatch):
    """As numpy does while it is imported."""

    def interrupted(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("multiarray failed to import") from None

    monkeypatch.setattr("lowmem_drf.commands.train.train_command", interrupted)
    assert run_cli("train") == (130, "", "Interrupted.\n")


def test_a_read_only_place_is_refused_and_left_as_it_was(run_cli, tmp_path, monkeypatch):
    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "touch", read_only)  # root may write wherever mode bits forbid it
    code, out, err = run_cli("train --output a/run")
    assert (code, out) == (2, "")
    assert err == "Error: a/run cannot be written to: Read-only file system. Give another folder with --output.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_refused_with_the_way_to_go_on(run_cli, tiny_run, tiny_preset):
    code, out, err = run_cli("train --preset", str(tiny_preset), "--output", str(tiny_run))
    assert (code, out) == (2, "")
    assert "already holds a run (config.toml, metrics.jsonl, checkpoints, samples, tensorboard)." in err
    assert f"Go on with it: lowmem-drf train --resume --output {tiny_run}" in err


def test_advised_commands_can_be_pasted(run_cli, tmp_path):
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "config.toml").touch()
    assert "--resume --output 'my run';" in run_cli("train --output", "my run")[2]
    assert "--preset 'my toy.toml'" in run_cli("presets copy toy", "my toy.toml")[1]
    said = run_cli("questions --output", "it's.json", PROMPT)[1]
    assert shlex.split(said.partition("run: ")[2])[-1] == "critic.questions=it's.json"


def test_a_new_run_replaces_no_questions_of_a_user(run_cli, tmp_path):
    (tmp_path / "questions.json").write_text("mine")
    code, _, err = run_cli("train --output .")
    assert code == 2 and "holds questions.json, which the run would overwrite. Move it elsewhere" in err


@pytest.mark.parametrize("option", ["train --preset", "plan --preset", "train --output", "export-lora --merge", "eval"])
def test_an_empty_argument_is_not_the_default(option, run_cli, tmp_path):
    code, out, err = run_cli(option, "")
    assert (code, out) == (2, "") and f"{option.split()[-1]} is empty" in err
    assert list(tmp_path.iterdir()) == []


def test_the_default_preset_is_named_with_its_reason(run_cli, tmp_path, tiny_preset, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lowmem_drf.preset_files.default_preset", lambda card_gb: str(tiny_preset))
    code, out, err = run_cli("train --steps 1 -s log.sample_every=0")
    assert code == 0, err
    assert f"preset {tiny_preset} (the default: there is no CUDA card)" in out


def test_a_prompt_file_may_have_any_name(run_cli, tmp_path):
    (tmp_path / "🎬 clips.txt").write_text(PROMPT)
    code, out, err = run_cli("train --dry-run --prompts", "🎬 clips.txt")
    assert code == 0, err
    assert f'prompts = "{tmp_path / "🎬 clips.txt"}"' in out


def test_presets(run_cli, tmp_path):
    out = run_cli("presets list")[1]
    assert "ToyWorld" in out and "GPU: none needed" in out
    assert 'id = "toyworld"' in run_cli("presets show toy")[1]
    code, out, _ = run_cli("presets copy toy mine.toml")
    assert code == 0 and "--preset mine.toml" in out
    assert load_config(tmp_path / "mine.toml") == load_config("toy")


def test_train_then_sample_then_export_without_arguments(run_cli, tmp_path, tiny_preset):
    code, out, err = run_cli("train --steps 1 -s log.eval_prompts=2 --preset", str(tiny_preset))
    assert code == 0, err
    for part in ("base", "tuned", "reward", "TA", "diversity", "lowmem-drf sample --compare", "lowmem-drf export-lora"):
        assert part in out
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-")
    code, out, err = run_cli("sample")
    assert code == 0, err
    assert read_video(tmp_path / out.strip())[0].shape == (9, 3, 256, 256)
    code, out, err = run_cli("export-lora")
    assert code == 0, err
    assert "fp32" in out  # the tiny models' dtype
    assert "maximum difference from the tuned model's output" in out
    assert [path for path in run.iterdir() if path.suffix == ".safetensors"]


def test_sample_compare_shows_base_and_tuned_from_the_same_noise(run_cli, tmp_path, tiny_run):
    common = ["--run", str(tiny_run), "--prompt", PROMPT]
    assert run_cli("sample --seed 3 --compare --output both.mp4", *common)[0] == 0
    assert run_cli("sample --seed 3 --lora-scale 0 --output base.mp4", *common)[0] == 0
    both, base = read_video(tmp_path / "both.mp4")[0], read_video(tmp_path / "base.mp4")[0]
    assert both.shape == (9, 3, 256 + 18, 2 * 256 + 4)
    assert (both[..., 18:, :256] - base).abs().mean() < 4 / 255  # two codings of the same clip
    assert {path.name for path in tmp_path.iterdir()} == {"both.mp4", "base.mp4"}


def test_sample_takes_a_lora_file_and_refuses_another_models(run_cli, tmp_path, tiny_run):
    from safetensors.torch import load_file

    good = tiny_run / "checkpoints" / "step-000004" / "lora.safetensors"
    common = ["--run", str(tiny_run), "--prompt", PROMPT]
    code, out, err = run_cli("sample --output clips --lora", str(good), *common)
    assert code == 0, err
    assert (tmp_path / out.strip()).is_file()
    other = {name.replace("blocks.0", "blocks.77"): tensor for name, tensor in load_file(good).items()}
    save_file(other, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name, said in (
        ("other.safetensors", "does not fit this model"),
        ("text.safetensors", "safetensors"),
        ("none.safetensors", "no file"),
    ):
        code, out, err = run_cli(f"sample --lora {name} --output never", *common)
        assert (code, out) == (2, "")
        assert said in err
    assert not (tmp_path / "never").exists()


def test_sample_of_several_prompts_writes_a_folder(run_cli, tmp_path, tiny_run):
    (tmp_path / "p.txt").write_text(f"{PROMPT}\na blue square moves up on a black background\n")
    code, _, err = run_cli("sample --prompts p.txt --output clips --run", str(tiny_run))
    assert code == 0, err
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 2
    alike = ["红" * 100, "红" * 101, "🎬"]
    given = [word for text in alike for word in ("--prompt", text)]
    code, out, err = run_cli("sample --output clips --run", str(tiny_run), *given)
    assert code == 0 and len(list((tmp_path / "clips").glob("*.mp4"))) == 5, err
    assert all("红红红" in name for name in out.splitlines()[:2])
    again = run_cli("sample --output clips --run", str(tiny_run), *given)
    assert again[:2] == (0, out), "clips that the command made may be made again"
    (tmp_path / "old.mp4").mkdir()
    (tmp_path / "mine.mp4").write_text("a film")
    for arguments, said in (
        (["--prompts", "p.txt", "--output", "one.mp4"], "Give a folder"),
        (["--output", "a.gif"], ".mp4"),
        (["--output", "old.mp4"], "is a folder"),
        (["--output", "mine.mp4"], "--force"),
        (["--output", "/dev/null"], "Give another folder"),
        (["--prompt", " "], "empty"),
    ):
        code, _, err = run_cli("sample --run", str(tiny_run), *arguments)
        assert code == 2
        assert said in err


def test_sample_of_a_preset_tries_a_lora_without_a_run(run_cli, tmp_path, tiny_run, tiny_preset):
    """Its clips are those of a run; no critic is needed, other settings make another file, the run is left alone."""
    before = sorted(tiny_run.rglob("*"))
    lora = ["--lora", str(tiny_run / "checkpoints" / "step-000004" / "lora.safetensors")]
    common = ["--preset", str(tiny_preset), "--prompt", PROMPT, "-s", "critic.id=./nowhere"]
    tuned = run_cli("sample", *common, *lora)
    assert tuned[0] == 0, tuned[2]
    assert "base model" not in tuned[2] and tuned[1].startswith("samples/tiny/lora-")
    base = run_cli("sample", *common)
    assert base[0] == 0 and "no --lora: these are clips of the base model" in base[2]
    assert base[1].startswith("samples/tiny/base/")
    code, _, err = run_cli("sample --output run.mp4 --run", str(tiny_run), "--prompt", PROMPT)
    assert code == 0, err
    clips = [(tmp_path / path.strip()).read_bytes() for path in (tuned[1], base[1], "run.mp4")]
    assert clips[0] == clips[2] != clips[1]
    short = run_cli("sample -s video.frames=5", *common)[1].strip()
    assert [len(read_video(tmp_path / path)[0]) for path in (short, base[1].strip())] == [5, 9]
    assert sorted(tiny_run.rglob("*")) == before
    merged = {"diffusion_model.head.head.diff_b": torch.full((16,), 2.0)}
    save_file(merged, tmp_path / "bias.safetensors")
    said = run_cli("sample --compare --output both.mp4 --lora bias.safetensors", *common)
    assert said[0] == 0 and "clips of the base first" in said[2]
    assert run_cli("sample --compare --output none.mp4 --lora-scale 0 --lora bias.safetensors", *common)[0] == 0
    both, none = (read_video(tmp_path / name)[0][:, :, 40:] for name in ("both.mp4", "none.mp4"))
    half = both.shape[-1] // 2
    base, tuned = (
        (one - other).abs().mean() for one, other in zip(both.split(half, -1), none.split(half, -1), strict=True)
    )
    assert base < 4 / 255 < tuned, "two codings of the same clip, and of two clips"


def test_inspect_lora_of_a_checkpoint(run_cli, tiny_run, monkeypatch):
    file = tiny_run / "checkpoints" / "step-000004" / "lora.safetensors"
    monkeypatch.setenv("HOME", str(tiny_run))
    code, out, err = run_cli("inspect-lora ~/checkpoints/step-000004/lora.safetensors")  # as from --lora=~/file
    assert (code, err) == (0, "")
    assert "attention and feed-forward of 2 blocks (0-1)" in out and "lowmem-drf (a checkpoint)" in out
    assert json.loads(run_cli("inspect-lora --json", str(file))[1])["model"]["width"] == 24
