"""Questions about an image: none is about time, all of them say image, and a prompt's own words are not touched."""

import pytest

from lowmem_drf.questions import fixed, toyworld
from lowmem_drf.questions.check import is_fixed
from lowmem_drf.questions.make import MODES, make_questions
from lowmem_drf.questions.still import OVER_TIME, TOYWORLDS, of_image
from lowmem_drf.questions.writer import instruction

PROMPT = 'a woman in a red coat films a video clip on her phone, a sign says "the motion in this video"'


@pytest.mark.parametrize("mode", MODES)
def test_an_image_is_asked_nothing_about_time(mode):
    asked, of_clips = (make_questions(PROMPT, mode, "phrases", still=still) for still in (True, False))
    assert not {q.name for q in asked if q.aspect != "TA"} & OVER_TIME
    for question in asked:
        outside = question.text.partition('"')[0] + question.text.rpartition('"')[2]
        assert "video" not in outside and "clip" not in outside and "image image" not in outside
        assert question.aspect == "TA" or is_fixed(question)
    if mode not in ("vanilla", "dense"):
        assert {q.aspect for q in asked} == {"TA", "Phy", "VQ"}
        assert any("films a video clip on her phone" in q.text for q in asked)
    of_time = [q for q in of_clips if q.aspect == "TA"]
    assert [q.answer for q in asked if q.aspect == "TA"] == [q.answer for q in of_time]


def test_what_the_dense_answers_and_the_writer_are_told():
    chosen = fixed.checks("a mountain lake", still=True)
    assert {check.name for checks in chosen.values() for check in checks}.isdisjoint(OVER_TIME)
    physics, quality = (question.answer for question in fixed.dense(chosen, still=True))
    assert physics.startswith("It is physically plausible: ") and quality.startswith("The image is sharp, ")
    assert of_image(fixed._DENSE[0]) == "Explain whether this image is physically plausible."
    told = instruction('a "video" of a lake', "both", still=True)
    assert told.startswith('An image was made from this description:\n\na "video" of a lake')
    assert told.count("video") == 1 and "whether this very scene obeys" in told


def test_toyworlds_own():
    names = {q.name for q in make_questions("a red circle moves left on a gray background", "both", "toyworld")}
    left = {
        q.name for q in make_questions("a red circle stays still on a gray background", "both", "toyworld", still=True)
    }
    assert names - left == TOYWORLDS and left == names - TOYWORLDS
    assert {*toyworld.QUALITY} - TOYWORLDS <= left
