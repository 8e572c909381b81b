"""The keys of LoRA files: which module of a transformer a tensor changes, and which part of the change it is.

    diffusion_model.blocks.0.self_attn.q.lora_A.weight      ComfyUI; also lora_down, with .alpha
    lora_unet_blocks_0_self_attn_q.lora_down.weight         kohya (musubi-tuner), with .alpha
    lora_unet__blocks_0_self_attn_q.lora_down.weight        VideoX-Fun
    lycoris_blocks_0_attn1_to_q.lokr_w1                     LyCORIS (SimpleTuner)
    lora_transformer_blocks_0_attn1_to_q.lora_down.weight   OneTrainer
    transformer.blocks.0.attn1.to_q.lora_A.weight           diffusers; transformer_2. for the low-noise expert
    base_model.model.blocks.0.attn1.to_q.lora_A.weight      peft
    blocks.0.self_attn.q.lora_A.default.weight              DiffSynth-Studio

The examples are of Wan. Underscores in place of dots lose nothing, since no two modules then have the same name. So
every name is compared in that form, in the family's own naming and in diffusers'. Sources: ``comfy/lora.py``,
``comfy/lora_convert.py`` and ``comfy/weight_adapter/`` of ComfyUI, ``loaders/lora_conversion_utils.py`` of diffusers
0.42.1, LyCORIS, peft 0.21.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.generators import FAMILIES, names_of
from lowmem_drf.texts import shown, some

if TYPE_CHECKING:
    from lowmem_drf.models.experts import Expert
    from lowmem_drf.models.family import Family

TEXT_ENCODER = "text encoder"

LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_PARTS = {
    **dict.fromkeys(("lora_A.weight", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"), "A"),
    **dict.fromkeys(("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"), "B"),
    **dict.fromkeys(("lora_B.bias", "lora_up.bias"), "bias"),
    "lora_A": "A",
    "lora_B": "B",
    "alpha": "alpha",
    **dict.fromkeys(("diff", "w_norm"), "diff"),
    **dict.fromkeys(("diff_b", "b_norm"), "diff_b"),
    "diff_m": "diff_m",
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector.weight", "lora_magnitude_vector"), "dora"),
    **{part: part for part in (*LOKR, *LOHA)},
}
"""Ending of a key -> part of the module's change."""

_ADAPTER = re.compile(
    r"(\.(?:lora_(?:A|B|magnitude_vector)|lokr_\w+|hada_\w+))\.(?!weight$|bias$)\w+(?=\.weight$|\.bias$|$)"
)
"""peft's name of the adapter inside a key: ``.lora_A.default.weight``."""

_PREFIX = re.compile(
    r"base_model\.model\.|(?:model\.)?diffusion_model\.|transformer\.|transformer_2\.|pipe\.dit\.|dit\.|module\.|model\."
    r"|lora_unet__?|lora_transformer_|lycoris_(?:unet_|transformer_)?"
)
_LAYOUTS = {
    "lora_unet__": "VideoX-Fun",
    "lora_unet_": "kohya (musubi-tuner)",
    "lycoris_": "LyCORIS",
    "lora_transformer_": "OneTrainer",
    "diffusion_model.": "ComfyUI",
    "model.diffusion_model.": "ComfyUI",
    "base_model.model.": "peft",
    "pipe.dit.": "DiffSynth-Studio",
    "transformer.": "diffusers",
    "transformer_2.": "diffusers",
}
_TEXT = re.compile(
    r"lora_(?:prior_)?te\d*_|lycoris_te|(?:base_model\.model\.)?(?:text_encoders?(?:_\d)?|cond_stage_model|conditioner"
    r"|te\d?|t5xxl|umt5\w*|clip_[lg]|text_model)\."
)
_OTHER_METHODS = {
    r"\.b?oft_\w+": "OFT",
    r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$": "GLoRA",
    r"\.(ia3_l|on_input)\b": "IA3",
    r"\.vera_lambda": "VeRA",
    r"\.lora_E\b": "AdaLoRA",
    r"\.(lora_mid\.weight|hada_t[12]|lokr_t2)$": "a LoRA of convolutions in three factors",
    r"\.set_weight$": "a file of weights that replace a model's",
    r"\.(lora_embedding_[AB])": "a LoRA of embeddings",
    r"\.(hra_u|shira_weight|fourierft_spectrum|poly_lora_\w+|randlora_\w+|lntuning_\w+)": "another method of peft",
}
"""In a key -> the method, which is not read."""
_AS_MODEL = "Give it as model.transformer"


