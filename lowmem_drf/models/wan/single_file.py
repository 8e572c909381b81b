"""``model.transformer``: a Wan transformer in one safetensors file, as ComfyUI and Wan's repositories have it, instead
of a folder's.

Its tensors have Wan's names, bare or with prefix ``diffusion_model.`` or ``model.diffusion_model.``, or diffusers'
names. The file has no configuration: it must exactly fit that of ``model.id``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.wan.names import wan_name
from lowmem_drf.models.wan.random_generator import empty_transformer
from lowmem_drf.models.weights.files import PICKLES, damage
from lowmem_drf.models.weights.quant import Quant
from lowmem_drf.models.weights.reader import DTYPES, Changes, Entry, TensorFiles, fill_from_files, parameter_shapes
from lowmem_drf.texts import expanded, one_line, some

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SCALES = ("scale_weight", "scale_input", "weight_scale", "scaled_fp8", "comfy_quant")
_OTHER_KINDS = {
    "img_emb.": "an image-to-video",
    "vace_blocks.": "a VACE",
    "face_adapter.": "an Animate",
    "motion_encoder.": "an Animate",
}


def load_single_file(
    file: str | Path,
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quant: Quant = "none",
    home: str | torch.device | None = None,
    changes: Changes | None = None,
    blocks: int | None = None,
    taken: Callable[[torch.nn.Parameter], None] | None = None,
) -> WanTransformer3DModel:
    """The transformer in a single file: frozen, eval, in the dtypes of ``load_denoiser``.

    Args:
        folder_or_id: ``model.id``, which gives the configuration (``generator_config``).
        quant, home, changes, blocks, taken: as in ``load_denoiser``.

    Raises:
        BadInputError: no such file, another format, quantised weights, a truncated file, not a transformer of this
            configuration, or bitsandbytes is missing.
    """
    path = expanded(file)
    files = _checked(path)
    model = empty_transformer(generator_config(folder_or_id).transformer, quant=quant)
    names = _matched(path, files.entries, parameter_shapes(model), folder_or_id)
    return fill_from_files(model, files, names, dtype, device, home, changes, blocks, taken)


def _checked(path: Path) -> TensorFiles:
    """The file's tensors. Raises BadInputError if they must not be read."""
    advice = "Give the 16-bit safetensors file of the model."
    if path.suffix == ".gguf":
        raise BadInputError(
            f"model.transformer, {path}: GGUF files hold quantised weights; model.quant quantises full ones. {advice}"
        )
    if path.suffix in PICKLES:
        raise BadInputError(
            f"model.transformer, {path}: only safetensors files are loaded; pickles can run code. {advice}"
        )
    if not path.is_file():
        raise BadInputError(f"model.transformer: there is no file {path}. {advice}")
    if what := damage(path):
        raise BadInputError(f"model.transformer, {path} {what}. Get it anew.")
    files = TensorFiles([path])
    low = sorted(name for name, entry in files.entries.items() if entry.dtype not in DTYPES)
    scaled = sorted(name for name in files.entries if name.rpartition(".")[2] in _SCALES)
    if low or scaled:
        first = (low or scaled)[0]
        raise BadInputError(
            f"model.transformer, {path} is quantised ({one_line(first, 80)} is {files.entries[first].dtype}); "
            f"model.quant quantises full weights. {advice}"
        )
    return files


def _matched(
    path: Path, header: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], folder_or_id: str
) -> dict[str, str]:
    """diffusers' name of each parameter -> its name in the file. Raises BadInputError unless they match one to one."""
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in header)), "")
    in_file = {name.removeprefix(prefix): name for name in header}
    for beginning, kind in _OTHER_KINDS.items():
        if any(name.startswith(beginning) for name in in_file):
            raise BadInputError(
                f"model.transformer, {path} is {kind} transformer, and this program trains Wan's text-to-video models."
            )
    as_diffusers = any(".attn1." in name for name in in_file)
    wanted = {name if as_diffusers else wan_name(name): name for name in shapes}
    problems = []
    if missing := sorted(wanted.keys() - in_file.keys()):
        problems.append(f"lacks {len(missing)} tensors of it ({some(missing)})")
    if unexpected := sorted(in_file.keys() - wanted.keys()):
        problems.append(f"has {len(unexpected)} that it has not ({some(unexpected)})")
    common = sorted(wanted.keys() & in_file.keys())
    if other := [own for own in common if header[in_file[own]].shape != shapes[wanted[own]]]:
        own, found = other[0], list(header[in_file[other[0]]].shape)
        problems.append(f"has {len(other)} of another shape ({own} is {found}, wanted is {list(shapes[wanted[own]])})")
    if problems:
        raise BadInputError(
            f"model.transformer, {path}, does not fit the configuration of {folder_or_id}: it {'; '.join(problems)}.\n"
            "Let model.id name the model that the file is a version of."
        )
    return {wanted[own]: in_file[own] for own in common}
