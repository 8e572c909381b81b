"""``bench.scaling``: bytes counted by hand and on models, seconds by Amdahl's law, and that one card is one card."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from _root import ROOT
from _tiny import Z_DIM, tiny_transformer, tiny_vae
from torch import nn

from bench import scaling, scaling_work
from bench.scaling import (
    FABRICS,
    WAYS,
    Fabric,
    all_gather_bytes,
    all_reduce_bytes,
    all_to_all_bytes,
    best_group,
    head_parts,
    split_blocks,
    split_chunks,
    split_clip,
    split_prompts,
    split_tokens,
    split_weights,
)
from bench.scaling_work import FULL_CHUNK, Work, cache_numbers, lora_numbers
from lowmem_drf.models.generators import KNOWN_GENERATORS
from lowmem_drf.models.lora.adapter import DEFAULT_TARGETS, add_lora, lora_parameters
from lowmem_drf.models.wan.decoder import WanDecoder
from lowmem_drf.models.wan.random_generator import empty_transformer, empty_vae

SMALL = Work(
    name="small",
    fabric="PCIe",
    stages_s={"rollout": 80.0, "decode": 4.0, "critic": 2.0, "vae_backward": 6.0, "denoise_backward": 30.0},
    update_s=1.0,
    steps=20,
    branches=2,
    graded_steps=3,
    graded_per_step=1,
    keeps_attention=False,
    packed=False,
    tokens=16,
    width=8,
    heads=12,
    layers=8,
    lora_bytes=1_000,
    weights_bytes=10_000,
    latent_bytes=64,
    frame_bytes=96,
    chunks=21,
    cache_bytes=400,
    cache_gradient_bytes=200,
)
"""122 s a clip: 110 of the transformer, 10 of the VAE, 2 of the critic."""
FREE = Fabric("at no cost", 1e30, 1e30)


def test_collectives_in_rings() -> None:
    """Two cards: an all-reduce sends half a tensor to be added and half of the sum; an all-gather each card's own
    half."""
    assert (all_reduce_bytes(8, 2), all_reduce_bytes(8, 4), all_reduce_bytes(8, 1)) == (8, 12, 0)
    assert (all_gather_bytes(8, 2), all_gather_bytes(8, 4), all_gather_bytes(8, 1)) == (4, 6, 0)


@pytest.mark.parametrize("cards", [1, 2, 4])
def test_all_to_all_counted_number_by_number(cards: int) -> None:
    """Token t is on card t // (tokens / cards), head h goes to card h // (heads / cards): what has to move is
    counted."""
    tokens, heads, per_head = 8, 4, 3
    sent = Counter(
        t * cards // tokens
        for t, h in product(range(tokens), range(heads))
        if t * cards // tokens != h * cards // heads
    )
    each = {2 * per_head * sent[card] for card in range(cards)}
    assert each == {all_to_all_bytes(tokens, heads * per_head, cards)}


def test_heads_are_split_evenly() -> None:
    assert [head_parts(12, n) for n in (1, 2, 8, 64)] == [1, 2, 6, 12]
    assert [head_parts(40, n) for n in (2, 8, 64)] == [2, 8, 40]


def test_between_machines() -> None:
    """Two machines of two cards, 6 bytes from each card. In a ring one flow leaves a machine; in an all-to-all each
    card has two of three receivers there."""
    fabric = Fabric("", card_gb_s=3e-9, machine_gb_s=1e-9, cards=2)
    assert fabric.ring_s(6, 2) == fabric.exchange_s(6, 2) == pytest.approx(2)
    assert fabric.ring_s(6, 4) == pytest.approx(6)
    leaving = sum(6 / 3 for card in (0, 1) for other in range(4) if other not in (0, 1, card))
    assert fabric.exchange_s(6, 4) == pytest.approx(leaving)
    fast_between = replace(fabric, machine_gb_s=1e9)
    assert fast_between.ring_s(6, 4) == fast_between.exchange_s(6, 4) == pytest.approx(2)


@pytest.mark.parametrize("name", [name for name in WAYS if name != "guidance"])
def test_one_card_is_one_card(name: str) -> None:
    split = WAYS[name][1](SMALL, FABRICS["PCIe"], 1)
    assert split and (split.cards, split.clips, split.sent_bytes) == (1, 1, 0)
    assert split.speed_up(SMALL) == pytest.approx(1)


def test_amdahl_where_sending_costs_nothing() -> None:
    def s(name: str, cards: int) -> float:
        split = WAYS[name][1](SMALL, FREE, cards)
        assert split
        return split.s

    assert (
        s("prompts", 8)
        == s("prompts, and weights (ZeRO-3)", 8)
        == s("the same, gathered in the rollout", 8)
        == pytest.approx(122 + 1)
    )
    assert s("guidance", 2) == pytest.approx(122 - 40 + 1)
    assert s("tokens (Ulysses)", 8) == pytest.approx(12 + 110 / 6 + 1)  # 12 heads: six cards work
    assert s("VAE chunks", 64) == pytest.approx(112 + 10 / 21 + 1)
    assert s("questions", 2) == pytest.approx(121 + 1)
    both = replace(SMALL, graded_per_step=2)
    assert split_clip(both, FREE, branches=2, tokens=1).s == pytest.approx(122 - 40 - 15 + 1)


def test_what_zero3_sends() -> None:
    """40 passes of the rollout, a forward and a backward for each of 3 graded steps: 46 gathers; half of the weights on
    each of two cards."""
    split, lora = split_weights(SMALL, FREE, 2), 1_000
    assert split and split.sent_bytes == 46 * 5_000 + lora
    gathered = split_weights(SMALL, FREE, 2, gathered=True)
    assert gathered and gathered.sent_bytes == 7 * 5_000 + lora
    assert split_weights(replace(SMALL, packed=True), FREE, 2) is None


def test_gathers_hide_behind_computation() -> None:
    """At 2,500 B/s: 80 s for the rollout's gathers, as long as it computes; 12 s for those of the graded steps. At half
    that rate 160 s, and 24 s."""
    at = {rate: split_weights(SMALL, Fabric("", rate / 1e9, rate / 1e9), 2) for rate in (2_500, 1_250)}
    reduce_s = {rate: 1_000 / rate for rate in at}
    assert [at[rate].s - reduce_s[rate] for rate in at] == pytest.approx([122 + 1, 122 + 80 + 1])  # type: ignore[union-attr]


def test_a_pipeline_fills_and_drains() -> None:
    """Two cards, four blocks each, two clips: a card computes 2 x half a pass for each pass, and waits half a pass once
    in the rollout (40 passes) and once in the graded steps (3)."""
    split = split_blocks(SMALL, FREE, 2)
    waits = 0.5 * (80 / 40 + 30 / 3)
    assert split.s == pytest.approx(12 + 110 + waits + 1)
    assert split.clips == 2
    # one of two cards hands on, two clips' worth; the other hands back: on average a card's
    assert split.sent_bytes == (40 + 2 * 3) * SMALL.boundary_bytes
    uneven = split_blocks(replace(SMALL, layers=7), FREE, 2)
    assert uneven.s == pytest.approx(12 + (110 + waits) * 8 / 7 + 1)


def test_what_split_tokens_send() -> None:
    """q, k, v and the result in each forward; in a graded step these and their gradients, and q, k, v (and the result,
    unless it was kept) once more."""
    exchange = all_to_all_bytes(16, 8, 2)
    for kept, turns in ((False, 12), (True, 11)):
        split = split_tokens(replace(SMALL, keeps_attention=kept), FREE, 2)
        assert split.sent_bytes == 8 * (40 * 4 + 3 * turns) * exchange + 1_000
    assert split_clip(SMALL, FREE, branches=2, tokens=1).sent_bytes == 20 * 64 + 1_000


def test_chunks_hand_on_caches_and_their_gradients() -> None:
    assert split_chunks(SMALL, FREE, 2).sent_bytes == 11 * (400 + 200)


def test_groups_for_fewer_prompts_than_cards() -> None:
    alone = best_group(SMALL, FREE, 64, 64)
    assert alone[:2] == (1, 1) and alone[2] == split_prompts(SMALL, FREE, 64)
    branches, tokens, split = best_group(SMALL, FREE, 64, 8)
    assert (branches, tokens) == (2, 4)  # 12 heads do not go round eight cards
    assert (split.cards, split.clips) == (64, 8)


@pytest.mark.parametrize("targets", [DEFAULT_TARGETS, ("to_q",), ("attn2.to_k", "ffn.net.2"), ("to_v", "attn1.to_v")])
def test_lora_is_counted_as_it_is_made(targets: tuple[str, ...]) -> None:
    transformer = tiny_transformer(layers=3)
    config = dict(transformer.config)
    add_lora(transformer, rank=4, alpha=4, targets=targets)
    assert lora_numbers(config, 4, targets) == sum(parameter.numel() for parameter in lora_parameters(transformer))


def test_lora_of_14b() -> None:
    config = KNOWN_GENERATORS["Wan-AI/Wan2.1-T2V-14B-Diffusers"].config.transformer
    linears = {
        name: module for name, module in empty_transformer(config).named_modules() if isinstance(module, nn.Linear)
    }
    chosen = [
        module for name, module in linears.items() if any(name.endswith(f".{target}") for target in DEFAULT_TARGETS)
    ]
    assert len(chosen) == 40 * 10
    assert lora_numbers(config, 32, DEFAULT_TARGETS) == sum(
        32 * (module.in_features + module.out_features) for module in chosen
    )
    with pytest.raises(ValueError, match="proj_out"):
        lora_numbers(config, 32, ["to_q", "proj_out"])


def test_caches_of_a_chunk() -> None:
    """Two frames of the input of every convolution with three taps in time, as diffusers has it; no chunk after those
    counted hands on more."""
    vae, shape = tiny_vae(), (Z_DIM, 5, 4, 6)
    decoder, caches, sizes = WanDecoder(vae), None, []
    with torch.no_grad():
        caches = decoder.start(1)
        for _ in range(FULL_CHUNK + 2):
            caches = decoder.chunk(torch.zeros(1, Z_DIM, 1, 4, 6), caches)[1]
            sizes.append(sum(cache.numel() for cache in caches if isinstance(cache, torch.Tensor)))
    assert sizes[FULL_CHUNK - 1 :] == [cache_numbers(vae, shape)] * 3
    inputs: list[int] = []
    for module in vae.decoder.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
            module.register_forward_pre_hook(lambda module, given: inputs.append(2 * given[0][0, :, 0].numel()))
    with torch.no_grad():
        decoder.chunk(torch.zeros(1, Z_DIM, 1, 4, 6), caches)
    assert sum(inputs) == cache_numbers(vae, shape)


def test_caches_of_wan_are_those_measured() -> None:
    """1.76 GiB in 16 bit at 832x480."""
    vae = empty_vae(KNOWN_GENERATORS["Wan-AI/Wan2.1-T2V-14B-Diffusers"].config.vae)
    assert 2 * cache_numbers(vae, (16, 21, 60, 104)) / 1024**3 == pytest.approx(1.76, abs=0.005)


def test_command(monkeypatch, capsys, tmp_path) -> None:
    """Plans a case on ToyWorld's clips; prints every way, or JSON; writes between the marks and nowhere else."""
    small = (
        "video.width=64",
        "video.height=64",
        "sampler.guidance=5.0",
        "sampler.steps=4",
        "sampler.graded_steps=2",
        "lora.rank=32",
    )
    cases = {"tiny": ("toy", ("model.id=Wan-AI/Wan2.1-T2V-1.3B-Diffusers", *small), "RTX 4090", "PCIe")}
    known = KNOWN_GENERATORS["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].config
    short = replace(known, transformer=known.transformer | {"num_layers": 2})
    monkeypatch.setattr("lowmem_drf.planner.plan.generator_config", lambda place: short)
    monkeypatch.setattr(scaling_work, "CASES", cases)
    monkeypatch.setattr(scaling, "CASES", cases)
    one = scaling_work.work("tiny")
    monkeypatch.setattr(scaling, "work", lambda name: one)
    assert (one.tokens, one.width, one.heads, one.layers) == (3 * 4 * 4, 1536, 12, 30)
    assert (one.forwards, one.graded_passes, one.branches, one.chunks) == (8, 2, 2, 3)
    assert one.latent_bytes == 4 * 16 * 3 * 8 * 8
    assert one.lora_bytes == 4 * 30 * 32 * (18 * 1536 + 2 * 8960)
    assert (
        set(one.stages_s) == {"rollout", "decode", "critic", "vae_backward", "denoise_backward"}
        and min(one.stages_s.values()) > 0
    )

    scaling.main(["--json"])
    made = json.loads(capsys.readouterr().out)["tiny"]["ways"]
    assert made.keys() == WAYS.keys() and made["prompts"]["2"]["gain"] > 1

    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.MARKS[0]}old\n{scaling.MARKS[1]}after\n", encoding="utf-8")
    monkeypatch.setattr(scaling, "PAGE", page)
    scaling.main(["--write"])
    printed = capsys.readouterr().out.rstrip("\n")
    assert all(f"\n| {name} | " in printed for name in WAYS)
    assert page.read_text(encoding="utf-8") == f"before\n{scaling.MARKS[0]}{printed}\n{scaling.MARKS[1]}after\n"


def test_the_page_has_the_tables() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    _, _, after = page.partition(scaling.MARKS[0])
    tables, end, _ = after.partition(scaling.MARKS[1])
    assert (
        end
        and all(f"**{name}**" in tables for name in scaling_work.CASES)
        and all(f"| {name} | " in tables for name in WAYS)
    )
