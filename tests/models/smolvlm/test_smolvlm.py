"""SmolVLM2 as a critic: answers and gradients of packed questions are those of transformers' own model and prompt."""

import datetime
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from _relay import LIMIT, lora_gradients, relative_difference
from _tiny import _seeded, _spread
from _toys import batch_of, plan_of, toy_parts
from torch.nn import functional as F
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from lowmem_drf.commands.bench import count_bytes
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.preprocess import resized
from lowmem_drf.method.reward import RewardSpec, mean_reward, token_probabilities
from lowmem_drf.method.step import drf_step
from lowmem_drf.models.qwen_vl.critic import VLMCritic, load_critic
from lowmem_drf.models.qwen_vl.files import video_geometry
from lowmem_drf.models.qwen_vl.random_critic import random_model
from lowmem_drf.models.qwen_vl.random_tokenizer import byte_tokenizer
from lowmem_drf.models.smolvlm.family import patches, placeholder
from lowmem_drf.models.smolvlm.numbers import in_words
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.types import Question

TEXT = dict(
    model_type="llama", vocab_size=308, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048, pad_token_id=0, bos_token_id=None,
    eos_token_id=300,
)  # fmt: skip
VISION = dict(
    num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4
)
CONFIG = dict(
    model_type="smolvlm", text_config=TEXT, vision_config=VISION, scale_factor=2, image_token_id=301,
    tie_word_embeddings=False,
)  # fmt: skip
SETTINGS = {
    "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}, "image_mean": [0.5, 0.45, 0.4],
    "image_std": [0.3, 0.25, 0.27], "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 24}},
}  # fmt: skip
QUESTIONS = (
    Question("TA", "Is there a red circle?", "yes", name="circle"),
    Question("Phy", "Does it jump or vanish?", "no", name="jump"),
    Question("VQ", "Describe the motion.", "It moves left.", kind="dense", name="motion"),
)


def tiny_model(dtype=torch.float64):
    with _seeded(0) as generator:
        model = SmolVLMForConditionalGeneration(SmolVLMConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"}))
        _spread(model, 1.0, generator)
    model = model.to(dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = TEXT["eos_token_id"]
    if dtype == torch.float64:  # transformers' norm and rotation round to fp32, and that gradient to 1e-7
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = lambda x, m=module: (
                    m.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon)
                )
    return model


def tiny_smolvlm(dtype=torch.float64, fps=2.0):
    return VLMCritic(tiny_model(dtype), byte_tokenizer(CONFIG), video_geometry(SETTINGS), fps=fps)


def clips_of(batch=2, frames=3, size=(12, 20), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, frames, 3, *size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def own_prompt(monkeypatch, frames, fps, text):
    """A chat about a clip by transformers' template and processor. (num2words may not be installed.)"""
    monkeypatch.setattr(processing_smolvlm, "num2words", in_words)
    processor = processing_smolvlm.SmolVLMProcessor.__new__(processing_smolvlm.SmolVLMProcessor)
    processor.image_seq_len, processor.image_token = 4, "<image>"
    processor.fake_image_token, processor.global_image_token = "<fake_token_around_image>", "<global-img>"
    metadata = SimpleNamespace(fps=fps, timestamps=[i / fps for i in range(frames)], duration=frames / fps)
    inputs = {"pixel_values": torch.zeros(1, frames, 1), "video_metadata": [metadata]}
    tokenizer = byte_tokenizer(CONFIG)
    message = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    template = processing_smolvlm.DEFAULT_CHAT_TEMPLATE
    chat = tokenizer.apply_chat_template(message, chat_template=template, tokenize=False, add_generation_prompt=True)
    holder = SimpleNamespace(all_special_multimodal_tokens=["<video>"], video_token="<video>")
    replacement = processor.replace_video_token(inputs, 0)
    (whole,), _ = ProcessorMixin.get_text_with_replacements(holder, [chat], videos_replacements=[replacement])
    return whole, tokenizer


def separately(monkeypatch, critic, model, frames_TCHW, question):
    """The scored logits of one question by the plain model, called as its own ``forward``."""
    prompt, tokenizer = own_prompt(monkeypatch, len(frames_TCHW), critic.fps, question.text)
    dense = question.kind == "dense"
    said = tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"] if dense else [0]
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"] + said[:-1]])
    pixels, _ = patches(frames_TCHW[None], critic.geometry)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels[None])
    return out.logits[0, -len(said) :]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_packed_answers_and_their_gradients_are_those_of_the_plain_model(monkeypatch, checkpointing):
    critic, model, frames = tiny_smolvlm(), tiny_model(), clips_of()
    critic.set_checkpointing(checkpointing)
    asked = [QUESTIONS, QUESTIONS[1:]]
    packed = [answer for of_clip in critic(frames, asked) for answer in of_clip]
    alone = [
        separately(monkeypatch, critic, model, clip, q) for clip, qs in zip(frames, asked, strict=True) for q in qs
    ]
    logp = [rows.logits_AV.log_softmax(-1) for rows in packed], [rows.log_softmax(-1) for rows in alone]
    for mine, plain in zip(*logp, strict=True):
        assert mine.shape == plain.shape and relative_difference(mine, plain) < LIMIT
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(rows.shape, generator=generator, dtype=rows.dtype) for rows in logp[0]]
    got, wanted = (
        torch.autograd.grad(sum((w * r).sum() for w, r in zip(weights, rows, strict=True)), frames)[0] for rows in logp
    )
    assert relative_difference(got, wanted) < LIMIT
    yes, no = critic.conversation.yes, critic.conversation.no
    assert len(yes) == len(no) == 3 and not set(yes) & set(no)


