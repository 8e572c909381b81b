"""The segments of the Wan decoder: their backward in strips of rows is that of the whole segment; and the final
clamp."""

from dataclasses import replace

import pytest
import torch
from _relay import LIMIT, relative_difference
from _vae import CONFIGS, fp64_throughout, some_latents, vae_of

from lowmem_drf.kernels.norm_silu import norm_silu_naive
from lowmem_drf.models.clamp import InwardClamp
from lowmem_drf.models.wan.vae.fused import Wants
from lowmem_drf.models.wan.vae.segments import segments_of
from lowmem_drf.models.wan.vae.strips import in_strips, segment_backward, sizes_of, strips_of

pytestmark = pytest.mark.usefixtures(fp64_throughout.__name__)


def segment_runs(name, norm_silu=None):
    """(segment, x, entering caches, first, shortcut) of every segment in the first, second and third chunk."""
    vae, runs, shortcut = vae_of(name), [], None
    segments = segments_of(vae.decoder, vae.config.patch_size, norm_silu)
    z, caches = vae.post_quant_conv(some_latents(3, 3, 2)), [(None,) * segment.slots for segment in segments]
    for chunk in range(3):
        x = z[:, :, chunk : chunk + 1]
        for i, segment in enumerate(segments):
            shortcut = x if segment.opens_shortcut else shortcut
            runs.append((segment, x, caches[i], chunk == 0, shortcut if segment.ends_shortcut else None))
            with torch.no_grad():
                x, caches[i] = segment(*runs[-1][1:])
    return runs


def replaced_runs(name, norm_silu):
    """``segment_runs``, each behind the same segment with ``norm_silu``."""
    vae = vae_of(name)
    segments = segments_of(vae.decoder, vae.config.patch_size, norm_silu)
    return [(segments[i % len(segments)], *run) for i, run in enumerate(segment_runs(name))]


@pytest.mark.parametrize(
    ("norm_silu", "hands_back"),
    [(None, True), (norm_silu_naive, True), (norm_silu_naive, False)],
    ids=["diffusers", "fused", "fused, keeps"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_segment_in_strips_of_any_height_is_the_segment(name, norm_silu, hands_back):
    """All its gradients, down to strips of one row, lower than their halo."""
    seen = 0
    for segment, x, caches, first, shortcut in segment_runs(name, norm_silu):
        if segment.halo is None:
            continue
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            out, handed = segment(x, caches, first, shortcut)
        d_out, *d_handed = (
            torch.randn(t.shape, generator=generator, dtype=t.dtype) if isinstance(t, torch.Tensor) else None
            for t in (out, *handed)
        )

        def pulled(strips, *cotangents, segment=segment, x=x, caches=caches, first=first, shortcut=shortcut):
            own = [d if d is None else d.clone() for d in cotangents]  # they may be overwritten
            d_x, d_shortcut, d_caches = segment_backward(
                segment, x.clone(), caches, first, shortcut, own[0], tuple(own[1:]), hands_back, strips
            )
            return [d_x, d_shortcut, *d_caches]

        no_handed = [None for _ in d_handed]
        for cotangents, counts in (
            ([d_out, *d_handed], {2, x.shape[3]}),
            ([d_out, *no_handed], {3}),
            ([None, *d_handed], {3}),
        ):
            whole = pulled(1, *cotangents)
            assert hands_back or all(d is None for d in whole[2:])
            for strips in counts:
                for d, expected in zip(pulled(strips, *cotangents), whole, strict=True):
                    assert (d is None) == (expected is None)
                    if d is not None:
                        assert relative_difference(d, expected) < LIMIT if expected.any() else not d.any()
                        seen += 1
    assert seen > 100


@pytest.mark.parametrize("norm_silu", [None, norm_silu_naive], ids=["diffusers", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_segment_without_gradient_in_strips_of_any_height_is_the_segment(name, norm_silu):
    """Its output and the caches it hands on, and its values are those of diffusers."""
    seen = 0
    for segment, own, x, caches, first, shortcut in replaced_runs(name, norm_silu):
        with torch.no_grad():
            expected, handed = own(x, caches, first, shortcut)
            for strips in {1, 2, x.shape[3]} if segment.halo is not None else {1}:
                out, made = in_strips(segment, x, caches, first, shortcut, strips)
                for a, b in zip((out, *made), (expected, *handed), strict=True):
                    assert a == b if isinstance(b, str | None) else relative_difference(a, b) < LIMIT
                    seen += 1
                only, none = in_strips(segment, x, caches, first, shortcut, strips, Wants.OUTPUT)
                assert torch.equal(only, out) and none == ()
    assert seen > 100


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_the_segments(name):
    runs = segment_runs(name)
    segments = [run[0] for run in runs[: len(runs) // 3]]
    for chunk in range(3):
        inputs = [run[1] for run in runs[chunk * len(segments) : (chunk + 1) * len(segments)]]
        counts = [x.numel() for x in inputs]
        assert sizes_of(segments, inputs[0].shape, chunk == 0) == [*map(max, counts[:-1], counts[1:]), counts[-1]]


def test_a_narrower_halo_would_not_do():
    """The halos are no wider than necessary, and the test above would notice narrower ones."""
    checked = 0
    for segment, x, caches, first, shortcut in segment_runs("toy"):
        if not segment.halo or x.shape[3] < 12:
            continue
        with torch.no_grad():
            out, handed = segment(x, caches, first, shortcut)
        d_out, d_handed = torch.randn_like(out), (None,) * len(handed)
        expected = segment_backward(segment, x.clone(), caches, first, shortcut, d_out.clone(), d_handed, False)[0]
        narrower = replace(segment, halo=segment.halo - 1)
        got = segment_backward(narrower, x.clone(), caches, first, shortcut, d_out, d_handed, False, 3)[0]
        assert relative_difference(got, expected) > LIMIT
        checked += 1
    assert checked


def test_the_largest_segments_get_all_strips_and_the_others_no_larger_ones():
    vae = vae_of("wan21")
    attention = next(s for s in segments_of(vae.decoder, None) if s.halo is None)
    local = segments_of(vae.decoder, None)[-1]
    assert [strips_of(local, elements, 800, 4) for elements in (800, 799, 401, 400, 200, 100)] == [4, 4, 3, 2, 1, 1]
    assert strips_of(attention, 800, 800, 4) == 1


def test_a_saturated_pixel_has_a_gradient_where_it_leads_back():
    x = torch.tensor([-3.0, -3.0, -1.0, 0.5, 1.0, 3.0, 3.0], dtype=torch.float64, requires_grad=True)
    d = torch.tensor([2.0, -2.0, 2.0, -2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    y = InwardClamp.apply(x, -1.0, 1.0)
    assert torch.equal(y, x.clamp(-1, 1))
    (got,) = torch.autograd.grad(y, x, d)
    assert torch.equal(got, torch.tensor([0.0, -2.0, 2.0, -2.0, -2.0, 2.0, 0.0], dtype=torch.float64))
    nearer = (x - 0.1 * got).clamp(-1, 1).detach()  # a step of descent never takes a pixel out of the range
    assert ((x - 0.1 * got).abs() <= x.abs().clamp(min=1.2)).all() and (nearer - y).abs().max() <= 0.2
