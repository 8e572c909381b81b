"""The keys of LoRA files: which module of a Wan transformer a tensor changes, and which part of the change it is.

    diffusion_model.blocks.0.self_attn.q.lora_A.weight      ComfyUI; also lora_down, with .alpha
    lora_unet_blocks_0_self_attn_q.lora_down.weight         kohya (musubi-tuner), with .alpha
    lora_unet__blocks_0_self_attn_q.lora_down.weight        VideoX-Fun
    lycoris_blocks_0_attn1_to_q.lokr_w1                     LyCORIS (SimpleTuner)
    lora_transformer_blocks_0_attn1_to_q.lora_down.weight   OneTrainer
    transformer.blocks.0.attn1.to_q.lora_A.weight           diffusers; transformer_2. for the low-noise expert
    base_model.model.blocks.0.attn1.to_q.lora_A.weight      peft
    blocks.0.self_attn.q.lora_A.default.weight              DiffSynth-Studio

Underscores in place of dots lose nothing, since no two modules of Wan then have the same name. So every name is
compared in that form, in Wan's naming and in diffusers'. Sources: ``comfy/lora.py``, ``comfy/lora_convert.py`` and
``comfy/weight_adapter/`` of ComfyUI, ``loaders/lora_conversion_utils.py`` of diffusers 0.42.1, LyCORIS, peft 0.21.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.wan.kinds import kind_of
from lowmem_drf.models.wan.names import IN_BLOCK, OUTSIDE
from lowmem_drf.texts import shown, some

Expert = Literal["", "low", "high"]

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
    r"\.(b?oft_\w+|oft_blocks|oft_diag)": "OFT",
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


def read_keys(keys: Iterable[str], expert: Expert = "") -> Keys:
    """Sorts a file's keys.

    Args:
        expert: of a model with two, the one that the LoRA is for. "": the model has one transformer.

    Raises:
        BadInputError: no LoRA, one of another method or model, an unknown key, or one module under two names.
    """
    found = Keys()
    split: list[tuple[str, str, str, str]] = []  # key, prefix, stem, part
    plain: list[str] = []
    for key in keys:
        if _TEXT.match(key):
            found.left_out.setdefault(TEXT_ENCODER, []).append(key)
            continue
        prefix, stem, part = _split(key)
        if part:
            split.append((key, prefix, stem, part))
        else:
            plain.append(key)
    if plain:
        _refuse_plain(plain, bool(split))
    if not split:
        raise BadInputError(
            "it is a LoRA of a text encoder alone, and text encoders are not trained or changed here"
            if found.left_out
            else "it holds no tensors"
        )
    split = _of_expert(split, expert, found)
    found.layout = _layout(split)
    wan_naming = _naming({stem for _, _, stem, _ in split}, {prefix for _, prefix, _, _ in split})
    for key, _, stem, part in split:
        module = _module(stem, part, wan_naming)
        if module is None:
            raise _of_another_model(key, stem)
        parts = found.modules.setdefault(module, {})
        if other := parts.get(part):
            raise BadInputError(
                f"it holds {shown(module)} twice, as {shown(other)} and as {shown(key)}: two files seem to be mixed"
            )
        parts[part] = key
        found.stems.setdefault(module, stem)
    return found


def _split(key: str) -> tuple[str, str, str]:
    """(prefixes, name of the module without them, part); part "" if the ending is unknown."""
    rest, prefix = _ADAPTER.sub(r"\1", key), ""
    while match := _PREFIX.match(rest):
        prefix, rest = prefix + match[0], rest[match.end() :]
    for ending, part in _PARTS.items():
        if rest.endswith(f".{ending}"):
            return prefix, rest[: -len(ending) - 1], part
        if ending.startswith("lora.") and rest.endswith(f"_{ending}"):  # diffusers' old attention processors
            stem = rest[: -len(ending) - 1].replace(".processor.", ".")
            return prefix, f"{stem}.0" if stem.endswith("to_out") else stem, part
    return prefix, rest, ""


def _flat(names: Mapping[str, str]) -> dict[str, str]:
    """Either name, with underscores -> diffusers' name."""
    return {either.replace(".", "_"): name for name, own in names.items() for either in (own, name)}