def test_the_relay_is_naive_with_it():
    parts, (noise, cond, uncond, _) = replace(toy_parts(), critic=tiny_smolvlm()), batch_of(2)
    arguments = plan_of((1, 4, 5), guidance=3.0), noise, cond, uncond, [QUESTIONS, QUESTIONS[1:]]
    expected, wanted = lora_gradients(naive_step, parts, *arguments)
    actual, stats = lora_gradients(drf_step, parts, *arguments)
    assert relative_difference(actual, expected) < LIMIT and stats.reward == pytest.approx(wanted.reward)
    assert set(stats.reward_by_question) == {"circle", "jump", "motion"}


def test_its_language_model_takes_ranges():
    """As the attention kernel does, which this stands for in fp64. The tower stays as it is."""
    critic, frames, calls = tiny_smolvlm(), clips_of(), []

    def attend(q, k, v, scale, ranges_BL3):
        calls.append(q.shape)
        prefix, start, stop = ranges_BL3[..., None, :].unbind(-1)
        column = torch.arange(k.shape[1])
        seen = (column < prefix) | ((column >= start) & (column < stop)) | (stop == 0)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen[:, None], scale=scale, enable_gqa=True).transpose(1, 2)

    asked = [QUESTIONS, QUESTIONS[:1]]
    plain = torch.cat([answer.logits_AV for of_clip in critic(frames, asked) for answer in of_clip])
    critic.set_attention(attend, {12})
    ranged = torch.cat([answer.logits_AV for of_clip in critic(frames, asked) for answer in of_clip])
    assert len(calls) == 2 and relative_difference(ranged, plain) < LIMIT


def test_the_prompt_is_its_processors(monkeypatch):
    """With the time of every frame, and no token across the border of clip and question."""
    critic = tiny_smolvlm(fps=0.5)
    whole, tokenizer = own_prompt(monkeypatch, 40, 0.5, QUESTIONS[0].text)
    assert "forty frames from a 0:01:20 [H:MM:SS]" in whole and "Frame from 01:18:<fake_token" in whole
    prefix = critic.prefix(torch.tensor([[40, 2, 2]]))
    ids = [*prefix.ids_P.tolist(), *critic.conversation.tokens(QUESTIONS[0]).ids]
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert prefix.ids_P[-1] == tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
    assert prefix.positions_3P[0].tolist() == list(range(len(prefix.ids_P)))
    assert str(datetime.timedelta(seconds=3725)) in placeholder("<image>", [3725, 2, 2], 1.0)


