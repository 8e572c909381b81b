"""RMSNorm over all channels of a token, then rotary embedding, for the queries and keys of an attention.

    n = x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)      the mean is over all H * d channels ("rms_norm_across_heads")
    y[2i]     = n[2i] * w[2i] * cos[2i] - n[2i+1] * w[2i+1] * sin[2i+1]        i: pairs of neighbours within a head
    y[2i + 1] = n[2i] * w[2i] * sin[2i+1] + n[2i+1] * w[2i+1] * cos[2i]
    dx = rstd * (g * w - n * mean(g * w * n)),  dw = sum over tokens of g * n     g: dy rotated back, that is, by -sin

Shapes: q, k (B, L, H * d) to (B, L, H, d), in bf16, fp16 or fp32, batch and tokens with any stride; weights (H * d,) in
any of these; cos, sin (L, d) or (1, L, 1, d), which hold each value twice. ``rms_norm`` is the same without rotation
and heads, (B, L, D) to (B, L, D). Computes in fp32 and rounds once. The backward keeps x, 4 bytes a token, and
references to the weight, cos and sin. The weight's gradient adds up partial sums, one row of H * d floats per 64
tokens: there are no atomics, so the same tile gives the same bits. Nothing else is allocated.

Queries and keys take one launch each. Both read cos and sin: 1 KiB a token, beside 6 KiB of other data in the forward
and 9 in the backward (Wan-1.3B).

Source: ``WanAttnProcessor`` and ``WanRotaryPosEmbed`` of diffusers 0.42. RMSNorm: Zhang and Sennrich, arXiv 1910.07467;
rotary embedding: Su et al., arXiv 2104.09864.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_drf.kernels.checks import DTYPES, aligned, require_card, tokens_of_a_program
from lowmem_drf.kernels.operators import operator
from lowmem_drf.kernels.tiles import CARDS, Tile, Variant, tiles_for, tuned, variant

TILES = (
    Tile({"BLOCK": 4096, "STAGES": 1}, 8, 1, CARDS, "2 tokens of Wan-1.3B a step: the weight is read once for both"),
    Tile({"BLOCK": 2048, "STAGES": 1}, 4, 1, CARDS, "1 token of Wan-1.3B a step: small blocks, sums over 4 warps only"),
    Tile({"BLOCK": 4096, "STAGES": 2}, 8, 1, CARDS,
         "loads the next tokens while it sums these, for wide rows, of which few blocks fit on a processor"),
    Tile({"BLOCK": 8192, "STAGES": 2}, 16, 1, CARDS,
         "the same, 16 values a thread for a row of Wan-14B (40 heads, padded to 64)"),
)  # fmt: skip
"""``BLOCK``: values at a time. Registers hold whole rows, heads and their channels padded to powers of two. ``STAGES``:
of the loop over tokens."""


def rms_norm_naive(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm in plain PyTorch, with fp32 copies of the sequence (fp64 stays fp64). Differentiable in x and weight."""
    wide = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
    return _normalised(wide, weight_D, eps).to(x_BLD.dtype)


