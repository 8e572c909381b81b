"""Which programs take a LoRA file of Wan as it is, and what they do not apply. Decided by the names of its tensors.

Written from ``loaders/lora_conversion_utils.py``, ``lora_pipeline.py`` and ``peft.py`` of diffusers 0.42.1 (the tests
call the first two), ``comfy/lora.py``, ``lora_convert.py`` and ``weight_adapter/`` of ComfyUI (commit 17358c8), and
``utils/lora_utils.py`` and ``convert_lora.py`` of musubi-tuner (commit 0bcd20e). ComfyUI and musubi-tuner refuse
nothing: they log the tensors that they do not know, and leave them out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lowmem_drf.models.family import Verdict
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.wan.names import BLOCK_LINEARS, IMAGE_LINEARS, IN_BLOCK, OUTSIDE
from lowmem_drf.texts import one_line

_LINEARS, _OF_IMAGES = list(BLOCK_LINEARS.values()), list(IMAGE_LINEARS.values())
_IN_BLOCK = {own.replace(".", "_") for own in IN_BLOCK.values()}
_OUTSIDE = {own.replace(".", "_") for own in OUTSIDE.values()}
_LORA = ("lora_up.weight", "lora_down.weight", "alpha")
_FACTORS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b"),
)
_COMFYUI = (
    *_LORA,
    *_FACTORS,
    *("lora_A.default.weight", "lora_B.default.weight", "lora_A.weight", "lora_B.weight", "lora.up.weight"),
    *("lora.down.weight", "lora_linear_layer.up.weight", "lora_linear_layer.down.weight", "lora_A", "lora_B"),
    *("dora_scale", "w_norm", "b_norm", "diff", "diff_b"),
)


def verdicts(lora: LoraChanges, header: Mapping[str, Any]) -> list[Verdict]:
    """One for each program. ``header``: of the file, its tensors alone."""
    return [_comfyui(lora, header), _diffusers(header), _musubi(lora, header)]


def _comfyui(lora: LoraChanges, keys: Collection[str]) -> Verdict:
    fun = any(key.startswith("lora_unet__") for key in keys)
    if fun and "lora_unet__blocks_0_cross_attn_k.lora_down.weight" in keys:
        keys = [key.replace("lora_unet__", "lora_unet_", 1) for key in keys]
    left = [key for key in keys if not _known(key, ("diffusion_model.", "lora_unet_"), _COMFYUI)]
    if len(left) == len(keys):
        if fun:
            return Verdict("ComfyUI", "no", "it knows lora_unet__ only in files that change cross-attention of block 0")
        return Verdict("ComfyUI", "no", f"it knows no such names for Wan ({_first(left)})")
    why = f"it leaves out {_counted(left)}" if left else ""
    if factor := _unread_scale(lora, keys):
        why += f"{'; ' if why else ''}it does not read the scale in the header: set the strength to {factor}"
    return Verdict("ComfyUI", "in part" if why else "yes", why)


def _musubi(lora: LoraChanges, keys: Collection[str]) -> Verdict:
    left = [key for key in keys if not _known(key, ("lora_unet_",), (*_LORA, *_FACTORS))]
    if not left:
        return Verdict("musubi-tuner", "yes")
    if len(left) < len(keys):
        return Verdict("musubi-tuner", "in part", f"it leaves out {_counted(left)}")
    plain = ("lora_A.weight", "lora_B.weight", *_LORA)
    if all(_known(key.replace("transformer.", "diffusion_model.", 1), ("diffusion_model.",), plain) for key in keys):
        scale = f", then set the multiplier to {factor}" if (factor := _unread_scale(lora, keys)) else ""
        return Verdict("musubi-tuner", "no", f"convert it with its convert_lora.py --target default{scale}")
    return Verdict("musubi-tuner", "no", f"it reads lora_unet_ with Wan's names alone ({_first(left)})")


def _known(key: str, prefixes: Collection[str], endings: Collection[str]) -> bool:
    """Whether a key is one of Wan's own names between one of the prefixes and one of the endings."""
    prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
    ending = next((ending for ending in endings if key.endswith(f".{ending}")), None)
    if prefix is None or ending is None:
        return False
    stem = key[len(prefix) : -len(ending) - 1]
    flat = stem.replace(".", "_") if prefix.endswith(".") else stem
    block = re.fullmatch(r"blocks_\d+_(.+)", flat)
    return block[1] in _IN_BLOCK if block else flat in _OUTSIDE