@dataclass
class Keys:
    """What the keys of a file mean."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    """diffusers' module name (without prefix) -> part -> key. The name of a modulation is that of the parameter."""
    stems: dict[str, str] = field(default_factory=dict)
    """Module name -> the name in the file, without prefix and part."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Why -> keys."""
    layout: str = ""


def read_keys(keys: Iterable[str], expert: Expert | None = None) -> Keys:
    """Sorts a file's keys.

    Args:
        expert: of a model with two, the one that the LoRA is for. ``None``: the model has one transformer.

    Raises:
        BadInputError: no LoRA, one of another method or model, an unknown key, or one module under two names.
    """
    found = Keys()
    split: list[_Key] = []
    for key in keys:
        if _TEXT.match(key):
            found.left_out.setdefault(TEXT_ENCODER, []).append(key)
        else:
            split.append(_split(key))
    if plain := [key.text for key in split if not key.part]:
        _refuse_plain(plain, has_lora=len(plain) < len(split))
    if not split:
        raise BadInputError(
            "it is a LoRA of a text encoder alone, and text encoders are not trained or changed here"
            if found.left_out
            else "it holds no tensors"
        )
    split = _of_expert(split, expert, found)
    names = _Names(family_with(key.stem for key in split))
    found.layout = _layout(split, names)
    is_own = _is_own(split, names)
    for entry in split:
        module = _module(entry, is_own, names)
        if module is None:
            raise _of_another_model(entry, names.family)
        parts = found.modules.setdefault(module, {})
        if other := parts.get(entry.part):
            both = f"{shown(other)} and {shown(entry.text)}"
            raise BadInputError(f"it holds {shown(module)} twice: {both}. Two files seem to be mixed")
        parts[entry.part] = entry.text
        found.stems.setdefault(module, entry.stem)
    return found


class _Key(NamedTuple):
    text: str
    prefix: str
    stem: str
    """Name of the module in the file, without prefix and part."""
    part: str
    """Empty if the ending is unknown."""

    @property
    def flat(self) -> str:
        return self.stem.replace(".", "_")


def _split(key: str) -> _Key:
    rest, prefix = _ADAPTER.sub(r"\1", key), ""
    while match := _PREFIX.match(rest):
        prefix, rest = prefix + match[0], rest[match.end() :]
    for ending, part in _PARTS.items():
        if rest.endswith(f".{ending}"):
            return _Key(key, prefix, rest[: -len(ending) - 1], part)
        if ending.startswith("lora.") and rest.endswith(f"_{ending}"):  # diffusers' old attention processors
            stem = rest[: -len(ending) - 1].replace(".processor.", ".")
            return _Key(key, prefix, f"{stem}.0" if stem.endswith("to_out") else stem, part)
    return _Key(key, prefix, rest, "")


def _flat(names: Mapping[str, str]) -> dict[str, str]:
    """Either name, with underscores -> diffusers' name."""
    return {either.replace(".", "_"): name for name, own in names.items() for either in (own, name)}


class _Names:
    """The names of a family's modules, with underscores in place of dots."""

    def __init__(self, family: Family) -> None:
        self.family = family
        tables = in_block, outside = family.NAMES.in_block, family.NAMES.outside
        self.in_block, self.outside = _flat(in_block), _flat(outside)
        self.own = {own.replace(".", "_") for names in tables for own in names.values()}
        self.diffusers = {name.replace(".", "_") for names in tables for name in names}
        self.swapped = {own: name for name, own in in_block.items() if own != name and own in in_block}
        """Its own name -> diffusers', where each is a name of the other too: Wan's ``norm2`` and ``norm3``."""
        self.block = re.compile(rf"{family.BLOCKS}_(\d{{1,4}})(?:_(.+))?")


def family_with(modules: Iterable[str]) -> Family:
    """The family that has most of these modules, by either name; of several, that whose blocks have fewest others."""
    flat = [module.replace(".", "_") for module in modules]

    def count(family: Family) -> tuple[int, int]:
        names = _Names(family)
        inner = [match[2] if (match := names.block.fullmatch(name)) else name for name in flat]
        found = sum(name in names.in_block or name in names.outside for name in inner)
        return found, -len(family.NAMES.linears) if found else 0

    return max(FAMILIES, key=count)


