"""The questions of a run: a draft that needs no model, then the questions that the critic writes."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch

from lowmem_drf.assembly.cache import Cache, cache_folder
from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.meter import free_bytes
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.models.weights.sources import READER, TOYWORLD
from lowmem_drf.questions.file import WRITERS, load_questions, require_same_prompts
from lowmem_drf.questions.make import Grammar, foils, make_questions
from lowmem_drf.questions.writer import VERSION, UnusableError, instruction, write_questions
from lowmem_drf.schema import Config
from lowmem_drf.terminal import clock, work_bar
from lowmem_drf.types import Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.models.qwen_vl.critic import VLMCritic

Questions = dict[str, tuple[Question, ...]]
"""Prompt id -> questions."""

WRITTEN_TOKENS = 1024
"""Limit of a writer's answer of at most 24 questions."""
MOST_AT_ONCE = 32
"""Prompts that a writer writes for at the same time, at most. A pass of a streamed writer moves all its weights, so its
time hardly depends on their number."""


def grammar_of(config: Config) -> Grammar:
    """The questions that need no model. ToyWorld's critics understand only ToyWorld's words.

    Raises BadInputError: ``phrases`` for ToyWorld's default critic.
    """
    critic = config.critic
    if critic.questions == "phrases" and critic.id == TOYWORLD:
        raise BadInputError(
            'critic.questions = "phrases": ToyWorld\'s default critic does not understand them. '
            f"Its reader does: -s critic.id={READER}"
        )
    if critic.questions == "phrases":
        return "toyworld_phrases" if critic.id == READER else "phrases"
    return "toyworld" if {critic.id, config.prompts} & {TOYWORLD, READER} else "phrases"


def is_still(config: Config) -> bool:
    """Whether questions are about images: clips of one frame."""
    return config.video.frames == 1


def draft_questions(
    config: Config, prompts: Sequence[Prompt], grammar: Grammar | None = None, strict: bool = True
) -> Questions:
    """Questions without a model: from the prompt file, else from the user's questions file, else from the grammar. None
    if no critic is asked.

    Args:
        grammar: ``None``: the critic's.
        strict: require that the questions file covers every prompt. If False, the grammar covers the others.

    Raises:
        BadInputError: an unusable questions file, or one for other prompts; prompts outside ToyWorld's grammar.
    """
    if not config.critic.weights.asked:
        return {prompt.id: () for prompt in prompts}
    source, grammar = config.critic.questions, grammar or grammar_of(config)
    if source == "grammar" and grammar != "toyworld":
        raise BadInputError(
            'critic.questions = "grammar" is ToyWorld\'s own. '
            'For other prompts use critic.questions = "critic", "phrases" or a file.'
        )
    given = {} if source in WRITERS else load_questions(source)
    if given and strict:
        require_same_prompts(source, given, prompts)
    pool = foils((prompt.text for prompt in prompts), grammar)
    made: Questions = {}
    refused: list[tuple[Prompt, BadInputError]] = []
    for prompt in prompts:
        try:
            asked = prompt.questions or given.get(prompt.text)
            made[prompt.id] = asked or make_questions(
                prompt.text, config.critic.mode, grammar, pool, is_still(config), prompt.image is not None
            )
        except BadInputError as error:
            refused.append((prompt, error))
    if refused:
        (first, reason), *rest = refused
        others = ", ".join(prompt.id for prompt, _ in rest[:5]) + (", …" if len(rest) > 5 else "")
        also = f"\nThe same holds for prompts {others}." if others else ""
        raise BadInputError(f"prompt {first.id}: {reason}{also}")
    return made


def writers_of(config: Config, prompts: Sequence[Prompt], grammar: Grammar | None = None) -> dict[str, str]:
    """Prompt id -> who makes the draft's questions: ``prompt file``, ``questions file``, ``phrases`` or ``grammar``.

    ``grammar``: as for ``draft_questions``.
    """
    source = config.critic.questions
    given = frozenset() if source in WRITERS else load_questions(source).keys()
    rest = "grammar" if (grammar or grammar_of(config)) == "toyworld" else "phrases"
    return {
        prompt.id: "prompt file" if prompt.questions else "questions file" if prompt.text in given else rest
        for prompt in prompts
    }


def with_scalars(
    config: Config, prompts: Sequence[Prompt], questions: Sequence[Sequence[Question]], held_out: bool = False
) -> list[tuple[Question, ...]]:
    """The questions of each prompt, and those of the scalar rewards that training uses, or of the held-out ones."""
    asked = {name: reward for name, reward in config.rewards.items() if reward.held_out == held_out}
    return [
        (*some, *(Question(name, prompt.text, "", "scalar", reward.weight) for name, reward in asked.items()))
        for prompt, some in zip(prompts, questions, strict=True)
    ]


def require_weights(questions: Mapping[str, Sequence[Question]], spec: RewardSpec) -> None:
    """Raises BadInputError for the first prompt without a question of weight above 0: its clips would get no reward."""
    for prompt, asked in questions.items():
        if not any(question.weight * spec.weights[question.aspect] > 0 for question in asked):
            raise BadInputError(
                f"prompt {prompt}: none of its questions has a weight above 0. "
                "Raise critic.weights, or the questions' own weights."
            )


