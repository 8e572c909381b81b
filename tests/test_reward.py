"""Rewards against probabilities worked out by hand; weights, hinge, averages and refusals."""

import math
from dataclasses import replace

import pytest
import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.reward import RewardSpec, mean_reward, question_reward, total_reward
from lowmem_drf.types import Answer, Question

YES, NO = (1, 2), (3, 4)
WANTS_YES = Question("TA", "is it red?", "yes", name="color")
WANTS_NO = Question("Phy", "does it jump?", " No ", name="jump")
DENSE = Question("VQ", "how is it?", "it is clean", kind="dense", name="picture")


def yesno(probabilities, dtype=torch.float64):
    return Answer(torch.tensor([probabilities], dtype=torch.float64).log().to(dtype) + 3.0, torch.tensor([1]), YES, NO)


ANSWER = yesno([0.1, 0.2, 0.1, 0.35, 0.15, 0.1])


@pytest.mark.parametrize(("question", "p"), [(WANTS_YES, 0.3), (WANTS_NO, 0.5)], ids=["yes", "no"])
def test_logprob_is_of_all_casings_of_the_wanted_answer(question, p):
    assert question_reward(ANSWER, question, RewardSpec()).item() == pytest.approx(math.log(p))


@pytest.mark.parametrize(("question", "odds"), [(WANTS_YES, 0.3 / 0.5), (WANTS_NO, 0.5 / 0.3)], ids=["yes", "no"])
def test_margin_is_the_log_odds_against_the_other_answer(question, odds):
    assert question_reward(ANSWER, question, RewardSpec("yes_margin")).item() == pytest.approx(math.log(odds))


@pytest.mark.parametrize("kind", ["yes_logprob", "yes_margin"])
def test_dense_is_the_mean_logprob_of_the_reference(kind):
    logits = torch.randn(3, 6, dtype=torch.float64)
    target = torch.tensor([5, 0, 2])
    expected = sum(logits[i].softmax(-1)[token].log() for i, token in enumerate(target)) / 3
    assert question_reward(Answer(logits, target), DENSE, RewardSpec(kind)).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(("given", "reward"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)], ids=str)
@pytest.mark.parametrize("question", [WANTS_YES, DENSE], ids=["yesno", "dense"])
def test_arithmetic_is_in_fp32_or_higher(question, given, reward):
    answer = yesno([0.1, 0.2, 0.1, 0.35, 0.15, 0.1], given)
    assert question_reward(answer, question, RewardSpec()).dtype == reward


@pytest.mark.parametrize("kind", ["yes_logprob", "yes_margin"])
@pytest.mark.parametrize("question", [WANTS_YES, WANTS_NO, DENSE], ids=["yes", "no", "dense"])
def test_gradients(question, kind):
    logits = torch.randn(3 if question is DENSE else 1, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([5, 0, 2])[: len(logits)]
    assert torch.autograd.gradcheck(lambda x: question_reward(Answer(x, target, YES, NO), question, RewardSpec(kind)), logits)


def test_hinge_caps_the_reward_and_stops_the_gradient():
    logits = ANSWER.logits_AV.requires_grad_()
    for target, pushed in ((math.log(0.31), True), (math.log(0.29), False)):
        reward = question_reward(replace(ANSWER, logits_AV=logits), WANTS_YES, RewardSpec(hinge=target))
        assert reward.item() == pytest.approx(min(math.log(0.3), target))
        (gradient,) = torch.autograd.grad(reward, logits)
        assert bool(gradient.any()) == pushed


def test_total_is_the_weighted_mean():
    answers = [yesno([0.0, p, 0.0, 1 - p, 0.0, 0.0]) for p in (0.9, 0.8, 0.3)]
    a, b, c = math.log(0.9), math.log(0.8), math.log(0.7)
    questions = [replace(WANTS_YES, weight=3.0), replace(WANTS_YES, name=""), replace(WANTS_NO, weight=0.5)]
    total, by_aspect, by_question = total_reward(answers, questions, RewardSpec(weights={"TA": 1.0, "Phy": 2.0}))
    assert total.item() == pytest.approx((3 * a + b + 0.5 * 2 * c) / 5)
    assert by_aspect == pytest.approx({"TA": (3 * a + b) / 4, "Phy": c})
    assert by_question == pytest.approx({"color": a, "TA": b, "jump": c})


def test_an_aspect_without_weight_is_reported_and_not_pushed():
    logits = ANSWER.logits_AV.clone().requires_grad_()
    answers = [ANSWER, replace(ANSWER, logits_AV=logits)]
    total, by_aspect, _ = total_reward(answers, [WANTS_YES, WANTS_NO], RewardSpec(weights={"TA": 1.0, "Phy": 0.0}))
    assert total.item() == pytest.approx(math.log(0.3))
    assert by_aspect["Phy"] == pytest.approx(math.log(0.5))
    assert not torch.autograd.grad(total, logits)[0].any()


def test_names_that_only_some_clips_have_are_averaged_over_those():
    mean, by_aspect, by_question = mean_reward([[ANSWER, ANSWER], [ANSWER]], [[WANTS_YES, WANTS_NO], [WANTS_YES]], RewardSpec())
    yes, no = math.log(0.3), math.log(0.5)
    assert mean.item() == pytest.approx(((yes + no) / 2 + yes) / 2)
    assert by_aspect == pytest.approx({"TA": yes, "Phy": no})
    assert by_question == pytest.approx({"color": yes, "jump": no})


@pytest.mark.parametrize(
    ("questions", "spec", "what"),
    [
        ([], RewardSpec(), "no question"),
        ([replace(WANTS_YES, weight=0.0)], RewardSpec(), "weight above 0"),
        ([WANTS_YES], RewardSpec(weights={"TA": 0.0}), "weight above 0"),
        ([replace(WANTS_YES, answer="red")], RewardSpec(), "give yes or no"),
    ],
    ids=["none", "weightless", "weightless-aspect", "neither-yes-nor-no"],
)
def test_unusable_questions_are_refused(questions, spec, what):
    with pytest.raises(BadInputError, match=what):
        total_reward([ANSWER] * len(questions), questions, spec)


@pytest.mark.parametrize(("changes", "what"), [({"kind": "no_margin"}, "yes_margin"), ({"weights": {"TA": -1.0}}, "aspect TA")], ids=str)
def test_bad_spec_is_refused(changes, what):
    with pytest.raises(BadInputError, match=what):
        RewardSpec(**changes)
