"""The sampler is diffusers' UniPC of order 1; noise depends on the seed alone; graded steps are the requested ones."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.schedule import (
    advance,
    choose_graded,
    draw_noise,
    euler_step,
    flow_sigmas,
    gradient_passes,
    guided,
)


def unipc(steps, shift):
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=shift,
        solver_order=1,
        disable_corrector=list(range(steps)),
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_sigmas_are_unipc_sigmas(steps, shift):
    sigmas = flow_sigmas(steps, shift)
    assert sigmas.dtype == torch.float64
    assert torch.equal(sigmas.float(), unipc(steps, shift).sigmas)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_truncated_timesteps_are_unipc_timesteps(steps):
    assert [int(sigma * 1000) for sigma in flow_sigmas(steps, 3.0)[:-1].tolist()] == unipc(
        steps, 3.0
    ).timesteps.tolist()


def test_no_step_is_empty():
    """The last of 10 steps does a quarter of the way; FlowMatchEulerDiscreteScheduler's does less than a hundredth."""
    assert -flow_sigmas(10, 3.0).diff()[-1] > 0.25


def test_euler_is_unipc_of_order_1():
    """UniPC computes in fp32 through log-SNR: its distance to our fp64 update is at most twice that of our update in
    fp32 plus its rounding of sigma (1 ulp of fp32 per step, on values of order 1)."""
    steps = 10
    scheduler, sigmas = unipc(steps, 3.0), flow_sigmas(steps, 3.0).tolist()
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, actual = x.float(), x
    for k, timestep in enumerate(scheduler.timesteps):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        expected = scheduler.step(v.float(), timestep, expected, return_dict=False)[0]
        actual = euler_step(actual, v, sigmas[k], sigmas[k + 1])
    assert (actual - expected).abs().max() < steps * 8 * torch.finfo(torch.float32).eps * actual.abs().max()


@pytest.mark.parametrize(
    ("steps", "shift", "key"),
    [(0, 3.0, "sampler.steps"), (4, 0.0, "sampler.shift"), (4, float("nan"), "sampler.shift")],
)
def test_bad_schedule_is_refused(steps, shift, key):
    with pytest.raises(BadInputError, match=key):
        flow_sigmas(steps, shift)


def test_noise_of_a_clip_depends_on_its_seed_alone():
    noise = draw_noise((2, 3, 4, 4), [5, 6])
    assert noise.shape == (2, 2, 3, 4, 4)
    assert noise.dtype == torch.float32
    assert torch.equal(draw_noise((2, 3, 4, 4), [6])[0], noise[1])
    assert not torch.equal(noise[0], noise[1])


def test_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    draw_noise((2,), [1])
    choose_graded("random", 5, 2, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("timesteps", [(1000, 757, 522), (987.7, 782.7, 609, 406.2)], ids=str)
def test_renoise_is_diffusers_stochastic_sampling(timesteps):
    """At the given noise levels, each clip with its own noise; at the end nothing is drawn."""
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[t / 1000 for t in timesteps])
    sigmas, generators = flow_sigmas(7, 3.0, timesteps).tolist(), [torch.Generator().manual_seed(1)]
    assert sigmas == [*(t / 1000 for t in timesteps), 0]
    x = expected = torch.randn(1, 2, 3)
    torch.manual_seed(1)
    for k, timestep in enumerate(scheduler.timesteps):
        v = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(k))
        expected = scheduler.step(v, timestep, expected, return_dict=False)[0]
        x = advance("renoise", x, v, sigmas[k], sigmas[k + 1], generators)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(
    ("mode", "k", "expected"),
    [
        ("tail", 3, (7, 8, 9)),
        ("tail", 10, tuple(range(10))),
        ("last", 4, (9,)),
        ([5, 2, 5], 1, (2, 5)),
        ((-1, 0), 1, (0, 9)),
    ],
    ids=str,
)
def test_choose_graded(mode, k, expected):
    assert choose_graded(mode, 10, k) == expected


def test_random_graded_steps():
    generator = torch.Generator().manual_seed(0)
    draws = [choose_graded("random", 10, 3, generator) for _ in range(200)]
    assert all(len(set(draw)) == 3 and list(draw) == sorted(draw) for draw in draws)
    assert {step for draw in draws for step in draw} == set(range(10))
    assert draws[:5] == [
        choose_graded("random", 10, 3, g) for g in [torch.Generator().manual_seed(0)] for _ in range(5)
    ]


@pytest.mark.parametrize(
    ("mode", "k", "what"),
    [
        ("tail", 0, "graded_steps"),
        ("random", 11, "graded_steps"),
        ("first", 1, "'tail', 'last', 'random'"),
        ([10], 1, "0..9"),
        ([], 1, "one step"),
    ],
    ids=str,
)
def test_bad_graded_is_refused(mode, k, what):
    with pytest.raises(BadInputError, match=what):
        choose_graded(mode, 10, k)


class Counted:
    """A velocity that counts its passes."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, condition):
        self.calls.append(torch.is_grad_enabled())
        return torch.tanh(x * condition) + sigma


def test_no_guidance_is_one_pass():
    velocity, x = Counted(), torch.randn(3, dtype=torch.float64)
    assert torch.equal(guided(velocity, x, 0.5, 2.0, None, 1.0), torch.tanh(2 * x) + 0.5)
    assert velocity.calls == [True]


@pytest.mark.parametrize("grad", ["cond", "both"])
def test_guidance_and_where_its_gradient_goes(grad):
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, dtype=torch.float64)
    velocity = Counted()
    v = guided(velocity, x, 0.5, 2.0, 3.0, 4.0, grad)
    assert velocity.calls == [grad == "both", True]
    expected = (torch.tanh(3 * x) + 0.5) + 4 * (torch.tanh(2 * x) - torch.tanh(3 * x))
    assert torch.equal(v, expected) or (v - expected).norm() / expected.norm() < 1e-10
    (actual,) = torch.autograd.grad(v, x, upstream)
    parts = gradient_passes(2.0, 3.0, 4.0, grad)
    by_parts = sum(
        factor * torch.autograd.grad(velocity(x, 0.5, condition), x, upstream)[0] for condition, factor in parts
    )
    assert len(parts) == (2 if grad == "both" else 1)
    assert (actual - by_parts).norm() / actual.norm() < 1e-10


def test_guidance_without_gradient_makes_no_graph():
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert not guided(Counted(), x, 0.5, 2.0, 3.0, 4.0, "both").requires_grad
