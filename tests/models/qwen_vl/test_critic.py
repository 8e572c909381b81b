"""The packed critic is the critic: logits and frame gradients equal those of transformers' own forward, one question at
a time."""

from __future__ import annotations

import pytest
import torch
from _critic import (
    DENSE,
    FAMILIES,
    LONG,
    SHORT,
    WORD,
    clips,
    expanded,
    inputs,
    lift_rotations,
    questions,
    separately,
    untouched,
)
from _tiny import relative_difference, tiny_critic, tiny_critic_model, tiny_critic_tokenizer, tiny_video_settings

from lowmem_drf.models.qwen_vl.critic import VLMCritic, video_geometry
from lowmem_drf.models.qwen_vl.packed_questions import Conversation

VOCABULARY = len(tiny_critic_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 5, 24])
def test_packed_is_separate(count: int, family: str, monkeypatch) -> None:
    lift_rotations(monkeypatch)
    critic = tiny_critic(torch.float64, family=family)
    oracle = untouched(critic, tiny_critic_model(torch.float64, family=family)[0])
    frames, asked = clips(1), questions(count)
    wanted = [separately(oracle, frames, q) for q in asked]
    upstreams = [
        torch.randn(w.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, w in enumerate(wanted)
    ]
    (wanted_grad,) = torch.autograd.grad(sum((w * u).sum() for w, u in zip(wanted, upstreams, strict=True)), frames)
    (answers,) = critic(frames, [asked])
    (got_grad,) = torch.autograd.grad(
        sum((a.logits_AV * u).sum() for a, u in zip(answers, upstreams, strict=True)), frames
    )
    for answer, logits in zip(answers, wanted, strict=True):
        assert answer.logits_AV.shape == logits.shape and answer.target_A.shape == logits.shape[:1]
        assert relative_difference(answer.logits_AV, logits) < 1e-10
    assert relative_difference(got_grad, wanted_grad) < 1e-10
    assert (got_grad.abs().amax(dim=(0, 2, 3, 4)) > 0).all(), "every frame gets a gradient"


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_is_one_clip_at_a_time(family: str) -> None:
    """Different numbers, kinds and lengths of questions, none at all among them: padding must not be attended to."""
    critic, frames = tiny_critic(torch.float64, family=family), clips(4)
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
    assert critic.conversation.pack(10, asked).mask.shape[0] == 1
    shared = critic(frames, asked)
    ragged = critic(frames, [*asked[:2], [*questions(4), LONG]])
    for a, b in zip([x for clip in shared for x in clip], [x for clip in ragged for x in clip[:4]], strict=True):
        assert relative_difference(a.logits_AV, b.logits_AV) < 1e-10


def test_no_questions() -> None:
    assert tiny_critic()(clips(2, dtype=torch.float32), [[], []]) == [[], []]


@pytest.mark.parametrize(("family", "width", "grid"), [("qwen2_5_vl", 24, [3, 6, 10]), ("qwen3_vl", 48, [3, 6, 10, 5])])
def test_features_can_be_computed_once_and_asked_later(family: str, width: int, grid: list[int]) -> None:
    """Cached features may be indexed by clip. Qwen3-VL's include the DeepStack tokens."""
    critic, frames, asked = (
        tiny_critic(family=family),
        clips(3, dtype=torch.float32),
        [questions(2), questions(3), questions(1)],
    )
    with torch.no_grad():
        features, grids = critic.embed_video(frames)
        assert features.shape == (3, 3 * 3 * 5, width) and grids.tolist() == [grid] * 3
        later = critic.answer_from_features(features[1:], grids[1:], asked[1:])
        logits, sizes = critic.scored_logits(features, grids, asked)
    assert sizes == [9, 1, 9, 1, 1, 9] and logits.shape == (sum(sizes), VOCABULARY)
    for a, b in zip([x for clip in later for x in clip], logits.split(sizes)[2:], strict=True):
        torch.testing.assert_close(a.logits_AV, b)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("frames", "fps"), [(5, 1.0), (6, 2.0), (6, 0.5), (2, 2.0), (9, 2 / 3)])
def test_prefix_is_that_of_transformers(frames: int, fps: float, family: str) -> None:
    """Tokens as the processor writes them (with Qwen3-VL's timestamps), positions as ``get_rope_index`` counts them."""
    critic = tiny_critic(fps=fps, family=family)
    wanted = inputs(critic, clips(1, frames, dtype=torch.float32), "red?")
    _, grid = critic.embed_video(clips(1, frames, dtype=torch.float32))
    prefix, length = critic.prefix(grid), len(critic.prefix(grid).ids_P)
    keys = ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    positions, _ = critic.model.model.get_rope_index(
        wanted["input_ids"], **{key: wanted[key] for key in keys if key in wanted}
    )
    assert torch.equal(prefix.ids_P, wanted["input_ids"][0, :length])
    assert torch.equal(prefix.positions_3P, positions[:, 0, :length])
    assert positions[:, 0, length].tolist() == [prefix.start] * 3
    assert torch.equal(prefix.slots_N, (wanted["input_ids"][0] == critic.model.config.video_token_id).nonzero()[:, 0])


