"""Training on tiny models: the contents of a run, the arithmetic of an update, and refusals."""

import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
from _trainer import PROMPTS, Keeping

from lowmem_drf.assembly import assemble
from lowmem_drf.assembly.assemble import critic_frames, critic_rate, derive_seed, step_spec
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.commands.train import train_command
from lowmem_drf.config import change, load_config
from lowmem_drf.distributed.ranks import Ranks
from lowmem_drf.errors import BadInputError, NonFiniteError
from lowmem_drf.models.lora.adapter import named_lora
from lowmem_drf.models.qwen_vl.critic import VLMCritic
from lowmem_drf.prompts import as_prompts
from lowmem_drf.questions.file import load_questions
from lowmem_drf.reporting.clips import prompt_of
from lowmem_drf.reporting.read import read_record
from lowmem_drf.scoring.evaluate import Trial, diversity, measure
from lowmem_drf.toy.captions import train_prompts
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.run_folder import claim, find_run, run_config
from lowmem_drf.training.trainer import SingleTrainer
from lowmem_drf.training.update import update
from lowmem_drf.video import read_video, side_by_side, write_mp4


def test_a_run_leaves_what_the_contract_says(tiny_run):
    folders = {"tensorboard", "samples", "checkpoints"}
    files = {"config.toml", "questions.json", "run.json", "metrics.jsonl"}
    assert {path.name for path in tiny_run.iterdir()} == files | folders
    assert run_config(tiny_run).lora.rank == 2
    assert set(load_questions(tiny_run / "questions.json")) < set(train_prompts())
    assert sorted(os.listdir(tiny_run / "checkpoints")) == ["step-000003", "step-000004"]
    last = tiny_run / "checkpoints" / "step-000004"
    assert sorted(os.listdir(last)) == ["lora.safetensors", "manifest.json", "state.safetensors"]
    assert sorted(os.listdir(tiny_run / "samples")) == ["step-000000", "step-000002", "step-000004"]
    assert len(list((tiny_run / "tensorboard").iterdir())) == 1


def test_metrics_have_a_complete_line_per_update(tiny_run):
    rows = read_metrics(tiny_run)
    stages = {"rollout", "decode", "critic", "vae_backward", "denoise_backward", "update"}
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert set(row["reward_by_aspect"]) == {"TA", "Phy", "VQ"}
        assert {"color", "jump", "noise"} <= set(row["reward_by_question"])
        assert set(row["stage_s"]) == set(row["stage_peak_gib"]) == stages
        assert min(*row["stage_s"].values(), *row["stage_peak_gib"].values(), row["grad_norm"], row["lr"]) > 0
        assert len(row["prompts"]) == len(row["seed"]) == 3
    assert len({seed for row in rows for seed in row["seed"]}) == 12


def test_samples_are_playable_and_big_enough(tiny_run):
    (file,) = (tiny_run / "samples" / "step-000004").iterdir()
    frames, fps = read_video(file)
    assert (frames.shape, fps) == ((9, 3, 256, 256), 8)


def test_the_micro_batch_changes_memory_and_not_the_gradient(ready):
    config, models, parts, prompts, questions = ready()
    trainer, gradients = Keeping(config, models.transformer), {}
    for size in (1, 2, 3):
        report = update(change(config, [f"micro_batch={size}"]), models, parts, trainer, 0, prompts, questions, None)
        parts_of_it = (gradient.flatten() for gradient in trainer.gradients[-1])
        gradients[size] = torch.cat([torch.tensor([report.reward]), *parts_of_it])
    for size in (1, 2):
        # the same fp32 sums in another order: 2**-24 each, about a thousand terms
        assert (gradients[size] - gradients[3]).norm() <= 1000 * 2**-24 * gradients[3].norm()


def test_a_lazy_anchor_has_its_whole_weight_in_some_updates(tiny_preset):
    config = load_config(tiny_preset, ["optim.anchor=0.5", "optim.anchor_every=4"])
    specs = [step_spec(config, step) for step in range(40)]
    assert [spec.anchor for spec in specs] == [2.0, 0.0, 0.0, 0.0] * 10
    for spec in specs:
        assert len(spec.anchored) == (spec.anchor > 0) and set(spec.anchored) <= set(spec.graded)
    assert len({spec.graded.index(*spec.anchored) for spec in specs if spec.anchor}) == 2  # of two graded steps


