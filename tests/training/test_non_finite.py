"""NaN and infinity: an update with one is skipped, weights with one are never saved, clips with one are said."""

import math
import shlex
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lowmem_drf.assembly.assemble import Models
from lowmem_drf.assembly.generate import flaw
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands import sample
from lowmem_drf.commands.train import train_command
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError, LowmemError, NonFiniteError
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.prompts import Cursor, PromptStream, as_prompts, without
from lowmem_drf.shared import tuned
from lowmem_drf.toy.captions import train_prompts
from lowmem_drf.training import update as updating
from lowmem_drf.training.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_steps,
    load_checkpoint,
    save_checkpoint,
)
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.skips import advice
from lowmem_drf.training.update import Cause

SETTINGS = [
    *("batch=1", "micro_batch=1", "critic.questions=phrases", "critic.normalize=false"),
    *("video.frames=5", "sampler.steps=1", "sampler.graded_steps=1", "sampler.guidance=1", "critic.frames=1"),
    *("log.sample_every=0", "log.keep=20"),
]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A prompt file."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(train_prompts()[:8]), encoding="utf-8")
    return file


@pytest.fixture
def spoil(monkeypatch):
    """``spoil(is_bad)``: in updates (from 1) and prompts for which ``is_bad(update, text)``, the latents become NaN."""

    def spoil(is_bad):
        condition, step_spec, now = Models.condition, updating.step_spec, [0]

        def counted(config, step, scales=None):
            now[0] = step + 1
            return step_spec(config, step, scales)

        def spoilt(self, prompts):
            made = condition(self, prompts)
            return made * math.nan if any(is_bad(now[0], prompt.text) for prompt in prompts) else made

        monkeypatch.setattr(updating, "step_spec", counted)
        monkeypatch.setattr(Models, "condition", spoilt)

    return spoil


def lora_bytes(run, step=None):
    return (checkpoint_folder(run, step) / "lora.safetensors").read_bytes()


def timeless(run):
    timed = ("update_s", "stage_s", "stage_peak_gib")
    return [{key: value for key, value in row.items() if key not in timed} for row in read_metrics(run)]


def test_a_nan_in_one_prompt_of_eight_costs_its_own_updates_alone_and_resumes_exactly(
    spoil, tiny_preset, eight, tmp_path, capsys
):
    bad = train_prompts()[4]
    spoil(lambda update, text: text == bad)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_command(str(tiny_preset), eight, whole, 8, None, False, SETTINGS, False)
    said = capsys.readouterr().out
    rows = timeless(whole)
    (skipped,) = (row for row in rows if "skipped" in row)
    assert skipped["skipped"] == {
        "what": "latents at the end of the rollout are NaN or infinite",
        "stage": "rollout",
        "dtype": "fp32",
        "prompts": ["0005"],
        "seed": skipped["seed"],
    }
    assert sorted(row["prompts"][0] for row in rows) == [f"{n:04d}" for n in range(1, 9)]
    step = skipped["step"]
    assert f"update {step} was skipped: latents" in said and "1 of 8 updates were skipped" in said
    assert lora_bytes(whole, step) == (lora_bytes(whole, step - 1) if step > 1 else lora_bytes(whole, step))
    assert len({lora_bytes(whole, n) for n in range(1, 9)}) == (8 if step == 1 else 7)
    state = load_checkpoint(checkpoint_folder(whole)).optimizer
    assert {int(tensor) for name, tensor in state.items() if name.endswith(".step")} == {7}

    train_command(str(tiny_preset), eight, halves, step, None, False, SETTINGS, False)  # ends with the skipped one
    train_command(None, None, halves, 8, None, True, [], False)
    assert lora_bytes(halves) == lora_bytes(whole) and timeless(halves) == rows


def test_a_nan_in_every_prompt_stops_after_five_with_the_last_good_weights_saved(spoil, tiny_preset, eight, tmp_path):
    run = tmp_path / "a run"
    spoil(lambda update, text: update > 2)
    settings = [*SETTINGS, "log.checkpoint_every=1"]
    with pytest.raises(NonFiniteError) as caught:
        train_command(str(tiny_preset), eight, run, 20, None, False, settings, False)
    message = str(caught.value)
    assert checkpoint_steps(run)[-1] == read_metrics(run)[-1]["step"] == 7
    assert lora_bytes(run, 7) == lora_bytes(run, 2) != lora_bytes(run, 1)
    assert len(message.splitlines()) <= 6
    for part in (
        "5 updates in a row",
        "stage rollout, fp32, prompt ",
        f"--resume --output '{run}'",
        "after step-000001",
    ):
        assert part in message
    assert "optim.lr=2.5e-05  -s kernels.ops=naive" in message