def test_times_are_spelled_out_for_qwen3_vl() -> None:
    """A last slice with a single frame gets the time of that frame."""
    text = expanded("<|vision_start|><|video_pad|><|vision_end|>", [2, 2, 2], 3, 2.0, "qwen3_vl")
    start, end, slice_ = "<|vision_start|>", "<|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    assert text == f"{start}<0.2 seconds>{slice_}<1.0 seconds>{slice_}{end}"
    ours = tiny_critic(family="qwen3_vl").family.placeholder("<|video_pad|>", [2, 2, 2, 3], 2.0)
    assert text == f"{start}{ours}{end}"


def test_positions_at_fractions_of_a_second() -> None:
    """tokens_per_second 4, two frames per patch, 16 frames a second: half a position per patch, rounded down
    (transformers < 5.18 gives 0 throughout)."""
    prefix = tiny_critic(fps=16.0).prefix(torch.tensor([[5, 2, 2]]))
    times = prefix.positions_3P[0, prefix.slots_N]
    assert (times - times[0]).tolist() == [0, 0, 1, 1, 2]


def test_logits_of_a_16_bit_critic_are_fp32() -> None:
    (answers,) = tiny_critic(torch.bfloat16)(clips(1, dtype=torch.float32), [questions(2)])
    assert {a.logits_AV.dtype for a in answers} == {torch.float32}


def test_answer_words() -> None:
    critic = tiny_critic()
    word = critic.tokenizer.convert_tokens_to_ids
    (answers,) = critic(clips(1, dtype=torch.float32), [[SHORT, LONG, WORD]])
    assert answers[0].yes == (word("yes"), word("Yes"), word("YES")) and answers[0].no == (
        word("no"),
        word("No"),
        word("NO"),
    )
    assert [a.target_A.tolist() for a in answers] == [[word("yes")], [word("no")], [word("red")]]


def test_casings_with_a_leading_space_count_too() -> None:
    """Byte-level BPE, as Qwen's, writes `` yes`` as ``Ġyes``."""
    tokenizer = tiny_critic_tokenizer()
    tokenizer.add_tokens(["Ġyes", "ĠYes", "▁no"])
    conversation, word = (
        Conversation(tokenizer, tokenizer.convert_tokens_to_ids("<|video_pad|>")),
        tokenizer.convert_tokens_to_ids,
    )
    assert conversation.yes == (word("yes"), word("Yes"), word("YES"), word("Ġyes"), word("ĠYes"))
    assert conversation.no == (word("no"), word("No"), word("NO"), word("▁no"))


def test_a_system_prompt_in_the_template_is_part_of_the_prefix() -> None:
    model, tokenizer = tiny_critic_model()
    system = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    tokenizer.chat_template = system + tokenizer.chat_template
    prefix = VLMCritic(model, tokenizer, video_geometry(tiny_video_settings())).prefix(torch.tensor([[1, 2, 2]]))
    assert prefix.ids_P[: len(tokenizer(system)["input_ids"])].tolist() == tokenizer(system)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_about_a_text_are_those_of_conversations_without_a_video(family: str) -> None:
    """Packed, two texts of equal length at once, against one conversation a question in transformers' own forward."""
    critic = tiny_critic(torch.float64, family=family)
    texts, asked = ["a red circle moves left", "a red square moves left"], [questions(4), questions(3)[::-1]]
    logits, sizes = critic.text_logits(texts, asked)
    model, rows = tiny_critic_model(torch.float64, family=family)[0], iter(logits.split(sizes))
    for text, question in [(text, question) for text, some in zip(texts, asked, strict=True) for question in some]:
        content = [{"type": "text", "text": f"{text}\n{question.text}"}]
        ids = critic.tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        ids, got = list(ids["input_ids"]), next(rows)
        if question.kind == "dense":
            ids += critic.tokenizer(question.answer)["input_ids"][:-1]
        wanted = model(input_ids=torch.tensor([ids])).logits[0, -len(got) :]
        assert relative_difference(got, wanted) < 1e-10
    (alone, *_) = critic.answer_from_text(texts[0], asked[0])
    assert relative_difference(alone.logits_AV, logits[: sizes[0]]) < 1e-10
