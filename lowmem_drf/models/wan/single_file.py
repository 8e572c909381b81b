"""``model.transformer``: a Wan transformer in one file, as ComfyUI and Wan's repositories have it, not in a folder.

The file is safetensors, also with weights in fp8 (``fp8_files``), or GGUF (``gguf_files``). Its tensors have Wan's
names or diffusers', with or without a prefix; other models may be beside it. It has no configuration: it must exactly
fit that of ``model.id``. Every tensor is used, left out for a reason that is said, or named in the refusal.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.wan.kinds import ITS_OWN, OURS, kind_of
from lowmem_drf.models.wan.names import wan_name
from lowmem_drf.models.wan.random_generator import empty_transformer
from lowmem_drf.models.weights.files import PICKLES, damage, is_pickle
from lowmem_drf.models.weights.fp8_files import Fp8Files
from lowmem_drf.models.weights.gguf_files import GgufFiles, is_gguf
from lowmem_drf.models.weights.quant import Quant
from lowmem_drf.models.weights.reader import Changes, Shapes, TensorFiles, fill_from_files, parameter_shapes
from lowmem_drf.texts import expanded, some

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_PREFIXES = ("", "model.", "transformer.", "diffusion_model.", "model.diffusion_model.")
_BESIDE = {
    "text_encoders": "the text encoder",
    "text_encoder": "the text encoder",
    "cond_stage_model": "the text encoder",
    "conditioner": "the text encoder",
    "vae": "the VAE",
    "first_stage_model": "the VAE",
    "clip_vision": "the image encoder",
    "image_encoder": "the image encoder",
}
"""First part of a name in an all-in-one checkpoint -> the model that is not the transformer."""
_BUFFER = re.compile(r"(rope\.)?freqs(_cos|_sin)?")
"""Wan's own checkpoints may carry its table of rotary frequencies, which are computed."""
Source = Fp8Files | GgufFiles
_FULL = "Give the model in 16 bits, in fp8 or as GGUF"


