"""Scalar rewards: CLIP's own logits and pixels, the gradient through the relay, and rewards of the user's own."""

import json
import re
from dataclasses import replace

import pytest
import torch
from _relay import LIMIT, lora_gradients, relative_difference
from _tiny import save_tiny_clip, tiny_clip, tiny_clip_tokenizer
from _toys import QUESTIONS, batch_of, plan_of, toy_parts
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lowmem_drf import api
from lowmem_drf.config import change, load_config, to_toml
from lowmem_drf.errors import BadInputError
from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.reward import RewardSpec, total_reward
from lowmem_drf.method.step import drf_step
from lowmem_drf.models.rewards.clip import ClipReward, load_clip
from lowmem_drf.models.rewards.combined import Combined
from lowmem_drf.models.rewards.users import UserReward, is_entry
from lowmem_drf.planner.words import unplanned
from lowmem_drf.scoring.alarm import Alarm
from lowmem_drf.types import Question, Scalar

CPU, LONG = torch.device("cpu"), "a red circle moves left a blue square moves right"
MEAN, STD = (0.5, 0.45, 0.4), (0.3, 0.25, 0.27)
USERS = """
import torch

class Bright(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((), 2.0, dtype=dtype))

    def forward(self, frames_BTCHW, prompts):
        sizes = frames_BTCHW.new_tensor([len(prompt) for prompt in prompts])
        return self.gain * frames_BTCHW.pow(2).mean((1, 2, 3, 4)) / sizes

def make(device, dtype):
    return Bright(dtype)

def blind(device, dtype):
    return lambda frames, prompts: frames.detach().mean((1, 2, 3, 4))

def one(device, dtype):
    return lambda frames, prompts: frames.mean()

def number(device, dtype):
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny_reward(dtype=torch.float64, recompute=True):
    tokenizer = tiny_clip_tokenizer()

    def encode(prompt):
        return tokenizer(prompt, truncation=True, max_length=8)["input_ids"]

    return ClipReward(tiny_clip(dtype), encode, MEAN, STD, recompute)


def frames_of(batch=2, frames=3, size=(10, 14)):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(batch, frames, 3, *size, generator=generator, dtype=torch.float64).requires_grad_()


def test_the_value_is_clips_own_logit_and_pickscores():
    frames, prompts, reward = frames_of(), ["a blue square", LONG], tiny_reward()
    values = reward(frames, prompts)
    rows = tiny_clip_tokenizer()(prompts, truncation=True, max_length=8, padding=True, return_tensors="pt")
    model, ids = reward.model, {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    assert rows["attention_mask"].sum(1).tolist() == [5, 8]
    by_frame = [model(**ids, pixel_values=reward.pixels(frame)) for frame in frames.unbind(1)]
    plain = torch.stack([out.logits_per_image.diagonal() for out in by_frame]).mean(0)
    # the formula on PickScore's model card
    features = model.get_text_features(**ids), model.get_image_features(reward.pixels(frames[:, 0]))
    text, image = (x.pooler_output / x.pooler_output.norm(dim=-1, keepdim=True) for x in features)
    scores = model.logit_scale.exp() * (text @ image.T)
    assert relative_difference(scores.diagonal(), by_frame[0].logits_per_image.diagonal()) < LIMIT
    assert relative_difference(values, plain) < LIMIT and values.std() > 0.1
    wanted, got, kept = (
        torch.autograd.grad(one.sum(), frames, retain_graph=True)[0]
        for one in (plain, values, tiny_reward(recompute=False)(frames, prompts))
    )
    assert relative_difference(got, wanted) < LIMIT and torch.equal(got, kept)


@pytest.mark.parametrize("size", [(10, 14), (23, 9), (8, 8), (5, 30)], ids=str)
def test_pixels_are_those_of_clips_processor(size):
    """Which rounds to 8 bit after each of two passes. No pixel is so near black or white that one would overshoot."""
    images = (60 + 135 * frames_of(size=size)[0].detach()).round()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=MEAN, image_std=STD
    )
    wanted = processor(list(images.to(torch.uint8).numpy()), return_tensors="pt")["pixel_values"]
    got = tiny_reward().pixels(images / 255)
    levels = (got - wanted).abs() * 255 * torch.tensor(STD)[:, None, None]
    assert got.shape == wanted.shape == (3, 3, 8, 8) and levels.max() < 2.5 and levels.mean() < 0.5


def test_the_relay_is_naive_with_scalar_rewards(here):
    """Beside the critic and alone; of several clips with other prompts; and the value of each is there."""
    parts, (noise, cond, uncond, _) = toy_parts(), batch_of(2)
    rewards = {"clip": tiny_reward(), "bright": UserReward("my_rewards:make", CPU, torch.float64)}
    scalars = [
        tuple(Question(name, prompt, "", "scalar", weight) for name, weight in (("clip", 0.3), ("bright", 20.0)))
        for prompt in ("a red circle", "a blue square moves up")
    ]
    gradients = []
    for asked, critic in (([QUESTIONS + own for own in scalars], parts.critic), (scalars, None)):
        judged = replace(parts, critic=Combined(critic, rewards))
        for graded in ((5,), (1, 4, 5)):
            arguments = plan_of(graded, guidance=3.0), noise, cond, uncond, asked
            expected, wanted = lora_gradients(naive_step, judged, *arguments)
            actual, stats = lora_gradients(drf_step, judged, *arguments)
            assert relative_difference(actual, expected) < LIMIT
            assert stats.reward_by_aspect == pytest.approx(wanted.reward_by_aspect)
            names = {"clip", "bright"} | ({"TA", "Phy", "VQ"} if critic else set())
            assert set(stats.reward_by_aspect) == names <= {*stats.reward_by_question, "TA", "Phy", "VQ"}
        gradients.append(actual)
        if critic is None:
            parts_of_it = {"clip": 0.3, "bright": 20.0}
            assert stats.reward == pytest.approx(sum(w * stats.reward_by_aspect[n] for n, w in parts_of_it.items()))
    plain, _ = lora_gradients(drf_step, parts, plan_of((1, 4, 5), guidance=3.0), noise, cond, uncond, [QUESTIONS] * 2)
    assert relative_difference(plain + gradients[1], gradients[0]) < LIMIT


def test_the_total_adds_weighted_values_and_divides_by_their_scales():
    asked = [Question("clip", "p", "", "scalar", 0.5), Question("other", "p", "", "scalar", 2.0)]
    answers = [Scalar(torch.tensor(3.0)), Scalar(torch.tensor(-1.0))]
    total, by_aspect, by_question = total_reward(answers, asked, RewardSpec(hinge=-5.0, scales={"clip": 4.0}))
    assert total.item() == 0.5 / 4 * 3 - 2 and by_aspect == by_question == {"clip": 3, "other": -1}


def test_a_clip_is_read_from_its_folder(tmp_path):
    folder = save_tiny_clip(tmp_path / "clip")
    frames, prompts = frames_of().float(), ["a red circle", LONG]
    read = load_clip(folder, torch.float32, CPU, True, print)
    assert torch.allclose(read(frames, prompts), tiny_reward(torch.float32)(frames, prompts))
    low = load_clip(folder, torch.bfloat16, CPU, True, print)
    (gradient,) = torch.autograd.grad((values := low(frames, prompts)).sum(), frames)
    assert values.dtype == gradient.dtype == torch.float32
    assert torch.allclose(values, read(frames, prompts), rtol=0.1) and gradient.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in read.parameters()) and not read.model.training
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"preprocessor_config.json has no image_mean"):
        load_clip(folder, torch.float32, CPU, True, print)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(BadInputError, match="it is a 'siglip' model, and a scalar reward is a CLIP"):
        load_clip(folder, torch.float32, CPU, True, print)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("no_such.module:make", "no module no_such"),
        ("my_rewards:other", "has no function other"),
        ("my_rewards:number", "made a int: it"),
        ("my_rewards:blind", "without a gradient"),
        ("my_rewards:one", r"gave \(\) torch.float32 for 2 clips"),
    ],
)
def test_a_reward_of_the_users_that_cannot_be_one_is_refused(here, entry, message):
    assert is_entry(entry) and not is_entry("owner/name") and not is_entry("C:/a:b")
    with pytest.raises(BadInputError, match=message):
        UserReward(entry, CPU, torch.float32)(frames_of().float(), ["a", "b"])


def test_settings_of_rewards():
    config = load_config("toy", ["rewards.clip.id=owner/clip", "rewards.clip.weight=0.5", "critic.weights.TA=0"])
    assert config.rewards["clip"].weight == 0.5 and 'id = "owner/clip"' in to_toml(config)
    assert change(config, ["rewards.clip.held_out=true"]).trained_rewards == {}
    assert change(config, ["rewards={}"]).rewards == {} == load_config("toy").rewards
    mine = load_config("toy", ["rewards.mine.id=my_rewards:make"])
    assert unplanned(config) == "" and "the memory of rewards.mine (my_rewards:make)" in unplanned(mine)
    none = [f"critic.weights.{aspect}=0" for aspect in ("TA", "Phy", "VQ")]
    assert not load_config("toy", [*none, "rewards.a.id=b"]).critic.weights.asked
    for wrong, message in (
        (["rewards.clip.wieght=1"], "no key 'rewards.clip.wieght'. Those of a reward: rewards.<name>.id"),
        (["rewards.clip.weight=2"], r"rewards.clip.id: is missing"),
        (["rewards.clip.weight=-2"], r"rewards.clip.weight: input should be at least"),
        (["rewards.CLIP.id=b"], "rewards: their names should be lower-case"),
        ([*none], "all three weights are 0"),
        ([*none, "rewards.a.id=b", "rewards.a.held_out=true"], "all three weights are 0"),
    ):
        with pytest.raises(BadInputError, match=message):
            load_config("toy", wrong)


def test_the_watch_sees_a_held_out_reward_fall():
    steady = {"diversity": 1.0, "motion": 0.5}
    alarm = Alarm()
    alarm.begin({"heldout_pick": [1.0, 2.0], "heldout_reward": [1.0, 2.0], **{k: [v, v] for k, v in steady.items()}})
    assert set(alarm.looks[0].bands) == {"heldout_pick", "diversity", "motion"}
    assert not alarm.add(1, {"heldout_pick": 3.0, **steady}, 0.1).outside
    assert alarm.add(2, {"heldout_pick": 1.5, **steady}, 0.2).outside == ["heldout_pick"]


@pytest.fixture(scope="module")
def run_alone(tiny_preset, tmp_path_factory):
    """A run of one update without a critic."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "my_rewards.py").write_text(USERS)
    settings = {
        "critic": {"id": "no/such-critic", "weights": {"TA": 0, "Phy": 0, "VQ": 0}},
        "rewards": {
            "clip": {"id": str(save_tiny_clip(folder / "clip")), "weight": 0.5},
            "bright": {"id": "my_rewards:make"},
            "apart": {"id": "my_rewards:make", "held_out": True},
        },
        "log": {"sample_every": 0, "eval_prompts": 1, "eval_seeds": 1, "watch_every": 1, "watch_prompts": 1},
        "memory.park": ["critic"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield api.train(tiny_preset, output=folder / "run", steps=1, settings=settings)


def test_a_run_with_scalar_rewards_alone_loads_no_critic(run_alone):
    """And says each of them in metrics, evaluation and watch."""
    (row,) = run_alone.metrics()
    by_aspect = row["reward_by_aspect"]
    assert set(by_aspect) == {"clip", "bright"}
    assert row["reward"] == pytest.approx(0.5 * by_aspect["clip"] + by_aspect["bright"], rel=1e-5)
    tuned = run_alone.result.tuned
    assert {"clip", "bright", "apart"} <= set(tuned.reward_by_aspect)
    assert tuned.heldout_reward == pytest.approx(tuned.reward_by_aspect["apart"])
    looks = [json.loads(line) for line in (run_alone.folder / "watch.jsonl").read_text().splitlines()]
    assert all({"heldout_reward", "heldout_apart"} <= set(look["measures"]) for look in looks)
    with pytest.raises(BadInputError, match="this run asks no critic"):
        api.evaluate(run_alone, critic="toyworld")


@pytest.mark.slow
def test_its_report_shows_them_and_it_goes_on(run_alone):
    page = api.report(run_alone.folder).read_text()
    assert {"<b>clip</b>", "<b>bright</b>", "<b>held-out reward: apart</b>"} <= set(re.findall("<b>.*?</b>", page))
    assert len(api.train(output=run_alone.folder, resume=True, steps=2).metrics()) == 2
