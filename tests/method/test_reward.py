"""Rewards against probabilities worked out by hand; weights, hinge, averages and refusals."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.reward import RewardSpec, Spread, mean_reward, question_reward, token_probabilities, total_reward
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


@pytest.mark.parametrize(
    ("given", "reward"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("question", [WANTS_YES, DENSE], ids=["yesno", "dense"])
def test_arithmetic_is_in_fp32_or_higher(question, given, reward):
    answer = yesno([0.1, 0.2, 0.1, 0.35, 0.15, 0.1], given)
    assert question_reward(answer, question, RewardSpec()).dtype == reward


@pytest.mark.parametrize("kind", ["yes_logprob", "yes_margin"])
@pytest.mark.parametrize("question", [WANTS_YES, WANTS_NO, DENSE], ids=["yes", "no", "dense"])
def test_gradients(question, kind):
    logits = torch.randn(3 if question is DENSE else 1, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([5, 0, 2])[: len(logits)]
    assert torch.autograd.gradcheck(
        lambda x: question_reward(Answer(x, target, YES, NO), question, RewardSpec(kind)), logits
    )


def test_hinge_caps_the_reward_and_stops_the_gradient():
    logits = ANSWER.logits_AV.requires_grad_()
    for target, pushed in ((math.log(0.31), True), (math.log(0.29), False)):
        reward = question_reward(replace(ANSWER, logits_AV=logits), WANTS_YES, RewardSpec(hinge=target))
        assert reward.item() == pytest.approx(min(math.log(0.3), target))
        (gradient,) = torch.autograd.grad(reward, logits)
        assert bool(gradient.any()) == pushed


def test_total_is_the_weighted_mean_of_the_aspects_means():
    answers = [yesno([0.0, p, 0.0, 1 - p, 0.0, 0.0]) for p in (0.9, 0.8, 0.3)]
    a, b, c = math.log(0.9), math.log(0.8), math.log(0.7)
    questions = [replace(WANTS_YES, weight=3.0), replace(WANTS_YES, name=""), replace(WANTS_NO, weight=0.5)]
    total, by_aspect, by_question = total_reward(
        answers, questions, RewardSpec(weights={"TA": 1.0, "Phy": 2.0, "VQ": 5.0})
    )
    assert by_aspect == pytest.approx({"TA": (3 * a + b) / 4, "Phy": c})
    assert total.item() == pytest.approx((by_aspect["TA"] + 2 * c) / 3)
    assert by_question == pytest.approx({"color": a, "TA": b, "jump": c})


def test_asking_more_questions_gives_an_aspect_no_more_say():
    few, many = ([WANTS_YES] * n + [WANTS_NO] for n in (1, 7))
    rewards = [total_reward([ANSWER] * len(asked), asked, RewardSpec())[0].item() for asked in (few, many)]
    assert rewards[0] == pytest.approx(rewards[1])


def test_an_aspect_without_weight_is_reported_and_not_pushed():
    logits = ANSWER.logits_AV.clone().requires_grad_()
    answers = [ANSWER, replace(ANSWER, logits_AV=logits)]
    total, by_aspect, _ = total_reward(answers, [WANTS_YES, WANTS_NO], RewardSpec(weights={"TA": 1.0, "Phy": 0.0}))
    assert total.item() == pytest.approx(math.log(0.3))
    assert by_aspect["Phy"] == pytest.approx(math.log(0.5))
    assert not torch.autograd.grad(total, logits)[0].any()


def test_names_that_only_some_clips_have_are_averaged_over_those():
    mean, by_aspect, by_question = mean_reward(
        [[ANSWER, ANSWER], [ANSWER]], [[WANTS_YES, WANTS_NO], [WANTS_YES]], RewardSpec()
    )
    yes, no = math.log(0.3), math.log(0.5)
    assert mean.item() == pytest.approx(((yes + no) / 2 + yes) / 2)
    assert by_aspect == pytest.approx({"TA": yes, "Phy": no})
    assert by_question == pytest.approx({"color": yes, "jump": no})


@pytest.mark.parametrize(
    ("questions", "spec", "what"),
    [
        ([], RewardSpec(), "no question"),
        ([WANTS_YES], RewardSpec(scales={"color": 1.0}, weights={"TA": 0.0, "Phy": 1.0}), "weight above 0"),
        ([replace(WANTS_YES, weight=0.0)], RewardSpec(), "weight above 0"),
        ([WANTS_YES], RewardSpec(weights={"TA": 0.0}), "weight above 0"),
        ([replace(WANTS_YES, answer="red")], RewardSpec(), "give yes or no"),
    ],
    ids=["none", "weightless-scaled", "weightless", "weightless-aspect", "neither-yes-nor-no"],
)
def test_unusable_questions_are_refused(questions, spec, what):
    with pytest.raises(BadInputError, match=what):
        total_reward([ANSWER] * len(questions), questions, spec)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"kind": "no_margin"}, "yes_margin"),
        ({"weights": {"TA": -1.0}}, "aspect TA"),
        ({"scales": {"color": 0.0}}, "scale of question color"),
    ],
    ids=str,
)
def test_bad_spec_is_refused(changes, what):
    with pytest.raises(BadInputError, match=what):
        RewardSpec(**changes)


DENSE_LOGITS = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DENSE_ANSWER = Answer(DENSE_LOGITS, torch.tensor([5, 0, 2]))


def test_token_weights_say_which_words_of_an_explanation_count():
    logp = [DENSE_LOGITS[i].softmax(-1)[token].log().item() for i, token in enumerate(DENSE_ANSWER.target_A)]
    weighted = question_reward(DENSE_ANSWER, replace(DENSE, token_weights=(1.0, 0.0, 3.0)), RewardSpec())
    assert weighted.item() == pytest.approx((logp[0] + 3 * logp[2]) / 4)
    alike = question_reward(DENSE_ANSWER, replace(DENSE, token_weights=(0.2, 0.2, 0.2)), RewardSpec())
    assert alike.item() == pytest.approx(question_reward(DENSE_ANSWER, DENSE, RewardSpec()).item())
    assert token_probabilities(DENSE_ANSWER).log().tolist() == pytest.approx(logp)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 0.0, 0.0)], ids=["too-few", "none-counts"])
def test_unusable_token_weights_are_refused(weights):
    with pytest.raises(BadInputError, match="one weight a token"):
        question_reward(DENSE_ANSWER, replace(DENSE, token_weights=weights), RewardSpec())


def test_scales_divide_what_counts_and_not_what_is_reported():
    questions = [WANTS_YES, WANTS_NO]
    total, by_aspect, by_question = total_reward([ANSWER, ANSWER], questions, RewardSpec(scales={"color": 0.5}))
    yes, no = math.log(0.3), math.log(0.5)
    assert total.item() == pytest.approx((yes / 0.5 + no) / 2)
    assert by_aspect == pytest.approx({"TA": yes, "Phy": no}) and by_question == pytest.approx(
        {"color": yes, "jump": no}
    )


def test_spread_gives_what_varies_more_a_larger_scale_and_nothing_a_vanishing_one():
    spread = Spread()
    for update in range(40):
        assert (spread.scales() == {}) == (update < spread.warmup)
        spread.add({"wild": -2.0 + (-1.0) ** update, "calm": -0.5 + 0.25 * (-1.0) ** update, "solved": -0.01})
    scales = spread.scales()
    # standard deviations of 1, 1/4 and 0, their mean 5/12; the floor is a tenth of that. The running mean follows each
    # value by 1 - decay = 0.05
    assert (
        scales["wild"] == pytest.approx((1 / (5 / 12) + 0.1) / 1.1, rel=0.05)
        and scales["wild"] > scales["calm"] > scales["solved"]
    )
    assert scales["solved"] == pytest.approx(0.1 / 1.1) and sum(scales.values()) / 3 == pytest.approx(1.0)


def test_spread_goes_on_from_what_was_saved():
    whole, first = Spread(), Spread()
    rewards = [{"a": -(i % 3) / 2, "b": -(i % 5) / 7} for i in range(20)]
    for row in rewards:
        whole.add(row)
    for row in rewards[:9]:
        first.add(row)
    second = Spread(seen=dict(first.seen))
    for row in rewards[9:]:
        second.add(row)
    assert second.scales() == whole.scales() != {}


class _Reads(TorchDispatchMode):
    """Counts single values that are read from tensors: on a card each read waits for it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_question_waits_for_the_card():
    with _Reads() as reads:
        total_reward([ANSWER] * 3, [WANTS_YES, WANTS_NO, DENSE], RewardSpec())
    assert reads.count == 0
