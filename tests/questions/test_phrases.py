"""Questions without a model: the prompt's clauses in any language, and fixed questions that it does not contradict."""

import json
import re
import time
from collections import Counter

import pytest

from bench import questions_doc
from bench.questions import PROMPTS, main, measure
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.prompts import as_prompts
from lowmem_drf.questions.clauses import LONGEST, cut, size
from lowmem_drf.questions.fixed import ANSWER, FEWEST
from lowmem_drf.questions.make import MODES, make_questions
from lowmem_drf.questions.phrases import NEUTRAL, content, foils

ROWS = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
TEXTS = [row["prompt"] for row in ROWS]
OTHERS = foils(TEXTS)
ODD = [
    "", "   ", "\n\t", "a", "red", ",,,,", '"', "'", '""', "of in on with and", "🐶🐱 !!!", "\u200b\x00\x1b[31m",
    "?" * 50, "4k, 8k, masterpiece", "(masterpiece:1.2), ((best quality))", "{}[]()<>\\|", "x" * 5000, "and, and, and",
    "then", ": :", "no", "<lora:x:1>", "BREAK", "a: b: c: d",
]  # fmt: skip


def quoted(question):
    return re.search(r'"(.*)"', question.text)[1]


def test_what_people_write_is_asked_about_in_its_own_words(capsys):
    rows = measure()
    assert len(rows) == 36 and len({row["lang"] for row in rows}) == 7
    for row in rows:
        assert not row["missing"] and not row["asked_never"] and not row["foreign"] and not row["too_few"], row
    assert main(["--prompts", str(PROMPTS)]) == 0
    assert "119 of 119" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prompt", "clauses"),
    [
        ("A kite climbs, dips twice and then falls.", ["A kite climbs", "dips twice", "falls"]),
        ("A girl waits while her brother sleeps", ["A girl waits", "her brother sleeps"]),
        ("A man rests for a while", ["A man rests for a while"]),
        ("A vase falls off a shelf and breaks on the floor", ["A vase falls off a shelf", "breaks on the floor"]),
        ("A ball falls between cups and plates on a shelf", ["A ball falls between cups and plates on a shelf"]),
        ("salt and pepper, black and white stripes", ["salt and pepper", "black and white stripes"]),
        ("A tall, dark stranger smiles", ["A tall, dark stranger smiles"]),
        ("A cute, fluffy, round owl with big, shiny eyes", ["A cute, fluffy, round owl with big, shiny eyes"]),
        ("A king of swords and shields and looks up, and", ["A king of swords and shields", "looks up"]),
        ('"A dog barks, a cat hides"', ["A dog barks", "a cat hides"]),
        ("Slowly, a door opens. Behind it, a dog barks", ["Slowly, a door opens", "Behind it, a dog barks"]),
        ("A road without cars, people or dogs, at dawn", ["A road without cars, people or dogs", "at dawn"]),
        ("a cat, no dogs, no people", ["a cat", "no dogs", "no people"]),
        ("Dr. Lee opens a 3.5 inch box at 10:30", ["Dr. Lee opens a 3.5 inch box at 10:30"]),
        ('A sign says "Stop, now. Go!" to me', ["A sign says 'Stop, now. Go!' to me"]),
        ("Style: noir. Two cats: one sleeps", ["noir", "one sleeps"]),
        ("A man calls his old friend: the line is dead", ["A man calls his old friend", "the line is dead"]),
        ("a cat, eyes: blue", ["a cat", "eyes: blue"]),
        ("a red ball, The red balls, a blue ball", ["a red ball", "a blue ball"]),
        ("score_9, (best quality:1.2), 8k, [fox], snow BREAK sky, <lora:a_b:.7>", ["fox", "snow", "sky"]),
        ("A PAN OVER WAVES THAT BREAK", ["A PAN OVER WAVES THAT BREAK"]),
        ("[0-2s] A candle burns. --ar 16:9", ["A candle burns"]),
        ("a cat\nNegative prompt: blurry, dog", ["a cat"]),
        ("女孩跳舞，然后她收起雨伞；没有人、车，高清", ["女孩跳舞", "她收起雨伞", "没有人、车"]),
        ("花びらが舞い、人はいない。", ["花びらが舞い", "人はいない"]),
        ("Ein Kind wirft Bälle um und der Opa lacht leise, dann geht er",
         ["Ein Kind wirft Bälle um", "der Opa lacht leise", "geht er"]),
        ("한 소녀가 자전거를 타고, 강아지가 뒤따라간다", ["한 소녀가 자전거를 타고", "강아지가 뒤따라간다"]),
    ],
)  # fmt: skip
def test_a_prompt_is_cut_into_its_clauses(prompt, clauses):
    assert list(cut(prompt).clauses) == clauses


