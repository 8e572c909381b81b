"""Gradient accumulation, clipping and the optimizer step: in one process, or in many (``distributed.zero``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from lowmem_drf.assembly.assemble import Models
from lowmem_drf.models.generators import blocks_of, family_of
from lowmem_drf.models.lora.adapter import named_lora
from lowmem_drf.models.lora.optimizers import (
    fill_states,
    make_optimizer,
    pack_optimizer,
    paged_moments,
    unpack_optimizer,
)
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import AdamW


class Trainer(Protocol):
    """The optimizer of the LoRA."""

    def accumulate(self) -> AbstractContextManager[None]:
        """Wraps all backwards of an update, which add to ``.grad`` of the LoRA's tensors. Several processes average
        their gradients when it ends."""
        ...

    def step(self, lr: float) -> float:
        """Clips and steps with this learning rate. Returns the gradient norm before clipping; if it is NaN or infinite,
        no weight was changed."""
        ...

    def finite(self) -> bool:
        """Whether this process's share of the weights is free of NaN and infinity: one fused pass where they are."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within the block the LoRA's tensors hold their full values. All processes must enter it."""
        ...

    def pack(self) -> dict[str, Tensor]:
        """The optimizer's state as CPU tensors (``optimizers.pack_optimizer``), independent of the number of processes.
        All processes must call it."""
        ...

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Restores the tensors of ``pack``. Raises BadInputError if they belong to another optimizer."""
        ...


class SingleTrainer:
    """The trainer of one process. ``lora``: the trainable tensors by name."""

    def __init__(self, config: Config, lora: Mapping[str, nn.Parameter]) -> None:
        self._names, self._lora = list(lora), list(lora.values())
        self._clip = config.optim.grad_clip
        self._optimizer = make_optimizer(config.optim, self._lora)
        self.steps_begun = 0
        """How often the optimizer was called: one that failed may have changed some weights."""

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
            self.steps_begun += 1
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def finite(self) -> bool:
        return bool(torch.nn.utils.get_total_norm(self._lora).isfinite())

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fill(self) -> None:
        """Allocates the moments that the first step would allocate."""
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
    """The trainer of these models' LoRA, and the models to use from here on.

    Args:
        abort: with several processes, called at once with any exception raised within an update (``ZeroEngine``).

    Raises:
        LowmemError: DeepSpeed is asked for and missing.
    """
    lora = named_lora(models.transformer)
    if config.engine == "single":
        return SingleTrainer(config, lora), models
    from lowmem_drf.distributed.zero import ZeroEngine

    optimizer: AdamW = make_optimizer(config.optim, list(lora.values()))  # type: ignore[assignment]  # the schema asks for adamw
    blocks, residency = blocks_of(models.transformer), models.residency
    # the anchor's pass is one of a stage that has room for a block's weights, not for all
    engine = ZeroEngine(
        config, lora, optimizer, models.transformer, blocks, abort, lambda: residency.running != "denoise_backward"
    )
    if config.engine == "zero3":
        residency.add("transformer", engine)
        family, fps = family_of(models.transformer), config.video.fps
        models = replace(models, velocity=family.as_velocity(models.transformer, call=engine, fps=fps))
    return engine, models
