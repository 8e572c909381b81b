"""``VLMCritic.generate`` agrees with transformers' ``generate`` token by token."""

from __future__ import annotations

import pytest
import torch
from _critic import FAMILIES, clips, inputs, untouched
from _tiny import tiny_critic, tiny_critic_model

from lowmem_drf.models.qwen_vl.generation import greedy

TEXT = "in this video, what is the color of the circle?"


def hugging_face(critic, model, frames, limit: int, text: str = TEXT) -> list[int]:
    oracle = untouched(critic, model)
    if frames is None:
        ids = torch.tensor([critic.conversation.prompt(text)])
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        arguments = inputs(oracle, frames, text)
    out = model.generate(**arguments, do_sample=False, max_new_tokens=limit)
    return out[0, arguments["input_ids"].shape[1] :].tolist()


def shown(critic, tokens: list[int]) -> str:
    return critic.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("frames", "size", "seed"), [(5, (24, 40), 0), (6, (16, 16), 1), (2, (8, 8), 2)])
def test_generate_is_that_of_transformers(
    family: str, checkpointing: bool, frames: int, size: tuple[int, int], seed: int
) -> None:
    """In fp64, so that no tie is decided by rounding. With checkpointing on transformers' own layers would drop the
    cache."""
    critic = tiny_critic(torch.float64, seed, family=family)
    critic.set_checkpointing(checkpointing)
    clip = clips(1, frames, size).detach()
    model, _ = tiny_critic_model(torch.float64, seed, family)
    wanted = hugging_face(critic, model, clip, 12)
    assert len(set(wanted)) > 1
    assert critic.generate(TEXT, clip[0], 12) == shown(critic, wanted)
    without = hugging_face(critic, model, None, 12)
    assert critic.generate(TEXT, None, 12) == shown(critic, without)
    assert without != wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_what_is_said_follow_the_text(family: str) -> None:
    """One row and column of tokens and half a second between frames: Qwen2.5-VL's time positions reach further than the
    text behind the video."""
    critic = tiny_critic(torch.float64, fps=1 / 4, family=family)
    clip = clips(1, 8, (8, 8)).detach()
    model, _ = tiny_critic_model(torch.float64, family=family)
    prefix = critic.prefix(critic.embed_video(clip)[1])
    assert (prefix.positions_3P.max() > prefix.start) == (family == "qwen2_5_vl")
    assert critic.generate(TEXT, clip[0], 10) == shown(critic, hugging_face(critic, model, clip, 10))


def test_it_stops_at_the_end_of_the_turn() -> None:
    critic = tiny_critic(torch.float64)
    clip = clips(1).detach()
    whole = hugging_face(critic, tiny_critic_model(torch.float64)[0], clip, 8)
    place = next(i for i, token in enumerate(whole) if token not in whole[:i] and i > 0)
    critic.model.generation_config.eos_token_id = [whole[place], 1]
    assert critic.generate(TEXT, clip[0], 8) == shown(critic, whole[:place])
    critic.model.generation_config.eos_token_id = None
    critic.tokenizer.eos_token = critic.tokenizer.convert_ids_to_tokens(whole[place])
    assert critic.generate(TEXT, clip[0], 8) == shown(critic, whole[:place])


def test_nothing_is_computed_beyond_what_is_said() -> None:
    """One step for the prompt and one per token except the last, each with new tokens only."""
    lengths, places = [], []

    def step(ids_BL, positions_3BL, mask, cache):
        lengths.append(ids_BL.shape[1])
        places.append(positions_3BL[0, 0].tolist())
        logits = torch.zeros(1, 9)
        logits[0, [5, 6, 7][len(lengths) - 1]] = 1
        return logits, (cache or 0) + 1

    assert greedy(step, torch.tensor([[1, 2, 3]]), torch.tensor([[[0, 7, 2]]] * 3), {7}, 9) == [[5, 6]]
    assert lengths == [3, 1, 1] and places == [[0, 7, 2], [3], [4]]
    assert greedy(step, torch.tensor([[1]]), torch.zeros(3, 1, 1, dtype=torch.int64), {0}, 0) == [[]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", [False, True])
def test_in_a_batch_each_text_gets_the_reply_it_gets_alone(family: str, kernel: bool) -> None:
    """Texts of different lengths, with replies that end at different tokens; with the kernel, which takes ranges."""
    critic = tiny_critic(torch.float64, family=family)
    texts = [TEXT, "a red circle", "is it blue? " * 9]
    whole = [hugging_face(critic, tiny_critic_model(torch.float64, family=family)[0], None, 10, text) for text in texts]
    critic.model.generation_config.eos_token_id = [whole[1][4], 1]
    if kernel:
        critic.set_attention(lambda *inputs: pytest.fail("generation has no ranges"), range(512))
    alone = [critic.generate(text, None, 10) for text in texts]
    assert critic.generate_batch(texts, 10) == alone
    assert alone[1] == shown(critic, whole[1][: whole[1].index(whole[1][4])])
    assert len(set(alone)) == 3


def test_it_keeps_no_graph_and_changes_no_gradient() -> None:
    critic, clip = tiny_critic(), clips(1, dtype=torch.float32)
    critic.set_checkpointing(True)
    first = critic.generate(TEXT, clip[0], 4)
    assert first == critic.generate(TEXT, clip[0], 4)
    assert clip.grad is None and not any(module.training for module in critic.model.modules())
