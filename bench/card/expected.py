"""What a card should reach, with sources. Cards that the tables leave out get a share of their peak rate."""

from __future__ import annotations

import torch

from bench.kernels.speed import DETERMINISTIC
from lowmem_drf.planner import cards
from lowmem_drf.planner.cards import CARDS, Card

Figure = tuple[float, str]
"""TFLOP/s, source."""

_NAMES = {"forward": "attention", "backward": "attention backward", "conv3d": "conv3d", "copy": "memory"}
SHARES = {name: cards.SHARES[kind].of for name, kind in _NAMES.items()} | {"row op": 0.9}
"""Of the card's peak; ``row op``: of a copy of as many bytes on the same card."""

FP32_SUMS, FP16_SUMS = "triton, sums in fp32", "triton, sums in fp16"
"""The ways of our backward; ``triton`` is the faster one."""
_FA2 = "SageAttention2's tables: FlashAttention-2, head dim 128"
_FA3 = "FlashAttention-3's paper, head dim 128"
_SASS = "estimate from the machine code, middle of the range"
ATTENTION: dict[tuple[str, str, str], Figure] = {
    ("RTX 4090", "SDPA flash", "forward"): (155, "150 to 160, " + _FA2),
    ("RTX 4090", "SDPA flash", "backward"): (117, "110 to 125, estimate from FlashAttention-2's share"),
    ("RTX 4090", "triton", "forward"): (142, "135 to 150, " + _SASS),
    ("RTX 4090", FP32_SUMS, "backward"): (117, "110 to 125, as FlashAttention-2: the same tile and five products"),
    ("RTX 4090", DETERMINISTIC, "backward"): (87, "80 to 95 with seven products, " + _SASS),
    ("RTX 4090", "xformers", "forward"): (106, "SageAttention2's tables"),
    ("RTX 5090", "SDPA flash", "forward"): (200, "187 to 214, " + _FA2),
    ("RTX 5090", "SDPA cuDNN", "forward"): (203.6, "public measurement at 400 W: 97% of the limit"),
    ("RTX 3090", "SDPA flash", "forward"): (70, _FA2),
    ("H100", "SDPA flash", "forward"): (370, _FA3),
    ("H100", "SDPA flash", "backward"): (322, _FA3),
    ("H100", "SDPA cuDNN", "forward"): (595, _FA3),
    ("H100", "SDPA cuDNN", "backward"): (516, _FA3),
    ("H100", "triton", "forward"): (460, "420 to 500, " + _SASS),
    ("H100", "triton", "backward"): (322, "as FlashAttention-2: five products; " + _FA3),
    ("H100", DETERMINISTIC, "backward"): (310, "280 to 340, " + _SASS),
}
"""Long self-attention in bf16."""
INT8 = "int8"
TWINS = {"H200": "H100"}
"""Cards with the same multiprocessors."""


def this_card() -> Card | None:
    """The specification of the card that is here."""
    name = torch.cuda.get_device_name(torch.cuda.current_device()).lower()
    return next((card for key, card in CARDS.items() if key.lower() in name), None)


def attention(by: str, direction: str) -> tuple[float | None, str]:
    """TFLOP/s of this card by a public figure, else by a share of its peak for the implementations that should reach
    it."""
    name = torch.cuda.get_device_name(torch.cuda.current_device()).lower()
    card = this_card()
    public = next((key for key in {key for key, _, _ in ATTENTION} if key.lower() in name), None)
    public = public or (TWINS.get(card.name) if card else None)
    if public and (public, by, direction) in ATTENTION:
        return ATTENTION[public, by, direction]
    if card and by == INT8:
        share = card.share("int8 attention")
        return share * card.bf16, f"{share:.0%} of bf16's peak rate: " + cards.SHARES["int8 attention"].source
    if card and card.half_sums and direction == "backward" and by in ("triton", FP16_SUMS):
        half = cards.HALF_BACKWARD
        return card.share(half) * card.bf16, f"{card.share(half):.0%} of the peak rate, {cards.SHARES[half].source}"
    if card and by in ("triton", FP32_SUMS, "SDPA flash"):
        return SHARES[direction] * card.bf16, f"{SHARES[direction]:.0%} of the peak rate"
    return None, ""


def conv3d(dtype: torch.dtype) -> tuple[float | None, str]:
    """TFLOP/s."""
    card, share = this_card(), SHARES["conv3d"]
    if card is None:
        return None, ""
    peak = card.tf32 if dtype is torch.float32 else card.bf16
    return share * peak, f"{share:.0%} of the peak rate; public: 18% on an H200"


def product(integers: bool) -> float | None:
    """TOP/s of a large product, in 8-bit integers or in 16 bit."""
    card, kind = this_card(), "int8 products" if integers else "matmul"
    return card.share(kind) * card.rate(kind) / 1e12 if card else None


def copy() -> tuple[float | None, str]:
    """GB/s, reads and writes."""
    card = this_card()
    return (SHARES["copy"] * card.memory, f"{SHARES['copy']:.0%} of the data sheet") if card else (None, "")