def rope_qk_naive(
    q_BLD: Tensor, k_BLD: Tensor, weight_q_D: Tensor, weight_k_D: Tensor,
    cos: Tensor, sin: Tensor, heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula in plain PyTorch, with fp32 copies of the sequence (fp64 stays fp64). Differentiable in q, k and the
    weights."""
    return _naive(q_BLD, weight_q_D, cos, sin, heads, eps), _naive(k_BLD, weight_k_D, cos, sin, heads, eps)


def _naive(x_BLD: Tensor, weight_D: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    wide = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
    x_1, x_2 = _normalised(wide, weight_D, eps).unflatten(2, (heads, -1)).unflatten(3, (-1, 2)).unbind(-1)
    cos, sin = (table.to(wide.dtype).view(1, x_BLD.shape[1], 1, -1) for table in (cos, sin))
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((x_1 * cos - x_2 * sin, x_1 * sin + x_2 * cos), -1).flatten(3).to(x_BLD.dtype)


def _normalised(wide_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return wide_BLD * torch.rsqrt(wide_BLD.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide_BLD.dtype)


@triton.jit
def _rotated(b_x, b_cos, b_sin, SIGN: tl.constexpr):
    """Rotates pairs of neighbours by the angle of cos and sin [ROWS, 1, BLOCK_DIM], which hold each value twice.
    SIGN -1 rotates back."""
    b_1, b_2 = tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2] // 2, 2]))
    b_c, _ = tl.split(tl.reshape(b_cos, [b_cos.shape[0], 1, b_x.shape[2] // 2, 2]))  # [ROWS, 1, BLOCK_DIM / 2]
    _, b_s = tl.split(tl.reshape(b_sin * SIGN, [b_cos.shape[0], 1, b_x.shape[2] // 2, 2]))
    return tl.reshape(tl.join(b_1 * b_c - b_2 * b_s, b_1 * b_s + b_2 * b_c), b_x.shape)


@tuned(TILES, key=["HEADS", "DIM"])
@triton.jit
def rope_qk_forward_kernel(
    p_x, p_weight, p_cos, p_sin, p_y, p_rstd, length, tokens, stride_xb, stride_xl, stride_cos, stride_sin, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DIM: tl.constexpr, ROTATE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK // (BLOCK_H * BLOCK_DIM) if BLOCK > BLOCK_H * BLOCK_DIM else 1
    chunks = tl.cdiv(length, tokens)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * tokens
    o_h = tl.arange(0, BLOCK_H)[None, :, None]
    o_c = tl.arange(0, BLOCK_DIM)[None, None, :]
    m_d = (o_h < HEADS) & (o_c < DIM)
    o_d = o_h * DIM + o_c
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)  # [1, BLOCK_H, BLOCK_DIM]
    for start in tl.range(first, tl.minimum(first + tokens, length), ROWS, num_stages=STAGES):
        o_l = start + tl.arange(0, ROWS)
        m_l = o_l < length
        o_row = o_l[:, None, None].to(tl.int64)
        m_row = m_l[:, None, None]
        # [ROWS, BLOCK_H, BLOCK_DIM]
        b_x = tl.load(p_x + i_b * stride_xb + o_row * stride_xl + o_d, mask=m_row & m_d, other=0.0).to(tl.float32)
        b_rstd = tl.rsqrt(tl.sum(tl.sum(b_x * b_x, axis=2), axis=1) / (HEADS * DIM) + eps)  # [ROWS]
        b_y = b_x * b_rstd[:, None, None] * b_weight
        if ROTATE:
            b_cos = tl.load(p_cos + o_row * stride_cos + o_c, mask=m_row & (o_c < DIM), other=0.0)
            b_sin = tl.load(p_sin + o_row * stride_sin + o_c, mask=m_row & (o_c < DIM), other=0.0)
            b_y = _rotated(b_y, b_cos, b_sin, 1)
        tl.store(p_y + (i_b * length + o_row) * (HEADS * DIM) + o_d, b_y.to(p_y.dtype.element_ty), mask=m_row & m_d)
        tl.store(p_rstd + i_b * length + o_l, b_rstd, mask=m_l)


@tuned(TILES, key=["HEADS", "DIM", "WANT_WEIGHT"])
@triton.jit
def rope_qk_backward_kernel(
    p_d, p_x, p_weight, p_cos, p_sin, p_rstd, p_dx, p_dweight, length, tokens,
    stride_db, stride_dl, stride_dh, stride_xb, stride_xl, stride_cos, stride_sin,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DIM: tl.constexpr, ROTATE: tl.constexpr,
    WANT_X: tl.constexpr, WANT_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK // (BLOCK_H * BLOCK_DIM) if BLOCK > BLOCK_H * BLOCK_DIM else 1
    chunks = tl.cdiv(length, tokens)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * tokens
    o_h = tl.arange(0, BLOCK_H)[None, :, None]
    o_c = tl.arange(0, BLOCK_DIM)[None, None, :]
    m_d = (o_h < HEADS) & (o_c < DIM)
    o_d = o_h * DIM + o_c
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)  # [1, BLOCK_H, BLOCK_DIM]
    b_dweight = tl.zeros([1, BLOCK_H, BLOCK_DIM], tl.float32)
    for start in tl.range(first, tl.minimum(first + tokens, length), ROWS, num_stages=STAGES):
        o_l = start + tl.arange(0, ROWS)
        m_l = o_l < length
        o_row = o_l[:, None, None].to(tl.int64)
        m_row = m_l[:, None, None]
        p_row = p_d + i_b * stride_db + o_row * stride_dl + o_h.to(tl.int64) * stride_dh + o_c
        b_g = tl.load(p_row, mask=m_row & m_d, other=0.0).to(tl.float32)  # [ROWS, BLOCK_H, BLOCK_DIM]
        b_x = tl.load(p_x + i_b * stride_xb + o_row * stride_xl + o_d, mask=m_row & m_d, other=0.0).to(tl.float32)
        b_rstd = tl.load(p_rstd + i_b * length + o_l, mask=m_l, other=0.0)[:, None, None]
        if ROTATE:
            b_cos = tl.load(p_cos + o_row * stride_cos + o_c, mask=m_row & (o_c < DIM), other=0.0)
            b_sin = tl.load(p_sin + o_row * stride_sin + o_c, mask=m_row & (o_c < DIM), other=0.0)
            b_g = _rotated(b_g, b_cos, b_sin, -1)
        b_n = b_x * b_rstd
        b_gn = b_g * b_n
        if WANT_WEIGHT:
            b_dweight += tl.sum(b_gn, axis=0, keep_dims=True)
        if WANT_X:
            b_mean = tl.sum(tl.sum(b_gn * b_weight, axis=2), axis=1)[:, None, None] / (HEADS * DIM)
            b_dx = ((b_g * b_weight - b_n * b_mean) * b_rstd).to(p_dx.dtype.element_ty)
            tl.store(p_dx + (i_b * length + o_row) * (HEADS * DIM) + o_d, b_dx, mask=m_row & m_d)
    if WANT_WEIGHT:
        tl.store(p_dweight + tl.program_id(0).to(tl.int64) * (HEADS * DIM) + o_d, b_dweight, mask=m_d)


@operator("rope_qk_forward")
def rope_qk_forward(
    x_BLD: Tensor, weight_D: Tensor, cos_Ld: Tensor | None, sin_Ld: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """y (B, L, H, d) and the reciprocal root mean square of each token, (B, L) fp32. Without cos and sin there is no
    rotation."""
    require_card("rope_qk", x_BLD)
    batch, length, width = x_BLD.shape
    x, weight = aligned(x_BLD), weight_D.contiguous()
    cos, sin = (x, x) if cos_Ld is None or sin_Ld is None else (aligned(cos_Ld), aligned(sin_Ld))
    y = torch.empty((batch, length, heads, width // heads), dtype=x.dtype, device=x.device)
    rstd = torch.empty((batch, length), dtype=torch.float32, device=x.device)
    size = _size(heads, width)
    tokens = _tokens(size, sums=False)
    with torch.cuda.device_of(x):
        rope_qk_forward_kernel[(batch * triton.cdiv(length, tokens),)](
            x, weight, cos, sin, y, rstd, length, tokens, *x.stride()[:2], cos.stride(0), sin.stride(0), eps,
            **size, ROTATE=cos_Ld is not None,
        )  # fmt: skip
    return y, rstd


@torch.library.register_fake(rope_qk_forward)
def _(
    x_BLD: Tensor, weight_D: Tensor, cos_Ld: Tensor | None, sin_Ld: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    batch, length, width = x_BLD.shape
    rstd = x_BLD.new_empty((batch, length), dtype=torch.float32)
    return x_BLD.new_empty((batch, length, heads, width // heads)), rstd


@operator("rope_qk_backward")
def rope_qk_backward(
    d_BLHd: Tensor, x_BLD: Tensor, weight_D: Tensor, rstd_BL: Tensor, cos_Ld: Tensor | None, sin_Ld: Tensor | None,
    want_x: bool, want_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and dweight; unwanted gradients are empty tensors. For dweight also allocates L / 64 rows of H * d floats."""
    require_card("rope_qk", d_BLHd)
    batch, length, width = x_BLD.shape
    d, x, weight = aligned(d_BLHd), aligned(x_BLD), weight_D.contiguous()
    cos, sin = (x, x) if cos_Ld is None or sin_Ld is None else (aligned(cos_Ld), aligned(sin_Ld))
    size = _size(d.shape[2], width)
    tokens = _tokens(size, sums=want_weight)
    programs = batch * triton.cdiv(length, tokens)
    dx = torch.empty((batch, length, width) if want_x else 0, dtype=x.dtype, device=x.device)
    dweight = torch.empty((programs, width) if want_weight else 0, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        rope_qk_backward_kernel[(programs,)](
            d, x, weight, cos, sin, rstd_BL, dx, dweight, length, tokens,
            *d.stride()[:3], *x.stride()[:2], cos.stride(0), sin.stride(0),
            **size, ROTATE=cos_Ld is not None, WANT_X=want_x, WANT_WEIGHT=want_weight,
        )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype) if want_weight else weight.new_empty(0)


@torch.library.register_fake(rope_qk_backward)
def _(
    d_BLHd: Tensor, x_BLD: Tensor, weight_D: Tensor, rstd_BL: Tensor, cos_Ld: Tensor | None, sin_Ld: Tensor | None,
    want_x: bool, want_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x_BLD.new_empty(x_BLD.shape if want_x else 0), weight_D.new_empty(weight_D.shape if want_weight else 0)


def _size(heads: int, width: int) -> dict[str, int]:
    dim, power = width // heads, triton.next_power_of_2
    return {"HEADS": heads, "DIM": dim, "BLOCK_H": power(heads), "BLOCK_DIM": power(dim)}


def _tokens(size: dict[str, int], sums: bool) -> int:
    padded = size["BLOCK_H"] * size["BLOCK_DIM"]
    return tokens_of_a_program(padded, sums, max(tile.sizes["BLOCK"] for tile in TILES))


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BLD: Tensor, weight_D: Tensor, cos_Ld: Tensor | None, sin_Ld: Tensor | None, heads: int, eps: float
    ) -> Tensor:
        y, rstd = rope_qk_forward(x_BLD, weight_D, cos_Ld, sin_Ld, heads, eps)
        ctx.save_for_backward(x_BLD, weight_D, rstd, cos_Ld, sin_Ld)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BLHd: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        made = rope_qk_backward(d_BLHd, *ctx.saved_tensors, *wanted)
        return *(gradient if want else None for gradient, want in zip(made, wanted, strict=True)), *(None,) * 4


def rope_qk(
    q_BLD: Tensor, k_BLD: Tensor, weight_q_D: Tensor, weight_k_D: Tensor,
    cos: Tensor, sin: Tensor, heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RMSNorm over the channels of all heads, then rotary embedding of pairs of neighbours, for queries and keys.

    Args:
        q_BLD: `(B, L, H * d)` in bf16, fp16 or fp32, d even; a slice of a longer sequence is not copied.
        k_BLD: the same shape and dtype.
        weight_q_D: `(H * d,)` in bf16, fp16 or fp32.
        weight_k_D: the same.
        cos: `(L, d)` or `(1, L, 1, d)` in fp32, as ``WanRotaryPosEmbed`` makes it; fp64 is rounded to fp32. May be a
            slice of a longer table.
        sin: the same.
        heads: H.
        eps: added to the mean square.

    Returns:
        q and k, `(B, L, H, d)` in their dtype. q, k and the weights get gradients; cos and sin do not.

    Raises:
        TypeError: another dtype. fp64 is for ``rope_qk_naive``.
        ValueError: shapes or devices that do not match, or cos or sin require a gradient.
    """
    _check("rope_qk", {"q": q_BLD, "k": k_BLD}, {"weight_q": weight_q_D, "weight_k": weight_k_D})
    length, width = q_BLD.shape[1:]
    if heads < 1 or width % (2 * heads):
        raise ValueError(f"rope_qk: {width} channels are not {heads} heads of an even number of channels")
    for name, table in {"cos": cos, "sin": sin}.items():
        if table.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"rope_qk: {name} is {table.dtype}; it must be float32 or float64")
        if table.shape not in ((length, width // heads), (1, length, 1, width // heads)):
            wanted = f"for q {tuple(q_BLD.shape)} it must be (L, d) or (1, L, 1, d)"
            raise ValueError(f"rope_qk: {name} has shape {tuple(table.shape)}; {wanted}")
        if table.device != q_BLD.device:
            raise ValueError(f"rope_qk: {name} is on {table.device} and q on {q_BLD.device}; all must be on one device")
        if table.requires_grad:
            raise ValueError(f"rope_qk: {name} wants a gradient, which is not computed; detach it or use rope_qk_naive")
    tables = [table.view(length, -1).float() for table in (cos, sin)]
    q, k = (_NormRotate.apply(x, w, *tables, heads, eps) for x, w in ((q_BLD, weight_q_D), (k_BLD, weight_k_D)))
    return q, k


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm with a weight.

    Args:
        x_BLD: `(B, L, D)` in bf16, fp16 or fp32; a slice of a longer sequence is not copied.
        weight_D: `(D,)` in bf16, fp16 or fp32.
        eps: added to the mean square.

    Returns:
        `(B, L, D)` in the dtype of ``x``, differentiable in x and weight.

    Raises:
        TypeError: another dtype. fp64 is for ``rms_norm_naive``.
        ValueError: shapes or devices that do not match.
    """
    _check("rms_norm", {"x": x_BLD}, {"weight": weight_D})
    return _NormRotate.apply(x_BLD, weight_D, None, None, 1, eps).squeeze(2)


def _check(op: str, sequences: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    x = next(iter(sequences.values()))
    if x.dim() != 3:
        raise ValueError(f"{op}: {next(iter(sequences))} has shape {tuple(x.shape)}; it must be (B, L, D)")
    for name, tensor in (sequences | weights).items():
        if tensor.dtype not in DTYPES or (name in sequences and tensor.dtype != x.dtype):
            known = "bfloat16, float16 and float32, one for all sequences"
            raise TypeError(f"{op}: {name} is {tensor.dtype}; the kernel takes {known}. Else there is {op}_naive")
        if tensor.device != x.device or x.device.type == "meta":
            devices = f"{name} is on {tensor.device}, others on {x.device}"
            raise ValueError(f"{op}: {devices}; all must be on one device that holds values")
        if tensor.shape != (wanted := x.shape if name in sequences else x.shape[2:]):
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {tuple(wanted)}")


def variants(card: int) -> Iterator[Variant]:
    """The least and the most heads of Wan, and the widest norm without rotation; the other dtypes with all gradients.
    What lies between takes fewer registers."""
    bf16 = (((12, 128), False), ((40, 128), False), ((40, 128), True), ((1, 5120), False), ((1, 5120), True))
    others = (((12, 128), True),)
    fp32 = dict.fromkeys(("p_cos", "p_sin", "p_rstd", "p_dweight", "eps"), "fp32")
    for tile in tiles_for(TILES, card):
        for element, shapes in (("bf16", bf16), ("fp16", others), ("fp32", others)):
            for (heads, dim), want_weight in shapes:
                constants = {**_size(heads, heads * dim), "ROTATE": heads > 1}
                if not want_weight:
                    yield variant(rope_qk_forward_kernel.fn, tile, element, constants, **fp32)
                switches = {"WANT_X": True, "WANT_WEIGHT": want_weight}
                yield variant(rope_qk_backward_kernel.fn, tile, element, constants | switches, **fp32)
