"""How an update would scale over more cards, on paper: what each way of splitting its work sends, and what it gains at
best.

    python -m bench.scaling            # --json for a program; --write renews the tables of docs/distributed.md between
    its ``scaling`` marks

Only the first way, prompts, is how lowmem-drf works, with the weights partitioned (ZeRO-3) where that is asked for; the
others are here to say why. Seconds of the stages are the plan's (``lowmem-drf plan``), bytes follow from the models'
configurations (``scaling_work``). Needs no card, no weights; two minutes on one core.

Taken for granted, all in favour of splitting: no latency, no straggler, a stage that is split over n cards takes an
n-th of its time. Against it: what a card sends is waited for, but where something else can be computed meanwhile
(ZeRO-3's gathers, a pipeline).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path

from bench.scaling_work import CASES, Work, work

PAGE = Path(__file__).resolve().parent.parent / "docs" / "distributed.md"
MARKS = "<!-- scaling: begin -->\n", "<!-- scaling: end -->\n"

CARDS = (2, 8, 64)

LINE_SHARE = 0.8
"""Of a link's nominal rate, what long transfers reach: an assumption, as ``cards.BANDWIDTH_SHARE``. NVLink between two
H100: 380 of 450 GB/s (github.com/NVIDIA/nccl/issues/1264)."""


@dataclass(frozen=True)
class Fabric:
    """What cards send each other over. GB/s in each direction."""

    name: str
    card_gb_s: float
    """Between the cards of a machine, each."""
    machine_gb_s: float
    """From a machine to others, for all its cards together."""
    cards: int = 8
    """Of a machine."""

    def ring_s(self, sent_bytes: float, cards: int) -> float:
        """Of a collective in a ring (all-reduce, all-gather) in which each card sends so much: one flow leaves each
        machine."""
        rate = self.card_gb_s if cards <= self.cards else min(self.card_gb_s, self.machine_gb_s)
        return sent_bytes / (rate * 1e9)

    def exchange_s(self, sent_bytes: float, cards: int) -> float:
        """Of an all-to-all: of what a card sends, every other card gets as much."""
        inside = sent_bytes / (self.card_gb_s * 1e9)
        if cards <= self.cards:
            return inside
        leaving = self.cards * sent_bytes * (cards - self.cards) / (cards - 1)
        return max(inside, leaving / (self.machine_gb_s * 1e9))


FABRICS = {
    # A GeForce RTX 40 has no access to another card's memory, so what it sends is written to host memory and read from
    # there. That halves the 22 GB/s of
    # cards.py: an assumption. What a machine reaches is up to its processors' memory
    # (github.com/NVIDIA/nccl/issues/1639). Machines: 10 Gb/s Ethernet.
    "PCIe": Fabric("PCIe 4.0 x16 through host memory; 10 Gb/s Ethernet between machines", 11, 1.25 * LINE_SHARE),
    # H200 SXM: NVLink 4, 900 GB/s both ways together; a 400 Gb/s InfiniBand adapter a card
    # (github.com/mlcommons/inference_results_v4.1, closed/NVIDIA/systems/H200-SXM-141GBx8_TRT_MaxQ.json).
    "NVLink": Fabric("NVLink 4; 400 Gb/s InfiniBand a card between machines", 450 * LINE_SHARE, 8 * 50 * LINE_SHARE),
}


@dataclass(frozen=True)
class Split:
    """An update on several cards, split in one way."""

    cards: int
    """That have work."""
    clips: int
    """Of the update."""
    sent_bytes: float
    """By a card, in the update."""
    s: float
    """The update takes."""

    def speed_up(self, one: Work) -> float:
        """Clips a second, over those of one card with the same update."""
        return (self.clips * one.clip_s + one.update_s) / self.s


def all_reduce_bytes(nbytes: float, cards: int) -> float:
    """Sent by each card in a ring. ZeRO-1 and -2 send as much (arXiv 1910.02054, 7): gradients scattered, updated
    weights gathered."""
    return 2 * nbytes * (cards - 1) / cards


def all_gather_bytes(nbytes: float, cards: int) -> float:
    """Sent by each card in a ring that gives everyone ``nbytes``, of which each had its part."""
    return nbytes * (cards - 1) / cards


def all_to_all_bytes(tokens: int, width: int, cards: int, number_bytes: int = 2) -> float:
    """Sent by each card when a tensor (tokens, width), split by tokens, becomes one split by heads (DeepSpeed-Ulysses,
    arXiv 2309.14509)."""
    return tokens * width * number_bytes * (cards - 1) / cards**2


def head_parts(heads: int, cards: int) -> int:
    """Cards that can have as many heads each: the largest divisor of ``heads`` that is no more than ``cards``."""
    return max(n for n in range(1, cards + 1) if heads % n == 0)


def split_prompts(one: Work, fabric: Fabric, cards: int) -> Split:
    """A clip a card; the LoRA's gradients are averaged once."""
    sent = all_reduce_bytes(one.lora_bytes, cards)
    return Split(cards, cards, sent, one.clip_s + fabric.ring_s(sent, cards) + one.update_s)


