"""The questions of a run: a draft that needs no model, then the questions that the critic writes."""

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
"""Prompt id -> questions."""

WRITTEN_TOKENS = 2048
"""Limit of a writer's answer; 24 questions take about 1,000 tokens."""


def grammar_of(config: Config) -> Grammar:
    """ToyWorld's critic understands only ToyWorld's words."""
    return "toyworld" if TOYWORLD in (config.critic.id, config.prompts) else "phrases"


def draft_questions(
    config: Config, prompts: Sequence[Prompt], grammar: Grammar | None = None, strict: bool = True
) -> Questions:
    """Questions without a model: from the prompt file, else from the user's questions file, else from the grammar.

    Args:
        grammar: ``None``: the critic's.
        strict: require that the questions file covers every prompt. If False, the grammar covers the others.

    Raises:
        BadInputError: an unusable questions file, or one for other prompts; prompts outside ToyWorld's grammar.
    """
    source, grammar = config.critic.questions, grammar or grammar_of(config)
    if source == "grammar" and grammar != "toyworld":
        raise BadInputError(
            'critic.questions = "grammar" is ToyWorld\'s own. '
            'For other prompts use critic.questions = "phrases", "critic" or a file.'
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
        (first, reason), *rest = refused
        others = ", ".join(prompt.id for prompt, _ in rest[:5]) + (", …" if len(rest) > 5 else "")
        also = f"\nThe same holds for prompts {others}." if others else ""
        raise BadInputError(f"prompt {first.id}: {reason}{also}")
    return made


def require_weights(questions: Mapping[str, Sequence[Question]], spec: RewardSpec) -> None:
    """Raises BadInputError for the first prompt without a question of weight above 0: its clips would get no reward."""
    for prompt, asked in questions.items():
        if not any(question.weight * spec.weights[question.aspect] > 0 for question in asked):
            raise BadInputError(
                f"prompt {prompt}: none of its questions has a weight above 0. "
                "Raise critic.weights, or the questions' own weights."
            )


def needs_writer(config: Config) -> bool:
    """True if the critic writes the questions. Vanilla-DRF's one question needs no writer."""
    return config.critic.questions == "critic" and config.critic.mode != "vanilla"


def written_questions(
    config: Config,
    prompts: Sequence[Prompt],
    draft: Mapping[str, tuple[Question, ...]],
    critic: QwenCritic,
    console: Console,
) -> Questions:
    """The critic writes the questions of all prompts without questions in the prompt file; the fixed ones stay.

    Cached by prompt, mode, critic and version. After two unusable answers a prompt keeps its draft, with a message.
    """

    def generate(text: str) -> str:
        return critic.generate(text, max_new_tokens=WRITTEN_TOKENS)

    cache, mode = Cache(cache_folder() / "questions"), config.critic.mode
    made, failed = dict(draft), list[str]()
    for prompt in counted(console, "writing questions", [prompt for prompt in prompts if not prompt.questions]):
        key = {"prompt": prompt.text, "mode": mode, "version": VERSION, **critic_key(config)}
        rows = cache.get(key)
        if rows is None:
            try:
                rows = [asdict(question) for question in write_questions(prompt.text, mode, generate)]
            except UnusableError as error:
                failed.append(f"{prompt.id} ({error})")
                continue
            cache.put(key, rows)
        written = tuple(Question(**{**row, "token_weights": ()}) for row in rows)
        made[prompt.id] = (*written, *(question for question in draft[prompt.id] if question.aspect != "TA"))
    if failed:
        told = f"The critic as writer gave no usable JSON for {len(failed)} of {len(prompts)} prompts, twice each; "
        told += f"they get the draft's questions. First: {failed[0]}"
        console.print(told, highlight=False, markup=False)
    return made


def critic_key(config: Config) -> dict[str, str]:
    """The settings that change a critic's answer to the same question."""
    return {"critic": config.critic.id, "quant": config.critic.quant, "dtype": config.dtype}
