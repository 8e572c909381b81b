"""The critic's language model: yes/no, short free-form answers and explanations, all questions of a clip packed in one
pass.

First on cached tokens of the frozen tower, then both together with the generator's own clips, labelled by the oracle,
among the drawn ones. Yes and no weigh the same for every kind of question: raw accuracy would reward a critic that
always says no (docs/toyworld.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from lowmem_drf.models.qwen_vl.critic import VLMCritic
from lowmem_drf.questions import toyworld
from lowmem_drf.toy.build.loop import Schedule, half_products, scaled, train
from lowmem_drf.toy.build.tower import draw_labelled
from lowmem_drf.toy.captions import WORDINGS, caption
from lowmem_drf.toy.defects import DEFECTS
from lowmem_drf.toy.oracle import measure
from lowmem_drf.toy.scenes import Combo
from lowmem_drf.types import Aspect, Question

CLIPS = 9600  # cached for the first part
BATCH = 24
END = "<|im_end|>"
SPOILS = {
    "morph": ("shape",),
    "recolor": ("color",),
    "jump": ("direction",),
    "jitter": ("direction",),
    "vanish": ("direction",),
}
"""Defect -> attributes without a single answer in a clip that has it; they are not asked about."""


class Label:
    """The truth about one clip: attributes (index, or -1 for none) and defects."""

    def __init__(self, combo: list[int], defects: set[str]) -> None:
        self.value = dict(zip(("shape", "color", "direction", "background"), combo, strict=True))
        self.defects = defects
        for defect in defects:
            for name in SPOILS.get(defect, ()):
                self.value[name] = -1

    @property
    def combo(self) -> Combo | None:
        return Combo(*self.value.values()) if min(self.value.values()) >= 0 else None


def drawn_labels(combos: Tensor, defect: Tensor) -> list[Label]:
    """Labels of clips from ``draw_labelled``."""
    return [Label(c, {DEFECTS[d]} if d >= 0 else set()) for c, d in zip(combos.tolist(), defect.tolist(), strict=True)]


def measured_labels(frames_BTCHW: Tensor) -> list[Label]:
    """Labels of any clips, by the oracle."""
    seen = measure(frames_BTCHW)
    values = torch.stack([seen.shape, seen.color, seen.motion, seen.background], 1).tolist()
    return [Label(v, {d for d in DEFECTS if getattr(seen, d)[i]}) for i, v in enumerate(values)]


class Lesson(NamedTuple):
    """A question about a clip, and the answer that the critic is shown, in which at most one word is wrong."""

    question: Question
    weight: float
    correction: tuple[int, str] | None = None
    """Position of the wrong word, and the true one. The words after it are learned as shown: a language model goes on
    with the sentence it is given, and otherwise one wrong word would spoil the reward of all later ones."""


def ask(label: Label, generator: torch.Generator) -> list[Lesson]:
    """Questions about one clip with their true answers: attributes, defects asked for in either way, one global, one
    open, a description and two explanations."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    out: list[Lesson] = []
    for name, wordings in toyworld.ALIGNMENT.items():
        true = label.value[name]
        if true >= 0:
            values = toyworld.ATTRIBUTES[name]
            yes = pick(2) == 0
            asked = true if yes else (true + 1 + pick(len(values) - 1)) % len(values)
            out.append(
                Lesson(
                    Question("TA", wordings[pick(2)].format(value=values[asked]), "yes" if yes else "no", name=name),
                    1.0,
                )
            )
    # 1 clip in 15 has a given defect, and is then asked about it; of absent defects 3 are asked: absence is 5 times as
    # common
    absent = [d for d in DEFECTS if d not in label.defects]
    order = torch.randperm(len(absent), generator=generator).tolist()[:3]
    for defect in [*label.defects, *(absent[i] for i in order)]:
        there = defect in label.defects
        for wordings, answer in (
            ((toyworld.PHYSICS | toyworld.QUALITY)[defect], there),
            (toyworld.SOUND[defect], not there),
        ):
            question = Question(
                "VQ" if defect in toyworld.QUALITY else "Phy", wordings[pick(2)], "yes" if answer else "no", name=defect
            )
            out.append(Lesson(question, 1.0 if there else 0.2))
    if label.combo is not None:
        yes, told = pick(2) == 0, _one_changed(label.combo, pick)
        text = toyworld.GLOBAL[pick(2)].format(caption=caption(label.combo if yes else told, pick(WORDINGS)))
        out.append(Lesson(Question("TA", text, "yes" if yes else "no", name="global"), 1.0))
        shown = _one_changed(label.combo, pick) if pick(3) == 0 else label.combo
        out.append(_lesson("TA", toyworld.DESCRIBE, "description", caption(shown), caption(label.combo), 0.5))
    known = [n for n in toyworld.OPEN if label.value[n] >= 0]
    if known:
        name = known[pick(len(known))]
        word = toyworld.ATTRIBUTES[name][label.value[name]]
        out.append(_lesson("TA", toyworld.OPEN[name], f"{name}_word", word, word, 0.5))
    return out + _explanations(label, pick)