def split_weights(one: Work, fabric: Fabric, cards: int, gathered: bool = False) -> Split | None:
    """ZeRO-3: prompts, and every pass of the transformer gathers its weights, while the block before computes. A graded
    step gathers them twice: in its forward, and in its backward, which computes each block once more. ``gathered``:
    once for the whole rollout, before it begins. ``None``: packed weights are not partitioned."""
    if one.packed:
        return None
    rollout, graded = (
        all_gather_bytes(one.weights_bytes, cards) * passes
        for passes in (1 if gathered else one.forwards, 2 * one.graded_passes)
    )
    gather_s, prompts = fabric.ring_s(rollout, cards), split_prompts(one, fabric, cards)
    rollout_s = gather_s + one.rollout_s if gathered else max(one.rollout_s, gather_s)
    transformer_s = rollout_s + max(one.denoise_s, fabric.ring_s(graded, cards))
    return Split(cards, cards, rollout + graded + prompts.sent_bytes, prompts.s - one.transformer_s + transformer_s)


def split_blocks(one: Work, fabric: Fabric, cards: int) -> Split:
    """Pipelines of as many cards as is fastest, two at least. Each has a clip for every card on its way, so that a card
    waits only while the pipeline fills and drains. All but the transformer is split by prompts."""
    lengths = [n for n in range(2, min(cards, one.layers) + 1) if cards % n == 0] or [1]
    return min((_pipelines(one, fabric, cards, length) for length in lengths), key=lambda split: split.s)


