"""``model.transformer``: one safetensors file with a Wan transformer, as ComfyUI and Wan's own repositories have it, in place of a folder's.

Its tensors have Wan's own names, bare or behind ``diffusion_model.`` or ``model.diffusion_model.``, or diffusers' names. It says nothing of the
model's configuration: that is the one of ``model.id``, and the file must fit it exactly. Each tensor is converted by itself: the host never
holds the model twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.known_generators import generator_config
from lowmem_drf.models.random_generator import empty_transformer, fill_as_loaded
from lowmem_drf.models.wan_names import wan_name
from lowmem_drf.models.weight_files import PICKLES, damage, read_header

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_FLOATS = ("F64", "F32", "F16", "BF16")
_OTHER_KINDS = {"img_emb.": "an image-to-video", "vace_blocks.": "a VACE", "face_adapter.": "an Animate", "motion_encoder.": "an Animate"}


def load_single_file(file: str | Path, folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> WanTransformer3DModel:
    """The transformer in a single file: frozen, eval, in the dtypes of ``load_denoiser``.

    Args:
        folder_or_id: ``model.id``, whose configuration it has (``generator_config``).

    Raises:
        BadInputError: no such file, another format, quantised weights, a cut file, or not a transformer of this configuration.
    """
    from safetensors import safe_open

    path = Path(file).expanduser()
    header = _checked_header(path)
    model = empty_transformer(generator_config(folder_or_id).transformer)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    names = _matched(path, header, shapes, folder_or_id)
    with safe_open(path, framework="pt") as stream:

        def value_of(wanted: torch.dtype) -> Callable[[str, Sequence[int]], Tensor]:
            # a copy, for a tensor that needs no conversion is a view of the file, which may change
            return lambda name, shape: stream.get_tensor(names[name]).to(device, wanted, copy=True)

        return fill_as_loaded(model, dtype, value_of).to(device)


def _checked_header(path: Path) -> dict[str, Any]:
    """The file's tensors by name: dtype and shape."""
    advice = "Give the 16-bit safetensors file of the model."
    if path.suffix == ".gguf":
        raise BadInputError(f"model.transformer, {path}: GGUF files hold quantised weights, which are not trained on. {advice}")
    if path.suffix in PICKLES:
        raise BadInputError(f"model.transformer, {path}: only safetensors files are loaded; pickles can run code. {advice}")
    if not path.is_file():
        raise BadInputError(f"model.transformer: there is no file {path}. {advice}")
    if what := damage(path):
        raise BadInputError(f"model.transformer, {path} {what}. Get it anew.")
    header = {name: entry for name, entry in read_header(path)[0].items() if name != "__metadata__"}
    low = sorted(name for name, entry in header.items() if entry["dtype"] not in _FLOATS)
    scaled = sorted(name for name in header if name.rpartition(".")[2] in ("scale_weight", "scale_input", "weight_scale", "scaled_fp8", "comfy_quant"))
    if low or scaled:
        first = (low or scaled)[0]
        raise BadInputError(f"model.transformer, {path} is quantised ({first} is {header[first]['dtype']}): a LoRA is trained on full weights. {advice}")
    return header


def _matched(path: Path, header: Mapping[str, Any], shapes: Mapping[str, list[int]], folder_or_id: str) -> dict[str, str]:
    """diffusers' name of each parameter -> its name in the file. Raises BadInputError where the two do not match one to one."""
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in header)), "")
    in_file = {name.removeprefix(prefix): name for name in header}
    for beginning, kind in _OTHER_KINDS.items():
        if any(name.startswith(beginning) for name in in_file):
            raise BadInputError(f"model.transformer, {path} is {kind} transformer, and this program trains Wan's text-to-video models.")
    as_diffusers = any(".attn1." in name for name in in_file)
    wanted = {name if as_diffusers else wan_name(name): name for name in shapes}
    problems = []
    if missing := sorted(wanted.keys() - in_file.keys()):
        problems.append(f"lacks {len(missing)} tensors of it ({_some(missing)})")
    if unexpected := sorted(in_file.keys() - wanted.keys()):
        problems.append(f"has {len(unexpected)} that it has not ({_some(unexpected)})")
    common = sorted(wanted.keys() & in_file.keys())
    if other := [own for own in common if list(header[in_file[own]]["shape"]) != shapes[wanted[own]]]:
        own = other[0]
        problems.append(f"has {len(other)} of another shape ({own} is {header[in_file[own]]['shape']}, wanted is {shapes[wanted[own]]})")
    if problems:
        raise BadInputError(
            f"model.transformer, {path}, does not fit the configuration of {folder_or_id}: it {'; '.join(problems)}.\n"
            "Let model.id name the model that the file is a version of."
        )
    return {wanted[own]: in_file[own] for own in common}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
