"""The packed critic is the critic: logits and frame gradients equal those of transformers' own forward, one question at a time."""

from __future__ import annotations

import json

import pytest
import torch
from _tiny import (
    SavedBytes,
    relative_difference,
    save_tiny_critic,
    save_tiny_generator,
    tiny_critic,
    tiny_critic_model,
    tiny_critic_tokenizer,
    tiny_video_settings,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.preprocess import video_patches
from lowmem_drf.models.critic import QwenCritic, load_critic, video_geometry
from lowmem_drf.models.packing import Conversation
from lowmem_drf.types import Question

SHORT = Question("TA", "red?", "yes")
LONG = Question("Phy", "in this video, does the red circle moving left jump or does it flicker or vanish?", "no")
DENSE = Question("VQ", "describe the motion.", "the red circle moves left the whole clip.", kind="dense")
WORD = Question("VQ", "what color is it?", "red", kind="dense")


def questions(count: int) -> list[Question]:
    return [(DENSE, SHORT, LONG, WORD)[i % 4] for i in range(count)]


def clips(batch: int, frames: int = 5, size: tuple[int, int] = (24, 40), dtype: torch.dtype = torch.float64) -> Tensor:
    """24x40 pixels are 3x5 tokens, which the 2x2 windows do not divide: windows of four lengths."""
    return torch.rand(batch, frames, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype).requires_grad_()


def separately(frames_1TCHW: Tensor, question: Question) -> Tensor:
    """The scored logits by ``Qwen2_5_VLForConditionalGeneration.forward`` with its own positions and masks."""
    model, tokenizer = tiny_critic_model(torch.float64)
    geometry, config = video_geometry(tiny_video_settings()), model.config
    pixels, grid = video_patches(frames_1TCHW, geometry)
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question.text}]}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    text = text.replace("<|video_pad|>", "<|video_pad|>" * int(grid.prod() // geometry.merge**2))
    answer = tokenizer(question.answer)["input_ids"] if question.kind == "dense" else [-1]
    ids = torch.tensor([tokenizer(text)["input_ids"] + answer[:-1]])
    out = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=pixels,
        video_grid_thw=grid,
        second_per_grid_ts=torch.tensor([1.0]),
        mm_token_type_ids=2 * (ids == config.video_token_id).int(),
    )
    return out.logits[0, -len(answer) :]


def rotate_in_fp64(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    half = modeling_qwen2_5_vl.rotate_half
    cos, sin = cos.double().unsqueeze(-2), sin.double().unsqueeze(-2)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


@pytest.mark.parametrize("count", [1, 5, 24])
def test_packed_is_separate(count: int, monkeypatch) -> None:
    # transformers rotates in fp32, whose backward would round the oracle's gradient to 1e-7 (as _tiny says of the norms)
    monkeypatch.setattr(modeling_qwen2_5_vl, "apply_rotary_pos_emb_vision", rotate_in_fp64)
    frames, asked = clips(1), questions(count)
    upstreams = [torch.randn(len(separately(frames, q)), 56, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i, q in enumerate(asked)]
    wanted = [separately(frames, q) for q in asked]
    (wanted_grad,) = torch.autograd.grad(sum((w * u).sum() for w, u in zip(wanted, upstreams, strict=True)), frames)
    (answers,) = tiny_critic(torch.float64)(frames, [asked])
    (got_grad,) = torch.autograd.grad(sum((a.logits_AV * u).sum() for a, u in zip(answers, upstreams, strict=True)), frames)
    for answer, logits in zip(answers, wanted, strict=True):
        assert answer.logits_AV.shape == logits.shape and answer.target_A.shape == logits.shape[:1]
        assert relative_difference(answer.logits_AV, logits) < 1e-10
    assert relative_difference(got_grad, wanted_grad) < 1e-10
    assert (got_grad.abs().amax(dim=(0, 2, 3, 4)) > 0).all(), "every frame gets a gradient"


def test_batch_is_one_clip_at_a_time() -> None:
    """Different numbers, kinds and lengths of questions, none at all among them: padding must not be attended to."""
    critic, frames = tiny_critic(torch.float64), clips(4)
    asked = [questions(6), [SHORT], [], [LONG, DENSE]]
    together = critic(frames, asked)
    loss = sum(a.logits_AV.square().sum() for clip in together for a in clip)
    (gradient,) = torch.autograd.grad(loss, frames)
    assert [len(clip) for clip in together] == [6, 1, 0, 2]
    assert not gradient[2].any()
    for i, clip in enumerate(asked):
        one = frames.detach()[i : i + 1].requires_grad_()
        (alone,) = critic(one, [clip])
        for a, b in zip(together[i], alone, strict=True):
            assert relative_difference(a.logits_AV, b.logits_AV) < 1e-10
            assert torch.equal(a.target_A, b.target_A)
        if clip:
            (wanted,) = torch.autograd.grad(sum(a.logits_AV.square().sum() for a in alone), one)
            assert relative_difference(gradient[i : i + 1], wanted) < 1e-10


def test_same_questions_for_all_clips_share_one_mask() -> None:
    critic, frames, asked = tiny_critic(torch.float64), clips(3), [questions(4)] * 3
    assert critic.conversation.pack(10, asked).mask_B1LL.shape[0] == 1
    shared = critic(frames, asked)
    ragged = critic(frames, [*asked[:2], [*questions(4), LONG]])
    for a, b in zip([x for clip in shared for x in clip], [x for clip in ragged for x in clip[:4]], strict=True):
        assert relative_difference(a.logits_AV, b.logits_AV) < 1e-10


def test_no_questions() -> None:
    assert tiny_critic()(clips(2, dtype=torch.float32), [[], []]) == [[], []]


def test_features_can_be_computed_once_and_asked_later() -> None:
    critic, frames, asked = tiny_critic(), clips(3, dtype=torch.float32), [questions(2), questions(3), questions(1)]
    with torch.no_grad():
        features, grid = critic.embed_video(frames)
        assert features.shape == (3, 3 * 3 * 5, 24) and grid.tolist() == [[3, 6, 10]] * 3
        later = critic.answer_from_features(features[1:], grid[1:], asked[1:])
        logits, sizes = critic.scored_logits(features, grid, asked)
    assert sizes == [9, 1, 9, 1, 1, 9] and logits.shape == (sum(sizes), 56)
    for a, b in zip([x for clip in later for x in clip], logits.split(sizes)[2:], strict=True):
        torch.testing.assert_close(a.logits_AV, b)


@pytest.mark.parametrize("fps", [1.0, 2.0, 0.5])
def test_positions_are_those_of_transformers(fps: float) -> None:
    critic = tiny_critic(fps=fps)
    grid, conversation = torch.tensor([[3, 6, 10]]), critic.conversation
    positions, start = critic._prefix_positions(grid)
    video = critic.model.config.video_token_id
    ids = torch.tensor([[*conversation.before_video, *[video] * 45, *conversation.after_video, 9]])
    wanted, _ = critic.model.model.get_rope_index(
        ids, mm_token_type_ids=2 * (ids == video).int(), video_grid_thw=grid, second_per_grid_ts=torch.tensor([2.0 / fps])
    )
    assert torch.equal(positions, wanted[:, 0, :-1]) and wanted[:, 0, -1].tolist() == [start] * 3


def test_positions_at_fractions_of_a_second() -> None:
    """tokens_per_second 4, two frames per patch, 16 frames a second: half a position per patch, rounded down (transformers < 5.18 gives 0
    throughout)."""
    positions, _ = tiny_critic(fps=16.0)._prefix_positions(torch.tensor([[5, 2, 2]]))
    before = len(tiny_critic().conversation.before_video)
    assert (positions[0, before : before + 5] - before).tolist() == [0, 0, 1, 1, 2]


def test_checkpointing_fires_for_a_frozen_critic_and_changes_no_gradient() -> None:
    critic, frames, asked = tiny_critic(torch.float64), clips(2), [questions(5)] * 2
    saved, flops, gradients = {}, {}, {}
    for on in (False, True):
        critic.set_checkpointing(on)
        with SavedBytes(critic.model) as kept:
            loss = sum(a.logits_AV.square().sum() for clip in critic(frames, asked) for a in clip)
        counter = FlopCounterMode(display=False)
        with counter:
            (gradients[on],) = torch.autograd.grad(loss, frames)
        saved[on], flops[on] = kept.total, counter.get_total_flops()
    assert not any(p.requires_grad for p in critic.model.parameters())
    assert saved[True] < saved[False] / 2
    assert flops[True] > 1.5 * flops[False]
    assert torch.equal(gradients[True], gradients[False])
    critic.set_checkpointing(False)
    assert not any(module.training for module in critic.model.modules())


def test_logits_of_a_16_bit_critic_are_fp32() -> None:
    (answers,) = tiny_critic(torch.bfloat16)(clips(1, dtype=torch.float32), [questions(2)])
    assert {a.logits_AV.dtype for a in answers} == {torch.float32}


def test_answer_words() -> None:
    critic = tiny_critic()
    word = critic.tokenizer.convert_tokens_to_ids
    (answers,) = critic(clips(1, dtype=torch.float32), [[SHORT, LONG, WORD]])
    assert answers[0].yes == (word("yes"), word("Yes"), word("YES")) and answers[0].no == (word("no"), word("No"), word("NO"))
    assert [a.target_A.tolist() for a in answers] == [[word("yes")], [word("no")], [word("red")]]


def test_casings_with_a_leading_space_count_too() -> None:
    """Byte-level BPE, as Qwen's, writes `` yes`` as ``Ġyes``."""
    tokenizer = tiny_critic_tokenizer()
    tokenizer.add_tokens(["Ġyes", "ĠYes", "▁no"])
    conversation, word = Conversation(tokenizer, tokenizer.convert_tokens_to_ids("<|video_pad|>")), tokenizer.convert_tokens_to_ids
    assert conversation.yes == (word("yes"), word("Yes"), word("YES"), word("Ġyes"), word("ĠYes"))
    assert conversation.no == (word("no"), word("No"), word("NO"), word("▁no"))


def test_a_system_prompt_in_the_template_is_part_of_the_prefix() -> None:
    model, tokenizer = tiny_critic_model()
    system = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    tokenizer.chat_template = system + tokenizer.chat_template
    conversation = QwenCritic(model, tokenizer, video_geometry(tiny_video_settings())).conversation
    assert conversation.before_video[: len(tokenizer(system)["input_ids"])] == tokenizer(system)["input_ids"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("<|video_pad|>no text here", "exactly once"),
        ("{{ messages[0]['content'][1]['text'] }}", "exactly one video token"),
    ],
)
def test_unusable_templates_are_refused(template: str | None, reason: str) -> None:
    tokenizer = tiny_critic_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(BadInputError, match=reason):
        Conversation(tokenizer, tokenizer.convert_tokens_to_ids("<|video_pad|>"))


def test_a_dense_question_needs_a_reference() -> None:
    with pytest.raises(BadInputError, match="no reference answer"):
        tiny_critic().conversation.ask(Question("TA", "what is it?", " ", kind="dense"))


def test_load_critic(tmp_path) -> None:
    critic = load_critic(str(save_tiny_critic(tmp_path)))
    frames, asked = clips(2, dtype=torch.float32), [questions(3), questions(2)]
    for got, wanted in zip(critic(frames, asked), tiny_critic()(frames, asked), strict=True):
        assert all(torch.equal(a.logits_AV, b.logits_AV) for a, b in zip(got, wanted, strict=True))
    assert critic.fps == 2.0 and load_critic(str(tmp_path), fps=8.0).fps == 8.0
    assert not any(p.requires_grad for p in critic.model.parameters())


def test_load_critic_from_the_files_of_older_models(tmp_path) -> None:
    """Qwen2.5-VL's own repository: pixels in preprocessor_config.json, the template in chat_template.json."""
    folder = save_tiny_critic(tmp_path)
    settings = tiny_video_settings() | {"min_pixels": 256, "max_pixels": 1024}
    del settings["size"], settings["fps"]
    (folder / "video_preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").rename(tmp_path / "template")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": (tmp_path / "template").read_text()}))
    critic = load_critic(str(folder))
    assert (critic.geometry.min_pixels, critic.geometry.max_pixels, critic.fps) == (256, 1024, 2.0)
    assert critic.conversation.yes


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "Cannot load the critic"),
        (
            lambda folder: save_tiny_generator(folder / "g") and (folder / "g/text_encoder/config.json").replace(folder / "config.json"),
            "Qwen2.5-VL",
        ),
        (lambda folder: (folder / "video_preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (lambda folder: (folder / "video_preprocessor_config.json").write_text('{"patch_size": 4}'), "lack"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"not weights"), "Cannot load the critic"),
    ],
    ids=["no config", "another model", "no preprocessor", "half a preprocessor", "broken weights"],
)
def test_broken_folders_are_refused(spoil, reason: str, tmp_path) -> None:
    folder = save_tiny_critic(tmp_path)
    spoil(folder)
    with pytest.raises(BadInputError, match=reason):
        load_critic(str(folder))
