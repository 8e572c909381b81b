"""The critic on the attention kernel: ranges describe the same mask; answers and gradients equal SDPA's within
rounding."""

from __future__ import annotations

import pytest
import torch
from _close import assert_within_budget
from _tiny import tiny_critic

from lowmem_drf.ops import ranged_attention
from lowmem_drf.types import Question

ASKED = [
    [
        Question("TA", "is the circle red ?", "yes"),
        Question("Phy", "does it jump ?", "no"),
        Question("VQ", "describe the video", "sharp motion", kind="dense"),
    ],
    [Question("Phy", "does it vanish ?", "no")],
]


@pytest.mark.parametrize("clips", [ASKED, ASKED[:1], [[], ASKED[0]]], ids=["uneven", "one", "one-unasked"])
def test_ranges_are_the_mask(clips):
    conversation = tiny_critic().conversation
    mask = conversation.pack(11, clips).mask[:, 0]
    ranges = conversation.pack(11, clips, ranges=True).mask[:, 0]
    assert ranges.dtype == torch.int32 and ranges.shape == (*mask.shape[:2], 3)
    prefix, start, stop = ranges.unbind(-1)
    column = torch.arange(mask.shape[2])
    seen = (column < prefix[..., None]) | ((column >= start[..., None]) & (column < stop[..., None]))
    padding = stop == 0
    assert torch.equal(seen[~padding], mask[~padding])
    lengths = [sum(len(conversation.tokens(q).ids) for q in clip) for clip in clips]
    assert (~padding).sum(1).tolist() == [11 + length for length in lengths]
    assert not seen[padding].any()


def answers(critic, frames):
    frames = frames.clone().requires_grad_()
    logits = torch.cat([answer.logits_AV.flatten() for clip in critic(frames, ASKED) for answer in clip])
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(
        logits.dtype
    )
    return logits.detach(), *torch.autograd.grad(logits, frames, upstream)


@pytest.mark.parametrize(("family", "checkpointed"), [("qwen2_5_vl", False), ("qwen3_vl", True)])
def test_answers_and_gradients(family, checkpointed):
    frames = torch.rand(2, 4, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    sizes = dict(family=family, width=192, vision_width=32)
    critic, exact = tiny_critic(**sizes), tiny_critic(torch.float64, **sizes)
    truth, eager = answers(exact, frames.double()), answers(critic, frames)
    attention, dims = ranged_attention()
    calls = []

    def counted(*arguments):
        calls.append(arguments[0].shape)
        return attention(*arguments)

    critic.set_checkpointing(checkpointed)
    critic.set_attention(counted, dims)
    kernel = answers(critic, frames)
    assert len(calls) == 4 * (1 + checkpointed)  # two layers of the vision tower, two of the language model
    for name, a, b, c in zip(("logits", "frames"), kernel, truth, eager, strict=True):
        assert_within_budget(name, a, b, c)
    spoken = critic.generate("is it red ?", frames[0], 3)
    critic.set_attention(None)
    assert critic.generate("is it red ?", frames[0], 3) == spoken
    assert all(torch.equal(a, b) for a, b in zip(answers(critic, frames), eager, strict=True))


def test_heads_of_another_size_stay_with_sdpa():
    frames, critic = torch.rand(2, 4, 3, 24, 16, generator=torch.Generator().manual_seed(0)), tiny_critic()
    wanted = answers(critic, frames)
    critic.set_attention(ranged_attention()[0], ranged_attention()[1])  # heads of 12 and of 8
    assert all(torch.equal(a, b) for a, b in zip(answers(critic, frames), wanted, strict=True))