def test_numbers_are_num2words():
    wanted = {7: "seven", 20: "twenty", 64: "sixty-four", 100: "one hundred", 121: "one hundred and twenty-one"}
    wanted |= {1000: "one thousand", 1001: "one thousand and one", 2345: "two thousand, three hundred and forty-five"}
    assert {number: in_words(number) for number in wanted} == wanted


@pytest.mark.parametrize("size", [(12, 20), (21, 9), (48, 80)], ids=str)
def test_frames_are_those_of_its_image_processor(size):
    """Its video processor needs torchvision, and does the same to each frame. It rounds to 8 bit after every pass."""
    images = (60 + 135 * clips_of(1, size=size)[0].detach()).round()
    processor = SmolVLMImageProcessorPil(
        size={"longest_edge": 24}, max_image_size={"longest_edge": 16}, resample=3, do_image_splitting=False,
        image_mean=SETTINGS["image_mean"], image_std=SETTINGS["image_std"],
    )  # fmt: skip
    wanted = processor([list(images.to(torch.uint8).numpy())], return_tensors="pt")["pixel_values"][0]
    critic = tiny_smolvlm()
    got, grid = patches(images[None] / 255, critic.geometry)
    levels = (got - wanted).abs() * 255 * torch.tensor(SETTINGS["image_std"])[:, None, None]
    assert got.shape == wanted.shape == (3, 3, 16, 16) and grid.tolist() == [[3, 2, 2]]
    assert levels.max() < 4.5 and levels.mean() < 0.8
    once = resized(images[None] / 255, critic.geometry)
    assert once.shape[-2:] == (16, 16) and resized(once, critic.geometry) is once


def test_it_is_loaded_from_its_folder_and_writes(monkeypatch, tmp_path):
    model, tokenizer = tiny_model(torch.float32), byte_tokenizer(CONFIG)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    critic, frames = load_critic(str(tmp_path), fps=2.0), clips_of(1, dtype=torch.float32)
    both = (one(frames, [QUESTIONS]) for one in (critic, tiny_smolvlm(torch.float32)))
    read, made = (mean_reward(answers, [QUESTIONS], RewardSpec())[0].item() for answers in both)
    assert read == pytest.approx(made, rel=1e-4)
    assert token_probabilities(critic.answer_from_text("A circle.", QUESTIONS)[2]).shape == (15,)
    prompt, tokenizer = own_prompt(monkeypatch, 3, 2.0, "What is it?")
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    pixels, _ = patches(frames.detach(), critic.geometry)
    made = model.generate(ids, pixel_values=pixels[None], max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    said = tokenizer.decode(made, skip_special_tokens=True).strip()
    assert said == critic.generate("What is it?", frames[0].detach(), 4) != ""
    assert len(critic.generate_batch(["One", "Another text"], 2)) == 2
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, "max_image_size": {"longest_edge": 32}}))
    with pytest.raises(BadInputError, match="max_image_size = 32, and the model's vision_config has image_size = 16"):
        load_critic(str(tmp_path))


def test_language_layers_are_packed_and_nothing_else():
    model = random_model(
        CONFIG | {"text_config": TEXT | {"hidden_size": 64, "intermediate_size": 64}}, torch.float32, "cpu", "nf4", 0
    )
    packed = {name for name, module in model.named_modules() if type(module).__name__ == "PackedLinear"}
    assert len(packed) == 14 and all(name.startswith("model.text_model.layers.") for name in packed)


@pytest.mark.slow
def test_planned_bytes_are_real(tmp_path):
    """Of more layers than the plan runs; more pixels make more tokens than the questions have."""
    wide = CONFIG | {"text_config": TEXT | {"num_hidden_layers": 8}, "vision_config": VISION | {"image_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    side = {"longest_edge": 64}
    settings = SETTINGS | {"max_image_size": side, "video_sampling": {"video_size": side}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    byte_tokenizer(wide).save_pretrained(tmp_path)
    small = ("micro_batch=1", "batch=1", "sampler.steps=2", "sampler.graded_steps=1", "memory.checkpoint=true")
    config = load_config("toy", [*small, f"critic.id={tmp_path}", "critic.mode=both"])
    planned, counted = make_plan(config, card_named("")).stages["critic"], count_bytes(config)["critic"]
    assert planned.peak_gib == pytest.approx(counted, rel=0.05)