def _pipelines(one: Work, fabric: Fabric, cards: int, length: int) -> Split:
    """Sent, while another clip is computed: what enters the next card's blocks, and its gradient."""
    share = ceil(one.layers / length) / one.layers  # of a pass, on the card with the most blocks
    rollout_s, denoise_s = (
        seconds * share * (length + (length - 1) / passes)
        for seconds, passes in ((one.rollout_s, one.forwards), (one.denoise_s, one.graded_passes))
    )
    handed_on = (length - 1) * (one.forwards + 2 * one.graded_passes) * one.boundary_bytes
    reduced = all_reduce_bytes(one.lora_bytes / length, cards // length)
    transformer_s = max(rollout_s + denoise_s, fabric.ring_s(handed_on, cards)) + fabric.ring_s(reduced, cards)
    return Split(cards, cards, handed_on + reduced, one.clip_s - one.transformer_s + transformer_s + one.update_s)


def split_clip(one: Work, fabric: Fabric, branches: int, tokens: int, clips: int = 1) -> Split:
    """A group of branches x tokens cards makes a clip, ``clips`` such groups an update.

    ``branches`` = 2: in the rollout one half of the group computes the velocity with the prompt, the other that
    without; they exchange them in every step. ``tokens`` = n: each attention among the tokens is split by heads, all
    else by tokens. q, k, v and the result change hands in every forward, and their gradients in the backward, where q,
    k and v do once more, and the result too unless it was kept.
    """
    group, graded = branches * tokens, min(branches, one.graded_per_step)
    turns = one.layers * (
        4 * one.forwards / branches + (11 if one.keeps_attention else 12) * one.graded_passes / graded
    )
    exchanged = turns * all_to_all_bytes(one.tokens, one.width, tokens)
    velocities = one.steps * one.latent_bytes * (branches - 1)
    reduced = all_reduce_bytes(one.lora_bytes, group * clips)
    transformer_s = one.rollout_s / group + one.denoise_s / (tokens * graded)
    waits = (
        fabric.exchange_s(exchanged, tokens) + fabric.ring_s(velocities, group) + fabric.ring_s(reduced, group * clips)
    )
    return Split(
        group * clips,
        clips,
        exchanged + velocities + reduced,
        one.clip_s - one.transformer_s + transformer_s + waits + one.update_s,
    )


def split_guidance(one: Work, fabric: Fabric, cards: int) -> Split | None:
    """Two cards, whatever there are. ``None``: without guidance there is one branch."""
    return split_clip(one, fabric, branches=2, tokens=1) if one.branches == 2 else None


def split_tokens(one: Work, fabric: Fabric, cards: int) -> Split:
    return split_clip(one, fabric, branches=1, tokens=head_parts(one.heads, cards))


def split_chunks(one: Work, fabric: Fabric, cards: int) -> Split:
    """The VAE's chunks go round: a card begins one as soon as the one before has left the decoder's first layers, and
    hands on its caches; backwards their gradients, which arrive in that order too. At best an n-th of the time."""
    parts = min(cards, one.chunks)
    sent = ceil(one.chunks / parts) * (one.cache_bytes + one.cache_gradient_bytes) * (parts > 1)
    s = one.clip_s - one.vae_s + one.vae_s / parts + fabric.ring_s(sent, parts) + one.update_s
    return Split(parts, 1, sent, s)


def split_questions(one: Work, fabric: Fabric, cards: int) -> Split:
    """Frames to every card, their gradients back. The vision pass and the video's tokens are the same for all
    questions, so every card repeats them; here they are counted as if they took no time."""
    sent = all_gather_bytes(2 * one.frame_bytes, cards)
    return Split(
        cards, 1, sent, one.clip_s - one.critic_s + one.critic_s / cards + fabric.ring_s(sent, cards) + one.update_s
    )


Way = Callable[[Work, Fabric, int], Split | None]
WAYS: dict[str, tuple[str, Way]] = {
    "prompts": ("all", split_prompts),
    "prompts, and weights (ZeRO-3)": ("all", split_weights),
    "the same, gathered in the rollout": ("all", partial(split_weights, gathered=True)),
    "blocks (pipeline)": ("all", split_blocks),
    "guidance": ("rollout", split_guidance),
    "tokens (Ulysses)": ("rollout, denoise_backward", split_tokens),
    "VAE chunks": ("decode, vae_backward", split_chunks),
    "questions": ("critic", split_questions),
}
"""Name -> the stages that it shortens, and how."""


def best_group(one: Work, fabric: Fabric, cards: int, clips: int) -> tuple[int, int, Split]:
    """Of ``cards`` for ``clips`` prompts an update, which is fewer: the fastest way to split a clip over its group, as
    (branches, tokens, update)."""
    group = cards // clips
    tried = [
        (b, t, split_clip(one, fabric, b, t, clips))
        for b in range(1, min(one.branches, group) + 1)
        for t in {head_parts(one.heads, group // b)}
    ]
    return min(tried, key=lambda way: way[2].s)


def gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.0f}" if nbytes >= 1e10 else f"{nbytes / 1e9:.2g}"


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def head(*cells: str) -> list[str]:
    return ["", row(*cells), "|---" * len(cells) + "|"]


def tables(works: Sequence[Work]) -> list[str]:
    """The page's tables, in Markdown."""
    lines = head("a clip on one card", *(one.name for one in works))
    lines += [row(name, *(f"{one.stages_s[name]:,.1f} s" for one in works)) for name in works[0].stages_s]
    lines += [row("together", *(f"{one.clip_s:,.0f} s" for one in works))]
    for what, field in SIZES.items():
        lines.append(row(what, *(f"{gb(getattr(one, field))} GB" for one in works)))
    lines += head("weights in a machine's memory, GB", *(f"{n} card{'s' * (n > 1)}" for n in HOSTED))
    for one in {one.weights_bytes: one for one in works if not one.packed}.values():
        lines.append(
            row(
                f"{one.name.split(',')[0]}, 16 bit, streamed: a copy a card",
                *(gb(n * one.weights_bytes) for n in HOSTED),
            )
        )
        lines.append(
            row(f"{one.name.split(',')[0]}, 16 bit, partitioned: one copy", *[gb(one.weights_bytes)] * len(HOSTED))
        )
    for one in works:
        lines += ways_table(one)
    lines += head("64 cards: clips an update; gain (branches x parts of the tokens)", *(one.name for one in works))
    for clips in (64, 32, 16, 8):
        groups = [best_group(one, FABRICS[one.fabric], 64, clips) for one in works]
        lines.append(
            row(
                clips,
                *(f"{split.speed_up(one):.3g} ({b} x {t})" for one, (b, t, split) in zip(works, groups, strict=True)),
            )
        )
    lines += head("64 machines of one card, between them", *(one.name for one in works))
    for name, rate in SLOW.items():
        slow = Fabric(name, rate, rate, cards=1)
        updates = [
            (split, slow.ring_s(split.sent_bytes, 64)) for split in (split_prompts(one, slow, 64) for one in works)
        ]
        lines.append(row(name, *(f"{waits:.1f} s, {waits / split.s:.1%}" for split, waits in updates)))
    return lines[1:]


def ways_table(one: Work) -> list[str]:
    """Every way with what it sends and gains on 2, 8 and 64 cards."""
    fabric = FABRICS[one.fabric]
    lines = ["", f"**{one.name}** ({fabric.name})"]
    lines += head(
        "split",
        "shortens",
        "clips an update",
        *(f"a card sends, of {n}" for n in CARDS),
        *(f"gain, {n}" for n in CARDS),
    )
    for name, (shortens, way) in WAYS.items():
        if splits := [split for n in CARDS if (split := way(one, fabric, n))]:
            sent, gains = (
                [f"{gb(split.sent_bytes)} GB" for split in splits],
                [f"{split.speed_up(one):.3g}" for split in splits],
            )
            lines.append(row(name, shortens, "one a card" if splits[0].clips > 1 else "1", *sent, *gains))
    return lines


SIZES = {
    "gradients of the LoRA": "lora_bytes",
    "weights of the transformer, 16 bit": "weights_bytes",
    "what enters a block": "boundary_bytes",
    "caches between two chunks of the VAE": "cache_bytes",
    "frames for the critic": "frame_bytes",
    "latents": "latent_bytes",
}
HOSTED = (1, 2, 4, 8)
SLOW = {"1 Gb/s Ethernet": 0.125 * LINE_SHARE, "10 Gb/s Ethernet": 1.25 * LINE_SHARE}


def as_json(works: Sequence[Work]) -> dict[str, object]:
    """By case: its work, and by way and number of cards the update."""
    return {
        one.name: {
            "work": asdict(one),
            "ways": {
                name: {
                    n: asdict(split) | {"gain": split.speed_up(one)}
                    for n in CARDS
                    if (split := way(one, FABRICS[one.fabric], n))
                }
                for name, (_, way) in WAYS.items()
            },
        }
        for one in works
    }


def main(arguments: list[str] | None = None) -> None:
    """Plans, and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--json", action="store_true", help="bytes and seconds in place of tables")
    parser.add_argument("--write", action="store_true", help="and into docs/distributed.md")
    options = parser.parse_args(arguments)
    works = [work(name) for name in CASES]
    text = "\n".join(tables(works)) + "\n"
    print(json.dumps(as_json(works), indent=1) if options.json else text)
    if options.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        PAGE.write_text(before + MARKS[0] + text + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")


if __name__ == "__main__":
    main()
