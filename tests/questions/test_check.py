"""The check of questions from the prompt's text alone: with a critic that answers from a table, and with ToyWorld's
second critic, which learned to read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from lowmem_drf.assembly.check import LEFT_OUT, checked_questions
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.config import load_config
from lowmem_drf.models.qwen_vl.critic import load_critic
from lowmem_drf.models.weights.sources import READER, resolve
from lowmem_drf.prompts import as_prompts
from lowmem_drf.questions import fixed, toyworld
from lowmem_drf.questions.check import BLIND, GUESSED_SHARE, RIGHT
from lowmem_drf.questions.file import to_json
from lowmem_drf.questions.fixed import ANSWER, FEWEST
from lowmem_drf.questions.make import make_questions
from lowmem_drf.types import Answer, Prompt, Question

ROBOT = "A robot loses an arm in the rain"
PEOPLE, BODIES = ("Are there people in the video?" + ANSWER, "Are there people or animals in the video?" + ANSWER)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_DRF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def quiet():
    return Console(record=True, width=300, file=open("/dev/null", "w"))


class Table:
    """A critic that answers yes with these probabilities: from a text, and from nothing."""

    def __init__(self, told=(), guessed=(), otherwise=None):
        self.told, self.guessed, self.otherwise, self.heard = dict(told), dict(guessed), otherwise, []

    def answer_from_text(self, text, questions):
        self.heard.append(text)
        table = self.guessed if text == BLIND else self.told
        return [self._answer(table, text, question) for question in questions]

    def _answer(self, table, text, question):
        wanted = question.answer == "yes"
        p = table.get(question.text)
        if p is None:  # what is not in the table is answered as wanted from the text, and not known without it
            p = 0.5 if text == BLIND else 0.99 if wanted else 0.01
        p = torch.tensor(p, dtype=torch.float64)
        return Answer(torch.stack([p.log(), (1 - p).log()])[None], torch.tensor([0]), yes=(0,), no=(1,))


def config_of(*overrides):
    return load_config(
        "toy", ["critic.id=some/critic", "prompts=p.txt", "critic.questions=phrases", "critic.mode=yesno", *overrides]
    )


def yes(text, weight=1.0):
    return Question("TA", text, "yes", weight=weight)


def check(critic, questions, quiet, prompt=ROBOT, **arguments):
    done = checked_questions(config_of(), as_prompts([prompt]), {"0001": tuple(questions)}, critic, quiet, **arguments)
    return done, done.questions["0001"]


def test_what_does_not_follow_from_the_text_is_left_out(quiet, tmp_path):
    """At a probability of 0.8 a question is asked; below it is not, in either answer, nor a dense one whose reference
    answer is wrong."""
    dense = [Question("TA", "What happens?", f"A robot {what}.", "dense") for what in ("loses an arm", "dances")]
    right, wrong = (RIGHT.format(text=q.text, answer=q.answer) for q in dense)
    no = [replace(yes("Is it dry?"), answer="no"), replace(yes("Is it Monday?"), answer="no")]
    asked = [yes("Is there a robot?"), yes("Is there a fifteen?"), *no, *dense]
    table = {"Is there a robot?": 0.8, "Is there a fifteen?": 0.79, "Is it dry?": 0.2, "Is it Monday?": 0.21}
    done, kept = check(Table({**table, right: 0.9, wrong: 0.3}), asked, quiet)
    assert list(kept) == [asked[0], no[0], dense[0]]
    done.write(tmp_path, as_prompts([ROBOT]))
    (row,) = json.loads((tmp_path / LEFT_OUT).read_text())
    assert row["prompt"] == ROBOT and [q["text"] for q in row["questions"]] == [
        "Is there a fifteen?",
        "Is it Monday?",
        "What happens?",
    ]
    assert [round(q["from_text"], 4) for q in row["questions"]] == [0.79, 0.79, 0.3]
    assert all("does not follow from the prompt" in q["why"] and not q["asked"] for q in row["questions"])
    assert "6 questions checked from the prompts' text alone: 3 left out, 0 weigh less." in quiet.export_text()


def test_what_is_answered_without_the_text_weighs_little(quiet):
    asked = [
        yes("Is there a robot?", 0.5),
        yes("Is something there?", 0.5),
        replace(yes("Is it a walrus?"), answer="no"),
    ]
    guessed = {"Is there a robot?": 0.79, "Is something there?": 0.8, "Is it a walrus?": 0.1}
    _, kept = check(Table(guessed=guessed), asked, quiet)
    assert [q.weight for q in kept] == [0.5, 0.5 * GUESSED_SHARE, GUESSED_SHARE]
    assert "0 left out, 2 weigh less" in quiet.export_text()


def test_of_the_fixed_questions_only_those_that_the_prompt_contradicts_go_and_others_take_their_place(quiet):
    """From the text the critic does not know whether the motion is smooth (0.5), which is no contradiction; the noise
    is asked for, in one of the two ways."""
    draft = [q for q in make_questions(ROBOT, "both") if q.aspect != "TA"]
    smooth, noise = ([q for q in fixed.about_text() if q.name == name] for name in ("smooth", "noise"))
    table = {**{q.text: 0.5 for q in smooth}, noise[0].text: 0.2, PEOPLE: 0.1, BODIES: 0.9}
    _, kept = check(Table(table), [yes("Is there a robot?"), *draft], quiet)
    names = list(dict.fromkeys(q.name for q in kept if q.aspect != "TA" and q.kind == "yesno"))
    assert names == ["smooth", "body", "appear", "shape", "contact", "sharp", "flicker", "warp", "light", "overlay"]
    assert [q.kind for q in kept].count("dense") == 2
    assert next(q for q in kept if q.name == "quality").answer.startswith("The video is sharp, free of flicker")
    # without people or animals nobody asks about bodies; hands need people
    _, kept = check(Table({PEOPLE: 0.1, BODIES: 0.79}), draft, quiet)
    assert not {"body", "hands"} & {q.name for q in kept}


def test_three_pairs_of_each_aspect_are_left_whatever_the_prompt_contradicts(quiet):
    opposite = {q.text: 0.01 if q.answer == "yes" else 0.99 for q in fixed.about_text()} | {PEOPLE: 0.9, BODIES: 0.9}
    _, kept = check(Table(opposite), make_questions(ROBOT), quiet)
    for aspect in ("Phy", "VQ"):
        asked = [q for q in kept if q.aspect == aspect]
        assert len(asked) == 2 * FEWEST == 2 * len({q.name for q in asked})


def test_a_prompt_without_a_right_question_about_itself_falls_back(quiet):
    nonsense = [yes("Is there a fifteen?"), Question("Phy", "Does it obey?", "yes")]
    done, kept = check(Table({q.text: 0.3 for q in nonsense}), nonsense, quiet)
    assert list(kept) == [q for q in make_questions(ROBOT) if q.aspect == "TA"]
    said = quiet.export_text()
    assert "No question about the prompt was right, others take their place: 0001." in said
    assert "No question about physics is left for 1 prompts, the first: 0001." in said
    # if phrases are no better they are asked all the same, rather than nothing
    bad = {q.text: 0.5 for q in (*nonsense, *kept)}
    _, again = check(Table(bad), nonsense, quiet)
    assert [q.text for q in again] == [q.text for q in kept]
    _, held_out = check(Table(bad), nonsense, quiet, prompt="another", replaces=False)
    assert held_out == ()


def test_a_users_questions_are_checked_too_and_not_replaced(quiet, tmp_path):
    texts = [*make_questions(ROBOT)[:1], *fixed.yesno(fixed.checks(ROBOT))]
    bad = next(q for q in texts if q.name == "noise")
    file = tmp_path / "mine.json"
    file.write_text(to_json({ROBOT: texts}))
    config, prompts = config_of(f"critic.questions={file}"), as_prompts([ROBOT])
    draft = draft_questions(config, prompts)
    done = checked_questions(config, prompts, draft, Table({bad.text: 0.1}), quiet)
    assert done.questions["0001"] == tuple(q for q in texts if q != bad)
    mine = Prompt("mine", "a cat", (yes("Is it a cat?"), yes("Is it a dog?")))
    done = checked_questions(config_of(), [mine], {"mine": mine.questions}, Table({"Is it a dog?": 0.1}), quiet)
    assert done.questions["mine"] == mine.questions[:1]


def test_what_was_checked_is_not_asked_again(quiet):
    asked = make_questions(ROBOT, "both")
    first = Table()
    kept = check(first, asked, quiet)[1]
    assert len(first.heard) == 2 and ROBOT in first.heard[0] and first.heard[1] == BLIND
    second = Table()
    assert check(second, asked, quiet)[1] == kept and second.heard == []


@pytest.fixture(scope="module")
def reader():
    return load_critic(resolve(READER, "critic"))


@pytest.mark.parametrize("writer", ["grammar", "phrases"])
def test_toyworlds_reader_leaves_out_what_is_false_and_only_that(reader, quiet, writer):
    """Captions that no model was trained on, in each of the six sentences; every third question about another caption
    is mixed in, reference answers too."""
    config = load_config("toy", [f"critic.id={READER}", f"critic.questions={writer}", "critic.mode=both"])
    from lowmem_drf.toy.captions import caption
    from lowmem_drf.toy.scenes import combos_of

    unseen = combos_of("unseen")
    prompts = as_prompts([caption(unseen[3 * i], i) for i in range(6)])
    others = as_prompts([caption(combo_unlike(unseen[3 * i]), i) for i in range(6)])
    right, wrong = (draft_questions(config, some) for some in (prompts, others))
    mixed, false = {}, {}
    for name, asked in right.items():
        about = [q for q in asked if q.aspect == "TA" and q.name != "foil"]
        theirs = [q for q in wrong[name] if q.aspect == "TA" and q.name != "foil"]
        false[name] = {(q.text, q.answer) for q in theirs[::3]}
        mixed[name] = tuple([*about, *theirs[::3], *(q for q in asked if q.aspect != "TA")])
    done = checked_questions(config, prompts, mixed, reader, quiet)
    for name, verdicts in done.verdicts.items():
        assert {(v.question.text, v.question.answer) for v in verdicts if not v.asked} == false[name] != set()
        assert len(done.questions[name]) == len(verdicts) - len(false[name])


def combo_unlike(combo):
    sizes = [len(values) for values in toyworld.ATTRIBUTES.values()]
    return type(combo)(*((value + 1) % size for value, size in zip(combo, sizes, strict=True)))
