"""Reference answers and token weights, computed once before training.

Reference-guided (Diffusion-DRF, arXiv 2601.04153): the critic's answer to a dense question about a caption-matched real
clip becomes the reference answer for generated clips. Yes/no questions that it answers wrongly even about the real clip
are left out.

Token weights: in "it moves left and keeps its form" only "moves left" depends on the clip. The weight of a token is its
probability given the clip minus its probability given static, which the critic would say anyway.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem_drf.assembly.cache import Cache, cache_folder
from lowmem_drf.assembly.check import Checked, can_check, checked_questions
from lowmem_drf.assembly.questions import Questions, critic_key, needs_writer, written_questions
from lowmem_drf.method.reward import RewardSpec, question_reward, token_probabilities
from lowmem_drf.schema import Config
from lowmem_drf.terminal import counted
from lowmem_drf.types import Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.models.qwen_vl.critic import VLMCritic

VERSION = 1
"""Part of the cache key."""

ANSWER_TOKENS = 96
"""Maximum length of a reference answer."""

WEIGHT_FLOOR = 0.05
"""Weight of a token that the critic would say anyway; above 0, so that the answer stays a sentence."""

BLIND_BATCH = 32


def finish_questions(
    config: Config,
    prompts: Sequence[Prompt],
    draft: Mapping[str, tuple[Question, ...]],
    critic: VLMCritic | None,
    console: Console,
    ready: Container[str] = (),
) -> Checked:
    """The draft with questions that the critic writes and checks, references of real clips and token weights, each if
    the configuration asks for it.

    Args:
        critic: ``None``: no critic is asked, and nothing is done.
        ready: ids of prompts whose questions were written and checked before.

    Raises BadInputError: an unreadable reference video.
    """
    made, written = dict(draft), set[str]()
    if critic is None:
        return Checked(made)
    fresh = [prompt for prompt in prompts if prompt.id not in ready]
    if needs_writer(config):
        made, written = written_questions(config, fresh, draft, critic, console)
    checks = can_check(config) and bool(fresh)
    done = checked_questions(config, fresh, made, critic, console) if checks else Checked(made)
    done.written = written
    questions, seen = done.questions, dict[str, list[Tensor]]()
    if config.critic.reference == "auto":
        guided = [prompt for prompt in prompts if prompt.reference_video]
        left_out = 0
        for prompt in counted(console, "looking at reference videos", guided):
            before = questions[prompt.id]
            questions[prompt.id], seen[prompt.id] = _guided_by_clip(config, prompt, before, critic)
            left_out += sum(old.weight > 0 == new.weight for old, new in zip(before, questions[prompt.id], strict=True))
        if left_out:
            why = "the critic does not answer them as wanted even of the real clip"
            console.print(f"{left_out} yes/no questions are left out: {why}.", highlight=False)
    if config.critic.token_weights == "contrast":
        done.questions = _weighted_tokens(questions, seen, critic, console)
    return done


@torch.no_grad()
def _guided_by_clip(
    config: Config, prompt: Prompt, questions: Sequence[Question], critic: VLMCritic
) -> tuple[tuple[Question, ...], list[Tensor]]:
    """Questions with the critic's answers about the prompt's real clip, and the probabilities of their tokens (empty
    for yes/no)."""
    from lowmem_drf.assembly.assemble import critic_frames, critic_rate
    from lowmem_drf.video import read_video

    assert prompt.reference_video is not None
    path = Path(prompt.reference_video)
    frames, _ = read_video(path, fps=critic_rate(config), frames=critic_frames(config))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    cache = Cache(cache_folder() / "references")
    guided = []
    for question in questions:
        if question.kind == "dense" and not prompt.questions:  # answers in the prompt file are the user's
            key = {"question": question.text, "video": digest, "frames": len(frames), "fps": critic.fps}
            key |= {"version": VERSION, **critic_key(config)}
            said = cache.get(key)
            if said is None:
                said = critic.generate(question.text, frames, max_new_tokens=ANSWER_TOKENS).strip()
                cache.put(key, said)
            question = replace(question, answer=said or question.answer)
        guided.append(question)
    answers = critic(frames[None].to(critic.model.device), [guided])[0]
    margin, pairs = RewardSpec("yes_margin"), list(zip(guided, answers, strict=True))
    failed = [q.kind == "yesno" and question_reward(a, q, margin).item() < 0 for q, a in pairs]
    # if no question would be left, the clip does not show this caption
    if all(failed[i] or q.weight == 0 for i, q in enumerate(guided)):
        failed = [False] * len(guided)
    kept = tuple(replace(q, weight=0.0) if bad else q for q, bad in zip(guided, failed, strict=True))
    return kept, [token_probabilities(a) if q.kind == "dense" else torch.empty(0) for q, a in pairs]


@torch.no_grad()
def _weighted_tokens(
    questions: Questions, seen: Mapping[str, Sequence[Tensor]], critic: VLMCritic, console: Console
) -> Questions:
    """Sets ``token_weights`` of all dense questions. ``seen``: token probabilities given the real clip, by prompt id; 1
    without a clip."""
    asked = [q for of_prompt in questions.values() for q in of_prompt if q.kind == "dense" and not q.token_weights]
    pending = list({(q.text, q.answer): q for q in asked}.values())
    blind: dict[tuple[str, str], Tensor] = {}
    frames = _static(critic)
    batches = [pending[i : i + BLIND_BATCH] for i in range(0, len(pending), BLIND_BATCH)]
    for batch in counted(console, "weighing the answers' words", batches):
        pairs = zip(batch, critic(frames, [batch])[0], strict=True)
        blind |= {(q.text, q.answer): token_probabilities(a) for q, a in pairs}

    def weighted(prompt: str, i: int, question: Question) -> Question:
        blind_A = blind.get((question.text, question.answer))
        if blind_A is None:
            return question
        seen_A = seen[prompt][i] if prompt in seen else torch.ones_like(blind_A)
        weights_A = WEIGHT_FLOOR + (1 - WEIGHT_FLOOR) * (seen_A - blind_A).clamp(min=0)
        return replace(question, token_weights=tuple(round(weight, 4) for weight in weights_A.tolist()))

    return {name: tuple(weighted(name, i, q) for i, q in enumerate(some)) for name, some in questions.items()}


def _static(critic: VLMCritic) -> Tensor:
    """The shortest and smallest white noise that the critic takes, (1, T, 3, H, W). Not gray: critics describe it as a
    scene."""
    geometry = critic.geometry
    unit = geometry.patch * geometry.merge
    side = unit * math.ceil(geometry.min_pixels**0.5 / unit)
    shape = (1, 2 * geometry.temporal_patch, 3, side, side)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(critic.model.device)
