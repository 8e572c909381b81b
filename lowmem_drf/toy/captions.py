"""ToyWorld's captions: a small grammar with paraphrases, its parser, and the prompt lists.

``caption(combo, i)`` gives the i-th of 24 wordings; 0 is the plainest: "a red circle moves left on a gray background".
"""

from __future__ import annotations

import torch

from lowmem_drf.questions.toyworld import ATTRIBUTES, attributes
from lowmem_drf.toy.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Combo, combos_of

_FRAMES = (
    "a {color} {shape} {moves} on a {background} background",
    "on a {background} background a {color} {shape} {moves}",
    "there is a {color} {shape} that {moves} , the background is {background}",
    "{background} background , a {color} {shape} {moves}",
    "a clip of a {color} {shape} that {moves} over a {background} background",
    "a {shape} that is {color} {moves} on a {background} background",
)
_MOVES = ("moves {d}", "slides {d}", "travels {d}", "goes {d}")
_STILL = ("stays still", "keeps still", "rests still", "stands still")
WORDINGS = len(_FRAMES) * len(_MOVES)


def caption(combo: Combo, wording: int = 0) -> str:
    """The caption of a combination in one of ``WORDINGS`` wordings."""
    frame, verb = _FRAMES[wording % len(_FRAMES)], wording // len(_FRAMES) % len(_MOVES)
    motion = MOTIONS[combo.motion]
    moves = _STILL[verb] if motion == "still" else _MOVES[verb].format(d=motion)
    return frame.format(
        color=COLORS[combo.color], shape=SHAPES[combo.shape], background=BACKGROUNDS[combo.background], moves=moves
    )


def parse(text: str) -> Combo | None:
    """The combination that a text describes; ``None`` unless it names exactly one shape, colour, motion and
    background."""
    if not (words := attributes(text)):
        return None
    return Combo(*(ATTRIBUTES[name].index(words[name]) for name in ("shape", "color", "direction", "background")))


def train_prompts() -> list[str]:
    """The training prompts of Diffusion-DRF: every combination of the split ``train`` in two wordings, 432 in all."""
    combos = combos_of("train")
    draws = torch.randint(WORDINGS, (len(combos),), generator=torch.Generator().manual_seed(1)).tolist()
    return [caption(c, w + other) for other in (0, 1) for c, w in zip(combos, draws, strict=True)]


def heldout_prompts(n: int = 128, seed: int = 0) -> list[str]:
    """n prompts of combinations that Diffusion-DRF never trains on. Each combination comes once before any comes twice;
    the seed draws order and wordings."""
    generator = torch.Generator().manual_seed(seed)
    combos = combos_of("heldout", "unseen")
    out: list[str] = []
    while len(out) < n:
        order = torch.randperm(len(combos), generator=generator).tolist()
        wordings = torch.randint(WORDINGS, (len(combos),), generator=generator).tolist()
        out += [caption(combos[i], w) for i, w in zip(order, wordings, strict=True)]
    return out[:n]


def vocabulary() -> list[str]:
    """Every word that captions use, sorted."""
    words = {w for c in combos_of("train", "heldout", "unseen") for i in range(WORDINGS) for w in caption(c, i).split()}
    return sorted(words)