_BOTH = ("norm2", "norm3")
"""Names of different modules in the two namings."""
_IN_A_BLOCK = _flat(IN_BLOCK)
_OUTSIDE_BLOCKS = _flat(OUTSIDE)
_WAN_ONLY = {own.replace(".", "_") for names in (IN_BLOCK, OUTSIDE) for own in names.values()}
_DIFFUSERS_ONLY = {name.replace(".", "_") for names in (IN_BLOCK, OUTSIDE) for name in names}
_BLOCK = re.compile(r"blocks_(\d{1,4})(?:_(.+))?")


def _module(stem: str, part: str, wan_naming: bool | None) -> str | None:
    """diffusers' name, or ``None`` if a Wan transformer has no such module."""
    flat = stem.replace(".", "_")
    match = _BLOCK.fullmatch(flat)
    if match is None:
        if part == "diff_m" and flat == "head":
            return "scale_shift_table"
        return _OUTSIDE_BLOCKS.get(flat)
    block = f"blocks.{int(match[1])}"
    if match[2] is None:
        return f"{block}.scale_shift_table" if part == "diff_m" else None
    if match[2] in _BOTH:
        if wan_naming is None:
            raise BadInputError(
                f"its module {shown(stem)} is another one in Wan's naming than in diffusers', and the file does not "
                "say which it uses"
            )
        return f"{block}.{names_of(wan_naming)[match[2]]}"
    name = _IN_A_BLOCK.get(match[2])
    return name and f"{block}.{name}"


def names_of(wan_naming: bool) -> dict[str, str]:
    """Of ``norm2`` and ``norm3``: a file's name -> diffusers'."""
    return {own: name for name, own in IN_BLOCK.items() if own in _BOTH} if wan_naming else {n: n for n in _BOTH}


def _naming(stems: set[str], prefixes: set[str]) -> bool | None:
    """True: the file uses Wan's names; False: diffusers'; ``None``: both, or it cannot be told."""
    flat = {
        match[2] if (match := _BLOCK.fullmatch(stem.replace(".", "_"))) else stem.replace(".", "_") for stem in stems
    }
    wan, diffusers = bool(flat & (_WAN_ONLY - _DIFFUSERS_ONLY)), bool(flat & (_DIFFUSERS_ONLY - _WAN_ONLY))
    if wan == diffusers == False:  # noqa: E712 (a chain: neither)
        wan, diffusers = any("diffusion_model." in prefix for prefix in prefixes), "transformer." in prefixes
    return None if wan == diffusers else wan


def _of_expert(split: list[tuple[str, str, str, str]], expert: Expert, found: Keys) -> list[tuple[str, str, str, str]]:
    """Of a file for two experts, the entries for one."""
    second = [entry for entry in split if "transformer_2." in entry[1]]
    first = [entry for entry in split if "transformer_2." not in entry[1]]
    if second and first:
        taken, left, of = (second, first, "high") if expert == "low" else (first, second, "low")
        found.left_out[f"the {of}-noise transformer"] = [entry[0] for entry in left]
        return taken
    if second and expert == "high":
        raise BadInputError('it is a LoRA of the low-noise transformer (transformer_2.), and model.expert = "high"')
    return split


def _layout(split: list[tuple[str, str, str, str]]) -> str:
    prefix, _ = Counter(prefix for _, prefix, _, _ in split).most_common(1)[0]
    for beginning, layout in _LAYOUTS.items():
        if prefix.startswith(beginning):
            return layout
    is_wan = _naming({stem for _, _, stem, _ in split}, set())
    if any(".default." in key for key, *_ in split):
        return "DiffSynth-Studio" if is_wan else "peft"
    return "Wan's names without a prefix" if is_wan else "diffusers' names without a prefix"


def _refuse_plain(plain: list[str], has_lora: bool) -> None:
    """Raises BadInputError for keys that end in no part of a LoRA."""
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
        kind, cure = kind_of(plain, complete=False) or ("the weights of a model", _AS_MODEL)
    raise BadInputError(f"it is {kind}, no LoRA ({some(plain, 2)}). {cure}")


def _of_another_model(key: str, stem: str) -> BadInputError:
    """The error for a module that no text-to-video transformer of Wan has."""
    if kind := kind_of([f"{stem}."], complete=False):
        return BadInputError(f"it is a LoRA of {kind[0]}, not of a Wan text-to-video model ({shown(key)})")
    return BadInputError(f"its tensor {shown(key)} belongs to no module of a Wan transformer: it is of another model")
