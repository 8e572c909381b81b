"""``lowmem-drf questions``: what it shows without a model, what a critic adds, and what it never overwrites."""

from __future__ import annotations

import json
import os

import pytest

from lowmem_drf.assembly import loading
from lowmem_drf.commands.questions import questions_command
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.weights.sources import READER
from lowmem_drf.questions.file import load_questions, to_json
from lowmem_drf.questions.make import make_questions
from lowmem_drf.types import Question

DOGS, CAT = "Two brown dogs chase a red ball, the camera pans left", "A cat sleeps"
RED, BLUE = (f"a {color} circle moves left on a gray background" for color in ("red", "blue"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_DRF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def run(prompt=None, *overrides, file=None, preset=None, as_json=False, output=None, **options):
    questions_command(prompt, file, preset, overrides, as_json, output, **options)


def test_without_a_model_it_shows_phrases_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_run_critic", lambda *arguments: pytest.fail("a model was loaded"))
    run(DOGS, "critic.id=some/critic", "critic.mode=yesno")
    said = capsys.readouterr().out
    assert 'Does this video show "the camera pans left"?' in said and "by: phrases" in said
    assert "No model was asked" in said and "--write" in said
    run(RED, preset="toy")
    said = capsys.readouterr().out
    assert "what color is it ?" in said and "by: grammar" in said and "No model" not in said


def test_check_shows_what_the_critic_thinks_of_a_users_questions(tmp_path, capsys):
    file, kept = tmp_path / "mine.json", tmp_path / "kept.json"
    asked = [Question("TA", f"is the shape {color} ?", "yes") for color in ("red", "blue")]
    file.write_text(to_json({RED: asked}))
    arguments = {"preset": "toy", "check": file}
    run(None, f"critic.id={READER}", **arguments)
    said = capsys.readouterr().out
    assert "left out: the answer yes does not follow from the prompt" in said and "by: questions file" in said
    run(None, f"critic.id={READER}", **arguments, as_json=True, output=kept)
    ((row,), _) = json.loads(capsys.readouterr().out), None
    assert [(q["text"], q["asked"]) for q in row["questions"]] == [(asked[0].text, True), (asked[1].text, False)]
    assert row["questions"][0]["from_text"] > 0.8 > 0.2 > row["questions"][1]["from_text"]
    assert [q.text for q in load_questions(kept)[RED]] == [asked[0].text]


def test_write_shows_what_training_would_ask(capsys):
    run(RED, f"critic.id={READER}", "critic.questions=phrases", "critic.mode=yesno", preset="toy", write=True)
    said = capsys.readouterr().out
    assert "from text" in said and "by: phrases" in said and f'"{RED}"' in said and "No model" not in said
    with pytest.raises(BadInputError, match=f"critic.id={READER}"):
        run(RED, preset="toy", write=True)


@pytest.mark.parametrize("given", [{}, {"prompt": DOGS, "check": "mine.json"}, {"prompt": DOGS, "file": "p.txt"}])
def test_it_wants_one_source(given):
    with pytest.raises(BadInputError, match="give one prompt, a prompt file with --prompts, or"):
        run(given.pop("prompt", None), **given)


def test_a_file_that_was_edited_is_not_overwritten(tmp_path, capsys):
    file = tmp_path / "questions.json"
    run(DOGS, output=file)
    whole = {DOGS: make_questions(DOGS, "dense")}
    assert file.read_text() == to_json(whole)
    run(CAT, output=file)  # nobody has touched it
    assert load_questions(file).keys() == {CAT}
    run(CAT, output=file)
    edited = file.read_text().replace("A cat sleeps.", "A cat sleeps on a sofa.")
    for text in (edited, "my notes"):
        file.write_text(text)
        with pytest.raises(BadInputError, match="was edited(.|\n)*--force"):
            run(DOGS, output=file)
        assert file.read_text() == text
    run(DOGS, output=file, force=True)
    assert file.read_text() == to_json(whole)


def test_links_and_devices_stay(tmp_path, capsys):
    target, link, pipe = tmp_path / "there" / "real.json", tmp_path / "link.json", tmp_path / "pipe"
    target.parent.mkdir()
    link.symlink_to(target)
    run(DOGS, output=link)
    assert link.is_symlink() and target.read_text() == to_json({DOGS: make_questions(DOGS, "dense")})
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run(CAT, output=pipe)
    assert os.read(reading, 1 << 16).decode() == to_json({CAT: make_questions(CAT, "dense")}) and pipe.is_fifo()
    os.close(reading)
    before = os.stat("/dev/null")
    run(DOGS, output=type(tmp_path)("/dev/null"))
    assert os.stat("/dev/null").st_rdev == before.st_rdev
