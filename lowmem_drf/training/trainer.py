"""What an update does with the LoRA's gradients: one process by itself, or many together (``distributed.zero``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from lowmem_drf.assembly.assemble import Models
from lowmem_drf.models.lora.adapter import named_lora
from lowmem_drf.models.lora.optimizers import (
    fill_states,
    make_optimizer,
    pack_optimizer,
    paged_moments,
    unpack_optimizer,
)
from lowmem_drf.models.wan.denoiser import as_velocity
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import AdamW


class Trainer(Protocol):
    """The optimizer of the LoRA."""

    def accumulate(self) -> AbstractContextManager[None]:
        """Around all backwards of an update, which add to ``.grad`` of the LoRA's tensors. Many processes: at its end
        they average."""
        ...

    def step(self, lr: float) -> float:
        """Clips and steps with this rate. Returns the norm of the gradient before clipping, NaN or infinite if that
        was: then no weight changed."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within the block the LoRA's tensors have their values. Of many processes all enter it."""
        ...

    def pack(self) -> dict[str, Tensor]:
        """The state as tensors on the CPU (``optimizers.pack_optimizer``), the same for any number of processes, all of
        which call it."""
        ...

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Puts ``pack``'s tensors back. Raises BadInputError for the state of another optimizer."""
        ...


class SingleTrainer:
    """One process.

    Args:
        lora: the trainable tensors by name.
    """

    def __init__(self, config: Config, lora: Mapping[str, nn.Parameter]) -> None:
        self._names, self._lora = list(lora), list(lora.values())
        self._clip = config.optim.grad_clip
        self._optimizer = make_optimizer(config.optim, self._lora)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        for tensor in self._lora:
            tensor.grad = torch.zeros_like(tensor)
        yield

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self._lora, self._clip)
        if bool(norm.isfinite()):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fill(self) -> None:
        """Makes the moments that the first step would make."""
        fill_states(self._optimizer)

    def paged(self) -> list[Tensor]:
        """The moments that may move to the host."""
        return paged_moments(self._optimizer)

    def pack(self) -> dict[str, Tensor]:
        return pack_optimizer(self._optimizer, self._names)

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        unpack_optimizer(self._optimizer, self._names, packed)


def make_trainer(
    config: Config, models: Models, abort: Callable[[BaseException], None] = lambda error: None
) -> tuple[Trainer, Models]:
    """The trainer of these models' LoRA, which has its first values, and the models as they are to be used from here
    on.

    Args:
        abort: of many processes: is told of an exception within an update at once (``ZeroEngine``).

    Raises:
        LowmemError: DeepSpeed is asked for and missing.
    """
    lora = named_lora(models.transformer)
    if config.engine == "single":
        return SingleTrainer(config, lora), models
    from lowmem_drf.distributed.zero import ZeroEngine

    optimizer: AdamW = make_optimizer(config.optim, list(lora.values()))  # type: ignore[assignment]  # the schema asks for adamw
    engine = ZeroEngine(config, lora, optimizer, models.transformer, list(models.transformer.blocks), abort)
    if config.engine == "zero3":
        models.residency.add("transformer", engine)
        models = replace(models, velocity=as_velocity(models.transformer, call=engine))
    return engine, models
