"""Specifications of cards: the rates behind a plan's seconds.

From NVIDIA's architecture whitepapers (Ampere GA102, Ada, Blackwell RTX) and data sheets: dense tensor-core rates with
fp32 accumulation, memory bandwidth, and what a PCIe link of the card's generation reaches with pinned memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowmem_drf.assembly.cache import Cache, cache_folder
from lowmem_drf.errors import BadInputError
from lowmem_drf.libraries import version_of
from lowmem_drf.shortage import GIB as GIB

CONTEXT_GIB = 0.6
"""Memory of the card that a process takes besides PyTorch's allocator: the CUDA context and the kernels' code."""
DESKTOP_GIB = 1.0
"""Taken by the driver and a desktop, where no card is at hand to say what is free."""
LARGEST_SHARE = 0.2
"""Of cards below 8 GiB: the two together are taken to be no more."""
LATER_GIB = 0.2
"""Code of kernels that CUDA loads when they are first called: not there yet when free memory is measured."""
SPARE = 0.05
"""Share of a stage's peak for what the allocator rounds up, and for fragments."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a kind of work reaches of a card's rate in ``Card``."""

    of: float
    source: str


SHARES = {
    "matmul": Share(0.75, "assumed for cuBLAS's large 16-bit products; no public figure at our shapes"),
    "attention": Share(0.75, "FlashAttention-2: 150 to 160 of a 4090's 165 TFLOP/s, 70 of a 3090's 71 (tables of "
                             "SageAttention2); below that for cross-attention and fewer tokens"),
    "attention backward": Share(0.6, "no public figure for consumer cards; five products, and sums in fp32"),
    "attention backward in fp16": Share(1.0, "assumed: 0.6 of its peak, 5/3 of that of sums in fp32, for four of five "
                                             "products sum in fp16 (``Card.fp16_sums``); no public figure"),
    "int8 attention": Share(1.9, "134 of a 3090's 71 TFLOP/s with such products (SageAttention2); at most 8/3: "
                                 "half at four times the rate, half at twice (``Card.fp16_sums``)"),
    "int8 products": Share(0.6, "480 to 512 of a 5090's 838 TOP/s, in Triton (gau-nernst/quantized-training); ours "
                                "also adds up groups, and has not been measured"),
    "conv3d": Share(0.3, "of a 4090. Public figures: 18% on an H200; a 4090 trains ResNet-50, SSD in fp16 1.4 to 1.6 "
                         "times as fast as a 3090 (Lambda, HPCDIY) with 2.3 times the arithmetic: a card with less of "
                         "it for its bandwidth reaches more (``Card.bandwidth``)"),
    "memory": Share(0.8, "long copies against the data sheet's bandwidth"),
    "link": Share(1.0, "``Card.link`` is what pinned copies reach already"),
}  # fmt: skip
"""By kind of work. Until ``bench`` has measured them on the card at hand (``learn``)."""
HALF_BACKWARD = "attention backward in fp16"


@dataclass(frozen=True, slots=True)
class Card:
    """TFLOP/s in bf16, TF32 (convolutions of fp32 tensors) and plain fp32; TOP/s of 8-bit integers; GB/s of memory and
    of the host link."""

    name: str
    gib: float
    bf16: float
    tf32: float
    fp32: float
    int8: float
    memory: float
    link: float
    measured: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Shares that ``bench`` found on such a card here."""

    def is_in(self, device: str) -> bool:
        """Whether CUDA's name of a device is this card's, and not one whose rates are unknown."""
        return self.name.lower() in device.lower()

    def share(self, kind: str) -> float:
        if kind == HALF_BACKWARD and kind not in self.measured and "attention backward" in self.measured:
            kind = "attention backward"  # that of the implementation that was chosen here
        own = {
            "int8 attention": self.fp16_sums / CARDS["RTX 3090"].fp16_sums,
            "conv3d": math.sqrt(self.bandwidth / CARDS["RTX 4090"].bandwidth),
        }
        return self.measured.get(kind, SHARES[kind].of * own.get(kind, 1.0))

    def rate(self, kind: str) -> float:
        """FLOPs or bytes a second that ``SHARES`` are shares of, in 16 bit unless the kind says 8."""
        others = {"memory": self.memory * 1e9, "link": self.link * 1e9, "int8 products": self.int8 * 1e12}
        return others.get(kind, self.bf16 * 1e12)

    @property
    def bandwidth(self) -> float:
        """Bytes of memory in the time of a thousand FLOPs in 16 bit. Between a 3090 (13.2) and a 4090 (6.1), what
        convolutions reach of the peak grows as its square root: by 1.47, where 1.44 to 1.61 is to be explained. Other
        cards are taken to lie on that line."""
        return self.memory / self.bf16

    @property
    def fp16_sums(self) -> float:
        """Rate of products that sum in fp16, as a multiple of ``bf16``: half that of integers. 2 on GeForce cards."""
        return self.int8 / self.bf16 / 2

    @property
    def half_sums(self) -> bool:
        """Whether sums in fp16 are worth having."""
        return self.fp16_sums > 1.5

    @property
    def link_rate(self) -> float:
        """Bytes a second between card and host, each way."""
        return self.link * self.share("link") * 1e9


