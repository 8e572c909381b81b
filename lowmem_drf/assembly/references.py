"""What a good answer is, fixed once before training: by a caption-matched real clip where there is one, and which of
its words count.

Reference-guided (Diffusion-DRF, arXiv 2601.04153): the critic is asked a dense question about the real clip, and what
it says is the answer wanted of the generated one. A yes/no question that it does not answer as wanted even there cannot
judge anything, and is left out.

Token weights: of "it moves left and keeps its form" only "moves left" depends on the clip. A token weighs the
probability it has when the clip is seen, less the one it has when the critic sees nothing but static: what it would say
anyway.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowmem_drf.assembly.cache import Cache, cache_folder
from lowmem_drf.assembly.questions import Questions, critic_key, needs_writer, written_questions
from lowmem_drf.method.reward import RewardSpec, question_reward, token_probabilities
from lowmem_drf.schema import Config
from lowmem_drf.terminal import counted
from lowmem_drf.types import Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lowmem_drf.models.qwen_vl.critic import QwenCritic

VERSION = 1
"""Goes into the cache's key."""

ANSWER_TOKENS = 96
"""A reference answer is cut here."""

WEIGHT_FLOOR = 0.05
"""Of a token that the critic would say anyway. Not 0: the answer is to stay a sentence."""

BLIND_BATCH = 32


def finish_questions(
    config: Config,
    prompts: Sequence[Prompt],
    draft: Mapping[str, tuple[Question, ...]],
    critic: QwenCritic,
    console: Console,
) -> Questions:
    """The draft, written by the critic where that is wanted, with the references of real clips and token weights.
    Nothing of this is done again during training.

    Raises BadInputError: a reference video that cannot be read.
    """
    questions = written_questions(config, prompts, draft, critic, console) if needs_writer(config) else dict(draft)
    seen: dict[str, list[Tensor]] = {}
    if config.critic.reference == "auto":
        guided = [prompt for prompt in prompts if prompt.reference_video]
        left_out = 0
        for prompt in counted(console, "looking at reference videos", guided):
            before = questions[prompt.id]
            questions[prompt.id], seen[prompt.id] = _guided_by_clip(config, prompt, before, critic)
            left_out += sum(old.weight > 0 == new.weight for old, new in zip(before, questions[prompt.id], strict=True))
        if left_out:
            console.print(
                f"{left_out} yes/no questions are left out: the critic does not answer them as wanted even of the real clip.",
                highlight=False,
            )
    return (
        _weighted_tokens(questions, seen, critic, console) if config.critic.token_weights == "contrast" else questions
    )


@torch.no_grad()
def _guided_by_clip(
    config: Config, prompt: Prompt, questions: Sequence[Question], critic: QwenCritic
) -> tuple[tuple[Question, ...], list[Tensor]]:
    """Questions with what the critic says of the prompt's real clip, and what it gives each token of that (empty for
    yes/no)."""
    from lowmem_drf.assembly.assemble import critic_frames, critic_rate
    from lowmem_drf.video import read_video

    assert prompt.reference_video is not None
    path = Path(prompt.reference_video)
    frames, _ = read_video(path, fps=critic_rate(config), frames=critic_frames(config))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    cache = Cache(cache_folder() / "references")
    guided = []
    for question in questions:
        if question.kind == "dense" and not prompt.questions:  # an answer that stands in the prompt file is the user's
            key = {
                "question": question.text,
                "video": digest,
                "frames": len(frames),
                "fps": critic.fps,
                "version": VERSION,
                **critic_key(config),
            }
            said = cache.get(key)
            if said is None:
                said = critic.generate(question.text, frames, max_new_tokens=ANSWER_TOKENS).strip()
                cache.put(key, said)
            question = replace(question, answer=said or question.answer)
        guided.append(question)
    answers = critic(frames[None].to(critic.model.device), [guided])[0]
    margin = RewardSpec("yes_margin")
    failed = [
        q.kind == "yesno" and question_reward(a, q, margin).item() < 0 for q, a in zip(guided, answers, strict=True)
    ]
    # nothing would be left: the clip is not of this caption
    if all(failed[i] or q.weight == 0 for i, q in enumerate(guided)):
        failed = [False] * len(guided)
    kept = tuple(replace(q, weight=0.0) if bad else q for q, bad in zip(guided, failed, strict=True))
    return kept, [
        token_probabilities(a) if q.kind == "dense" else torch.empty(0) for q, a in zip(guided, answers, strict=True)
    ]


@torch.no_grad()
def _weighted_tokens(
    questions: Questions, seen: Mapping[str, Sequence[Tensor]], critic: QwenCritic, console: Console
) -> Questions:
    """``token_weights`` of all dense questions. ``seen``: by prompt id, each token's probability given the real clip; 1
    where there is none."""
    dense = {
        (q.text, q.answer): q
        for asked in questions.values()
        for q in asked
        if q.kind == "dense" and not q.token_weights
    }
    blind: dict[tuple[str, str], Tensor] = {}
    pending = list(dense.values())
    frames = _static(critic)
    batches = [pending[i : i + BLIND_BATCH] for i in range(0, len(pending), BLIND_BATCH)]
    for batch in counted(console, "weighing the answers' words", batches):
        blind |= {
            (q.text, q.answer): token_probabilities(a) for q, a in zip(batch, critic(frames, [batch])[0], strict=True)
        }
    return {
        prompt: tuple(
            _weigh(question, seen[prompt][i] if prompt in seen else None, blind)
            if (question.text, question.answer) in blind
            else question
            for i, question in enumerate(asked)
        )
        for prompt, asked in questions.items()
    }


def _weigh(question: Question, seen_A: Tensor | None, blind: Mapping[tuple[str, str], Tensor]) -> Question:
    blind_A = blind[question.text, question.answer]
    seen_A = torch.ones_like(blind_A) if seen_A is None else seen_A
    weights_A = WEIGHT_FLOOR + (1 - WEIGHT_FLOOR) * (seen_A - blind_A).clamp(min=0)
    return replace(question, token_weights=tuple(round(weight, 4) for weight in weights_A.tolist()))


def _static(critic: QwenCritic) -> Tensor:
    """White noise, as short and small as the critic takes it: (1, T, 3, H, W). Plain gray is a scene too, and critics
    describe it."""
    geometry = critic.geometry
    unit = geometry.patch * geometry.merge
    side = unit * math.ceil(geometry.min_pixels**0.5 / unit)
    shape = (1, 2 * geometry.temporal_patch, 3, side, side)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(critic.model.device)
