"""Files that change more than pairs of matrices do: differences of weights, biases, norms and modulations, LoKr, LoHa
and DoRA. Sources of the rules: ``layouts``."""

from __future__ import annotations

from functools import partial

import torch

from bench.lora.facts import LoraFile
from bench.lora.names import (
    BARE_WAN,
    COMFY,
    COMFY_DOWN,
    DIFFUSERS,
    EMBEDDERS,
    LYCORIS,
    MUSUBI,
    ONETRAINER,
    OUTSIDE,
)
from bench.lora.rows import FULL, Rows, pairs

ROWS = Rows()
layout = ROWS.layout


@layout("lora_B.bias, diffusers", DIFFUSERS)
def lora_bias(file: LoraFile) -> None:
    for module in FULL:
        file.pair(module)
        file.whole(module, ".lora_B.bias", "bias")


@layout("diff_b of biases beside pairs, ComfyUI", COMFY_DOWN)
def diff_b(file: LoraFile) -> None:
    for module in FULL:
        file.pair(module, alpha=2)
        file.whole(module, ".diff_b", "bias")


@layout("LyCORIS full: diff and diff_b of every Linear", LYCORIS)
def lycoris_full(file: LoraFile) -> None:
    for module in FULL:
        file.whole(module, ".diff", "weight")
        file.whole(module, ".diff_b", "bias")


@layout("LyCORIS w_norm and b_norm", LYCORIS)
def lycoris_norm(file: LoraFile) -> None:
    pairs(FULL, alpha=2)(file)
    for number in range(2):
        file.whole(f"blocks.{number}.norm2", ".w_norm", "weight")
        file.whole(f"blocks.{number}.norm2", ".b_norm", "bias")


@layout("norm differences alone, ComfyUI", COMFY)
def norms_alone(file: LoraFile) -> None:
    _differences(file)


@layout("norm differences beside bare Wan names", BARE_WAN)
def norms_bare(file: LoraFile) -> None:
    """Wan's norm3 is diffusers' norm2."""
    pairs()(file)
    _differences(file)


@layout("norm differences beside diffusers' names", DIFFUSERS)
def norms_diffusers(file: LoraFile) -> None:
    pairs()(file)
    _differences(file)


@layout("LightX2V: every module, norms, biases, modulation", COMFY_DOWN)
def lightx2v(file: LoraFile) -> None:
    """As extracted from a whole distilled model: what is no matrix comes as a difference."""
    for module in (*FULL, *OUTSIDE):
        file.pair(module, 3)
        file.whole(module, ".diff_b", "bias")
    _differences(file)
    file.whole("patch_embedding", ".diff", "weight")
    file.whole("patch_embedding", ".diff_b", "bias")
    for name in ("blocks.0", "blocks.1", ""):
        parameter = f"{name}.scale_shift_table".lstrip(".")
        key = f"diffusion_model.{name or 'head'}.diff_m"
        file.tensors[key] = file.random(*file.base[parameter].shape)
        file.changed(parameter, file.tensors[key])


def _differences(file: LoraFile) -> None:
    for number in range(2):
        for norm in ("attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k", "norm2"):
            file.whole(f"blocks.{number}.{norm}", ".diff", "weight")
        file.whole(f"blocks.{number}.norm2", ".diff_b", "bias")


@layout("LightX2V 2.2: head.head.diff as a matrix", COMFY_DOWN)
def lightx2v_head(file: LoraFile) -> None:
    pairs(FULL, 3)(file)
    file.whole("proj_out", ".diff", "weight")
    file.whole("proj_out", ".diff_b", "bias")


@layout("CausVid: pairs, time projection, norms", COMFY_DOWN, torch.float16)
def causvid(file: LoraFile) -> None:
    for module in (*FULL, *OUTSIDE):
        file.pair(module, 4)
        file.whole(module, ".diff_b", "bias")
    _differences(file)


@layout("alpha outside of the blocks too", COMFY_DOWN)
def alpha_outside(file: LoraFile) -> None:
    for module in (*FULL, *OUTSIDE):
        file.pair(module, 4, alpha=2)


@layout("AccVideo: time projection's bias without weight", COMFY_DOWN)
def accvideo(file: LoraFile) -> None:
    for module in (*FULL, *EMBEDDERS):
        file.pair(module, 3)
        file.whole(module, ".diff_b", "bias")
    file.whole("condition_embedder.time_proj", ".diff_b", "bias")


@layout("a pair and a difference of one weight", COMFY_DOWN)
def both(file: LoraFile) -> None:
    for module in FULL:
        file.pair(module, alpha=2)
        file.whole(module, ".diff", "weight")


@layout("modulation.diff, as ComfyUI names parameters", COMFY)
def modulation(file: LoraFile) -> None:
    pairs(FULL)(file)
    for name in ("blocks.0.scale_shift_table", "scale_shift_table"):
        file.whole(name, ".diff", "")


