"""The choice of an attention, of tiles, and its record in the run's folder."""

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from lowmem_drf.assembly import kernel_choice
from lowmem_drf.assembly.kernel_choice import KERNELS, choose, record_text, saved_choice
from lowmem_drf.assembly.trials import Work
from lowmem_drf.config import load_config
from lowmem_drf.distributed.ranks import Ranks
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.attention import attention_named, refusal
from lowmem_drf.models.family import GeneratorSizes
from lowmem_drf.ops import Attention, naive_ops, sdpa_attention, sdpa_backward, sdpa_forward

AUTO = ("kernels.ops=naive", "kernels.attention=auto")


def work(*settings, device="cpu"):
    config = load_config("toy", [*AUTO, "dtype=fp32", *settings])
    sizes = GeneratorSizes(
        channels=4, spatial=8, temporal=4, patch=(1, 2, 2), positions=1024, heads=2, head_dim=16, hidden=48,
        text_dim=8, vae_widths=(8,), vae_patch=1,
    )  # fmt: skip
    return config, Work(config, sizes, None, 0, (4, 2, 4, 4), torch.device(device))


@dataclass
class Clock:
    """A timer, and attentions that take as long as they are told."""

    costs: dict
    """Name -> (forward, backward)."""
    now: float = 0.0

    def seconds(self, run):
        self.now = 0.0
        run()
        return self.now

    def named(self, name):
        if name not in self.costs:
            return sdpa_attention()

        def forward(q, k, v):
            self.now += self.costs[name][0]
            return sdpa_forward(q, k, v)

        def backward(*tensors):
            self.now += self.costs[name][1]
            return sdpa_backward(*tensors)

        def fails(*tensors):
            raise RuntimeError("no kernel image is available for execution on the device")

        return Attention.of_pair(name, (forward, backward) if self.costs[name] else (fails, fails))


@pytest.fixture
def chosen(monkeypatch):
    """(times of the back ends, settings) -> the record of the choice."""

    def run(costs, *settings):
        clock, (config, here) = Clock(costs), work(*settings)
        monkeypatch.setattr(kernel_choice, "why_not", lambda name, device: None if name in costs else "absent")
        monkeypatch.setattr(kernel_choice, "attention_named", clock.named)
        return kernel_choice._timed(config, here, naive_ops(), clock.seconds)

    return run


def test_the_fastest_attention_is_chosen_and_one_that_fails_is_not(chosen):
    record = chosen({"cudnn": (1e-3, 2e-3), "sdpa": (3e-3, 3e-3), "xformers": None})
    assert record["attention"] == "cudnn" and "no kernel image" in record["failed"]["xformers"]
    assert record["why"] == (
        "the fastest here, forward + backward: cudnn 1.0 + 2.0 ms, sdpa 3.0 + 3.0 ms; cannot: xformers"
    )
    assert chosen({"cudnn": None, "flash": None})["attention"] == "sdpa", "where all fail, the run says what is wrong"


def test_what_counts_is_an_update_of_the_run(chosen):
    """A rollout of many steps is mostly forwards."""
    costs = {"cudnn": (1e-3, 9e-3), "sdpa": (2e-3, 1e-3)}
    assert chosen(costs, "sampler.steps=50", "sampler.graded_steps=1")["attention"] == "cudnn"
    assert chosen(costs, "sampler.steps=2", "sampler.graded_steps=2")["attention"] == "sdpa"


def test_what_cannot_follow_a_forward_in_8_bits_is_not_chosen(chosen):
    costs = {"xformers": (1e-3, 1e-3), "sdpa": (2e-3, 2e-3)}
    assert chosen(costs)["attention"] == "xformers"
    assert chosen(costs, "kernels.graded_attention=int8")["attention"] == "sdpa"
    with pytest.raises(BadInputError, match="kernels.graded_attention.*xformers.*set kernels.attention"):
        work("kernels.graded_attention=int8", "kernels.attention=xformers")


@pytest.mark.parametrize("keep", ["none", "card"])
def test_what_is_timed_is_what_will_run(keep, monkeypatch):
    """With kept attentions the pair, and without them the differentiable call."""
    calls = []
    own = Attention(
        "sdpa", lambda *x: (calls.append("call"), sdpa_attention().call(*x))[1], (sdpa_forward, sdpa_backward)
    )
    _, here = work("memory.checkpoint=true", f"memory.keep_attention={keep}")
    here.attention_seconds(own, lambda run: (run(), 1.0)[1])
    assert bool(calls) == (keep == "none")


@pytest.fixture
def card(monkeypatch):
    """A card that only its name is known of; counts how often a choice is made."""
    made = []
    record = {"attention": "sdpa", "why": "the fastest here", "failed": {}, "critic": "sdpa"}
    record["tiles"] = [{"kernel": "k", "case": "WIDTH=8", "sizes": sizes, "tile": "8 warps"} for sizes in ([], [8, 64])]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(kernel_choice, "_timed", lambda *rest: (made.append(1), record)[1])
    return made


def test_a_resumed_run_takes_its_choice_again(card, tmp_path):
    config, here = work(device="cuda:0")
    first = choose(config, here)
    (tmp_path / KERNELS).write_text(record_text(first.record))
    before = saved_choice(tmp_path, pytest.fail)
    assert before == first.record and len(card) == 1
    again = choose(config, here, before)
    assert len(card) == 1 and str(again) == "kernels: naive; attention: sdpa (as kernels.json says)"
    earlier = {name: value for name, value in before["about"].items() if name != "kernels.graded_attention"}
    choose(config, here, {**before, "about": earlier})
    assert len(card) == 1, "a setting that came later does not ask for another choice"
    for place, was in (("card", "NVIDIA H200"), ("torch", "2.11.0")):
        other = choose(config, here, {**before, "about": {**before["about"], place: was}})
        assert f"chosen anew, {place} was {was} and is " in other.why
    assert len(card) == 3


