"""``lora.scale``: training is at 1, and everything that uses the trained LoRA at this strength."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands.eval import eval_command
from lowmem_drf.commands.export_lora import export_run
from lowmem_drf.commands.sample import sample_command
from lowmem_drf.commands.train import train_command
from lowmem_drf.models.lora.adapter import lora_layers, remove_lora
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.prompts import as_prompts
from lowmem_drf.scoring.alarm import read_looks
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora, overrides_from
from lowmem_drf.training.manifest import read_manifest
from lowmem_drf.training.run_folder import run_config
from lowmem_drf.video import read_video

SCALE = 1.5
SETTINGS = (
    f"lora.scale={SCALE}", "log.watch_every=1", "log.watch_prompts=2", "log.eval_prompts=1", "log.sample_every=4",
    "log.sample_first=false", "log.keep=9",
)  # fmt: skip


@pytest.fixture(scope="module")
def scaled_run(tiny_preset, tmp_path_factory):
    run = tmp_path_factory.mktemp("scaled") / "run"
    train_command(str(tiny_preset), None, run, None, None, False, list(SETTINGS), False)
    return run


def file_of(run, step=None):
    return checkpoint_folder(run, step) / "lora.safetensors"


def test_training_does_not_see_it_and_files_have_it(scaled_run, tiny_run):
    state, plain = load_file(file_of(scaled_run)), load_file(file_of(tiny_run))
    assert state.keys() == plain.keys() and all(torch.equal(state[name], plain[name]) for name in plain)
    pairs, before = (read_lora(file_of(run)).pairs for run in (scaled_run, tiny_run))
    assert [pair.scale for pair in pairs.values()] == [SCALE * pair.scale for pair in before.values()]


def test_on_the_way_it_has_a_part_of_it(scaled_run, tiny_run):
    trained = {pair.scale for pair in read_lora(file_of(tiny_run)).pairs.values()}
    for step in (1, 2, 3, 4):  # of 4
        strong = {pair.scale for pair in read_lora(file_of(scaled_run, step)).pairs.values()}
        assert strong == {scale * (1 + (SCALE - 1) * step / 4) for scale in trained}


@pytest.mark.parametrize("step", [2, 4])
def test_an_export_is_as_strong(scaled_run, step, tmp_path):
    exported = read_lora(export_run(scaled_run, step, output=tmp_path / "lora.safetensors").paths[0])
    for name, other in read_lora(file_of(scaled_run, step)).pairs.items():
        pair = exported.pairs[name]
        change, wanted = pair.scale * pair.b @ pair.a, other.scale * other.b @ other.a
        size = other.scale * other.b.abs() @ other.a.abs()
        # each side rounds twice when the file folds the scale into A and B, in each product, and when it adds two
        assert bool(((change - wanted).abs() <= 2 * 6 * 2**-24 * size).all())


def test_a_run_with_another_strength_exports_what_its_clips_show(scaled_run, tmp_path):
    """As after ``train --resume -s lora.scale=1``: the checkpoint's file is from before."""
    run = shutil.copytree(scaled_run, tmp_path / "run")
    file = run / "config.toml"
    file.write_text(file.read_text(encoding="utf-8").replace(f"scale = {SCALE}", "scale = 1.0"), encoding="utf-8")
    exported = read_lora(export_run(run, output=tmp_path / "lora.safetensors").paths[0])
    alpha = float(exported.metadata["lowmem_drf.alpha"])
    assert alpha == run_config(run).lora.alpha == read_lora(file_of(run)).alpha / SCALE


def test_the_runs_own_clips_and_figures_are_those_of_the_commands_after_it(scaled_run, tmp_path, capsys):
    """In training the LoRA is scaled for a moment, after it the file is: the same model."""
    own = json.loads((scaled_run / "eval.json").read_text(encoding="utf-8"))["result"]
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(own["by_prompt"][0]["prompt"] + "\n", encoding="utf-8")
    capsys.readouterr()
    eval_command(scaled_run, prompt, True, seeds=own["seeds"])
    again = json.loads(capsys.readouterr().out)
    assert own["tuned"]["velocity_norm"] != own["base"]["velocity_norm"]
    assert again["tuned"] == own["tuned"]
    for name, scale in (("clip", 1.0), ("weaker", 1 / SCALE)):
        sample_command(scaled_run, None, (), None, None, False, scale, 0, tmp_path / f"{name}.mp4")
    clip, weaker = (read_video(tmp_path / f"{name}.mp4")[0] for name in ("clip", "weaker"))
    (in_training,) = (scaled_run / "samples" / "step-000004").glob("01-*.mp4")
    assert torch.equal(clip, read_video(in_training)[0])
    assert not torch.equal(clip, weaker)


def test_the_watch_looks_at_it(scaled_run):
    looks = read_looks(scaled_run, 4)[1:]
    assert [look.step for look in looks] == [1, 2, 3, 4]
    for look in looks:
        pairs = read_lora(file_of(scaled_run, look.step)).pairs.values()
        change = sum(((pair.scale * pair.b.double() @ pair.a.double()) ** 2).sum() for pair in pairs).sqrt().item()
        assert look.measures["lora_norm"] == pytest.approx(change, rel=1e-12)  # fp64


def test_a_run_that_goes_on_for_longer_leaves_earlier_updates_as_strong_as_they_were(scaled_run, tmp_path):
    """Their clips, and the look at the last of them that a killed run missed."""
    run = tmp_path / "run"
    shutil.copytree(scaled_run, run)
    looks = (run / "watch.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "watch.jsonl").write_text("".join(looks[:-1]), encoding="utf-8")
    train_command(None, None, run, 5, None, True, [], False)
    assert read_looks(run, 4)[-1].measures == read_looks(scaled_run, 4)[-1].measures
    config = run_config(run)
    models = load_models(config, as_prompts(["a red circle"]), with_critic=False)
    for step in (2, 4, 5):
        load_run_lora(models.transformer, checkpoint_folder(run, step), config)
        loaded = {layer.scaling["default"] for layer in lora_layers(models.transformer).values()}
        assert loaded == {pair.scale for pair in read_lora(file_of(run, step)).pairs.values()}
        remove_lora(models.transformer)
    assert read_manifest(checkpoint_folder(run, 4)).steps == 4 and read_manifest(checkpoint_folder(run)).steps == 5


def test_a_run_that_begins_with_such_a_file_does_not_scale_it_again(scaled_run, tiny_preset):
    found = overrides_from(str(tiny_preset), [f"lora.scale={SCALE}"], file_of(scaled_run))
    assert "lora.scale=1.0" in found and f"lora.alpha={2.0 * SCALE}" in found