def needs_writer(config: Config) -> bool:
    """True if a model writes the questions. Vanilla-DRF's one question needs none, and ToyWorld's critics cannot."""
    critic = config.critic
    can = critic.weights.asked and (bool(critic.writer) or critic.id not in (TOYWORLD, READER))
    return critic.questions == "critic" and critic.mode != "vanilla" and can


def write_missing(
    config: Config, prompts: Sequence[Prompt], critic: VLMCritic | None, console: Console
) -> dict[str, Any]:
    """A model writes the questions of all prompts without questions in the prompt file.

    Cached by prompt, mode, model and version as soon as they are written, so that a stopped run goes on where it was.

    Args:
        critic: ``None``, or another model if ``critic.writer`` names one: the writer is loaded if anything is missing,
            and freed.

    Returns:
        By text: the fields of each question, or after two answers that cannot be used ``{"unusable": reason}``.
    """
    cache, mode = Cache(cache_folder() / "questions"), config.critic.mode
    still = is_still(config)
    model = {**critic_key(config), **({"critic": config.critic.writer} if config.critic.writer else {})}

    def key(text: str) -> dict[str, object]:
        return {"prompt": text, "mode": mode, "version": VERSION, **model, **({"still": True} if still else {})}

    rows: dict[str, Any] = {prompt.text: cache.get(key(prompt.text)) for prompt in prompts if not prompt.questions}
    missing = sorted((text for text, found in rows.items() if found is None), key=len)  # alike: little padding
    if missing:
        with _writer(config, critic) as writer:
            for text, new in _write(writer, missing, mode, still, console):
                unusable = isinstance(new, UnusableError)
                rows[text] = {"unusable": str(new)} if unusable else list(map(asdict, cast("list[Question]", new)))
                cache.put(key(text), rows[text])
    return rows


def written_questions(
    config: Config,
    prompts: Sequence[Prompt],
    draft: Mapping[str, tuple[Question, ...]],
    critic: VLMCritic,
    console: Console,
) -> tuple[Questions, set[str]]:
    """``write_missing``, with the draft's fixed questions. A prompt whose writer failed keeps its draft; that is said.

    Returns:
        The questions, and the ids of the prompts that the model wrote for.
    """
    rows = write_missing(config, prompts, critic, console)
    made, written, failed = dict(draft), set[str](), list[str]()
    for prompt in prompts:
        found = None if prompt.questions else rows[prompt.text]
        if isinstance(found, list):
            own = tuple(Question(**{**row, "token_weights": ()}) for row in found)
            made[prompt.id] = (*own, *(question for question in draft[prompt.id] if question.aspect != "TA"))
            written.add(prompt.id)
        elif found:
            failed.append(f"{prompt.id} ({found['unusable']})")
    if failed:
        told = f"The writer gave no usable JSON for {len(failed)} of {len(prompts)} prompts, twice each; "
        told += f"they get the draft's questions. First: {failed[0]}"
        console.print(told, highlight=False, markup=False)
    return made, written


@contextmanager
def _writer(config: Config, critic: VLMCritic | None) -> Iterator[VLMCritic]:
    if critic is not None and not config.critic.writer:
        yield critic
        return
    from lowmem_drf.assembly.loading import load_run_critic

    named = config.critic.model_copy(update={"id": config.critic.writer or config.critic.id})
    loaded = [load_run_critic(config.model_copy(update={"critic": named}))]
    try:
        yield loaded[0]
    finally:
        loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _write(
    writer: VLMCritic, texts: Sequence[str], mode: str, still: bool, console: Console
) -> Iterator[tuple[str, tuple[Question, ...] | UnusableError]]:
    """Yields the questions of each text, batch by batch, and says what they cost."""
    count = at_once(writer, [instruction(text, mode, still) for text in texts])
    console.print(
        f"The writer makes questions for {len(texts)} prompts, {min(count, len(texts))} at once: a pass a token, up to "
        f"{WRITTEN_TOKENS} tokens each. They are cached: a stopped run goes on where it was.",
        highlight=False,
    )
    start, said = time.monotonic(), Counter[str]()

    def generate(instructions: Sequence[str]) -> list[str]:
        answers = writer.generate_batch(instructions, max_new_tokens=WRITTEN_TOKENS)
        sizes = [len(writer.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
        said.update(tokens=sum(sizes), passes=max(sizes) + 1)
        return answers

    with work_bar(console, "writing questions", len(texts)) as advance:
        for i in range(0, len(texts), count):
            some = texts[i : i + count]
            yield from zip(some, write_questions(some, mode, generate, still), strict=True)
            advance(len(some))
    spent = clock(time.monotonic() - start)
    console.print(f"Questions written: {said['tokens']} tokens, {said['passes']} passes, {spent}.", highlight=False)


def at_once(writer: VLMCritic, instructions: Sequence[str]) -> int:
    """How many prompts a writer writes for at the same time: they take half of the free memory, at most."""
    if writer.device.type != "cuda":
        return 8
    tokens = len(writer.conversation.prompt(max(instructions, key=len)))
    row = writer.generation_bytes(tokens, WRITTEN_TOKENS)
    return max(1, min(MOST_AT_ONCE, free_bytes(writer.device) // 2 // row))


def critic_key(config: Config) -> dict[str, str]:
    """The settings that change a critic's answer to the same question."""
    return {"critic": config.critic.id, "quant": config.critic.quant, "dtype": config.dtype}
