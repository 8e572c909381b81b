"""Questions from a model and from files: checked, repaired once, cached; then answers from a real clip, and token
weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from lowmem_drf.assembly.cache import Cache
from lowmem_drf.assembly.questions import draft_questions, needs_writer, write_missing, written_questions
from lowmem_drf.assembly.references import WEIGHT_FLOOR, finish_questions
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.qwen_vl.critic import load_critic
from lowmem_drf.models.weights.sources import READER, TOYWORLD, resolve
from lowmem_drf.prompts import as_prompts
from lowmem_drf.questions.file import load_questions, to_json
from lowmem_drf.questions.fixed import ANSWER
from lowmem_drf.questions.make import make_questions
from lowmem_drf.questions.writer import UnusableError, read_questions, write_questions
from lowmem_drf.toy.scenes import Combo, draw_tracks, render
from lowmem_drf.types import Prompt, Question
from lowmem_drf.video import write_mp4

DOGS = "Two brown dogs chase a red ball"
GOOD = [
    {"aspect": "TA", "kind": "yesno", "text": "Are there two dogs?", "answer": "yes"},
    {"aspect": "TA", "kind": "yesno", "text": "Is the ball blue?", "answer": "no"},
    {"aspect": "Phy", "kind": "yesno", "text": "Does the ball roll as balls do?", "answer": "yes"},
]
RED = "a red circle moves left on a gray background"


class Model:
    """A language model with fixed answers."""

    def __init__(self, *lines):
        self.lines, self.heard = list(lines), []

    def __call__(self, texts):
        self.heard += texts
        return [self.lines.pop(0) for _ in texts]


@pytest.mark.parametrize(
    "said",
    [
        json.dumps(GOOD),
        f"Here are the questions:\n```json\n{json.dumps(GOOD, indent=2)}\n```\nI hope they help [really].",
        json.dumps([{"aspect": q["aspect"], "question": q["text"], "answer": q["answer"].title() + "."} for q in GOOD]),
        json.dumps([{**q, "answer": q["answer"] == "yes", "id": 3, "weight": "high"} for q in GOOD]),
        json.dumps([*GOOD, {**GOOD[0], "text": "ARE THERE TWO DOGS?"}]),
        json.dumps([[q["aspect"], q["text"], q["answer"]] for q in GOOD]),
    ],
    ids=["plain", "fenced", "other-keys", "booleans", "repeated", "rows"],
)
def test_what_models_write_is_read(said):
    model = Model(said)
    (questions,) = write_questions([DOGS], "yesno", model)
    assert [(q.aspect, q.text, q.answer, q.kind, q.weight) for q in questions] == [
        (q["aspect"], q["text"] + ANSWER, q["answer"], "yesno", 1.0) for q in GOOD
    ]
    assert DOGS in model.heard[0]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("I cannot do that.", "no JSON array"),
        ('[{"aspect": "TA", "text": "Is', "not JSON"),
        ("[]", "0 different questions"),
        (json.dumps(GOOD[:1]), "1 different questions"),
        (json.dumps([{**GOOD[0], "text": f"Are there {i}?"} for i in range(25)]), "25 different questions"),
        (json.dumps([{**q, "aspect": "VQ"} for q in GOOD]), "is to be TA or Phy"),
        (json.dumps([{**q, "aspect": "Phy"} for q in GOOD]), 'no question has aspect "TA"'),
        (json.dumps([{**q, "answer": "maybe"} for q in GOOD]), "one of yes, no"),
        (json.dumps([{**GOOD[0], "kind": "dense"}, *GOOD[1:]]), "is to be yesno"),
        (json.dumps([{**GOOD[0], "text": ""}, *GOOD[1:]]), 'no "text"'),
        (json.dumps(["Are there two dogs?", "Is the ball red?"]), "is to be an object"),
        (json.dumps([{**GOOD[0], "mood": "curious"}, *GOOD[1:]]), "unknown key 'mood'"),
    ],
    ids=[
        *("prose", "cut-off", "empty", "one", "too-many", "aspect"),
        *("no-alignment", "answer", "kind", "no-text", "strings", "unknown-key"),
    ],
)
def test_what_cannot_be_used_is_sent_back_once_with_the_reason(said, reason):
    model = Model(json.dumps(GOOD), said, json.dumps(GOOD))
    assert [len(made) for made in write_questions(["a cat", DOGS], "yesno", model)] == [3, 3]
    assert reason in model.heard[2] and model.heard[2].startswith(model.heard[1])
    (failed,) = write_questions([DOGS], "yesno", Model("nothing", said))
    assert isinstance(failed, UnusableError) and reason in str(failed)


def test_kinds_are_those_of_the_mode():
    mixed = [*GOOD, {"aspect": "TA", "text": "What do the dogs do?", "answer": "The two dogs chase a red ball."}]
    assert [q.kind for q in read_questions(json.dumps(mixed), "both")] == ["yesno"] * 3 + ["dense"]
    with pytest.raises(UnusableError, match="one of yes, no"):
        read_questions(json.dumps(mixed), "yesno")
    for mode in ("yesno", "dense", "both"):
        model = Model(json.dumps(mixed if mode == "both" else [{**q, "kind": mode} for q in GOOD]))
        write_questions([DOGS], mode, model)
        asked = ['"yes"]' in model.heard[0], 'chase a red ball."]' in model.heard[0]]
        assert asked == [mode != "dense", mode != "yesno"]


@pytest.fixture
def quiet():
    return Console(record=True, width=300, file=open("/dev/null", "w"))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_DRF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Writer:
    """A critic that can only write."""

    device = torch.device("cpu")

    def __init__(self, *lines):
        self.model = Model(*lines)

    def tokenizer(self, text, **arguments):
        return {"input_ids": text.split()}

    def generate_batch(self, texts, max_new_tokens=0):
        return self.model(texts)


def config_of(*overrides):
    settings = ["critic.id=some/critic", "prompts=p.txt", "critic.mode=yesno", "critic.check=false"]
    return load_config("toy", [*settings, *overrides])


def test_the_writers_questions_replace_the_phrases_and_are_cached(own_cache, quiet):
    config, prompts = config_of(), as_prompts([DOGS])
    draft = draft_questions(config, prompts)

    def written(config, *lines):
        made, ids = written_questions(config, prompts, draft, Writer(*lines), quiet)
        assert ids == {"0001"}
        return made["0001"]

    made = written(config, json.dumps(GOOD))
    assert [q.text for q in made[:3]] == [q["text"] + ANSWER for q in GOOD]
    assert made[3:] == tuple(q for q in draft["0001"] if q.aspect != "TA") != ()
    assert written(config) == made  # a writer without answers: the cache is used
    for other in ("critic.mode=both", "critic.id=another/critic", "critic.quant=nf4"):
        with pytest.raises(IndexError):
            written(config_of(other))


def test_a_stopped_writer_goes_on_with_the_next_batch_and_says_what_it_costs(own_cache, quiet):
    """Nine prompts, eight at once; the first time it is stopped in the second batch."""
    config, prompts = config_of(), as_prompts([f"{DOGS} {'very ' * i}fast" for i in range(9)])
    draft, eight = draft_questions(config, prompts), [json.dumps(GOOD)] * 8
    with pytest.raises(IndexError):
        written_questions(config, prompts, draft, Writer(*eight), quiet)
    last = Writer(eight[0])
    made, ids = written_questions(config, prompts, draft, last, quiet)
    assert len(last.model.heard) == 1 and prompts[-1].text in last.model.heard[0]
    assert ids == made.keys() == {prompt.id for prompt in prompts}
    said, size = quiet.export_text(), len(eight[0].split())
    assert "for 9 prompts, 8 at once" in said and "for 1 prompts, 1 at once" in said
    assert f"{size} tokens, {size + 1} passes" in said


def test_another_model_can_write_and_is_loaded_only_if_needed(own_cache, quiet, monkeypatch):
    loaded = []

    def load(config):
        loaded.append(config.critic.id)
        return Writer(json.dumps(GOOD))

    monkeypatch.setattr("lowmem_drf.assembly.loading.load_run_critic", load)
    config, prompts = config_of("critic.writer=big/one"), as_prompts([DOGS])
    draft = draft_questions(config, prompts)
    write_missing(config, prompts, None, quiet)
    made, ids = written_questions(config, prompts, draft, Writer(), quiet)
    assert loaded == ["big/one"] and ids == {"0001"} and made["0001"][0].text == GOOD[0]["text"] + ANSWER
    # the words of one writer are not another's
    with pytest.raises(IndexError):
        written_questions(config_of("critic.id=big/two"), prompts, draft, Writer(), quiet)


def test_a_writer_that_gives_no_json_leaves_the_phrases_and_is_told_of(own_cache, quiet):
    mine = Prompt("mine", "a cat", (Question("TA", "Is it a cat?", "yes"),))
    config, prompts = config_of(), (*as_prompts([DOGS]), mine)
    draft = draft_questions(config, prompts)
    assert written_questions(config, prompts, draft, Writer("no", "no"), quiet) == (draft, set())
    said = quiet.export_text()
    assert "no usable JSON for 1 of 2 prompts" in said and "the draft's questions" in said
    assert "0001 (there is no JSON array in it)" in said
    # it is not tried again
    assert written_questions(config, prompts, draft, Writer(), quiet) == (draft, set())


def test_toyworlds_critics_cannot_write_and_train_on_the_grammar():
    for critic in (TOYWORLD, READER):
        config = load_config("toy", ["critic.mode=yesno", f"critic.id={critic}"])
        assert config.critic.questions == "critic" and not needs_writer(config)
        assert draft_questions(config, as_prompts([RED]))["0001"] == make_questions(RED, "yesno", "toyworld")


def test_a_users_file_goes_before_the_grammar_and_the_prompts_own_questions_before_both(tmp_path):
    file = tmp_path / "questions.json"
    color = Question("TA", "Is it red?", "yes", weight=2.0, name="color")
    mine = color, Question("VQ", "Explain.", "it is clean", "dense")
    file.write_text(to_json({RED: mine}))
    assert load_questions(file) == {RED: mine}
    own = Prompt("own", RED, (Question("TA", "Is it?", "yes"),))
    blue = "a blue circle moves left on a gray background"
    config = load_config("toy", [f"critic.questions={file}", "critic.mode=yesno"])
    assert draft_questions(config, (*as_prompts([RED]), own)) == {"0001": mine, "own": own.questions}
    for prompts, named in (([RED, blue], (blue,)), ([blue], (blue, RED))):  # some are in it, none is
        with pytest.raises(BadInputError, match="has no questions for 1 of") as refused:
            draft_questions(config, as_prompts(prompts))
        assert all(repr(text) in str(refused.value) for text in named)
        assert ("does not have" in str(refused.value)) == (RED in named)
    # evaluation also has prompts outside the training set
    held_out = draft_questions(config, as_prompts([RED, blue]), strict=False)
    assert held_out == {"0001": mine, "0002": make_questions(blue, "yesno", "toyworld")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "is to be a list"),
        ('[{"prompt": "a"}]', "entry 1"),
        ('[{"prompt": "a", "questions": []}]', "has no question"),
        ('[{"prompt": "a", "questions": [{"aspect": "X", "text": "t", "answer": "yes"}]}]', "entry 1, question 1"),
        (json.dumps([{"prompt": "a", "questions": GOOD}] * 2), "there twice"),
        (None, "lowmem-drf questions"),
    ],
    ids=["cut-off", "object", "no-questions", "empty", "aspect", "twice", "missing"],
)
def test_a_file_that_cannot_be_used_says_where(tmp_path, text, said):
    file = tmp_path / "questions.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadInputError, match=said):
        load_questions(file)


def test_a_cache_forgets_what_it_cannot_read_or_write(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.put({"a": 1}, ["x"])
    assert cache.get({"a": 1}) == ["x"] and cache.get({"a": 2}) is None
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text("{")
    assert cache.get({"a": 1}) is None
    (tmp_path / "file").write_text("")
    nowhere = Cache(tmp_path / "file")
    nowhere.put({"a": 1}, ["x"])
    assert nowhere.get({"a": 1}) is None


@pytest.fixture(scope="module")
def critic():
    return load_critic(resolve(TOYWORLD, "critic"))


def clip(path, combo, seed=5):
    frames = render(draw_tracks([combo], torch.Generator().manual_seed(seed)))[0]
    return str(write_mp4(path, frames, fps=8, upscale=8))


def test_the_critic_looking_at_a_real_clip_says_what_a_good_answer_is(tmp_path, own_cache, quiet, critic):
    """Clip and prompt: a blue square moves up. The dense questions start with nonsense as reference answers."""
    text = "a blue square moves up on a black background"
    guided = Prompt("0001", text, reference_video=clip(tmp_path / "real.mp4", Combo(1, 2, 2, 0)))
    config = load_config("toy", ["critic.mode=both", "critic.token_weights=uniform"])
    honest = make_questions(text, "both", "toyworld")
    draft = {"0001": tuple(replace(q, answer="red red red") if q.kind == "dense" else q for q in honest)}
    made = finish_questions(config, [guided], draft, critic, quiet).questions["0001"]
    assert [q.answer for q in made] == [q.answer for q in honest]
    assert finish_questions(replace_reference(config), [guided], draft, critic, quiet).questions == draft
    assert list(own_cache.rglob("*.json"))  # cached: a resumed run does not ask again


def test_an_answer_that_stands_in_the_prompt_file_stays(tmp_path, own_cache, quiet, critic):
    own = (Question("TA", "what color is it ?", "red", kind="dense"), Question("TA", "does it move up ?", "yes"))
    real = clip(tmp_path / "real.mp4", Combo(1, 2, 2, 0))
    prompt = Prompt("0001", "a blue square moves up on a black background", own, real)
    config = load_config("toy", ["critic.token_weights=uniform"])
    assert finish_questions(config, [prompt], {"0001": own}, critic, quiet).questions["0001"] == own
    assert "left out" not in quiet.export_text()


def replace_reference(config):
    return config.model_copy(update={"critic": config.critic.model_copy(update={"reference": "prompt"})})


def test_a_question_that_fails_on_the_real_clip_is_left_out(tmp_path, own_cache, quiet, critic):
    """The square moves up in the caption, but down in the real clip: only the question about direction is useless."""
    text = "a blue square moves up on a black background"
    prompt = Prompt("0001", text, reference_video=clip(tmp_path / "real.mp4", Combo(1, 2, 3, 0)))
    config = load_config("toy", ["critic.mode=yesno"])
    draft = draft_questions(config, [prompt])
    made = finish_questions(config, [prompt], draft, critic, quiet).questions["0001"]
    assert {q.name for q in made if q.weight == 0} == {"direction"}
    assert "1 yes/no questions are left out" in quiet.export_text()


def test_words_that_the_critic_would_say_anyway_weigh_little(quiet, critic):
    config, prompts = load_config("toy", ["critic.mode=dense"]), as_prompts([RED])
    draft = draft_questions(config, prompts)
    made = {q.name: q for q in finish_questions(config, prompts, draft, critic, quiet).questions["0001"]}
    for name, telling, idle in (
        ("motion", {"left"}, {"and", "its", "size", "color"}),
        ("description", {"red", "circle", "left"}, {"a", "on", "background"}),
    ):
        words, weights = made[name].answer.split(), made[name].token_weights
        assert len(words) == len(weights) and telling | idle <= set(words)
        said = list(zip(words, weights, strict=True))
        least = min(weight for word, weight in said if word in telling)
        assert least > 2 * max(weight for word, weight in said if word in idle), said
    assert all(WEIGHT_FLOOR <= weight <= 1 for q in made.values() for weight in q.token_weights)
