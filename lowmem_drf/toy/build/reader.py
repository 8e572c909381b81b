"""ToyWorld's second critic, ``toyworld-reader``: the default one, which also learned to answer questions in the form of
``phrases``, and from a caption that stands in the clip's place, as the check of questions wants it.

It starts from the default one's weights; the tower stays as it is. Of clips it learns what that one learned, and
phrases; of captions everything that a caption says; of no caption the share of yes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lowmem_drf.models.qwen_vl.critic import VLMCritic, load_critic, video_geometry
from lowmem_drf.models.wan.vae.decoder import load_vae
from lowmem_drf.questions import phrases, toyworld
from lowmem_drf.questions.check import BLIND, DESCRIBED, RIGHT
from lowmem_drf.questions.clauses import cut
from lowmem_drf.toy.build.critic import (
    Label,
    Language,
    Lesson,
    ask,
    cache_tokens,
    lessons_loss,
    measured_labels,
    questions_of,
)
from lowmem_drf.toy.build.critic_model import PREPROCESSOR
from lowmem_drf.toy.build.generator import folder_samples
from lowmem_drf.toy.build.loop import Schedule, half_products, scaled, train
from lowmem_drf.toy.build.words import critic_tokenizer
from lowmem_drf.toy.captions import WORDINGS, caption, train_prompts
from lowmem_drf.toy.scenes import FPS, Combo, all_combos
from lowmem_drf.types import Question

CLIPS, SAMPLES = 4800, 960
"""Drawn clips and clips of the generator, in tokens of the tower."""
BATCH, TEXTS = 16, 12
FRAMES = 6
"""Sentences of ``captions``: those of one sentence have equally many words."""


def build_reader(critic_folder: Path, seed: int) -> VLMCritic:
    """The default critic with rows for the new words, of the size of the others."""
    old = load_critic(str(critic_folder))
    tokenizer, model = critic_tokenizer(reader=True), old.model
    known = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    draw = torch.Generator().manual_seed(seed)
    for layer, std in ((model.get_input_embeddings(), 0.3), (model.lm_head, 0.08)):
        new = layer.weight.data[known:]
        new.copy_(std * torch.randn(new.shape, generator=draw))
    return VLMCritic(model, tokenizer, video_geometry(PREPROCESSOR), fps=FPS)


def phrase_lessons(label: Label, generator: torch.Generator) -> list[Lesson]:
    """The questions of ``phrases`` about a caption that is right, wrong in one attribute or another scene's."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    told = list(label.combo or [max(value, 0) for value in label.value.values()])
    match pick(4):
        case 0:
            at, sizes = pick(4), [len(values) for values in toyworld.ATTRIBUTES.values()]
            told[at] = (told[at] + 1 + pick(sizes[at] - 1)) % sizes[at]
        case 1:
            told = list(all_combos()[pick(270)])
    text = cut(caption(Combo(*told), pick(WORDINGS)))
    asked = [(question, truth(question.text, label)) for question in phrases.about(text, heldout=pick(2) == 0)]
    return [
        Lesson(Question("TA", question.text, "yes" if true else "no", name=question.name), 1.0)
        for question, true in asked
        if true is not None
    ]


def truth(text: str, label: Label) -> bool | None:
    """Whether the attributes that a text names are the clip's; ``None`` if the clip has no single answer."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    named = {
        name: i for name, values in toyworld.ATTRIBUTES.items() for i, value in enumerate(values) if value in words
    }
    if any(label.value[name] < 0 for name in named):
        return None
    return all(label.value[name] == i for name, i in named.items())


def text_lessons(label: Label, generator: torch.Generator) -> list[Lesson]:
    """What can be asked of a caption: all that is asked of a clean clip, and whether explanations are right."""
    said = [lesson for lesson in ask(label, generator) if lesson.question.kind == "yesno"]
    lessons = [lesson._replace(weight=1.0) for lesson in said] + phrase_lessons(label, generator)
    for dense in toyworld.dense({name: values[label.value[name]] for name, values in toyworld.ATTRIBUTES.items()}):
        if int(torch.randint(3, (1,), generator=generator)) == 0:
            other = {name: values[int(torch.randint(len(values), (1,), generator=generator))]
                     for name, values in toyworld.ATTRIBUTES.items()}  # fmt: skip
            wrong = next(q for q in toyworld.dense(other) if q.name == dense.name)
            shown = wrong if int(torch.randint(2, (1,), generator=generator)) else dense
            text = RIGHT.format(text=shown.text, answer=shown.answer)
            answer = "yes" if shown.answer == dense.answer else "no"
            lessons.append(Lesson(Question(dense.aspect, text, answer, name=dense.name), 1.0))
    return lessons


def train_reader(
    critic: VLMCritic,
    generator_folder: Path,
    folder: Path,
    seed: int,
    scale: float = 1.0,
    log: Callable[[str], None] = print,
) -> None:
    """Trains the language model on tokens of the frozen tower, and on texts."""
    critic.model.requires_grad_(False)

    @cache  # a finished training does not compute it
    def data() -> tuple[Tensor, Tensor, list[Label]]:
        share, vae = min(1.0, scale), load_vae(str(generator_folder))
        tokens, grid, labels = cache_tokens(critic, vae, seed + 7, max(1, int(CLIPS * share) // 96))
        count, prompts = max(24, int(SAMPLES * share)), train_prompts()
        own = folder_samples(str(generator_folder), [prompts[i % len(prompts)] for i in range(count)], seed + 100_000)
        with torch.no_grad():
            more = torch.cat([critic.embed_video(part)[0].half() for part in own.split(96)])
        return torch.cat([tokens, more]), grid, labels + measured_labels(own)

    language = Language(critic).train()
    language.requires_grad_(True)
    schedule = Schedule(
        steps=scaled(2400, scale), lr=1e-3, warmup=min(100, scaled(300, scale)), ema=0.995, log_every=50
    )

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        tokens, grid, labels = data()
        rows = torch.randint(len(tokens), (BATCH,), generator=generator)
        asked = [ask(labels[i], generator) + phrase_lessons(labels[i], generator) for i in rows.tolist()]
        with half_products():
            seen = critic.scored_logits(tokens[rows].float(), grid.expand(BATCH, -1), questions_of(asked))
        of_clips, rates = lessons_loss(critic, *seen, asked)
        known = [Combo(*all_combos()[i]) for i in torch.randint(270, (TEXTS,), generator=generator).tolist()]
        lessons = [text_lessons(Label(list(combo), set()), generator) for combo in known]
        sentence, verb = (int(torch.randint(n, (1,), generator=generator)) for n in (FRAMES, WORDINGS // FRAMES))
        texts = [DESCRIBED.format(prompt=caption(combo, sentence + FRAMES * verb)) for combo in known]
        texts = [BLIND] * TEXTS if step % 4 == 3 else texts
        with half_products():
            read = critic.text_logits(texts, questions_of(lessons))
        of_texts, read_rates = lessons_loss(critic, *read, lessons)
        if step % 4 != 3:
            rates |= {f"read_{name}": rate for name, rate in read_rates.items()}
        return of_clips + 0.5 * of_texts, rates

    train("reader", language, loss, schedule, folder, seed, log=log)
    critic.model.eval().requires_grad_(False)