def _one_changed(combo: Combo, pick: Callable[[int], int]) -> Combo:
    at, values = pick(4), list(combo)
    options = len(list(toyworld.ATTRIBUTES.values())[at])
    values[at] = (values[at] + 1 + pick(options - 1)) % options
    return Combo(*values)


def _explanations(label: Label, pick: Callable[[int], int]) -> list[Lesson]:
    """What is to be said of the motion and of the picture, where there is one thing to say; now and then what training
    will want to hear is put before the critic instead."""
    out: list[Lesson] = []
    directions, true = toyworld.ATTRIBUTES["direction"], label.value["direction"]
    wrong = [toyworld.EXPLANATIONS[defect] for defect in sorted(label.defects) if defect in toyworld.PHYSICS]
    if len(wrong) + (true >= 0) and len(wrong) <= 1:
        said = wrong[0] if wrong else toyworld.sound_motion(directions[true])
        # of a motion with a defect "it moves left …"; of one without a wrong direction
        other = directions[true if wrong and true >= 0 else pick(len(directions))]
        out.append(
            _lesson(
                "Phy",
                toyworld.EXPLAIN_MOTION,
                "motion",
                toyworld.sound_motion(other) if pick(3) == 0 else said,
                said,
                0.5 if wrong else 0.2,
            )
        )
    wrong = [toyworld.EXPLANATIONS[defect] for defect in sorted(label.defects) if defect in toyworld.QUALITY]
    if len(wrong) <= 1:
        said = wrong[0] if wrong else toyworld.SOUND_PICTURE
        out.append(
            _lesson(
                "VQ",
                toyworld.EXPLAIN_PICTURE,
                "picture",
                toyworld.SOUND_PICTURE if pick(3) == 0 else said,
                said,
                0.5 if wrong else 0.2,
            )
        )
    return out


def _lesson(aspect: Aspect, text: str, name: str, shown: str, true: str, weight: float) -> Lesson:
    """A dense question. Its answer ends with the end-of-turn token, at which ``generate`` stops."""
    words, right = ([*answer.split(), END] for answer in (shown, true))
    at = next((i for i, (word, truth) in enumerate(zip(words, right, strict=False)) if word != truth), None)
    question = Question(aspect, text, " ".join(words), kind="dense", name=name)
    return Lesson(question, weight, None if at is None else (at, right[at]))


def answer_loss(
    critic: VLMCritic, features: Tensor, grid: Tensor, asked: list[list[Lesson]]
) -> tuple[Tensor, dict[str, float]]:
    """Weighted cross-entropy of the answers' tokens, and the share of correct yes and of correct no answers."""
    with half_products():
        logits, sizes = critic.scored_logits(features, grid, questions_of(asked))
    return lessons_loss(critic, logits, sizes, asked)


def questions_of(asked: list[list[Lesson]]) -> list[list[Question]]:
    """The questions of each clip's lessons."""
    return [[lesson.question for lesson in clip] for clip in asked]


def lessons_loss(
    critic: VLMCritic, logits: Tensor, sizes: list[int], asked: list[list[Lesson]]
) -> tuple[Tensor, dict[str, float]]:
    """``answer_loss`` from the results of ``scored_logits``."""
    logits = logits.float()
    flat = [lesson for clip in asked for lesson in clip]
    targets = torch.tensor([token for lesson in flat for token in targets_of(critic, lesson)])
    weights = torch.tensor(
        [lesson.weight / size for lesson, size in zip(flat, sizes, strict=True) for _ in range(size)]
    )
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    yes, no = critic.conversation.yes[0], critic.conversation.no[0]
    said = (logits[:, yes] > logits[:, no]).detach()
    is_yes, is_no = targets == yes, targets == no
    return loss, {"yes": said[is_yes].float().mean().item(), "no": (~said[is_no]).float().mean().item()}