def test_processes_take_the_choice_of_the_first(card):
    config, here = work(device="cuda:0")
    record = choose(config, here).record

    class Second(Ranks):
        def from_chief(self, value):
            return record, "as in the first process"

    assert choose(config, here, ranks=Second(rank=1, count=2)).record == record and len(card) == 1


def test_a_damaged_choice_is_said_and_made_anew(card, tmp_path):
    said = []
    assert saved_choice(None, said.append) is None is saved_choice(tmp_path, said.append) and not said
    for text in (
        "{",
        "[]",
        '{"attention": "none"}',
        '{"attention": "sdpa", "about": {}, "critic": "sdpa", "tiles": [1]}',
    ):
        (tmp_path / KERNELS).write_text(text)
        assert saved_choice(tmp_path, said.append) is None
    assert len(said) == 4 and "chosen anew" in said[0]


def test_a_back_end_that_cannot_run_is_refused_with_a_cure(monkeypatch):
    monkeypatch.setattr("lowmem_drf.models.attention.absent", lambda name: name == "flash")
    config, here = work("kernels.attention=flash", device="cuda:0")
    with pytest.raises(BadInputError, match=r"'flash' cannot run: it is not installed\. Cure: pip install flash-attn"):
        choose(config, here)
    config, here = work("kernels.attention=cudnn")
    with pytest.raises(BadInputError, match="it needs a CUDA card. Cure: -s kernels.attention=sdpa"):
        choose(config, here)


def test_a_library_that_is_built_for_another_cuda_is_refused_with_a_cure(monkeypatch):
    def forward(q, k, v):
        raise NotImplementedError("No operator found:\n  query: shape\n`fa2F` is not supported because:\n  no CUDA")

    fmha = ModuleType("xformers.ops.fmha")
    fmha.memory_efficient_attention_forward_requires_grad = forward
    fake_library(monkeypatch, "xformers.ops", fmha=fmha)
    monkeypatch.setattr("lowmem_drf.models.attention.why_not", lambda name, device: None)
    reason = refusal("xformers", torch.device("cpu"), torch.float32, 16)
    assert reason.startswith("NotImplementedError: No operator found: no CUDA. Cure: pip install --force-reinstall xf")


def fake_library(monkeypatch, name, **contents):
    """Modules that can be imported."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


def flash_attn(monkeypatch):
    """With the signatures of flash-attn 2.8.3."""

    def forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
                return_softmax):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert softmax_scale == q.shape[-1] ** -0.5 and alibi_slopes is None and return_softmax is False
        return *sdpa_forward(q, k, v), None, None

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                 window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):  # fmt: skip
        for mine, value in zip((dq, dk, dv), sdpa_backward(dout, q, k, v, out, softmax_lse), strict=True):
            mine.copy_(value)

    interface = {"_flash_attn_forward": forward, "_flash_attn_backward": backward}
    fake_library(monkeypatch, "flash_attn.flash_attn_interface", **interface)


def xformers(monkeypatch):
    """With the signatures of xformers 0.0.35."""

    def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        return sdpa_backward(grad, query, key, value, output, lse)

    fmha = ModuleType("xformers.ops.fmha")
    fmha.memory_efficient_attention_forward_requires_grad = lambda query, key, value: sdpa_forward(query, key, value)
    fmha.memory_efficient_attention_backward = backward
    fake_library(monkeypatch, "xformers.ops", fmha=fmha)


@pytest.mark.parametrize("library, name", [(flash_attn, "flash"), (xformers, "xformers")])
def test_a_librarys_attention_is_called_as_it_wants_to_be(library, name, monkeypatch):
    library(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    q, d_out = (torch.randn(2, 9, 3, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(2, 5, 3, 16, generator=generator) for _ in range(2))

    def results(attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention.call(*leaves)
        return out, *torch.autograd.grad(out, leaves, d_out)

    wanted, found = results(sdpa_attention()), results(attention_named(name))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def _torchs_setting(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("_torchs_setting")
def test_the_same_bits_take_our_attention_and_pytorchs_own_switch(monkeypatch):
    def record(config, *_):
        return {"attention": config.kernels.attention, "tiles": [], "critic": "sdpa"}, ""

    def name(device, attention):
        settings = ["kernels.deterministic=true", f"kernels.attention={attention}"]
        return choose(*work(*settings, device=device)).attention.name

    monkeypatch.setattr(kernel_choice, "_record", record)
    monkeypatch.setattr(kernel_choice, "refusal", lambda *_: None)
    monkeypatch.setattr(kernel_choice, "why_not", lambda name, _: None if name == "sdpa" else "not asked")
    assert name("cpu", "sdpa") == "sdpa" and not torch.are_deterministic_algorithms_enabled()
    assert name("cuda", "auto") == name("cuda", "triton") == "triton"
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("attention", ["sdpa", "cudnn", "xformers", "flash"])
def test_an_attention_that_adds_up_in_any_order_is_refused(attention):
    with pytest.raises(BadInputError, match=r"differ by rounding. Cure: -s kernels.attention=triton"):
        choose(*work("kernels.deterministic=true", f"kernels.attention={attention}", device="cuda"))
