"""Checkpointing really happens on a frozen critic in ``eval``: asserted as bytes and as work, at the depth of the real
models."""

from __future__ import annotations

import copy

import pytest
import torch
from _critic import FAMILIES, clips, questions
from _tiny import SavedBytes, relative_difference, tiny_critic
from torch.utils.flop_counter import FlopCounterMode

from lowmem_drf.models.qwen_vl.known import KNOWN

DEPTHS = {
    "qwen2_5_vl": KNOWN["Qwen/Qwen2.5-VL-7B-Instruct"].config,
    "qwen3_vl": KNOWN["Qwen/Qwen3-VL-8B-Instruct"].config,
}


def deep_critic(family: str):
    """As many layers as the real one has, tiny ones; dropout configured, which a frozen critic must not apply."""
    config = DEPTHS[family]
    layers, depth = config["text_config"]["num_hidden_layers"], config["vision_config"]["depth"]
    return tiny_critic(torch.float64, family=family, layers=layers, depth=depth, dropout=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_bytes_fall_and_gradients_stay(family: str) -> None:
    critic, frames, asked = deep_critic(family), clips(1), [questions(5)]
    saved, forward, backward, gradients, logits = {}, {}, {}, {}, {}
    for on in (False, True):
        critic.set_checkpointing(on)
        assert not any(module.training for module in critic.model.modules())
        with FlopCounterMode(display=False) as counter, SavedBytes(critic.model) as kept:
            (answers,) = critic(frames, asked)
            loss = sum(a.logits_AV.square().sum() for a in answers)
        forward[on], saved[on] = counter.get_total_flops(), kept.total
        with FlopCounterMode(display=False) as counter:
            (gradients[on],) = torch.autograd.grad(loss, frames)
        backward[on] = counter.get_total_flops()
        logits[on] = torch.cat([a.logits_AV for a in answers])
    assert not any(p.requires_grad for p in critic.model.parameters())
    assert saved[True] < saved[False] / 4
    # the backward runs each layer's forward once more, up to its last product: that one's result is not needed
    assert forward[True] == forward[False]
    assert backward[True] - backward[False] == _flops_of_layers(critic, frames, asked)
    assert torch.equal(logits[True], logits[False]) and torch.equal(gradients[True], gradients[False])


def _flops_of_layers(critic, frames, asked) -> int:
    """All layers of both towers without the last linear of each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        critic(frames, asked)
    counts = counter.get_flop_counts()
    layers = [name for name in counts if name.split(".")[-2:-1] in (["layers"], ["blocks"])]
    assert len(layers) > 50
    last = [name for name in counts if name.endswith(("mlp.down_proj", "mlp.linear_fc2"))]
    assert len(last) == len(layers)
    return sum(sum(counts[name].values()) for name in layers) - sum(sum(counts[name].values()) for name in last)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mode_of_the_model_undoes_it(family: str) -> None:
    """transformers' own checkpointing stops at ``eval()``."""
    critic, frames, asked = tiny_critic(torch.float64, family=family), clips(1), [questions(3)]
    saved = []
    for change in (
        lambda: None,
        lambda: critic.set_checkpointing(True),
        critic.model.train,
        critic.model.eval,
        lambda: critic.set_checkpointing(True),
    ):
        change()
        with SavedBytes(critic.model) as kept:
            critic(frames, asked)
        saved.append(kept.total)
    assert saved[1] < saved[0] and set(saved[1:]) == {saved[1]}
    critic.set_checkpointing(False)
    with SavedBytes(critic.model) as kept:
        critic(frames, asked)
    assert kept.total == saved[0]


def test_a_copied_critic_recomputes_its_own_layers() -> None:
    critic, frames, asked = tiny_critic(torch.float64), clips(1), [questions(3)]
    critic.set_checkpointing(True)
    twin = copy.deepcopy(critic)
    with torch.no_grad():
        for parameter in critic.model.parameters():
            parameter.zero_()
    fresh = tiny_critic(torch.float64)
    for a, b in zip(twin(frames, asked)[0], fresh(frames, asked)[0], strict=True):
        assert relative_difference(a.logits_AV, b.logits_AV) < 1e-10
