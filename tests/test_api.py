"""The Python API: what its functions return, that commands give the same, and how a callback ends a run."""

import json
import threading
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

import lowmem_drf
from lowmem_drf import api, cli
from lowmem_drf.errors import BadInputError
from lowmem_drf.training.metrics import read_metrics

PROMPTS = ["a red circle moves left on a gray background", "a blue square moves up on a black background"]
FEW = {"log": {"sample_every": 0}, "batch": 2, "critic.questions": "phrases"}


def command(*words):
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def silent(capfd):
    """Fails if the test printed anything."""
    yield
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_package_has_the_functions_and_no_others():
    for name in lowmem_drf.API:
        assert getattr(lowmem_drf, name) is getattr(api, name) and getattr(api, name).__doc__
    assert set(lowmem_drf.API) <= set(dir(lowmem_drf))
    with pytest.raises(AttributeError, match="tune"):
        lowmem_drf.tune  # noqa: B018


def test_a_callback_ends_a_run_which_goes_on_to_the_same_bytes(tiny_preset, tmp_path, silent):
    rows, common = [], {"prompts": PROMPTS, "settings": {**FEW, "log.checkpoint_every": 9}}
    whole = api.train(tiny_preset, output=tmp_path / "whole", steps=3, on_update=rows.append, **common)
    assert rows == whole.metrics() == read_metrics(whole.folder) and len(rows) == 3
    run = api.train(tiny_preset, output=tmp_path / "run", steps=3, on_update=lambda row: row["step"] < 2, **common)
    assert (run.folder, run.step, run.result) == (tmp_path / "run", 2, None)
    with pytest.raises(BadInputError, match="other prompts"):
        api.train(output=run, resume=True, prompts=PROMPTS[:1])
    assert api.train(output=run, resume=True, prompts=PROMPTS) == run
    assert run.lora.read_bytes() == whole.lora.read_bytes()


def test_an_error_of_a_callback_is_raised_when_its_update_is_saved(tiny_preset, tmp_path, silent):
    def fails(row):
        raise ZeroDivisionError("mine")

    settings = {**FEW, "log.checkpoint_every": 9}
    with pytest.raises(ZeroDivisionError, match="mine"):
        api.train(tiny_preset, output=tmp_path / "run", on_update=fails, settings=settings)
    assert api.Run(tmp_path / "run").step == 1


def test_a_thread_trains_and_a_console_hears_of_it(tiny_preset, tmp_path, capfd):
    console, runs = Console(record=True, file=(tmp_path / "log").open("w"), width=100), []

    def work():
        settings = {**FEW, "log.eval_prompts": 1}
        runs.append(api.train(tiny_preset, output=tmp_path / "run", steps=1, settings=settings, console=console))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (run,) = runs
    assert run.result.prompts == 1 and set(run.result.base.reward_by_aspect) == {"TA", "Phy", "VQ"}
    said = console.export_text()
    assert f"run: {run.folder}" in said and "update 1/1" in said and "Base against tuned" in said
    assert tuple(capfd.readouterr()) == ("", "")


def test_sample_and_score_give_what_the_commands_give(tiny_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (clip,) = api.sample(tiny_run, prompts=PROMPTS[:1], seed=3, output="own.mp4", settings={"video": {"frames": 5}})
    words = ("--run", tiny_run, "--prompt", PROMPTS[0], "--seed", 3, "-s", "video.frames=5")
    assert command("sample", *words, "--output", "its.mp4") == "its.mp4\n"
    assert (clip.path, clip.prompt) == (Path("own.mp4"), PROMPTS[0])
    assert clip.path.read_bytes() == Path("its.mp4").read_bytes()
    assert clip.frames().shape == (5, 3, 256, 256)
    with pytest.raises(BadInputError, match="list of texts"):
        api.sample(tiny_run, prompts=PROMPTS[0])

    score = api.score(clip.path, PROMPTS[0], preset="toy", mode="yesno", frames=5)
    assert tuple(capfd.readouterr()) == ("", "")
    printed = command(
        "score", "own.mp4", "--prompt", PROMPTS[0], *["--preset", "toy", "--mode", "yesno", "--frames", "5", "--json"]
    )
    assert score.as_json() == json.loads(printed)


def test_evaluate_and_export_give_what_the_commands_give(tiny_run, tiny_preset, tmp_path, monkeypatch, silent):
    """A run's LoRA, and its exported file with the run's preset, are the same model."""
    monkeypatch.chdir(tmp_path)
    result = api.evaluate(tiny_run, prompts=PROMPTS, seeds=1)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    (file,) = api.export_lora(tiny_run, output="own.safetensors").paths
    command("export-lora", tiny_run, "--output", "its.safetensors")
    assert_close(load_file(file), load_file(tmp_path / "its.safetensors"), rtol=0, atol=0)
    words = ("--preset", tiny_preset, "--lora", file, "--prompts", "p.txt", "--seeds", 1, "-s", "log.eval_batch=1")
    other = json.loads(command("eval", *words, "--json"))
    assert [row.prompt for row in result.by_prompt] == PROMPTS
    for side in ("base", "tuned"):
        assert getattr(result, side).reward == pytest.approx(other[side]["reward"], rel=1e-4)
    assert result.change["reward"].mean != 0


def test_a_plan_is_that_of_the_command(silent):
    """Of a configuration that a test of plans has made before, or will."""
    made = api.plan("toy", vram="8GB")
    assert (
        made.fits
        and made.as_json("toy").items()
        <= json.loads(command(*["plan", "--preset", "toy", "--vram", "8GB", "--json"])).items()
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"memory.on_oom": "adapt"}, "does not become"),
        ({"engine": "zero1", "processes": 2, "batch": 2}, "one process"),
        ({"optim": {"lrr": 1}}, "Did you mean optim.lr"),
        ({"optim.lr": object()}, "no configuration holds"),
        ({"lora.rank": True}, "lora.rank"),
    ],
)
def test_a_program_is_told_what_it_cannot_have(settings, said, tiny_preset, tmp_path, silent):
    with pytest.raises(BadInputError, match=said):
        api.train(tiny_preset, output=tmp_path / "run", prompts=PROMPTS, settings=settings, on_update=print)
    assert not list(tmp_path.iterdir())
