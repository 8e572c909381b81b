"""Which linear layers are stored in 4 or 8 bits (``packed_linear.PackedLinear``), and a check that exactly these are.

Critic (``critic.quant``): the layers of the language model. Vision tower, embedding and lm_head keep the model's dtype:
4-bit vision towers break these models, and the other two are used at few positions. transformers quantises with
bitsandbytes while it reads. The result is checked because ``llm_int8_skip_modules=["visual"]`` does not skip
``model.visual``: transformers matches the start or the end of a module's name.

Transformer (``model.quant``): the attentions and feed-forwards of the blocks, which the generator's family names: 98%
of the weights of Wan2.1-1.3B and 14B. The rest keeps the dtypes of ``from_pretrained``; it is small, and
every block's input passes through it. Cost: ``python -m bench.accuracy.quant_error``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.models.weights.packed_linear import PackedLinear, Packing

Quant = Literal["none"] | Packing

KEPT = [
    *("model.visual", "model.language_model.embed_tokens", "lm_head"),
    *("model.vision_model", "model.connector", "model.text_model.embed_tokens"),
]
"""A critic's unquantised modules, named as transformers 5.17 to 5.23 match them."""


def in_critic(name: str) -> bool:
    """True if a linear layer of this name is packed in a critic."""
    return name.startswith(("model.language_model.layers.", "model.text_model.layers."))


def require_library(quant: str, key: str = "critic.quant", choices: tuple[str, ...] = ("none", "nf4")) -> None:
    """Raises BadInputError for a ``quant`` that is not one of ``choices``, and for NF4 without bitsandbytes."""
    if quant not in choices:
        *first, last = map(repr, choices)
        raise BadInputError(f"{key} is {quant!r}: it must be {', '.join(first)} or {last}")
    if quant == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise BadInputError(
                f"{key} = nf4 needs bitsandbytes, which cannot be imported ({error}). pip install bitsandbytes, "
                f"or -s {key}=none"
            ) from error


def lay_out(model: Any, quant: Quant, inside: Callable[[str], bool]) -> None:
    """Replaces every linear layer that ``inside`` accepts by an empty ``PackedLinear``; nothing for ``none``."""
    if quant == "none":
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and inside(name):
            packed = PackedLinear(module.in_features, module.out_features, module.bias is not None, quant)
            model.set_submodule(name, packed)


def set_products(model: Any, int8: bool) -> None:
    """Lets the layers that are stored in int8 also multiply in 8 bit, or not."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.int8_products = int8 and module.quant == "int8"


def loading_arguments(quant: Quant, dtype: torch.dtype, device: str | torch.device, already: bool) -> dict[str, Any]:
    """Arguments with which a critic's ``from_pretrained`` quantises on the device, weight by weight. ``already``: the
    checkpoint is 4-bit."""
    if quant == "none":
        return {}
    if already:
        return {"device_map": {"": str(device)}}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=KEPT,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def convert_bnb(model: Any, dtype: torch.dtype) -> None:
    """Turns bitsandbytes' linear layers into ``PackedLinear`` without a copy, and casts all other parameters to
    ``dtype``: transformers does not cast those of a quantised checkpoint.

    Raises LowmemError: a layer is not NF4 with double quantisation.
    """
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            try:
                model.set_submodule(name, PackedLinear.from_bnb(module))
            except LowmemError as error:
                raise LowmemError(_wrong("critic", "nf4", f"{name} {error}")) from error
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def check_quantised(model: Any, quant: Quant, inside: Callable[[str], bool], role: str = "critic") -> None:
    """Raises LowmemError unless the linear layers that ``inside`` accepts, and no others, are packed as ``quant``. The
    message names the first wrong module. ``none``: checks nothing."""
    if quant == "none":
        return
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            if not inside(name):
                raise LowmemError(_wrong(role, quant, f"{name} is quantised, and must not be"))
            if module.quant != quant:
                raise LowmemError(_wrong(role, quant, f"{name} is {module.quant.upper()}"))
            continue
        wanted = isinstance(module, nn.Linear) and inside(name)
        for parameter in module.parameters(recurse=False):
            if wanted or not parameter.dtype.is_floating_point:
                expected = f", and should be {quant.upper()}" if wanted else ""
                raise LowmemError(_wrong(role, quant, f"{name} is {parameter.dtype}{expected}"))


def _wrong(role: str, quant: str, what: str) -> str:
    key = "critic.quant" if role == "critic" else "model.quant"
    return (
        f"The {role} was not quantised as asked: {what}. "
        f"Use an unquantised checkpoint with {key} = {quant}, or -s {key}=none."
    )