def at_share(card: Card, share: float) -> Card:
    """The card if every kind of arithmetic reached ``share`` of its peak, and copies what they do.

    The peak of int8 attention is 4/3 of that of sums in fp16: half of its products run at that rate, half at twice. Of
    attention's backward in fp16, four of five products run at that rate.
    """
    kinds = dict.fromkeys(SHARES.keys() - {"memory", "link"}, share)
    peaks = {"int8 attention": card.fp16_sums * 4 / 3, HALF_BACKWARD: 5 / (1 + 4 / card.fp16_sums)}
    return replace(card, measured=kinds | {kind: share * peak for kind, peak in peaks.items()})


CARDS = {
    card.name: card
    for card in (
        Card("RTX 3090", 24, 71, 35.5, 35.6, 284, 936, 22),
        Card("RTX 4090", 24, 165, 82.6, 82.6, 660, 1008, 22),
        Card("RTX 5090", 32, 209, 104.8, 104.8, 838, 1792, 45),
        Card("RTX 4080", 16, 97.5, 48.7, 48.7, 390, 717, 22),
        Card("RTX 3060", 12, 25.4, 12.7, 12.7, 102, 360, 22),
        Card("RTX 4060", 8, 30.2, 15.1, 15.1, 121, 272, 11),
        Card("H200", 141, 989, 495, 67, 1979, 4800, 45),
    )
}


def card_named(text: str, default: str = "RTX 4090") -> Card:
    """The card named in ``text`` (a preset's ``GPU:`` line, or CUDA's device name), else ``default``."""
    return next((card for card in CARDS.values() if card.is_in(text)), CARDS[default])


RATES = "rates"
"""Folder of measured shares in the cache."""


def _kept(card: Card) -> tuple[Cache, dict[str, Any]]:
    """Where a card's shares are kept: for its name and for what computes."""
    return Cache(cache_folder() / RATES), {
        "card": card.name,
        **{name: version_of(name) for name in ("torch", "triton")},
    }


def learn(card: Card, shares: Mapping[str, float]) -> None:
    """Keeps measured shares for later plans."""
    cache, key = _kept(card)
    cache.put(key, dict(shares))


def learned(card: Card) -> Card:
    """The card with the shares that were measured on such a card here, if there are any."""
    cache, key = _kept(card)
    found = cache.get(key)
    found = found if isinstance(found, dict) else {}
    numbers = {kind: float(share) for kind, share in found.items() if kind in SHARES and plausible(kind, share)}
    return replace(card, measured=numbers)


def plausible(kind: str, share: object) -> bool:
    """Whether this may be a measured share: cards run somewhat above the clocks of their data sheets."""
    return isinstance(share, int | float) and 0.001 < share < 2 * max(0.75, SHARES[kind].of)


def parse_vram(text: str) -> float:
    """``24GB``, ``24 GiB``, ``24`` -> 24.0. Both units mean GiB: a card sold as 24 GB has 24 GiB. Raises
    BadInputError."""
    found = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*(?:GB|GiB|G)?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]) > 0:
        raise BadInputError(f"--vram {text[:30]}: give the card's memory, for example --vram 24GB")
    return float(found[1])


def free_of(vram_gib: float) -> float:
    """What PyTorch's allocator can take of a card of this size that is not at hand. 8 GiB: 6.4."""
    return vram_gib - min(CONTEXT_GIB + DESKTOP_GIB, LARGEST_SHARE * vram_gib)


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of a card, in GiB."""

    vram_gib: float
    free_gib: float
    """What PyTorch's allocator can take."""
    measured: bool = False

    def within(self, limit_gib: float) -> Room:
        """Where the process may use no more than this. 0: no limit."""
        if not limit_gib:
            return self
        free = max(limit_gib - CONTEXT_GIB, (1 - LARGEST_SHARE) * limit_gib)
        return self if free >= self.free_gib else Room(min(self.vram_gib, limit_gib), free)


def room_of(vram_gib: float, limit_gib: float = 0.0) -> Room:
    """Of a card of this size that is not at hand."""
    return Room(vram_gib, free_of(vram_gib)).within(limit_gib)


def fits_in(free_gib: float, copies_gib: float = 0.0) -> float:
    """The highest peak that a plan may have where PyTorch can take ``free_gib`` and cuDNN copies ``copies_gib``."""
    return (free_gib - copies_gib) / (1 + SPARE)