def test_an_anchored_update_tells_how_far_it_is_from_the_base(ready):
    config, models, parts, prompts, questions = ready("optim.anchor=1")
    trainer = SingleTrainer(config, named_lora(models.transformer))
    away = [update(config, models, parts, trainer, step, prompts, questions, None).departure for step in range(2)]
    assert away[0] == 0 < away[1]  # a fresh LoRA is the base


def test_an_update_is_one_adamw_step_on_the_clipped_gradient(ready):
    config, models, parts, prompts, questions = ready("optim.grad_clip=1e-3", "optim.lr=0.01")
    before = [tensor.detach().clone() for tensor in parts.lora]
    trainer = SingleTrainer(config, named_lora(models.transformer))
    report = update(config, models, parts, trainer, 0, prompts, questions, None)
    assert report.grad_norm > 1e-3
    moved = [(tensor - old).abs().max().item() for tensor, old in zip(parts.lora, before, strict=True)]
    assert 0 < max(moved) <= 0.01 * (1 + 1e-3)  # AdamW's first step is lr x sign(gradient)
    assert all(tensor.grad is None for tensor in parts.lora)


def test_a_non_finite_reward_names_update_prompt_and_seed_and_changes_nothing(ready):
    config, models, parts, prompts, questions = ready("micro_batch=1")
    before = [tensor.detach().clone() for tensor in parts.lora]
    with torch.no_grad():
        models.critic.model.lm_head.weight.fill_(math.inf)
    trainer = SingleTrainer(config, named_lora(models.transformer))
    with pytest.raises(NonFiniteError) as caught:
        update(config, models, parts, trainer, 6, prompts, questions, None)
    for part in ("update 7", "critic, fp32, prompt 0001", str(derive_seed(config.seed, "noise", 6, 0))):
        assert part in str(caught.value)
    assert all(torch.equal(tensor, old) for tensor, old in zip(parts.lora, before, strict=True))


def test_an_infinite_gradient_is_refused_before_the_optimizer(ready, monkeypatch):
    config, models, parts, prompts, questions = ready()
    before = [tensor.detach().clone() for tensor in parts.lora]
    monkeypatch.setattr("torch.nn.utils.get_total_norm", lambda *a, **k: torch.tensor(math.nan))
    trainer = SingleTrainer(config, named_lora(models.transformer))
    with pytest.raises(NonFiniteError, match="update 1 was skipped: gradients of the LoRA"):
        update(config, models, parts, trainer, 0, prompts, questions, None)
    assert all(torch.equal(tensor, old) for tensor, old in zip(parts.lora, before, strict=True))


def test_random_choices_of_an_update_depend_on_seed_and_update_alone(tiny_preset):
    config = load_config(tiny_preset)
    plans = [step_spec(config, step) for step in range(12)]
    again = step_spec(config, 5)
    assert (again.graded, again.kept) == (plans[5].graded, plans[5].kept)
    assert len({plan.graded for plan in plans}) > 1
    assert len({plan.kept for plan in plans}) > 1
    other = load_config(tiny_preset, ["seed=1"])
    assert [step_spec(other, step).kept for step in range(12)] != [plan.kept for plan in plans]


def test_the_critic_sees_a_number_of_frames_or_so_many_a_second():
    """9 frames at 8 a second."""
    for frames, count, rate in (("3", 3, 2.0), ("9", 9, 8.0), ('"fps:4"', 4, 3.0), ('"fps:8"', 8, 7.0)):
        config = load_config("toy", [f"critic.frames={frames}"])
        assert (len(step_spec(config, 0).kept), critic_frames(config), critic_rate(config)) == (count, count, rate)
    config = load_config("toy", ["critic.frames=3", "critic.frame_sampling=random_phase"])
    assert critic_rate(config) == 8 / 3  # a grid of three frames' spacing


def test_scales_of_the_normalisation_change_the_step(ready):
    config, models, parts, prompts, questions = ready("micro_batch=3")
    trainer = Keeping(config, models.transformer)
    for scales in ({}, {"color": 0.1, "jump": 5.0}):
        update(config, models, parts, trainer, 0, prompts, questions, None, scales)
    plain, scaled = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in trainer.gradients)
    assert not torch.allclose(plain, scaled)