def test_whatever_is_advised_can_be_changed_on_resume(tiny_run):
    config = load_config("toy", ["kernels.rollout_attention=int8", "kernels.ops=auto"])
    causes = [Cause("it", stage, "bf16", ["0003", "it's"], [1, 2]) for stage in ("decode", "vae_backward")]
    options = [shlex.split(words) for words in advice(config, causes, prompts=9)]
    overrides = [word for words in options for word in words if word != "-s"]
    assert [word.partition("=")[0] for word in overrides] == [
        *("optim.lr", "kernels.rollout_attention", "kernels.ops", "kernels.attention"),
        *("memory.vae_dtype", "memory.vae_grad_dtype", "skip_prompts"),
    ]
    train_command(None, None, tiny_run, None, None, True, [*overrides, "steps=5", "optim.eps=1e-8"], True)
    assert not any("skip_prompts" in words for words in advice(config, causes[:1], prompts=9))


@pytest.mark.slow
def test_one_prompt_in_every_update_is_advised_to_be_left_out_and_then_is(spoil, tiny_preset, eight, tmp_path):
    run, bad = tmp_path / "run", train_prompts()[1]
    spoil(lambda update, text: text == bad)
    settings = [*SETTINGS[1:], "batch=8", "optim.max_skipped=2"]
    with pytest.raises(NonFiniteError, match=r"""-s 'skip_prompts=\["0002"\]'"""):
        train_command(str(tiny_preset), eight, run, 3, None, False, settings, False)
    with pytest.raises(NonFiniteError, match="2 updates in a row"):  # it counts anew
        train_command(None, None, run, 5, None, True, [], False)
    assert checkpoint_steps(run)[-1] == 4
    train_command(None, None, run, 5, None, True, ['skip_prompts=["0002"]'], False)
    last = read_metrics(run)[-1]
    assert last["step"] == 5 and "0002" not in last["prompts"] and len(last["prompts"]) == 8


def test_prompts_that_are_left_out_change_no_order():
    prompts = as_prompts("abcdefgh")
    every = [prompt for prompt in PromptStream(prompts, 3).take(24) if prompt.id != "0004"]
    assert list(PromptStream(prompts, 3, Cursor(), ["0004"]).take(21)) == every
    assert [prompt.text for prompt in without(prompts, ["0004", "0001"])] == list("bcefgh")
    for ids, said in ((["4"], "no prompt has the id '4'"), ([prompt.id for prompt in prompts], "names every prompt")):
        with pytest.raises(BadInputError, match=said):
            without(prompts, ids)


def test_weights_that_the_optimizer_made_nan_are_not_saved(tiny_preset, eight, tmp_path, monkeypatch):
    run, step, calls = tmp_path / "run", torch.optim.AdamW.step, []

    def broken(self, *rest):
        step(self, *rest)
        calls.append(None)
        if len(calls) == 2:
            self.param_groups[0]["params"][3].data[0, 0] = math.inf

    monkeypatch.setattr("torch.optim.AdamW.step", broken)
    with pytest.raises(NonFiniteError, match="update 2 made weights.*not saved; update 1 is the last.*\\n.*--resume"):
        train_command(str(tiny_preset), eight, run, 3, None, False, SETTINGS, False)
    assert checkpoint_steps(run) == [1] and len(read_metrics(run)) == 1