def _module(key: _Key, is_own: bool | None, names: _Names) -> str | None:
    """diffusers' name, or ``None`` if a transformer of the family has no such module."""
    match = names.block.fullmatch(key.flat)
    if match is None:
        whole_head = key.part == "diff_m" and key.flat == "head"
        return "scale_shift_table" if whole_head else names.outside.get(key.flat)
    block, inner = f"{names.family.BLOCKS}.{int(match[1])}", match[2]
    if inner is None:
        return f"{block}.scale_shift_table" if key.part == "diff_m" else None
    if inner not in names.swapped:
        return f"{block}.{names.in_block[inner]}" if inner in names.in_block else None
    if is_own is None:
        raise BadInputError(
            f"its module {shown(key.stem)} is another one in {names.family.NAME}'s naming than in diffusers', and the "
            "file does not say which it uses"
        )
    return f"{block}.{names.swapped[inner] if is_own else inner}"


def _is_own(keys: Collection[_Key], names: _Names) -> bool | None:
    """True: the names are the family's own; False: diffusers'; ``None``: both, or it cannot be told."""
    inner = {match[2] if (match := names.block.fullmatch(key.flat)) else key.flat for key in keys}
    own, diffusers = bool(inner & (names.own - names.diffusers)), bool(inner & (names.diffusers - names.own))
    if not own and not diffusers:
        own = any("diffusion_model." in key.prefix for key in keys)
        diffusers = any("transformer." in key.prefix for key in keys)
    return None if own == diffusers else own


def _of_expert(keys: list[_Key], expert: Expert | None, found: Keys) -> list[_Key]:
    """Of a file for two experts, the keys for one."""
    second = [key for key in keys if "transformer_2." in key.prefix]
    first = [key for key in keys if "transformer_2." not in key.prefix]
    if second and first:
        taken, left, of = (second, first, "high") if expert == "low" else (first, second, "low")
        found.left_out[f"the {of}-noise transformer"] = [key.text for key in left]
        return taken
    if second and expert == "high":
        raise BadInputError('it is a LoRA of the low-noise transformer (transformer_2.), and model.expert = "high"')
    return keys


def _layout(keys: Collection[_Key], names: _Names) -> str:
    prefix, _ = Counter(key.prefix for key in keys).most_common(1)[0]
    for beginning, layout in _LAYOUTS.items():
        if prefix.startswith(beginning):
            return layout
    if any(".default." in key.text for key in keys):
        return "DiffSynth-Studio" if _is_own(keys, names) else "peft"
    return (
        f"{names.family.NAME}'s names without a prefix" if _is_own(keys, names) else "diffusers' names without a prefix"
    )


def _refuse_plain(plain: list[str], has_lora: bool) -> None:
    """Raises BadInputError for keys that end in no part of a LoRA."""
    if any(key.endswith((".exp_avg", ".exp_avg_sq")) for key in plain):
        raise BadInputError("it is the optimizer's state of a checkpoint; the LoRA is lora.safetensors beside it")
    for pattern, method in _OTHER_METHODS.items():
        if hit := next((key for key in plain if re.search(pattern, key)), ""):
            raise BadInputError(f"it is {method} ({shown(hit)}), which is not read: LoRA, LoKr, LoHa and DoRA are")
    if has_lora:
        raise BadInputError(
            f"{len(plain)} of its tensors are no part of a LoRA ({some(plain)}): whole weights beside a LoRA, such as "
            "peft's modules_to_save, are not read"
        )
    if any(key.startswith(("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.")) for key in plain):
        kind, cure = "an all-in-one checkpoint", _AS_MODEL
    else:
        kind, cure = family_with(plain).kind_of(plain, complete=False) or ("the weights of a model", _AS_MODEL)
    raise BadInputError(f"it is {kind}, no LoRA ({some(plain, 2)}). {cure}")


def _of_another_model(key: _Key, family: Family) -> BadInputError:
    """The error for a module that no transformer of the families has."""
    if kind := family.kind_of([f"{key.stem}."], complete=False):
        names = names_of(FAMILIES)
        return BadInputError(f"it is a LoRA of {kind[0]}, not of a {names} model ({shown(key.text)})")
    return BadInputError(
        f"its tensor {shown(key.text)} belongs to no module of a {family.NAME} transformer: it is of another model"
    )