def test_every_mode_trains_with_a_4_bit_critic(ready):
    config, models, parts, prompts, _ = ready("critic.quant=nf4", "memory.checkpoint=true")
    layers = models.critic.model.model.language_model.layers
    assert {type(layer.self_attn.q_proj).__name__ for layer in layers} == {"PackedLinear"}
    trainer = SingleTrainer(config, named_lora(models.transformer))
    for mode in ("vanilla", "yesno", "dense", "both"):
        config = change(config, [f"critic.mode={mode}"])
        report = update(config, models, parts, trainer, 0, prompts, draft_questions(config, prompts), None)
        assert math.isfinite(report.reward) and report.grad_norm > 0, mode
        assert set(report.reward_by_aspect) == ({"TA"} if mode == "vanilla" else {"TA", "Phy", "VQ"})


def test_an_output_that_holds_a_run_is_refused_and_untouched(tiny_run, tiny_preset):
    before = sorted(path.stat().st_mtime_ns for path in tiny_run.rglob("*"))
    with pytest.raises(BadInputError, match="already holds a run.*--resume"):
        train_command(str(tiny_preset), None, tiny_run, None, None, False, [], False)
    assert sorted(path.stat().st_mtime_ns for path in tiny_run.rglob("*")) == before


@pytest.mark.parametrize("override", ["kernels.attention=cudnn", "kernels.attention=triton", "kernels.ops=fused"])
def test_a_kernel_that_cannot_run_is_refused_before_anything_is_read(override, tmp_path, tiny_preset, monkeypatch):
    monkeypatch.setattr("lowmem_drf.ops.why_no_triton", lambda device: "none here")
    monkeypatch.setattr("lowmem_drf.models.attention.why_no_triton", lambda device: "none here")
    monkeypatch.setattr("lowmem_drf.assembly.loading.load_models", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(BadInputError, match=f"{override.partition('=')[0]} = .* cannot run: "):
        train_command(str(tiny_preset), None, tmp_path / "run", None, None, False, [override], False)
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path, tiny_preset):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot be written to"):
        train_command(str(tiny_preset), None, tmp_path / "file" / "run", None, None, False, [], False)


@pytest.mark.parametrize(
    "override",
    [
        'lora.targets=["nothing"]',
        "model.id=/no/such/model",
        "video.width=20",
        "critic.id=toyworld",
        "critic.questions=/no/such.json",
        "critic.weights={TA = 0, Phy = 0, VQ = 0}",
    ],
)
def test_a_run_that_cannot_start_leaves_nothing_behind(tmp_path, tiny_preset, override):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog on a skateboard\n" if override == "critic.id=toyworld" else PROMPTS[0])
    with pytest.raises(BadInputError):
        train_command(str(tiny_preset), prompts, tmp_path / "a" / "run", None, None, False, [override], False)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_claim_leaves_folders_that_were_there(tmp_path):
    with claim(tmp_path / "a" / "b", pytest.fail):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path, pytest.fail):
        pass
    assert tmp_path.is_dir()


def test_resume_refuses_what_would_be_another_run(tiny_run):
    for overrides, said in ((["lora.rank=4"], "lora.rank"), (["seed=1"], "seed"), ([], "is complete: 4 of 4")):
        with pytest.raises(BadInputError, match=said):
            train_command(None, None, tiny_run, None, None, True, overrides, True)
    with pytest.raises(BadInputError, match="--preset does not go with --resume"):
        train_command("toy", None, tiny_run, None, None, True, [], True)


