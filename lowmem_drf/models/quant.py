"""NF4 weights for the critic, by bitsandbytes (QLoRA, arXiv 2305.14314): the linears of the language model's layers, and nothing else.

Vision tower, embedding and lm_head stay in the model's dtype: 4-bit vision towers break these models, and the other two are looked up or
needed at a few positions. What was quantised is asserted, not believed: ``llm_int8_skip_modules=["visual"]`` skips nothing of
``model.visual``, since transformers matches from the start of a module's name, or at its end.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowmem_drf.errors import BadInputError, LowmemError

Quant = Literal["none", "nf4"]

KEPT = ["model.visual", "model.language_model.embed_tokens", "lm_head"]
"""Module names as transformers 5.17 to 5.23 match them."""

QUANTISED = "model.language_model.layers."
"""How the names of the linears in 4 bit begin."""


def require_library(quant: Quant) -> None:
    """Raises BadInputError for NF4 without bitsandbytes, and for an unknown ``quant``."""
    if quant not in ("none", "nf4"):
        raise BadInputError(f"critic.quant is {quant!r}: it must be 'none' or 'nf4'")
    if quant == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise BadInputError(
                f"critic.quant = nf4 needs bitsandbytes, which cannot be imported ({error}). pip install bitsandbytes, or -s critic.quant=none"
            ) from error


def loading_arguments(quant: Quant, dtype: torch.dtype, device: str | torch.device, already: bool) -> dict[str, Any]:
    """What ``from_pretrained`` needs besides: weights are quantised one by one as they are read, on the device. ``already``: the
    checkpoint's are 4-bit as they lie there."""
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


def quantised_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """An NF4 ``Linear4bit`` with the values of ``weight`` (out, in), on its device."""
    import bitsandbytes as bnb

    rows, columns = weight.shape
    linear = bnb.nn.Linear4bit(columns, rows, bias is not None, dtype, compress_statistics=True, quant_type="nf4", device="meta")
    packed: Any = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear)
    linear.weight = packed.to(weight.device)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def check_quantised(model: Any, quant: Quant, dtype: torch.dtype) -> None:
    """Every linear of the language model's layers is NF4, doubly quantised, and nothing else is quantised. Settles besides what bitsandbytes
    would choose or change later: they compute in ``dtype``, and stay as they are laid out. ``none``: nothing to do.

    Raises:
        LowmemError: names the first module that is not as it should be.
    """
    if quant == "none":
        return
    import bitsandbytes as bnb

    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        in_layers = name.startswith(QUANTISED)
        if not isinstance(module, bnb.nn.Linear4bit):
            if in_layers or not module.weight.dtype.is_floating_point:
                raise LowmemError(_wrong(name, f"is {module.weight.dtype}" + (", and should be NF4" if in_layers else "")))
            continue
        if not in_layers:
            raise LowmemError(_wrong(name, "is quantised, and must stay as it is"))
        state = getattr(module.weight, "quant_state", None)
        if state is None or state.quant_type != "nf4" or not state.nested:
            raise LowmemError(_wrong(name, "is not NF4 with double quantisation"))
        module.compute_dtype, module.compute_type_is_set = dtype, True
        # On processors with AVX512-BF16 a forward without gradient repacks the weight in place, and from then on no gradient passes it.
        module.support_avx512bf16_for_cpu = False


def _wrong(name: str, what: str) -> str:
    return f"The critic was not quantised as asked: {name} {what}. Use an unquantised checkpoint with critic.quant = nf4, or -s critic.quant=none."