def _unread_scale(lora: LoraChanges, keys: Collection[str]) -> str:
    """The scale of a LoRA that has it in peft's settings and not in alpha tensors; "" if it is 1 everywhere."""
    scales = {round(pair.scale, 6) for pair in lora.pairs.values()}
    if scales <= {1.0} or any(key.endswith(".alpha") for key in keys):
        return ""
    return f"{min(scales):g}" if len(scales) == 1 else f"{min(scales):g} to {max(scales):g}, module by module"


def _diffusers(header: Mapping[str, Any]) -> Verdict:
    """``WanPipeline.load_lora_weights``."""
    why, left, keys = "", list[str](), header.keys()
    for prefix in ("diffusion_model.", "lora_unet_"):
        if not any(key.startswith(prefix) for key in keys):
            continue
        rest = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        if odd := [key for key in keys if not key.startswith(prefix)]:
            why = f"it cannot read {_first(odd)} beside names with {prefix} (ValueError)"
        elif prefix == "lora_unet_":
            why = _from_kohya(rest)
        else:
            why, left = _from_wan(rest)
        break
    else:
        why, left = _native(keys)
    if odd := [key for key in keys if _is_flat(key) and len(header[key]["shape"]) > 2]:
        why = why or f"{_first(odd)} has more than two dimensions (RuntimeError)"
    if any(key.endswith(".alpha") for key in keys) and any(header[key]["dtype"].startswith("F8") for key in keys):
        why = why or "it cannot multiply numbers in 8 bit by alpha (NotImplementedError)"
    if len(left) == len(keys):
        why = why or f"it leaves out {_counted(left)}, which is all"
    if why:
        return Verdict("diffusers", "no", why)
    return Verdict("diffusers", "in part" if left else "yes", f"it leaves out {_counted(left)}" if left else "")


def _is_flat(key: str) -> bool:
    """Whether it is a matrix of a Linear."""
    return "patch_embedding" not in key and bool(re.search(r"lora[._](A|B|up|down)\b", key))


def _from_wan(rest: set[str]) -> tuple[str, list[str]]:
    """``_convert_non_diffusers_wan_lora_to_diffusers``: (why it fails, what it drops)."""
    down = "lora_A" if any("lora_A" in key for key in rest) else "lora_down"
    up = "lora_B" if any("lora_B" in key for key in rest) else "lora_up"
    blocks = [int(key.split(".")[1]) for key in rest if re.match(r"blocks\.\d+\.", key)]
    if not blocks:
        return "it needs at least one block in the file (ValueError)", []
    dropped = {key for key in rest if key.endswith((".diff", ".diff_b")) and "norm" in key}
    if not any(key.startswith("time_projection") and key.endswith(".weight") for key in rest):
        dropped |= {key for key in rest if "time_projection" in key}
    left = rest - dropped
    for number in range(min(blocks), max(blocks) + 1):
        for own in _LINEARS + _taken_of_images(rest):
            stem = f"blocks.{number}.{own}"
            left -= {f"{stem}.{part}" for part in (f"{down}.weight", f"{up}.weight", "alpha", "diff_b")}
    if f"head.head.{down}.weight" in rest or "head.head.diff_b" in rest:
        left.discard("head.head.diff")
    for stem in ("img_emb.proj.1", "img_emb.proj.3"):
        pair = {f"{stem}.{down}.weight", f"{stem}.{up}.weight"}
        left -= {*pair, *([f"{stem}.diff_b"] if f"{stem}.{up}.weight" in rest else [])}
    for stem in ("time_projection.1", "head.head", *(f"{x}_embedding.{i}" for x in ("text", "time") for i in (0, 2))):
        mine = {key for key in rest - dropped if key.startswith(f"{stem}.")}
        pair = {f"{stem}.{down}.weight", f"{stem}.{up}.weight"}
        if mine and "embedding" in stem and not pair <= mine:
            return f"it needs a pair of matrices for {stem} (KeyError)", []
        left -= {*pair, f"{stem}.diff_b"}
    if not all(".diff" in key for key in left):
        return f"it knows no {_first([key for key in left if '.diff' not in key])} in such a file (ValueError)", []
    used = rest - dropped - left
    return _uneven(used, (f".{down}.weight", ".diff"), ".diff_b"), sorted(dropped | left)


