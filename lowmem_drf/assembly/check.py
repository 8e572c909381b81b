"""Checks the questions of a run with its critic, once before training (``questions.check``)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.assembly.cache import Cache, cache_folder
from lowmem_drf.assembly.questions import Questions, critic_key, grammar_of, is_still
from lowmem_drf.files import write_text
from lowmem_drf.method.reward import RewardSpec, question_reward
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.questions import fixed
from lowmem_drf.questions.check import (
    BLIND,
    DESCRIBED,
    SURE,
    VERSION,
    Verdict,
    checkable,
    contradicted,
    is_fixed,
    needs_guess,
    report,
    verdict,
)
from lowmem_drf.questions.make import foils, make_questions
from lowmem_drf.questions.still import about_image, of_image
from lowmem_drf.schema import Config
from lowmem_drf.terminal import counted
from lowmem_drf.types import Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.models.qwen_vl.critic import VLMCritic

LEFT_OUT = "left_out.json"
"""File in a run's folder: the questions that the check left out or gave less weight, and why."""
ASPECTS = {"TA": "the prompt", "Phy": "physics", "VQ": "quality"}


@dataclass
class Checked:
    """Questions by prompt id, and what the check found."""

    questions: Questions
    verdicts: dict[str, tuple[Verdict, ...]] = field(default_factory=dict)
    """By prompt id, in the order of the questions; also of those that were left out."""
    written: set[str] = field(default_factory=set)
    """Prompts whose questions a model wrote."""
    fell_back: set[str] = field(default_factory=set)
    """Prompts of whose questions about the prompt none was right: ``phrases`` or the grammar takes their place."""

    def write(self, run: Path, prompts: Sequence[Prompt]) -> None:
        """Writes ``left_out.json``."""
        rows = [{"id": p.id, "prompt": p.text, "questions": report(self.verdicts.get(p.id, ()))} for p in prompts]
        text = json.dumps([row for row in rows if row["questions"]], indent=1, ensure_ascii=False)
        write_text(run / LEFT_OUT, text + "\n")


def can_check(config: Config) -> bool:
    """False if the check is off, no critic is asked, or it is ToyWorld's default one, which cannot read."""
    return config.critic.check and config.critic.weights.asked and config.critic.id != TOYWORLD


def checked_questions(
    config: Config,
    prompts: Sequence[Prompt],
    questions: Mapping[str, tuple[Question, ...]],
    critic: VLMCritic,
    console: Console,
    replaces: bool = True,
) -> Checked:
    """Asks the critic every question of every prompt, with the prompt's text in the clip's place; cached.

    Args:
        replaces: where a prompt contradicts a fixed question another one takes its place, except in questions of a
            user; where no question about the prompt is right, ``phrases`` or the grammar do. False: only leave out.
    """
    check = _Check(config, prompts, critic)
    done = Checked(dict(questions))
    for prompt in counted(console, "checking questions", prompts):
        made = questions[prompt.id]
        ours = not prompt.questions and config.critic.questions in ("critic", "phrases")
        verdicts = check(prompt, made, rebuilds=replaces and ours and check.grammar == "phrases")
        if replaces and _nothing_about_the_prompt(verdicts):
            spare = make_questions(
                prompt.text, config.critic.mode, check.grammar, check.foils, check.still, prompt.image is not None
            )
            again = check(prompt, [q for q in spare if q.aspect == "TA"], rebuilds=False)
            if _nothing_about_the_prompt(again):
                again = [Verdict(v.question, v.told, None, "asked all the same: no other is left") for v in again]
            verdicts = [*verdicts, *again]
            done.fell_back.add(prompt.id)
        done.verdicts[prompt.id] = tuple(verdicts)
        done.questions[prompt.id] = tuple(v.question for v in verdicts if v.asked)
    _say(done, prompts, console, "questions" if replaces else "held-out questions")
    return done