@pytest.mark.parametrize("part", ["lora", "optimizer"])
def test_no_checkpoint_with_nan_is_written_or_read(part, tmp_path):
    torch.manual_seed(0)
    good = Checkpoint(1, {"a": torch.randn(2)}, {"a.exp_avg": torch.randn(2)}, Cursor(), "hash")
    bad = replace(good, step=2, **{part: {"b": torch.tensor([1.0, math.nan])}})
    save_checkpoint(tmp_path, good, 1.0, keep=3)
    with pytest.raises(NonFiniteError, match="update 2 is not saved"):
        save_checkpoint(tmp_path, bad, 1.0, keep=3)
    assert checkpoint_steps(tmp_path) == [1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowmem_drf.training.checkpoint.not_finite", lambda tensors: [])
        folder = save_checkpoint(tmp_path, bad, 1.0, keep=3)
    with pytest.raises(LowmemError, match="damaged.*b holds NaN"):
        load_checkpoint(folder)


@pytest.mark.parametrize("which", ["transformer", "vae", "critic", "text"])
def test_base_weights_with_nan_are_refused(which, tiny_preset, tiny_folders, tmp_path, monkeypatch):
    from lowmem_drf.models.weights import finite

    config = load_config(tiny_preset)
    with spoilt_weights(which, monkeypatch), pytest.raises(BadInputError, match=f"{said_of(which)}.*NaN or infinity"):
        load_models(config, as_prompts(["a red circle"]))
    assert finite.not_finite({"ids": torch.zeros(2, dtype=torch.int64), "large": torch.full((4,), 3e38)}) == []


def said_of(which):
    return {"transformer": "transformer", "vae": "the VAE of", "critic": "the critic", "text": "text encoder"}[which]


@contextmanager
def spoilt_weights(which, monkeypatch):
    """One number is NaN."""
    if which == "transformer":
        from lowmem_drf.models.weights.reader import TensorFiles

        read = TensorFiles.read

        def spoilt(self, name):
            made = read(self, name)
            made.view(-1)[0] = math.nan if name == "blocks.1.attn1.to_q.weight" else made.view(-1)[0]
            return made

        monkeypatch.setattr(TensorFiles, "read", spoilt)
        yield
        return
    module = {"vae": "diffusers.AutoencoderKLWan", "text": "transformers.UMT5EncoderModel"}
    name = module.get(which, "transformers.Qwen2_5_VLForConditionalGeneration")
    owner = __import__(name.split(".")[0])
    cls = getattr(owner, name.split(".")[1])
    load = cls.from_pretrained

    def loaded(*arguments, **settings):
        model, info = load(*arguments, **settings)
        with torch.no_grad():
            next(model.parameters()).view(-1)[:].fill_(math.nan)
        return model, info

    monkeypatch.setattr(cls, "from_pretrained", loaded)
    yield


def test_a_lora_file_with_nan_is_refused(tiny_run, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(checkpoint_folder(tiny_run) / "lora.safetensors")
    tensors[min(tensors)][0, 0] = math.nan
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(BadInputError, match=f"bad.safetensors: its '{min(tensors)}' holds NaN"):
        read_lora(tmp_path / "bad.safetensors")


CLIPS = {"": torch.full((3, 3, 8, 8), 0.5), "is black": torch.zeros(3, 3, 8, 8)}


def test_black_and_nan_clips_are_told_from_dark_ones():
    dark, spoilt = torch.zeros(3, 3, 8, 8), CLIPS[""].clone()
    dark[1, 0, 0, 0], spoilt[2, 1, 3, 3] = 0.01, math.nan
    assert [flaw(clip) for clip in (CLIPS[""], CLIPS["is black"], dark, spoilt)] == ["", "is black", "", flaw(spoilt)]
    assert "NaN" in flaw(spoilt) and "NaN" in flaw(CLIPS[""].bfloat16() * math.inf)


def test_sample_says_which_clips_are_black_or_nan_and_fails(tiny_run, tmp_path, monkeypatch, capsys):
    clips = [CLIPS[""], CLIPS["is black"], CLIPS[""] * math.nan]
    monkeypatch.setattr(tuned, "load", lambda *rest, **more: None)
    monkeypatch.setattr(sample, "base_and_tuned", lambda *rest, **more: [(None, clip) for clip in clips])
    with pytest.raises(LowmemError, match=r"2-b-.* \(tuned\) is black; 3-c-.* \(tuned\) holds NaN") as caught:
        sample.sample_command(tiny_run, None, ["a", "b", "c"], None, None, False, 1.0, 0, tmp_path / "clips")
    assert caught.value.exit_code == 1
    assert len(list((tmp_path / "clips").iterdir())) == len(capsys.readouterr().out.splitlines()) == 2
    assert "the LoRA of an earlier checkpoint" in str(caught.value)


@pytest.mark.parametrize(("lora", "cure"), [(Path("x"), "--lora-scale 0.5"), (None, "No LoRA is at work")])
def test_black_clips_of_a_preset_have_a_cure_without_a_run(lora, cure, tiny_preset, tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "load", lambda *rest, **more: None)
    monkeypatch.setattr(tuned, "lora_file", lambda path: path)
    monkeypatch.setattr(tuned, "left_out", lambda lora: ())
    monkeypatch.setattr(tuned, "read_lora_for", lambda *rest: SimpleNamespace(metadata={}, merged=list))
    monkeypatch.setattr(sample, "base_and_tuned", lambda *rest, **more: [(None, CLIPS["is black"])])
    with pytest.raises(LowmemError, match=cure):
        sample.sample_command(None, lora, ["a"], None, None, False, 1.0, 0, tmp_path / "x.mp4", preset=str(tiny_preset))


def test_previews_say_it_and_training_goes_on(tiny_preset, eight, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "lowmem_drf.models.wan.vae.decoder.WanDecoder.decode", lambda self, x: torch.zeros(1, 5, 3, 16, 16)
    )
    settings = [*SETTINGS, "log.sample_every=1"]
    train_command(str(tiny_preset), eight, tmp_path / "run", 1, None, False, settings, False)
    said = capsys.readouterr().err
    assert "update 0: the sample clip 01-" in said and "update 1: the sample clip 01-" in said
    assert said.count("is black") == 2


@pytest.mark.parametrize(
    "override",
    [
        *("optim.eps=1e-300", "optim.lr=2", "optim.lr=1e-300", "optim.betas=[0.9, 0.99999999]", "optim.weight_decay=3"),
        *("optim.grad_clip=1e-300", "sampler.shift=1e300", "sampler.shift=1e-9", "sampler.guidance=1e38"),
        *("lora.alpha=1e38", "lora.alpha=1e-40", "critic.hinge=1e300", "critic.weights.TA=1e300"),
        *("critic.weights.VQ=1e-300", "model.base_lora_scale=1e30", "optim.max_skipped=0"),
    ],
)
def test_a_number_that_fp32_cannot_use_is_refused_with_its_bound(override):
    key, _, value = override.partition("=")
    with pytest.raises(BadInputError, match=rf"{key}.*(at least|at most|equal to) [-\de+.]+"):
        load_config("toy", [override])