def _kron(
    file: LoraFile, module: str, factor: int, rank1: int, rank2: int, alpha: float | None, dora: bool = False
) -> None:
    """LyCORIS: w1 (x) w2, each full or a product; alpha / rank counts where one is a product."""
    out, width = file.base[f"{module}.weight"].shape
    small, large = (factor, factor), (out // factor, width // factor)
    scale = 1.0 if alpha is None or not (rank1 or rank2) else alpha / (rank2 or rank1)
    file.alpha(module, alpha)
    factors, sizes = [], []
    for name, (rows, columns), rank in (("lokr_w1", small, rank1), ("lokr_w2", large, rank2)):
        if rank:
            a = file.put(module, f".{name}_a", file.random(rows, rank))
            b = file.put(module, f".{name}_b", file.random(rank, columns))
            factors.append(a @ b)
            sizes.append(a.abs() @ b.abs())
        else:
            factors.append(file.put(module, f".{name}", file.random(rows, columns)))
            sizes.append(factors[-1].abs())
    size, delta = abs(scale) * torch.kron(*sizes), scale * torch.kron(*factors)
    if dora:
        _decomposed(file, module, delta, size, axis=0, roundings=rank1 + rank2)
    else:
        file.changed(f"{module}.weight", delta, size, rank1 + rank2 + 5)


def _lokr(file: LoraFile, rank1: int = 0, rank2: int = 0, alpha: float | None = None, dora: bool = False) -> None:
    for module in FULL:
        _kron(file, module, 4, rank1, rank2, alpha, dora)


for name, names, arguments in (
    ("LoKr, full w1, w2_a/w2_b, LyCORIS", LYCORIS, dict(rank2=2, alpha=1)),
    ("LoKr, w1_a/w1_b, w2_a/w2_b, LyCORIS", LYCORIS, dict(rank1=2, rank2=2, alpha=1)),
    ("LoKr, full w1 and w2, alpha ignored, LyCORIS", LYCORIS, dict(alpha=1)),
    ("LoKr with DoRA, LyCORIS", LYCORIS, dict(rank2=2, alpha=1, dora=True)),
    ("LoKr, w2_a/w2_b, musubi", MUSUBI, dict(rank2=2, alpha=1)),
    ("LoKr, w2_a/w2_b, no alpha, ComfyUI", COMFY, dict(rank2=2)),
    ("LoKr, full w1 and w2, no alpha, ComfyUI", COMFY, {}),
    ("LoKr, full, alpha 9999999999 (ai-toolkit)", COMFY, dict(alpha=9999999999.0)),
):
    layout(name, names)(partial(_lokr, **arguments))
layout("LoKr, full, alpha 9999999999 in fp16 is inf (ai-toolkit)", COMFY, torch.float16)(
    partial(_lokr, alpha=9999999999.0)
)


def _loha(file: LoraFile, alpha: float | None) -> None:
    """LyCORIS: alpha / rank (w1_a w1_b) * (w2_a w2_b), element by element."""
    rank = 3
    for module in FULL:
        out, width = file.base[f"{module}.weight"].shape
        file.alpha(module, alpha)
        a, b, c, d = (
            file.put(module, f".hada_{end}", file.random(*shape))
            for end, shape in (
                *(("w1_a", (out, rank)), ("w1_b", (rank, width))),
                *(("w2_a", (out, rank)), ("w2_b", (rank, width))),
            )
        )
        scale = 1.0 if alpha is None else alpha / rank
        size = scale * (a.abs() @ b.abs()) * (c.abs() @ d.abs())
        file.changed(f"{module}.weight", scale * (a @ b) * (c @ d), size, 2 * rank + 5)


layout("LoHa, LyCORIS", LYCORIS)(partial(_loha, alpha=2))
layout("LoHa, musubi", MUSUBI)(partial(_loha, alpha=2))
layout("LoHa, no alpha, ComfyUI", COMFY)(partial(_loha, alpha=None))


def _decomposed(
    file: LoraFile, module: str, delta: torch.Tensor, size: torch.Tensor, axis: int, roundings: int
) -> None:
    """DoRA: m (W + delta) / |W + delta|; ``axis`` 0: one norm for each output (a row), 1: for each input (a column)."""
    file.trainable = False
    file.relative.add(f"{module}.weight")
    weight = file.base[f"{module}.weight"]
    norm = weight.norm(dim=1 - axis, keepdim=True)
    m = file.put(module, ".dora_scale", (norm * (1 + file.random(*norm.shape).double())).abs().to(file.dtype))
    changed = weight + delta
    ratio = m / changed.norm(dim=1 - axis, keepdim=True)
    size = ratio * (weight.abs() + size) + weight.abs()
    file.changed(f"{module}.weight", ratio * changed - weight, size, roundings + max(weight.shape) + 8)


def _dora(file: LoraFile, axis: int, alpha: float | None = 2.0) -> None:
    rank, scale = 4, 1.0 if alpha is None else alpha / 4
    for module in FULL:
        out, width = file.base[f"{module}.weight"].shape
        file.alpha(module, alpha)
        a = file.put(module, file.names.a, file.random(rank, width))
        b = file.put(module, file.names.b, file.random(out, rank))
        _decomposed(file, module, scale * (b @ a), scale * (b.abs() @ a.abs()), axis, rank)


layout("DoRA, dora_scale on the output axis, LyCORIS", LYCORIS)(partial(_dora, axis=0))
layout("DoRA, dora_scale on the input axis, OneTrainer", ONETRAINER)(partial(_dora, axis=1))
layout("DoRA, dora_scale on the input axis, ComfyUI", COMFY_DOWN)(partial(_dora, axis=1, alpha=None))
layout("DoRA, dora_scale on the output axis, bf16", LYCORIS, torch.bfloat16)(partial(_dora, axis=0))


@layout("pairs, LoKr and differences in one file", LYCORIS)
def mixed(file: LoraFile) -> None:
    for i, module in enumerate(FULL):
        if i % 3 == 0:
            file.pair(module, alpha=2)
        elif i % 3 == 1:
            _kron(file, module, 4, 0, 2, 1.0)
        else:
            file.whole(module, ".diff", "weight")
