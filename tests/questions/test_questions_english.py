"""Questions from free English prompts: what they cover, that they say nothing the prompt does not, and that they are
good English."""

import json
import re
from collections import Counter

import pytest
from _root import ROOT

from lowmem_drf.errors import BadInputError
from lowmem_drf.questions.english import parse, questions
from lowmem_drf.questions.english.dense import IN_A_SENTENCE
from lowmem_drf.questions.english.verbs import FORMS
from lowmem_drf.questions.english.wording import ANSWER

CASES = [
    json.loads(line)
    for line in (ROOT / "tests" / "data" / "english_prompts.jsonl").read_text(encoding="utf-8").splitlines()
]
PROMPTS = [case["prompt"] for case in CASES]
DOGS = PROMPTS[0]
NAMES = {
    "subject",
    "count",
    "attribute",
    "action",
    "relation",
    "place",
    "time",
    "camera",
    "style",
    "text",
    "global",
    "foil",
}

ALSO = {
    "subject": {"count", "time", "place"},
    "attribute": {"place", "time", "count"},
    "action": {"relation"},
    "relation": {"action", "attribute", "place"},
    "place": {"relation", "subject", "attribute"},
    "time": {"place", "attribute", "subject", "relation"},
}
"""A fact of one kind may be asked under another name: "in a bowl" is a place to one reader and a relation to
another."""

TEMPLATE = set(
    """is are do does there in the a an video exactly wearing made of have has take takes place show this camera filmed with from shot view
    style shows appear text lens at on and film years old person during while to lapse motion""".split()  # noqa: SIM905
)
"""Words that questions add of their own."""


def bare(question):
    """Without the instruction at the end."""
    return question.text.removesuffix(ANSWER).removesuffix(IN_A_SENTENCE)


def alignment(prompt, mode="yesno", answer="yes"):
    return [q for q in questions(prompt, mode) if q.aspect == "TA" and q.kind == "yesno" and q.answer == answer]


def found(fact, asked):
    kind, pattern = fact
    return any(q.name in {kind} | ALSO.get(kind, set()) and re.search(pattern, bare(q), re.IGNORECASE) for q in asked)


def words(text):
    return re.findall(r"[^\W_]+", text.lower())


def same_word(word, said, joined):
    """The word stands in the prompt, in this form or another one of the same verb."""
    bases = set(FORMS.get(word, {}).values()) | {word}
    return any(bases & (set(FORMS.get(other, {}).values()) | {other}) for other in said) or word in joined


def test_the_prompts_are_many_and_varied():
    assert len(CASES) == 40 and len({p for p in PROMPTS}) == 40
    assert sum(case.get("heldout", False) for case in CASES) == 10
    assert sum(len(p.split()) >= 60 for p in PROMPTS) >= 8
    assert all(4 <= len(case["facts"]) <= 12 for case in CASES)
    assert set().union(*({kind for kind, _ in case["facts"]} for case in CASES)) == NAMES - {"global", "foil"}
    assert (
        PROMPTS[0]
        == "Two brown dogs chase a red ball across a snowy field while the camera pans left, watercolor style"
    )


@pytest.mark.parametrize("heldout", [False, True])
def test_questions_cover_the_facts_that_a_reader_finds(heldout):
    total, hit, missed = Counter(), Counter(), []
    for case in CASES:
        if case.get("heldout", False) != heldout:
            continue
        asked = alignment(case["prompt"])
        for fact in case["facts"]:
            total[fact[0]] += 1
            hit[fact[0]] += found(fact, asked)
            missed += [] if found(fact, asked) else [(fact, case["prompt"][:50])]
    rates = {kind: f"{hit[kind]}/{n}" for kind, n in total.items()}
    # seen with pytest -s
    print(f"facts found, {'held-out' if heldout else 'other'} prompts: {hit.total()} of {total.total()}  {rates}")
    assert hit.total() >= 0.9 * total.total(), f"{rates}\n{missed}"