def test_the_latest_run_is_the_one_written_to_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match="no run under runs/"):
        find_run()
    for number, name in enumerate(["b", "a", "c"]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        file = tmp_path / "runs" / name / "config.toml"
        file.write_text("")
        os.utime(file, (1000 + number, 1000 + number))
    metrics = tmp_path / "runs" / "a" / "metrics.jsonl"
    metrics.write_text("")
    os.utime(metrics, (2000, 2000))
    assert find_run().name == "a"
    with pytest.raises(BadInputError, match="is not a run"):
        find_run(tmp_path)


def test_texts_are_what_the_encoder_makes_of_them_but_kept_short(ready):
    from lowmem_drf.models.wan.text import load_text

    config, models, *_ = ready()
    expected = load_text(config.model.id).encode([*PROMPTS, ""], config.model.text_tokens)
    assert torch.equal(models.condition(as_prompts([*PROMPTS, ""])), expected)
    assert len(models.texts[""]) < config.model.text_tokens
    assert models.texts[""].untyped_storage().nbytes() == models.texts[""].nbytes


class Half(Ranks):
    """One of two ranks that run one after the other; the last one gets what all gathered."""

    gathered = []

    def gather(self, value):
        self.gathered.append(value)
        if len(self.gathered) < self.count:
            raise StopIteration
        return self.gathered


def test_measures_do_not_depend_on_the_batch_or_the_ranks_and_name_every_aspect(ready):
    config, models, _, prompts, questions = ready("critic.mode=vanilla")
    trial = Trial(prompts, 2, questions, {}, "of the test")
    measured = []
    for size in (1, 4):
        measured.append(measure(change(config, [f"log.eval_batch={size}"]), models, trial, lambda clips: None))
    with pytest.raises(StopIteration):
        measure(change(config, ["log.eval_batch=3"]), models, trial, lambda clips: None, Half(0, 2))
    measured.append(measure(change(config, ["log.eval_batch=3"]), models, trial, lambda clips: None, Half(1, 2)))
    for name in ("reward", "diversity", "velocity_norm", "motion", "si", "blur", "noise"):
        assert measured[0][name] > 0 or name == "reward"
        # fp32 kernels may sum in another order for another batch
        assert [m[name] for m in measured[1:]] == pytest.approx([measured[0][name]] * 2, rel=1e-4)
    assert set(measured[0]["reward_by_aspect"]) == {"TA", "Phy", "VQ"}
    assert measured[0]["reward_by_aspect"]["Phy"] is measured[0]["heldout_reward"] is None


def test_mp4_round_trip_pads_odd_sizes(tmp_path):
    smooth = torch.linspace(0, 1, 33).expand(5, 3, 31, 33)
    frames, fps = read_video(write_mp4(tmp_path / "new" / "clip.mp4", smooth, fps=12))
    assert (frames.shape, fps) == ((5, 3, 32, 34), 12)
    # chroma subsampling and quantisation: a few grey levels
    assert (frames[:, :, :31, :33] - smooth).abs().mean() < 4 / 255
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_side_by_side_shows_each_clip_under_its_label():
    left, right = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    both = side_by_side((left, right), ("base", "tuned"), upscale=8)
    assert both.shape == (2, 3, 64 + 18, 64 + 4 + 64)
    assert both[..., 18:, :64].max() == 0
    assert both[..., 18:, 68:].min() == 1
    assert both[..., :18, :64].min() < 0.5  # the label's ink


def test_diversity_is_the_distance_over_seeds_of_one_prompt():
    clips = torch.zeros(2, 2, 3, 3, 4, 4)
    clips[0, 1] = 0.5
    assert diversity(clips) == pytest.approx(0.25)
    assert diversity(clips[:, :1]) == 0


def test_the_oracle_judges_toyworlds_clips_and_nothing_else(tiny_preset):
    from lowmem_drf.scoring.oracle_rates import RATES, oracle_for
    from lowmem_drf.toy.captions import caption
    from lowmem_drf.toy.scenes import combos_of, draw_tracks, render

    combos = combos_of("heldout")
    texts = [caption(combo) for combo in combos]
    frames = render(draw_tracks(combos, torch.Generator().manual_seed(0)))
    judge = oracle_for(load_config("toy"), texts)
    right, wrong = judge(frames, texts), judge(frames, texts[1:] + texts[:1])
    assert tuple(right) == RATES
    assert min(right.values()) > 0.9
    assert wrong["all"] < 0.5 < wrong["physics"]
    assert oracle_for(load_config("toy"), ["a dog on a skateboard"]) is None
    assert oracle_for(load_config(tiny_preset), texts) is None
    assert oracle_for(load_config("toy", ["video.width=64"]), texts) is None


def test_questions_are_checked_once_when_a_run_begins(tiny_preset, tmp_path, monkeypatch):
    """A user's question that is false goes to left_out.json; on resume no question is checked again."""
    monkeypatch.setenv("LOWMEM_DRF_CACHE", str(tmp_path / "cache"))
    run, overrides = tmp_path / "run", ["critic.id=toyworld-reader", "critic.questions=phrases", "critic.check=true"]
    overrides += ["critic.mode=yesno", "critic.token_weights=uniform", "log.sample_every=0"]
    red, blue = (f"a {color} circle moves left on a gray background" for color in ("red", "blue"))
    mine = [{"aspect": "TA", "text": f"is the shape {color} ?", "answer": "yes"} for color in ("red", "blue")]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": red}) + "\n" + json.dumps({"prompt": blue, "questions": mine}) + "\n")
    train_command(str(tiny_preset), prompts, run, 1, None, False, overrides, False)
    (row,) = json.loads((run / "left_out.json").read_text())
    assert row["prompt"] == blue and [q["text"] for q in row["questions"]] == ["is the shape red ?"]
    asked = load_questions(run / "questions.json")
    assert [q.text for q in asked[blue]] == ["is the shape blue ?"]
    assert f'"{red}"' in asked[red][0].text
    heard = []
    real = VLMCritic.answer_from_text
    monkeypatch.setattr(VLMCritic, "answer_from_text", lambda *some: heard.append(some[1]) or real(*some))
    shutil.rmtree(tmp_path / "cache")
    train_command(None, None, run, 2, None, True, [], False)
    assert heard and not any(red in text for text in heard)  # a user's questions may have changed, ours have not
    assert load_questions(run / "questions.json") == asked


@pytest.mark.slow  # two runs on tiny models
def test_a_resumed_run_is_given_its_own_choice_of_kernels(tiny_preset, tmp_path, monkeypatch):
    """On a card it is timed; here the processor stands in for one."""
    run, given, real = tmp_path / "run", [], assemble.choose

    def choose(config, work, before=None, ranks=None):
        given.append(before)
        record = before or {"about": {}, "attention": "sdpa", "why": "", "failed": {}, "critic": "sdpa", "tiles": []}
        return replace(real(config, work), record=record)

    monkeypatch.setattr(assemble, "choose", choose)
    train_command(str(tiny_preset), None, run, 1, None, False, ["log.sample_every=0"], False)
    saved = json.loads((run / "kernels.json").read_text())
    (run / "kernels.json").write_text(json.dumps({**saved, "why": "mine"}))
    train_command(None, None, run, 2, None, True, [], False)
    assert given == [None, {**saved, "why": "mine"}]
    assert json.loads((run / "kernels.json").read_text())["why"] == "mine"


def test_sample_clips_are_what_the_run_asks_for_and_change_no_update(tiny_run, tiny_preset, tmp_path):
    """Of another size, of fewer steps, of one's own prompts and seed; and the report knows their prompts."""
    own = "a blue square moves up on a black background"
    settings = {"prompts": [own], "seed": 7, "width": 32, "frames": 13, "steps": 2}
    overrides = [f"log.sample_{key}={json.dumps(value)}" for key, value in settings.items()]
    run = tmp_path / "run"
    train_command(str(tiny_preset), None, run, 2, None, False, overrides, False)
    (file,) = (run / "samples" / "step-000002").iterdir()
    assert read_video(file)[0].shape == (13, 3, 256, 512)
    assert "a-blue-square" in file.name
    assert [row["reward"] for row in read_metrics(run)] == [row["reward"] for row in read_metrics(tiny_run)[:2]]
    (tmp_path / "p.txt").write_text(f"{own}\n{own} too\n")
    again = [f"log.sample_prompts={tmp_path}/p.txt", "log.sample_seed=8", "log.sample_width=32", "log.sample_every=1"]
    train_command(None, None, run, 3, None, True, again, False)
    first, second = sorted((run / "samples" / "step-000003").iterdir())
    assert first.name == file.name and first.read_bytes() != file.read_bytes()
    record = read_record(run)
    assert [prompt_of(record, path.name) for path in (first, second)] == [own, f"{own} too"]


def test_sample_clips_of_a_size_that_no_model_makes_are_refused(tiny_preset, tmp_path):
    sizes = {
        "sample_width=30": "log.sample_width",
        "sample_frames=6": "4n",
        "sample_width=264": "log.sample_width=256",
    }
    for override, said in sizes.items():
        with pytest.raises(BadInputError, match=said):
            train_command(str(tiny_preset), None, tmp_path / "run", 1, None, False, [f"log.{override}"], False)
    assert not list(tmp_path.iterdir())