def test_labels_after_commas_go_where_the_prompt_opens_with_one():
    assert cut("Subject: an old man, Place: a foggy pier").clauses == ("an old man", "a foggy pier")


@pytest.mark.parametrize("prompt", TEXTS, ids=range(len(TEXTS)))
def test_foils_are_of_other_prompts_and_share_no_word(prompt):
    asked = [q for q in make_questions(prompt, "yesno", "phrases", OTHERS) if q.name == "foil"]
    others = {clause for other in TEXTS if other != prompt for clause in cut(other).clauses}
    assert len(asked) == 2 and all(q.answer == "no" and q.weight == 0.5 for q in asked)
    for question in asked:
        assert quoted(question) in others | set(NEUTRAL) and content(quoted(question)).isdisjoint(content(prompt))


def test_one_prompt_has_neutral_foils_and_languages_do_not_mix():
    assert {quoted(q) for q in make_questions(TEXTS[0]) if q.name == "foil"} <= set(NEUTRAL)
    cats = "A cat chases a red ball in snow", "Eine Katze jagt einen Ball im Schnee", "一只猫在雪地里追逐红色的球"
    for text in cats:
        asked = make_questions(text, "yesno", "phrases", foils(cats))
        assert all(quoted(q) in NEUTRAL for q in asked if q.name == "foil")


