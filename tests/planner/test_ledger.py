"""The ledger: bytes alive on card and host, on real and on fake tensors; operations against PyTorch's own count."""

import gc
import math
from dataclasses import astuple, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowmem_drf.config import load_config
from lowmem_drf.planner.cards import SHARES, at_share, card_named
from lowmem_drf.planner.costs import Rates, kind_of
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stand_ins import planned_store

MIB = 1024**2


def floats(mib):
    return torch.ones(mib * MIB // 4)


def test_counts_live_and_peak_bytes():
    with Ledger() as ledger:
        a = floats(3)
        b = a + 1
        assert ledger.card_bytes == 6 * MIB
        del a
        assert (ledger.card_bytes, ledger.peak_card_bytes) == (3 * MIB, 6 * MIB)
        ledger.reset_peak()
        assert ledger.peak_card_bytes == 3 * MIB
        del b
    assert ledger.card_bytes == 0


def test_views_share_their_storage():
    with Ledger() as ledger:
        a = floats(2)
        view = a[5:].view(-1)
        del a
        assert ledger.card_bytes == 2 * MIB
        del view
        assert ledger.card_bytes == 0


def test_saved_tensors_count_until_the_backward():
    w = floats(1).requires_grad_()
    with Ledger() as ledger:
        y = (w * 2).exp()  # exp keeps its output, which y is; w * 2 is gone
        assert ledger.card_bytes == MIB
        z = y.sum()
        del y
        assert ledger.card_bytes == MIB + 4
        z.backward()
        del z
        gc.collect()
        assert ledger.card_bytes == MIB  # w.grad


def test_the_host_has_its_own_account():
    with Ledger() as ledger:
        a, b = floats(1), floats(2)
        ledger.on_host(b)
        ledger.on_host(b)
        assert (ledger.card_bytes, ledger.host_bytes) == (MIB, 2 * MIB)
        assert (ledger.on_card([a, a[1:], b]), ledger.on_card([b])) == (MIB, 0)
        del b
        assert (ledger.host_bytes, ledger.peak_host_bytes) == (0, 2 * MIB)


def test_adopts_weights():
    layer = torch.nn.Linear(512, 512, bias=False)
    with Ledger() as ledger:
        ledger.adopt(layer.parameters())
        ledger.adopt(layer.parameters())
        assert ledger.card_bytes == MIB


def test_rounds_up_to_the_allocators_blocks():
    with Ledger(block=512) as ledger:
        a = torch.ones(3)
        assert ledger.card_bytes == 512
        del a


def test_lists_the_largest_items_of_the_peak():
    with Ledger() as ledger:
        kept = [floats(4) for _ in range(2)]
        small = kept[0].sigmoid()
        del small
        first, second = ledger.close_peak()[:2]
        assert (first.op, first.count, first.bytes) == ("ones", 2, 8 * MIB)
        assert (second.op, second.bytes, str(second)) == ("sigmoid", 4 * MIB, "sigmoid 1048576 float32")


def test_nested_ledgers_the_inner_one_is_active():
    assert Ledger.active() is None
    with Ledger() as outer:
        with Ledger() as inner:
            assert Ledger.active() is inner
        assert Ledger.active() is outer
    assert Ledger.active() is None


def test_fake_tensors_count_as_real_ones_do():
    def run(x, w):
        y = F.scaled_dot_product_attention(x, x, x) @ w
        return torch.autograd.grad(F.gelu(y).sum(), w)[0]

    peaks = []
    for fake in (False, True):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode if fake else torch.no_grad():
            x, w = torch.ones(2, 4, 64, 32), torch.ones(32, 32)
        with Fakes(mode), Ledger() as ledger:
            grad = run(x, w.requires_grad_())
            assert isinstance(grad, FakeTensor) is fake
            peaks.append((ledger.peak_card_bytes, ledger.card_bytes, ledger.flops))
            del grad
    assert peaks[0] == peaks[1]


def test_a_shortcut_counts_as_if_it_were_run():
    rates = Rates({torch.float32: 1e9}, 2e9, 1e6, 1e6)
    x, store = floats(1).view(512, 512), planned_store()

    def run():
        y = x.mm(x).exp()
        store.put(y).get()
        return y * 2

    def twice(step):
        with Ledger(rates=rates) as ledger:
            for more in (1, 2):
                # the peak is this and what the step needs, not only the latter; one tensor is of a kind with the step's
                kept = floats(more), x.exp()
                step(ledger)
                del kept
        return ledger

    done = twice(lambda _: run())
    skipped = twice(lambda ledger: ledger.shortcut("key", run, lambda: torch.empty_like(x)))
    assert done.peak_card_bytes == skipped.peak_card_bytes == 5 * MIB
    assert done.peak_host_bytes == skipped.peak_host_bytes == MIB
    assert done.flops == skipped.flops == 2 * 2 * 512**3
    assert astuple(done.spent) == pytest.approx(astuple(skipped.spent))
    assert done.spent.to_host == done.spent.to_card == 2 * MIB
    assert done.stalled == pytest.approx(2 * 2 * MIB / 1e6)  # to the host and back, twice
    assert [str(item) for item in done.close_peak()] == [str(item) for item in skipped.close_peak()]


@pytest.mark.parametrize("heads", [4, 2], ids=["mha", "gqa"])
def test_operations_are_those_of_the_mathematics(heads):
    """PyTorch's table lacks CPU attention: compared with the same attention written as products."""
    q, k = torch.ones(1, 4, 64, 32), torch.ones(1, heads, 64, 32)
    with Ledger() as ledger:
        F.scaled_dot_product_attention(q, k, k, enable_gqa=heads != 4)
    with FlopCounterMode(display=False) as counted:
        wide = k.repeat_interleave(4 // heads, 1)
        (q @ wide.transpose(-1, -2)) @ wide
    assert ledger.flops == counted.get_total_flops()


def test_linear_and_convolution_operations_are_pytorchs():
    x, w = torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3, requires_grad=True)

    def run():
        return torch.autograd.grad(F.conv2d(x, w).flatten(1).mm(torch.ones(144, 5)).sum(), w)

    with Ledger() as ledger:
        run()
    with FlopCounterMode(display=False) as counted:
        run()
    assert ledger.flops == counted.get_total_flops()


def test_seconds_are_the_longer_of_arithmetic_and_traffic():
    rates = Rates({torch.float32: 1e9}, 2e9, 1e6)
    x = torch.ones(100, 100)
    with Ledger(rates=rates) as ledger:
        x.mm(x)
        assert ledger.seconds == pytest.approx(3 * 40_000 / 1e6)  # 2 MFLOP take 2 ms, 120 kB take 120 ms
        ledger.seconds = 0
        x.t()
        assert ledger.seconds == 0
    with Ledger(rates=Rates({torch.float32: 1e3}, 2e9, 1e6)) as ledger:
        x.mm(x)
        assert ledger.seconds == pytest.approx(2e6 / 1e3)


def test_what_our_attention_backward_allocates_is_in_the_peak():
    """The gradient of q in fp32, log-sum-exp and delta; for grouped queries the gradients of each head's keys too."""
    attention_backward = pytest.importorskip("lowmem_drf.kernels.attention").attention_backward
    for groups, more in ((4, 0), (2, 2 * 2 * 256 + 256)):
        with FakeTensorMode(), Ledger() as ledger:
            q, k = (torch.empty(1, n, h, 16, dtype=torch.bfloat16) for n, h in ((128, 4), (256, groups)))
            lse, rows = torch.empty(1, 4, 128), 4 * 128
            gradients = attention_backward(q, q, k, k, q, lse)
            assert len(gradients) == 3
            assert ledger.peak_card_bytes - ledger.card_bytes == 4 * (rows * (16 + 2) + more * groups * 16)


def test_each_kind_of_work_takes_its_share_of_the_rate():
    from lowmem_drf.kernels.int8_linear import int8_product_op

    shares = {"matmul": 0.5, "attention": 0.25, "conv3d": 0.1, "int8 products": 0.2}
    rates = Rates({torch.float32: 1e9}, 2e9, math.inf, shares=shares, int8=4e9)
    x8, row = torch.ones(100, 100, dtype=torch.int8), torch.ones(1, 100)
    x, q, image = torch.ones(100, 100), torch.ones(1, 2, 64, 32), torch.ones(1, 2, 8, 8)
    works = {
        lambda: x @ x: 2 * 100**3 / 0.5e9,
        lambda: F.scaled_dot_product_attention(q, q, q): 4 * 2 * 64 * 64 * 32 / 0.25e9,
        lambda: int8_product_op(x8, row, x8, row[0], None, torch.float32, True): 2 * 100**3 / 0.8e9,
        lambda: F.conv2d(image, torch.ones(3, 2, 1, 1)): 2 * 3 * 2 * 64 / 0.2e9,
    }
    for work, seconds in works.items():
        with Ledger(rates=rates) as ledger:
            work()
        assert ledger.seconds == pytest.approx(seconds)


def test_int8_attention_and_backwards_have_kinds_of_their_own():
    from lowmem_drf.kernels import attention, attention_backward, attention_int8, int8_linear  # noqa: F401  # operators

    ours, aten = torch.ops.lowmem_drf, torch.ops.aten
    kinds = {
        ours.attention_forward.default: "attention",
        ours.attention_backward.default: "attention backward",
        ours.attention_int8.default: "int8 attention",
        ours.int8_product.default: "int8 products",
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: "attention backward",
        aten.convolution_backward.default: "conv3d",
        aten.addmm.default: "matmul",
    }
    assert {func: kind_of(func) for func in kinds} == kinds and set(kinds.values()) < SHARES.keys()


def test_int8_attention_gains_twice_as_much_where_fp16_sums_are_fast():
    """The limit is 8/3 of attention's rate on GeForce cards, and 4/3 on data center cards."""
    geforce, other = (card_named(name).share("int8 attention") for name in ("RTX 4090", "H200"))
    assert geforce == pytest.approx(2 * other, rel=1e-3) and 1 < geforce < 8 / 3


def test_two_cards_convolve_as_far_apart_as_they_train_convolutional_networks():
    """1.44 to 1.61 times (``SHARES``), where their arithmetic is 2.3 times apart."""
    small, large = card_named("RTX 3090"), card_named("RTX 4090")
    assert 1.44 < large.bf16 * large.share("conv3d") / (small.bf16 * small.share("conv3d")) < 1.61


def test_attentions_backward_gains_where_fp16_sums_are_fast_but_not_behind_a_mask_or_where_it_cannot_be_taken():
    from lowmem_drf.planner.plan import _rates

    q = torch.ones(1, 2, 64, 128, dtype=torch.bfloat16)
    lse = torch.ones(1, 2, 64)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    usual = ["dtype=bf16", "kernels.attention=auto"]
    plain = load_config("toy", usual)

    def seconds(card, config=plain, **mask):
        with Ledger(rates=replace(_rates(card_named(card), config), bytes=math.inf)) as ledger:
            backward(q, q, q, q, q, lse, 0.0, False, **mask)
        return ledger.seconds / ledger.flops * card_named(card).bf16 * 1e12

    others = (["kernels.attention=sdpa"], ["kernels.deterministic=true"], ["dtype=fp32"])
    slow = [seconds("RTX 4090", load_config("toy", [*usual, *other])) for other in others]
    slow += [seconds("RTX 4090", attn_mask=torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)), seconds("H200")]
    assert slow == [pytest.approx(1 / 0.6)] * 5 and seconds("RTX 4090") == pytest.approx(1)
    peak = at_share(card_named("RTX 4090"), 0.6).share("attention backward in fp16")
    measured = replace(card_named("RTX 4090"), measured={"attention backward": 0.8})
    assert peak == pytest.approx(1) and measured.share("attention backward in fp16") == 0.8