def _taken_of_images(rest: Collection[str]) -> list[str]:
    """The layers for an image, which it takes where a file has some of both kinds."""
    return _OF_IMAGES if all(any(f"{x}_img" in key for key in rest) for x in "kv") else []


def _uneven(used: Collection[str], pairs: tuple[str, ...], biases: str) -> str:
    """Why a file fails that has biases for some of its layers: peft then adds one to every layer, and diffusers leaves
    those that the file lacks on the meta device."""
    with_pair = {key.removesuffix(ending) for ending in pairs for key in used if key.endswith(ending)}
    with_bias = {key.removesuffix(biases) for key in used if key.endswith(biases)}
    if not with_bias or with_bias == with_pair:
        return ""
    return (
        f"{len(with_bias)} of its layers have a bias and {len(with_pair)} a pair of matrices: it leaves the rest empty"
    )


def _from_kohya(rest: set[str]) -> str:
    """``_convert_musubi_wan_lora_to_diffusers``: why it fails."""
    if odd := [key for key in rest if not re.match(r"blocks_\d+_", key)]:
        return f"it knows no {_first(odd)} in a file with lora_unet_ (KeyError)"
    count = len({key.split("_")[1] for key in rest})
    flat = [own.replace(".", "_") for own in _LINEARS + _taken_of_images(rest)]
    wanted = {f"blocks_{i}_{own}.{part}" for i in range(count) for own in flat for part in _LORA}
    if missing := wanted - rest:
        return (
            f"it needs every attention and feed-forward layer, with its alpha ({_first(missing)} is missing; KeyError)"
        )
    if odd := [*(rest - wanted)]:
        return f"it knows no {_first(odd)} in a file with lora_unet_ (ValueError)"
    return ""


def _native(keys: Collection[str]) -> tuple[str, list[str]]:
    """Names of diffusers itself: (why it fails, what it leaves out)."""
    left = [key for key in keys if "dora_scale" in key]
    if odd := [key for key in keys if "lora" not in key]:
        return f"it takes no tensors like {_first(odd)} (ValueError)", []
    taken = [key for key in keys if key.startswith("transformer.") and "dora_scale" not in key]
    if not taken:
        return "its names lack the prefix transformer., so it loads nothing, and only warns", []
    if odd := [
        key
        for key in taken
        if not re.search(r"((lora_[AB]|[._]lora\.(up|down))\.(weight|bias)|lora_magnitude_vector(\.weight)?)$", key)
    ]:
        return f"it does not read {_first(odd)}", []
    if odd := [key for key in taken if re.search(r"\.(self_attn|cross_attn)\.", key)]:
        return f"it expects its own names after transformer., not Wan's ({_first(odd)}; ValueError)", []
    left += [key for key in taken if re.search(r"\.(to_out|net)\.[\w.]+_lora\.(up|down)\.", key)]
    uneven = _uneven(taken, (".lora_A.weight",), ".lora_B.bias")
    return uneven, [*left, *(key for key in keys if not key.startswith("transformer."))]


def _first(keys: Collection[str]) -> str:
    return one_line(min(keys), 48)


def _counted(keys: Collection[str]) -> str:
    """Keys by their endings: "30 tensors diff_m"."""
    kinds: dict[str, int] = {}
    for key in keys:
        ending = next(
            (end for end in ("diff_m", "diff_b", "diff", "alpha", "dora_scale") if key.endswith(f".{end}")), ""
        )
        what = f"{'norms: ' if 'norm' in key and ending else ''}.{ending}" if ending else f"like {one_line(key, 48)}"
        kinds[what] = kinds.get(what, 0) + 1
    if len(kinds) > 4:
        return f"{len(keys)} tensors ({_first(keys)}, …)"
    return ", ".join(f"{count} {'tensor' if count == 1 else 'tensors'} {what}" for what, count in sorted(kinds.items()))