def test_a_prompt_of_many_clauses_is_asked_about_whole_in_few_questions():
    tags = [f"tag{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(70)]
    asked = [q for q in make_questions(", ".join(tags)) if q.name == "clause"]
    assert len(asked) == 20 and ", ".join(quoted(q) for q in asked) == ", ".join(tags)
    assert len(make_questions("A dog runs past a cat, then " * 20_000, "both")) < 60


@pytest.mark.parametrize("prompt", [*TEXTS, *ODD], ids=range(len(TEXTS) + len(ODD)))
def test_every_mode_asks_something_of_every_prompt(prompt):
    made = {mode: make_questions(prompt, mode, "phrases", OTHERS) for mode in MODES}
    for asked in made.values():
        assert any(q.aspect == "TA" for q in asked) and len({(q.aspect, q.text) for q in asked}) == len(asked)
        assert all(q.text.isprintable() and q.answer and q.name for q in asked)
        assert all(q.text.endswith(ANSWER) and q.answer in ("yes", "no") for q in asked if q.kind == "yesno")
    assert made["both"] == (*made["yesno"], *made["dense"])
    assert len(made["vanilla"]) == 1 and made["vanilla"][0].answer == "yes"
    assert all(q.kind == "dense" and size(q.answer) <= LONGEST for q in made["dense"] if q.aspect == "TA")
    assert Counter(q.aspect for q in made["dense"])["Phy"] == Counter(q.aspect for q in made["dense"])["VQ"] == 1
    same = [[(q.aspect, q.name, q.answer, q.weight) for q in made[mode]] for mode in ("yesno", "heldout")]
    assert same[0] == same[1] and not {q.text for q in made["yesno"]} & {q.text for q in made["heldout"]}


def test_explanations_are_clauses_in_the_prompts_own_words():
    asked = make_questions("Two dogs chase a ball, no cats, the camera pans left", "dense")
    told = [q.answer for q in asked if q.aspect == "TA"]
    assert told == ["Two dogs chase a ball, no cats, the camera pans left.", "The camera pans left."]
    (long,) = (q.answer for q in make_questions("a very odd dog " * 30, "dense") if q.aspect == "TA")
    assert size(long) == LONGEST


def test_a_thousand_prompts_take_no_long_time():
    """Promised: under 5 s. CPU time, so that other processes have no effect."""
    start = time.process_time()
    prompts = as_prompts(f"{TEXTS[i % len(TEXTS)]}, take {i}" for i in range(1000))
    draft_questions(load_config("toy", ["critic.id=some/critic", "prompts=p.txt"]), prompts)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("mode", ["yesno", "heldout"])
@pytest.mark.parametrize("prompt", [*TEXTS, *ODD], ids=range(len(TEXTS) + len(ODD)))
def test_physics_and_quality_are_asked_both_ways_at_least_three_times_each(prompt, mode):
    for aspect in ("Phy", "VQ"):
        asked = [q for q in make_questions(prompt, mode) if q.aspect == aspect]
        names = Counter(q.name for q in asked)
        assert len(names) >= FEWEST and set(names.values()) == {2} and {q.weight for q in asked} == {0.5}
        assert all({q.answer for q in asked if q.name == name} == {"yes", "no"} for name in names)


@pytest.mark.parametrize(
    ("prompt", "dropped"),
    [
        ("A car drives along a road", {"body", "hands"}),
        ("A street, no people", {"body", "hands"}),
        ("An ice cube is melting", {"shape", "constant", "warp"}),
        ("A seed grows into a plant", {"shape", "constant"}),
        ("A man transforms into a wolf", {"shape", "appear", "body", "constant"}),
        ("A robot loses an arm in a fight", {"body", "shape"}),
        ("A vase explodes into pieces", {"shape", "appear"}),
        ("Time-lapse of clouds over a city", {"shape", "appear", "smooth", "constant"}),
        ("A rabbit disappears", {"appear"}),
        ("A dog, shallow depth of field, film grain, lens flare", {"sharp", "noise", "warp"}),
        ("A dog, vintage 8mm film", {"noise", "flicker", "light"}),
        ("A dog in black and white", {"light"}),
        ("A dog walks, claymation style", {"smooth"}),
        ("A candle flickers on a table", {"flicker"}),
        ("An astronaut floats in zero gravity", {"contact"}),
        ("A two-headed monster walks", {"body"}),
        ("A man passes through a wall", {"through"}),
        ("Rewind: a glass jumps back onto a table, played backwards", {"forward"}),
        ('A sign that says "OPEN"', {"overlay"}),
        ("一只猫，水彩画风格", {"light"}),
        ("pixel art of a glitch, vhs, double exposure, fog, a logo, surreal time-lapse played in reverse", set()),
    ],
)
def test_a_property_that_the_prompt_contradicts_gives_its_place_to_another(prompt, dropped):
    names = {q.name for q in make_questions(prompt) if q.aspect != "TA"}
    assert not names & dropped and len(names) >= 2 * FEWEST
    plain = {q.name for q in make_questions("A woman walks her dog") if q.aspect != "TA"}
    assert plain == {"smooth", "body", "appear", "shape", "contact", "sharp", "noise", "flicker", "warp", "light"}


def test_who_writes_is_chosen_by_name():
    with pytest.raises(BadInputError, match='"templates" is gone: use "phrases"'):
        load_config("toy", ["critic.questions=templates"])
    config = load_config("toy", ["critic.id=some/critic", "prompts=p.txt", "critic.mode=yesno"])
    prompts = as_prompts(TEXTS)
    assert config.critic.questions == "critic"  # the draft, before it writes, has phrases
    asked = draft_questions(config, prompts)
    assert asked == {prompt.id: make_questions(prompt.text, "yesno", "phrases", OTHERS) for prompt in prompts}
    config = load_config("toy", ["critic.id=some/critic", "prompts=p.txt", "critic.questions=grammar"])
    with pytest.raises(BadInputError, match="ToyWorld's own"):
        draft_questions(config, prompts)
    red = "a red circle moves left on a gray background"
    for value in ("grammar", "critic"):
        toy = load_config("toy", [f"critic.questions={value}", "critic.mode=yesno"])
        assert draft_questions(toy, as_prompts([red]))["0001"] == make_questions(red, "yesno", "toyworld")
    with pytest.raises(BadInputError, match="critic.id=toyworld-reader"):
        draft_questions(load_config("toy", ["critic.questions=phrases"]), as_prompts([red]))


def test_phrases_of_toyworld_quote_captions_and_keep_its_questions_about_every_clip():
    toy = load_config("toy", ["critic.id=toyworld-reader", "critic.questions=phrases", "critic.mode=yesno"])
    texts = [
        "gray background , a red circle moves left",
        "a red square moves up on a white background",
        "a blue square stays still on a white background",
    ]
    first, *_ = draft_questions(toy, as_prompts(texts)).values()
    about = [(quoted(q), q.answer) for q in first if q.aspect == "TA"]
    clauses = [("gray background", "yes"), ("a red circle moves left", "yes")]
    assert about == [
        *clauses,
        ("gray background, a red circle moves left", "yes"),
        (texts[2], "no"),
    ]  # the second caption is red too
    assert [q for q in first if q.aspect != "TA"] == [
        q for q in make_questions(texts[0], "yesno", "toyworld") if q.aspect != "TA"
    ]


def test_the_page_of_examples_is_what_is_asked():
    assert questions_doc.PAGE.read_text(encoding="utf-8") == questions_doc.page(), "run: python -m bench.questions_doc"
