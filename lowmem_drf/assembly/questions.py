"""The questions of a run: a draft that needs no model, and what the critic as writer makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lowmem_drf.assembly.cache import Cache, cache_folder
from lowmem_drf.errors import BadInputError
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.questions.file import WRITERS, load_questions, require_same_prompts
from lowmem_drf.questions.make import Grammar, make_questions
from lowmem_drf.questions.phrases import foils
from lowmem_drf.questions.writer import VERSION, UnusableError, write_questions
from lowmem_drf.schema import Config
from lowmem_drf.terminal import counted
from lowmem_drf.types import Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.models.qwen_vl.critic import QwenCritic

Questions = dict[str, tuple[Question, ...]]
"""By prompt id."""

WRITTEN_TOKENS = 2048
"""A writer's answer is cut here: 24 questions take about 1,000 tokens."""


def grammar_of(config: Config) -> Grammar:
    """ToyWorld's critic knows its own words only."""
    return "toyworld" if TOYWORLD in (config.critic.id, config.prompts) else "phrases"


def draft_questions(
    config: Config, prompts: Sequence[Prompt], grammar: Grammar | None = None, strict: bool = True
) -> Questions:
    """Without a model: the prompt's own questions, or the user's file's, or the grammar's (also what a writer falls
    back to).

    Args: grammar: ``None`` takes the critic's. strict: a file has to have the questions of every prompt. If not, the
        grammar's take the place of those it has not.

    Raises: BadInputError: a file that cannot be used or has other prompts; prompts that are not in ToyWorld's grammar,
        every one named.
    """
    source, grammar = config.critic.questions, grammar or grammar_of(config)
    if source == "grammar" and grammar != "toyworld":
        raise BadInputError(
            'critic.questions = "grammar" is ToyWorld\'s own. For other prompts use critic.questions = "phrases", "critic" or a file.'
        )
    given = {} if source in WRITERS else load_questions(source)
    if given and strict:
        require_same_prompts(source, given, prompts)
    pool = foils(prompt.text for prompt in prompts) if grammar == "phrases" else ()
    made: Questions = {}
    refused: list[tuple[Prompt, BadInputError]] = []
    for prompt in prompts:
        try:
            asked = prompt.questions or given.get(prompt.text)
            made[prompt.id] = asked or make_questions(prompt.text, config.critic.mode, grammar, pool)
        except BadInputError as error:
            refused.append((prompt, error))
    if refused:
        others = ", ".join(prompt.id for prompt, _ in refused[1:6]) + (", …" if len(refused) > 6 else "")
        raise BadInputError(
            f"prompt {refused[0][0].id}: {refused[0][1]}"
            + (f"\nThe same holds for prompts {others}." if others else "")
        )
    return made


def require_weights(questions: Mapping[str, Sequence[Question]], spec: RewardSpec) -> None:
    """Raises BadInputError for the first prompt none of whose questions counts: its clips would have no reward."""
    for prompt, asked in questions.items():
        if not any(question.weight * spec.weights[question.aspect] > 0 for question in asked):
            raise BadInputError(
                f"prompt {prompt}: none of its questions has a weight above 0. Raise critic.weights, or the questions' own weights."
            )


def needs_writer(config: Config) -> bool:
    """Vanilla-DRF's one question needs none."""
    return config.critic.questions == "critic" and config.critic.mode != "vanilla"


def written_questions(
    config: Config,
    prompts: Sequence[Prompt],
    draft: Mapping[str, tuple[Question, ...]],
    critic: QwenCritic,
    console: Console,
) -> Questions:
    """The critic writes the questions of every prompt that brings none; the fixed ones stay. Cached by prompt, model
    and version.

    What it writes twice in a row and cannot be used leaves the draft as it is, and is told on ``console``.
    """
    cache = Cache(cache_folder() / "questions")
    made, failed = dict(draft), list[str]()
    for prompt in counted(console, "writing questions", [prompt for prompt in prompts if not prompt.questions]):
        key = {"prompt": prompt.text, "mode": config.critic.mode, "version": VERSION, **critic_key(config)}
        rows = cache.get(key)
        if rows is None:
            try:
                rows = [
                    asdict(q)
                    for q in write_questions(
                        prompt.text,
                        config.critic.mode,
                        lambda text: critic.generate(text, max_new_tokens=WRITTEN_TOKENS),
                    )
                ]
            except UnusableError as error:
                failed.append(f"{prompt.id} ({error})")
                continue
            cache.put(key, rows)
        written = tuple(Question(**{**row, "token_weights": ()}) for row in rows)
        made[prompt.id] = (*written, *(question for question in draft[prompt.id] if question.aspect != "TA"))
    if failed:
        console.print(
            f"The critic as writer gave no usable JSON for {len(failed)} of {len(prompts)} prompts, twice each; they get the draft's questions. "
            f"First: {failed[0]}",
            highlight=False, markup=False,
        )  # fmt: skip
    return made


def critic_key(config: Config) -> dict[str, str]:
    """What a critic's words depend on besides what it is asked."""
    return {"critic": config.critic.id, "quant": config.critic.quant, "dtype": config.dtype}
