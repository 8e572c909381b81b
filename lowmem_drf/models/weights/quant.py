"""Which weights are kept in 4 or 8 bit (``packed.PackedLinear``), and the proof that these are and no others.

Critic (``critic.quant``): the linears of the language model's layers. Vision tower, embedding and lm_head stay in the
model's dtype: 4-bit vision towers break these models, and the other two are looked up or needed at a few positions.
transformers quantises them with bitsandbytes as it reads; what was quantised is asserted, not believed:
``llm_int8_skip_modules=["visual"]`` skips nothing of ``model.visual``, since transformers matches from the start of a
module's name, or at its end.

Transformer (``model.quant``): the linears of the blocks' attentions (to_q, to_k, to_v, to_out.0) and feed-forwards
(net.0.proj, net.2): 98% of the weights of Wan2.1-1.3B and of 14B. The rest stays in the dtypes of ``from_pretrained``:
patch embedding, text embedding and time projection (condition_embedder), the norms of q and k and the last projection
(proj_out) in 16 bits; modulation (scale_shift_table), the other norms and the time embedder in 32; biases in those of
their layers. They are few, and every block's input passes through them. Cost: ``python -m bench.accuracy.quant_error``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.models.weights.packed_linear import PackedLinear, Packing

Quant = Literal["none"] | Packing

KEPT = ["model.visual", "model.language_model.embed_tokens", "lm_head"]
"""Of a critic, module names as transformers 5.17 to 5.23 match them."""

_BLOCK_LINEAR = re.compile(r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))")


def in_critic(name: str) -> bool:
    """Whether a linear of this name is packed in a critic."""
    return name.startswith("model.language_model.layers.")


def in_transformer(name: str) -> bool:
    """Whether a linear of this name is packed in a Wan transformer (diffusers' names)."""
    return _BLOCK_LINEAR.fullmatch(name) is not None


def require_library(quant: str, key: str = "critic.quant", choices: tuple[str, ...] = ("none", "nf4")) -> None:
    """Raises BadInputError for a ``quant`` that is not one of ``choices``, and for NF4 without bitsandbytes."""
    if quant not in choices:
        raise BadInputError(f"{key} is {quant!r}: it must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}")
    if quant == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise BadInputError(
                f"{key} = nf4 needs bitsandbytes, which cannot be imported ({error}). pip install bitsandbytes, or -s {key}=none"
            ) from error


def lay_out(model: Any, quant: Quant, inside: Callable[[str], bool]) -> None:
    """Puts a ``PackedLinear`` without values in the place of each linear that is to be packed. ``none``: nothing to
    do."""
    if quant == "none":
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and inside(name):
            model.set_submodule(
                name, PackedLinear(module.in_features, module.out_features, module.bias is not None, quant)
            )


def loading_arguments(quant: Quant, dtype: torch.dtype, device: str | torch.device, already: bool) -> dict[str, Any]:
    """What ``from_pretrained`` of a critic needs besides: weights are quantised one by one as they are read, on the
    device. ``already``: the checkpoint's are 4-bit as they lie there."""
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


def take_over(model: Any, dtype: torch.dtype) -> None:
    """Makes the linears that bitsandbytes quantised ours, in their places and without a copy. All other parameters are
    in ``dtype`` then: transformers leaves those of a checkpoint that is quantised already as they are.

    Raises:
        LowmemError: one of them is not NF4 with double quantisation.
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
    """Every linear of the names that ``inside`` accepts is packed as ``quant`` says, and nothing else is quantised.
    ``none``: nothing to do.

    Raises:
        LowmemError: names the first module that is not as it should be.
    """
    if quant == "none":
        return
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            if not inside(name):
                raise LowmemError(_wrong(role, quant, f"{name} is quantised, and must stay as it is"))
            if module.quant != quant:
                raise LowmemError(_wrong(role, quant, f"{name} is {module.quant.upper()}"))
            continue
        wanted = isinstance(module, nn.Linear) and inside(name)
        for parameter in module.parameters(recurse=False):
            if wanted or not parameter.dtype.is_floating_point:
                raise LowmemError(
                    _wrong(
                        role,
                        quant,
                        f"{name} is {parameter.dtype}" + (f", and should be {quant.upper()}" if wanted else ""),
                    )
                )


def _wrong(role: str, quant: str, what: str) -> str:
    key = "critic.quant" if role == "critic" else "model.quant"
    return f"The {role} was not quantised as asked: {what}. Use an unquantised checkpoint with {key} = {quant}, or -s {key}=none."