def load_single_file(
    file: str | Path,
    config: Mapping[str, Any],
    model: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quant: Quant = "none",
    home: str | torch.device | None = None,
    changes: Changes | None = None,
    blocks: int | None = None,
    taken: Callable[[torch.nn.Parameter], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> WanTransformer3DModel:
    """The transformer in a single file: frozen, eval, in the dtypes of ``load_denoiser``.

    Args:
        config: ``config.json`` of the transformer.
        model: ``model.id``, whose configuration it is, for messages.
        quant, home, changes, blocks, taken: as in ``load_denoiser``.
        say: is told in one line what is dequantised and what is left out.

    Raises:
        BadInputError: no such file, another format or kind of model, weights quantised in a way that is not read, a
            damaged file, not a transformer of this configuration, or bitsandbytes or gguf is missing.
    """
    path = expanded(file)
    files = _opened(path)
    empty = empty_transformer(config, quant=quant)
    names, left_out = _matched(path, files, empty, model)
    stored, unused = files.said(names.values())
    parts = [f"{stored}, dequantised as they are read"] * bool(stored)
    parts += [f"left out: {', '.join([*left_out, *unused])}"] * bool(left_out or unused)
    if say is not None and parts:
        say(f"{path}: {'; '.join(parts)}")
    return fill_from_files(empty, files, names, dtype, device, home, changes, blocks, taken)


def _opened(path: Path) -> Source:
    """The file's tensors. Raises BadInputError for a missing, unsafe or damaged file."""
    if path.is_dir():
        raise BadInputError(f"model.transformer, {path}, is a folder. Give model.id the folder, or the file in it.")
    if path.suffix in PICKLES or is_pickle(path):
        raise BadInputError(
            f"model.transformer, {path}: only safetensors and GGUF files are loaded; pickles can run code. "
            "Give one of these, or convert it with the tool that made it."
        )
    if not path.is_file():
        raise BadInputError(f"model.transformer: there is no file {path}. {_FULL}.")
    try:
        if is_gguf(path):
            return GgufFiles(path)
        if what := damage(path):
            raise ValueError(what)
        return Fp8Files(TensorFiles([path]))
    except ValueError as error:
        raise BadInputError(f"model.transformer, {path} {error}. Get it anew.") from error


def _matched(path: Path, files: Source, model: torch.nn.Module, folder_or_id: str) -> tuple[dict[str, str], list[str]]:
    """(diffusers' name of each parameter -> its name in the file, what is left out, in words). Raises BadInputError
    unless they match one to one."""
    shapes = parameter_shapes(model)
    wanted, prefix = _naming(files.entries.keys(), shapes)
    in_file, strays, left_out = dict[str, str](), list[str](), Counter[str]()
    for name in files.entries:
        own = name.removeprefix(prefix)
        if own not in wanted and (what := _unused(name, own, model)):
            left_out[what] += 1
        elif name.startswith(prefix):
            in_file[own] = name
        else:
            strays.append(name)
    if isinstance(files, GgufFiles):
        files.reshape({in_file[own]: shapes[wanted[own]] for own in wanted.keys() & in_file.keys()})
    held = {own: files.entries[name].shape for own, name in in_file.items()}
    problems = list(_problems(held, {own: shapes[name] for own, name in wanted.items()}, strays))
    odd = in_file.keys() - wanted.keys() if in_file else files.entries.keys()
    kind = kind_of(odd, wanted.keys() <= in_file.keys()) or _by_channels(held, model, folder_or_id)
    if problems and kind:
        raise BadInputError(f"model.transformer, {path}, is {kind[0]}. {kind[1]}.")
    try:
        files.check(in_file.values())
    except ValueError as error:
        raise BadInputError(f"model.transformer, {path} {error}. This is not read. {_FULL}.") from error
    if problems:
        shard = re.search(r"-\d{5}-of-\d{5}\.safetensors", path.name)
        cure = "the folder that it is a part of" if shard else "the model that the file is a version of"
        raise BadInputError(
            f"model.transformer, {path}, does not fit the configuration of {folder_or_id}: it {'; '.join(problems)}.\n"
            f"Let model.id name {cure}."
        )
    return {wanted[own]: in_file[own] for own in in_file}, [f"{count} {what}" for what, count in left_out.items()]


def _naming(names: Collection[str], shapes: Shapes) -> tuple[dict[str, str], str]:
    """(name as the file has it -> diffusers' name, prefix in the file): those that most of ``names`` have."""
    namings = [{wan_name(name): name for name in shapes}, {name: name for name in shapes}]
    choices = [(naming, prefix) for naming in namings for prefix in _PREFIXES]
    return max(choices, key=lambda choice: sum(choice[1] + name in names for name in choice[0]))


def _unused(name: str, own: str, model: torch.nn.Module) -> str:
    """Why a tensor is left out, in words; "" if it has to be a parameter."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if beside := _BESIDE.get(name.partition(".")[0]):
        return f"tensors of {beside}"
    if _BUFFER.fullmatch(own):
        return "table of frequencies, which is computed"
    return "that diffusers leaves out too" if any(part in own for part in ignored) else ""


def _problems(held: Shapes, wanted: Shapes, strays: list[str]) -> Iterator[str]:
    """What keeps the file's tensors from being the parameters."""
    if missing := sorted(wanted.keys() - held.keys()):
        yield f"lacks {len(missing)} tensors of it ({some(missing)})"
    if unexpected := sorted([*(held.keys() - wanted.keys()), *strays]):
        yield f"has {len(unexpected)} that it has not ({some(unexpected)})"
    if other := sorted(own for own in wanted.keys() & held.keys() if held[own] != wanted[own]):
        shapes = f"{list(held[other[0]])}, wanted is {list(wanted[other[0]])}"
        yield f"has {len(other)} of another shape ({other[0]} is {shapes})"


def _by_channels(held: Shapes, model: Any, folder_or_id: str) -> tuple[str, str] | None:
    """As ``kind_of``, for transformers that differ in the channels of their first layer."""
    found, wanted = held.get("patch_embedding.weight", ()), tuple(model.patch_embedding.weight.shape)
    if len(found) != len(wanted) or found[1] == wanted[1] or (found[0], *found[2:]) != (wanted[0], *wanted[2:]):
        return None
    takes = f"its first layer takes {found[1]} channels, that of {folder_or_id} {wanted[1]}"
    if found[1] == model.config.out_channels:
        return f"a text-to-video transformer: {takes}", ITS_OWN
    if found[1] > 2 * model.config.out_channels:
        return f"an image-to-video or control transformer: {takes}", ITS_OWN
    return f"a control transformer: {takes}", OURS