def test_the_dogs():
    asked = {(q.name, bare(q)) for q in questions(DOGS)}
    assert {
        ("count", "Are there exactly two dogs in the video?"),
        ("attribute", "Are the dogs brown?"),
        ("attribute", "Is the ball red?"),
        ("action", "Do the dogs chase a ball?"),
        ("place", "Does the video take place in a snowy field?"),
        ("camera", "Does the camera pan left?"),
        ("style", "Is the video in watercolor style?"),
    } <= asked
    assert len(alignment(DOGS)) >= 8
    assert {q.aspect for q in questions(DOGS)} == {"TA", "Phy", "VQ"}
    facts = parse(DOGS)
    assert [(e.head, e.count) for e in facts.subjects if e.ask] == [("dogs", 2), ("ball", None)]


@pytest.mark.parametrize("mode", ["yesno", "dense", "both", "vanilla", "heldout"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_questions_are_good_english(prompt, mode):
    asked = questions(prompt, mode)
    assert asked == questions(prompt, mode)
    assert len({(q.aspect, q.text) for q in asked}) == len(asked)
    for question in asked:
        text = bare(question) if mode != "vanilla" else re.sub(r'"[^"]*"', "it", bare(question))
        assert text[0].isupper() and text.endswith("?" if question.kind == "yesno" else ("?", ".")), text
        assert question.answer in {"yes", "no"} if question.kind == "yesno" else question.answer.endswith("."), question
        for sentence in (text, "" if mode == "vanilla" or question.name == "global" else question.answer):
            assert not re.search(
                r"\b(\w+) \1\b|  |[,;]\?| [?,.]|\bthe (?:a|an|the|his|her|its|their)\b|\ban? (?:a|an|the)\b", sentence
            ), sentence
            assert not re.search(
                r"\ba (?=[aeio])(?!one)|\ban (?=[^aeioAEFHILMNORSX8])(?!hour|honest|unusual|umbrella|upright)", sentence
            ), sentence
        assert question.weight in {0.5, 1.0} and question.name


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_nothing_is_asked_that_the_prompt_does_not_say(prompt):
    said, joined = set(words(prompt)), re.sub(r"[^a-z0-9]", "", prompt.lower())
    for question in alignment(prompt):
        new = [w for w in words(bare(question)) if w not in TEMPLATE and not same_word(w, said, joined)]
        assert not new, f"{bare(question)}: {new}"


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_one_contrast_shares_its_weight_with_what_it_contradicts(prompt):
    asked = questions(prompt)
    foils = [q for q in asked if q.name == "foil"]
    halves = [q for q in asked if q.aspect == "TA" and q.weight == 0.5]
    assert len(foils) == 1 and foils[0].answer == "no" and len(halves) == 2
    assert foils[0].text not in {q.text for q in asked if q.answer == "yes"}
    assert len(alignment(prompt)) <= 20


def test_contrasts_are_of_the_same_kind_where_they_can():
    foils = {
        p: bare(q)
        for p in (
            DOGS,
            "A car on a bridge, camera pans left",
            "Three ducks",
            "A young man rides a horse",
            "A cat jumps",
        )
        for q in questions(p)
        if q.name == "foil"
    }
    assert list(foils.values()) == [
        "Are the dogs blue?",
        "Does the camera pan right?",
        "Are there exactly five ducks in the video?",
        "Is the man elderly?",
        "Does the cat sleep?",
    ]


@pytest.mark.parametrize("mode", ["yesno", "heldout"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_physics_and_quality_are_asked_both_ways(prompt, mode):
    for aspect in ("Phy", "VQ"):
        asked = [q for q in questions(prompt, mode) if q.aspect == aspect]
        assert asked and {q.weight for q in asked} == {0.5}
        assert sum(q.weight for q in asked if q.answer == "yes") == sum(q.weight for q in asked if q.answer == "no")
        assert Counter(q.name for q in asked if q.answer == "yes") == Counter(q.name for q in asked if q.answer == "no")


PLAIN = {
    "shape",
    "appear",
    "smooth",
    "contact",
    "body",
    "constant",
    "sharp",
    "noise",
    "flicker",
    "warp",
    "light",
    "overlay",
}


@pytest.mark.parametrize(
    ("prompt", "dropped"),
    [
        ("A man walks a dog in a park", set()),
        ("A car drives along a road", {"body"}),
        ("An ice cube is melting", {"shape", "constant", "warp"}),
        ("A seed grows into a plant", {"shape", "constant"}),
        ("A man transforms into a wolf", {"shape", "appear", "body", "constant"}),
        ("A vase explodes into pieces", {"shape", "appear"}),
        ("Time-lapse of clouds over a city", {"shape", "appear", "smooth", "constant"}),
        ("A face morphing into another face", {"shape", "appear", "constant", "warp"}),
        ("A rabbit disappears", {"appear"}),
        ("A blurry video of a dog", {"sharp"}),
        ("A dog, bokeh", {"sharp"}),
        ("A noisy, grainy video of a dog", {"noise"}),
        ("A dog, vintage 8mm film", {"noise", "flicker", "light"}),
        ("A dog in black and white", {"light"}),
        ("A dog, pixel art", {"sharp", "noise", "light"}),
        ("A dog walks, claymation style", {"smooth", "light"}),
        ("A candle flickers on a table", {"flicker"}),
        ("An astronaut floats in zero gravity", {"contact"}),
        ("A two-headed monster walks", {"body"}),
        ("A dog, fisheye lens", {"warp"}),
        ('A sign that says "OPEN"', {"overlay"}),
        ("A dog next to a poster", {"overlay"}),
        ("A chameleon changing color", {"constant"}),
    ],
)
def test_a_property_that_the_prompt_breaks_is_not_asked(prompt, dropped):
    names = {q.name for q in questions(prompt) if q.aspect != "TA"}
    assert not names & dropped
    if not dropped - {"body"}:
        assert names == PLAIN - dropped
    told = " ".join(q.answer for q in questions(prompt, "dense") if q.aspect != "TA")
    clauses = {
        "shape": "keep their shape",
        "appear": "appears or vanishes",
        "smooth": "smooth",
        "sharp": "sharp",
        "flicker": "flicker",
        "light": "light and color",
    }
    assert not [name for name in dropped & clauses.keys() if clauses[name] in told]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_heldout_asks_the_same_in_other_words(prompt):
    training, heldout = questions(prompt, "yesno"), questions(prompt, "heldout")
    assert [(q.aspect, q.name, q.answer, q.weight) for q in training] == [
        (q.aspect, q.name, q.answer, q.weight) for q in heldout
    ]
    assert not {q.text for q in training} & {q.text for q in heldout}


def test_dense_references_come_from_the_prompt():
    told = {q.text.removesuffix(IN_A_SENTENCE): q.answer for q in questions(DOGS, "dense")}
    assert told["Describe what happens in this video in one sentence."] == DOGS + "."
    assert told["What color is the ball?"] == "The ball is red."
    assert told["What do the dogs do?"] == "The dogs chase a red ball."
    assert told["Where does the video take place?"] == "The video takes place in a snowy field."
    assert told["How is the video filmed?"] == "The camera pans left."
    assert told["What is the visual style of the video?"] == "The video is in watercolor style."
    assert told["Explain whether the motion of the dogs in this video is physically plausible."].startswith(
        "The motion is physically plausible: "
    )
    assert "sharp" in told["Explain the visual quality of this video."]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_dense_is_one_of_each_aspect_and_both_is_both(prompt):
    dense, both = questions(prompt, "dense"), questions(prompt, "both")
    assert both == (*questions(prompt, "yesno"), *dense)
    assert all(q.kind == "dense" and q.weight == 1.0 and not q.token_weights for q in dense)
    assert (
        Counter(q.aspect for q in dense)["Phy"] == Counter(q.aspect for q in dense)["VQ"] == 1 and 3 <= len(dense) <= 13
    )
    (one,) = questions(prompt, "vanilla")
    assert one.answer == "yes" and one.name == "global" and prompt.replace('"', "'").rstrip(".") in one.text


ODD = [
    "", "   ", "\n\t", "a", "dog", "running", "red", ",,,,", "\"", "'", "\"\"", "the the the", "of in on with and", "to to run",
    "🐶🐱 !!!", "\u200b\x00\x1b[31m", "?" * 50, "一只棕色的狗在雪地里奔跑", "Un chien court dans la neige avec une balle rouge",
    "Ein Hund läuft durch den Schnee und spielt mit einem Ball", "Собака бежит по снегу", "4k, 8k, masterpiece",
    "(masterpiece:1.2), ((best quality)), 1girl, solo, long hair", "http://example.com/x.mp4", "A girl with her", "no people",
    "{}[]()<>\\|", "x" * 5000, "'s 's", "is is is are", "who that which", "a a a an an", "and, and, and", "one two three four",
    "camera camera camera", "1234567890", "A\xa0dog\u2014runs",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["yesno", "dense", "both", "vanilla", "heldout"])
@pytest.mark.parametrize("prompt", ODD, ids=range(len(ODD)))
def test_odd_prompts_give_a_question_all_the_same(prompt, mode):
    asked = questions(prompt, mode)
    assert any(q.aspect == "TA" for q in asked)
    assert all(q.text and q.answer and q.text.isprintable() for q in asked)


def test_what_is_not_english_is_asked_as_a_whole():
    for prompt in ODD[17:21]:
        assert [q.name for q in alignment(prompt)] == ["global"]


def test_long_input_takes_no_long_time():
    long = " ".join(PROMPTS) * 40
    assert len(long) > 200_000 and len(questions(long, "both")) < 80


def test_case_and_spelling_do_not_matter():
    for other in (DOGS.upper(), DOGS.lower(), DOGS.title()):
        assert {bare(q) for q in alignment(other)} == {bare(q) for q in alignment(DOGS)}
    british = {bare(q) for q in alignment("A grey cat in a colourful jumper sits in the theatre")}
    assert "Is the cat grey?" in british and "Is the jumper colourful?" in british


@pytest.mark.parametrize(
    ("prompt", "asked", "never"),
    [
        ("A black cat and a white cat play", "Is there a black cat in the video?", "Is the cat black?"),
        ("A woman in a red dress and a man in a black suit dance", "Do the woman and the man dance?", "Is the woman wearing a man?"),
        ("A cat that is not black sits on a chair", "Does the cat sit on a chair?", "Is the cat black?"),
        ("An old man who wears a hat walks his dog", "Does the man walk his dog?", "Is there a hat walks in the video?"),
        ("A woman cuts bread with a knife. She smiles.", "Does the woman smile?", "Does the bread have a knife?"),
        ("A boy takes a ball and throws it", "Does the boy throw the ball?", "Does the boy throw it?"),
        ("Ocean waves crash on rocks", "Do the ocean waves crash on rocks?", "Does the ocean wave?"),
        ("A man says \"hello\" to a dog", "Is there a man in the video?", 'Does the text "hello" appear in the video?'),
        ("A man holding a camera", "Is the man holding a camera?", "Does the camera hold?"),
        ("A hot air balloon rises", "Is there a hot air balloon in the video?", "Is the balloon hot?"),
        ("No people, an empty street", "Is the street empty?", "Are there people in the video?"),
        ("A pair of jeans hangs on a line", "Do the jeans hang on a line?", "Are there exactly two jeans in the video?"),
        ("A magician makes a rabbit disappear", "Does the magician make a rabbit disappear?", "Is there a rabbit disappear in the video?"),
        ("A 5-year-old boy runs", "Is the boy 5 years old?", "Is the boy 5-year-old?"),
    ],
)  # fmt: skip
def test_traps(prompt, asked, never):
    texts = {bare(q) for q in alignment(prompt)}
    assert asked in texts and never not in texts, texts


def test_an_unknown_mode_is_refused():
    with pytest.raises(BadInputError, match="critic.mode"):
        questions(DOGS, "structured")