def targets_of(critic: VLMCritic, lesson: Lesson) -> list[int]:
    """The tokens to predict: the answer's, with the wrong word corrected."""
    tokens = list(critic.conversation.tokens(lesson.question).target)
    if lesson.correction:
        at, word = lesson.correction
        tokens[at] = critic.tokenizer.convert_tokens_to_ids(word)
    return tokens


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, frames_BTCHW: Tensor) -> Tensor:
    """Clips through the VAE and back, in [0, 1]."""
    y = vae.decode(vae.encode(frames_BTCHW.transpose(1, 2) * 2 - 1).latent_dist.mode()).sample
    return (y.transpose(1, 2) + 1) / 2


def half_reconstructed(vae: AutoencoderKLWan, frames: Tensor, defect: Tensor) -> Tensor:
    """Passes every other clip through the VAE, since the critic judges clips that the VAE decodes. Except clips with a
    quality defect: the VAE removes noise and flicker, so their labels would be wrong."""
    rows = torch.tensor([i for i in range(0, len(frames), 2) if defect[i] < len(toyworld.PHYSICS)])
    frames = frames.clone()
    if len(rows):
        frames[rows] = reconstruct(vae, frames[rows])
    return frames


class Language(nn.Module):
    """The modules that the first part trains."""

    def __init__(self, critic: VLMCritic) -> None:
        super().__init__()
        self.language_model, self.lm_head = critic.model.model.language_model, critic.model.lm_head


@torch.no_grad()
def cache_tokens(
    critic: VLMCritic, vae: AutoencoderKLWan, seed: int, batches: int
) -> tuple[Tensor, Tensor, list[Label]]:
    """-> the tower's tokens of 96 clips a batch (n, tokens, width) in fp16, the patch grid (1, 3), the labels."""
    draw = torch.Generator().manual_seed(seed)
    features, labels = [], []
    for _ in range(batches):
        frames, _, combos, defect = draw_labelled(96, draw, clean_share=0.4)
        tokens, grid = critic.embed_video(half_reconstructed(vae, frames, defect))
        features.append(tokens.half())
        labels += drawn_labels(combos, defect)
    return torch.cat(features), grid[:1], labels


def train_language(
    critic: VLMCritic,
    vae: AutoencoderKLWan,
    folder: Path,
    seed: int,
    scale: float = 1.0,
    log: Callable[[str], None] = print,
) -> None:
    """First part: the tower is frozen, its tokens are cached."""
    critic.model.requires_grad_(False)
    # cached, so that a finished training does not compute it
    data = cache(partial(cache_tokens, critic, vae, seed + 1, max(1, int(CLIPS * min(1.0, scale)) // 96)))
    language = Language(critic).train()
    language.requires_grad_(True)
    schedule = Schedule(
        steps=scaled(4000, scale), lr=2e-3, warmup=min(100, scaled(300, scale)), ema=0.995, log_every=100
    )

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        tokens, grid, labels = data()
        rows = torch.randint(len(tokens), (BATCH,), generator=generator)
        asked = [ask(labels[i], generator) for i in rows.tolist()]
        return answer_loss(critic, tokens[rows].float(), grid.expand(BATCH, -1), asked)

    train("language", language, loss, schedule, folder, seed, log=log)


def train_together(
    critic: VLMCritic,
    vae: AutoencoderKLWan,
    draw: Callable[[], Tensor],
    folder: Path,
    seed: int,
    scale: float = 1.0,
    log: Callable[[str], None] = print,
) -> None:
    """Second part: tower and language model together, a third of each batch the generator's clips (``draw()``:
    frames_BTCHW), oracle-labelled."""

    @cache  # a finished training does not compute it
    def data() -> tuple[Tensor, list[Label]]:
        samples = draw()
        return samples, measured_labels(samples)

    critic.model.train().requires_grad_(True)
    schedule = Schedule(
        steps=scaled(1000, scale), lr=8e-4, warmup=min(100, scaled(300, scale)), ema=0.995, log_every=50
    )
    own = BATCH // 3

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        samples, labels = data()
        frames, _, combos, defect = draw_labelled(BATCH - own, generator, clean_share=0.4)
        rows = torch.randint(len(samples), (own,), generator=generator)
        clips = torch.cat([half_reconstructed(vae, frames, defect), samples[rows]])
        asked = [
            ask(label, generator) for label in [*drawn_labels(combos, defect), *(labels[i] for i in rows.tolist())]
        ]
        with half_products():
            features, grid = critic.embed_video(clips)
        return answer_loss(critic, features, grid, asked)

    train("critic", critic.model, loss, schedule, folder, seed, log=log)
    critic.model.eval().requires_grad_(False)