class _Check:
    """The check of one prompt."""

    def __init__(self, config: Config, prompts: Sequence[Prompt], critic: VLMCritic) -> None:
        self.grammar, self.still = grammar_of(config), is_still(config)
        self._of_images = self.still and self.grammar == "phrases"
        self.foils = foils((prompt.text for prompt in prompts), self.grammar)
        self._critic, self._key = critic, {"check": VERSION, **critic_key(config)}
        self._cache = Cache(cache_folder() / "checks")

    def __call__(self, prompt: Prompt, questions: Sequence[Question], rebuilds: bool) -> list[Verdict]:
        """``rebuilds``: choose the fixed questions anew, by what the critic reads."""
        yesno = any(is_fixed(q) and q.kind == "yesno" for q in questions)
        dense = any(is_fixed(q) and q.kind == "dense" for q in questions)
        rebuilds = rebuilds and (yesno or dense)
        begins = prompt.image is not None
        about = fixed.about_text(self.still, begins) if rebuilds else []
        asked = [q for q in questions if not (is_fixed(q) and (rebuilds or q.kind == "dense"))]
        described, blind = map(of_image, (DESCRIBED, BLIND)) if self._of_images else (DESCRIBED, BLIND)
        told = self._probabilities(described.format(prompt=prompt.text), [*map(checkable, asked), *about])
        unsaid = [q for q, p in zip(asked, told, strict=False) if needs_guess(q, p)]
        guessed = dict(zip(unsaid, self._probabilities(blind, list(map(checkable, unsaid))), strict=True))
        found = {q: verdict(q, p, guessed.get(q)) for q, p in zip(asked, told, strict=False)}
        if not rebuilds:
            return [found.get(q) or Verdict(q) for q in questions]
        by_text = {q.text: p for q, p in zip(about, told[len(asked) :], strict=True)}
        unfit = {
            q.name for q in about if contradicted(by_text[q.text]) or (q.aspect == "TA" and by_text[q.text] < SURE)
        }
        chosen = fixed.checks(prompt.text, unfit, self.still, begins)
        kept = [*(fixed.yesno(chosen) if yesno else ()), *(fixed.dense(chosen, self.still) if dense else ())]
        kept = [*about_image(kept)] if self.still else kept
        dropped = [q for q in questions if is_fixed(q) and q.kind == "yesno" and q not in kept]
        left_out = [verdict(q, by_text[q.text]) for q in dropped if contradicted(by_text[q.text])]
        return [*found.values(), *(Verdict(q, by_text.get(q.text)) for q in kept), *left_out]

    def _probabilities(self, text: str, questions: Sequence[Question]) -> list[float]:
        """Of the wanted answer against the other one, for each yes/no question."""
        if not questions:
            return []
        key = {"text": text, "questions": [[q.text, q.answer] for q in questions], **self._key}
        found = self._cache.get(key)
        if found is None:
            answers = self._critic.answer_from_text(text, questions)
            margin, pairs = RewardSpec("yes_margin"), zip(answers, questions, strict=True)
            found = [question_reward(answer, question, margin).sigmoid().item() for answer, question in pairs]
            self._cache.put(key, found)
        return [float(p) for p in found]


def _nothing_about_the_prompt(verdicts: Sequence[Verdict]) -> bool:
    about = [v for v in verdicts if v.question.aspect == "TA" and v.question.weight > 0]
    return bool(about) and not any(v.asked for v in about)


def _say(done: Checked, prompts: Sequence[Prompt], console: Console, what: str) -> None:
    """Tells what the check changed, and which prompts have an aspect without a question."""
    every = [v for verdicts in done.verdicts.values() for v in verdicts]
    out, light = sum(not v.asked for v in every), sum(v.asked and bool(v.why) for v in every)
    lines = [f"{len(every)} {what} checked from the prompts' text alone: {out} left out, {light} weigh less."]
    if done.fell_back:
        lines.append(f"No question about the prompt was right, others take their place: {_names(done.fell_back)}.")
    without = Counter[str]()
    first: dict[str, str] = {}
    for prompt in prompts:
        before = {v.question.aspect for v in done.verdicts[prompt.id]}
        for aspect in before - {q.aspect for q in done.questions[prompt.id]}:
            without[aspect] += 1
            first.setdefault(aspect, prompt.id)
    lines += [
        f"No question about {ASPECTS[a]} is left for {n} prompts, the first: {first[a]}." for a, n in without.items()
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _names(ids: set[str]) -> str:
    some = sorted(ids)
    return ", ".join(some[:5]) + (", …" if len(some) > 5 else "")
