"""DeepSpeed's ZeRO (arXiv 1910.02054, 2104.07857; deepspeed 0.19): partitioned weights and training state.

ZeRO-3 supports one forward and its backward at a time, and the relay needs no more. A pass of the transformer is a
forward of the engine. Its backward runs the engine's hooks, which gather each block's weights before the block runs and
free them after it. Blocks are gathered whole (leaf modules), because their code reads weights without calling the
submodules that hold them.

Each process accumulates the LoRA's gradients over all micro-batches and graded steps of an update. They are averaged
over the processes once (``DeepSpeedEngine.coalesce_grad_reduction``). DeepSpeed gets no ``fp16`` or ``bf16`` section,
so it casts nothing: the base stays in 16 bits, norms and the LoRA in fp32. The optimizer is torch's AdamW on each
process's partition: the LoRA is small, and DeepSpeed's own optimizer would have to be compiled first.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from torch.optim import AdamW

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}

REDUCE_BUCKET = 16_777_216
"""Elements of a gradient averaged at once. DeepSpeed keeps a buffer of this size on the card."""

PREFETCH_NUMEL = 355_000_000
"""Weights that ZeRO-3 gathers ahead of use: one block of Wan 14B with its LoRA, several blocks of smaller models."""
LIVE_NUMEL = 710_000_000
"""ZeRO-3 gathers nothing ahead while more weights than this are gathered. This bounds the card's memory to the current
and the next block, or three blocks at the start of a backward."""
PERSIST_NUMEL = 40_000
"""Tensors up to this size stay on every card: norms, biases and modulation. In a block of Wan 14B these are two thirds
of the tensors and 0.03% of the weights."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per parameter, apart from its step count."""

_PINNED = -1
"""An extra entry in a parameter's set of active modules: DeepSpeed frees no parameter with an active module. Its own
module ids start at 0."""


def deepspeed_config(config: Config, trains: bool = True) -> dict[str, Any]:
    """DeepSpeed's JSON configuration. ``trains=False``: for the critic's engine, which has no optimizer."""
    zero, stage = config.zero, STAGES[config.engine]
    optimization: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "reduce_bucket_size": REDUCE_BUCKET}
    if trains and zero.offload != "none":
        optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": zero.pin_memory}
    if stage == 3:
        if zero.offload != "none":
            optimization["offload_param"] = {"device": "cpu", "pin_memory": zero.pin_memory}
        optimization["stage3_prefetch_bucket_size"] = PREFETCH_NUMEL
        optimization["stage3_max_live_parameters"] = LIVE_NUMEL
        optimization["stage3_param_persistence_threshold"] = PERSIST_NUMEL
        # the order of the relay's passes gives no reuse, but DeepSpeed would look for it in every pass
        optimization["stage3_max_reuse_distance"] = 0
        optimization["overlap_comm"] = True  # gather on a separate stream
    return {
        "train_micro_batch_size_per_gpu": 1,  # no effect: the relay makes the micro-batches
        "gradient_accumulation_steps": 1,  # DeepSpeed divides by it, and the relay's gradients are already means
        "gradient_clipping": config.optim.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": optimization,
    }


class Partition:
    """Partitions weights one by one as they are loaded, so that no process ever holds the whole model.

    Raises:
        LowmemError: DeepSpeed is missing.
    """

    def __init__(self, config: Config) -> None:
        self._settings = deepspeed_config(config)
        self._deepspeed = import_deepspeed()
        self._first: Any = None

    def take(self, parameter: nn.Parameter) -> None:
        """Moves this process's partition of the weight to the device of ``zero.offload`` and empties the parameter.

        A collective: every process calls it with the same values in the same order."""
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=[parameter])
            return
        holder = nn.Module()
        holder.weight = parameter
        offload = self._settings["zero_optimization"].get("offload_param", {})
        with redirect_stdout(io.StringIO()):
            self._deepspeed.zero.Init(
                module=holder,
                config_dict_or_path=self._settings,
                dtype=parameter.dtype,
                remote_device=offload.get("device"),
                pin_memory=offload.get("pin_memory", False),
            )
        self._first = parameter


class ZeroEngine:
    """A ``training.trainer.Trainer`` on DeepSpeed.

    Args:
        lora: the trainable tensors by name, in the optimizer's order.
        optimizer: of these tensors; DeepSpeed takes it over.
        module: ``zero3``: the model that contains them, partitioned. ``zero1`` and ``zero2`` ignore it: its frozen
            weights stay whole.
        leaves: modules of ``module`` that are gathered whole.
        keeps: whether a forward under ``no_grad`` keeps what it gathers, with ``zero.rollout = "gathered"``.
        abort: called with an exception inside ``accumulate`` before anything else happens. It need not return.
    """

    def __init__(
        self,
        config: Config,
        lora: Mapping[str, nn.Parameter],
        optimizer: AdamW,
        module: nn.Module | None = None,
        leaves: Sequence[nn.Module] = (),
        abort: Callable[[BaseException], None] = lambda error: None,
        keeps: Callable[[], bool] = lambda: True,
    ) -> None:
        self._lora, self._adamw, self._abort, self._keeps = dict(lora), optimizer, abort, keeps
        self._stage = STAGES[config.engine]
        self._gathers = config.zero.rollout == "gathered"
        model = module if module is not None and self._stage == 3 else _Holder(lora.values())
        self._engine = _initialize(model, leaves, deepspeed_config(config), optimizer, list(lora.values()))

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """``zero3``: the module's forward, which gathers weights as it needs them. With ``zero.rollout = "gathered"``,
        a forward under ``no_grad`` keeps them until ``drop``, if ``keeps``."""
        if self._gathers and not torch.is_grad_enabled() and self._keeps():
            for parameter in self._engine.module.parameters():
                parameter.ds_active_sub_modules.add(_PINNED)
        return self._engine(*inputs, **arguments)

    def drop(self) -> None:
        """``zero3``: frees all gathered weights."""
        self._engine.optimizer.empty_partition_cache()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Wraps all backwards of an update, which add to ``.grad``. On exit, the processes average their gradients."""
        if self._stage == 3:
            # If a block's input needs no gradient, DeepSpeed's backward hook runs before the block's backward. It then
            # creates missing gradients in the shape of freed weights, which is empty.
            for parameter in self._lora.values():
                _zero_gradient(parameter)
        with self._engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException as error:
                self._abort(error)  # leaving enters a collective, and the processes that did not fail are not there
                raise

    def step(self, lr: float) -> float:
        """Clips and steps. Returns the gradient's norm before clipping: NaN if not finite, and no step was made."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.nan

    def finite(self) -> bool:
        """Whether this process's share of the weights is free of NaN and infinity."""
        return bool(torch.nn.utils.get_total_norm(self._partitions()).isfinite())

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block, every process can read the LoRA's tensors."""
        if self._stage < 3:
            yield
            return
        with import_deepspeed().zero.GatheredParameters(list(self._lora.values())):
            yield

    def pack(self) -> dict[str, Tensor]:
        """The optimizer's state in the format of ``models.lora.optimizers.pack_optimizer``. A collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = next(iter(self._adamw.state.values()))["step"] if self._adamw.state else None
        if steps is None:
            return {}
        packed = {}
        for name, parameter in self._lora.items():
            packed[f"{name}.step"] = steps.detach().cpu().clone()
            for key in MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, key).detach().cpu()
                packed[f"{name}.{key}"] = moment.reshape(_shape(parameter)).contiguous()
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Restores ``pack``'s tensors, from any number of processes. BadInputError: another optimizer's state."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if packed.keys() != {f"{name}.{key}" for name in self._lora for key in ("step", *MOMENTS)}:
            raise BadInputError(
                "the checkpoint has the state of another optimizer, or of another LoRA. Start a new run."
            )
        zero, parts = self._engine.optimizer, self._partitions()
        steps = packed[f"{next(iter(self._lora))}.step"]
        for part in parts:
            self._adamw.state[part] = {"step": steps.clone(), **{key: torch.zeros_like(part) for key in MOMENTS}}
        if self._stage < 3:
            # the first step would do this too late
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._lora.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, packed[f"{name}.{key}"].to(parameter.device), key)

    def _partitions(self) -> list[Tensor]:
        """This process's share of the LoRA, in fp32."""
        zero = self._engine.optimizer
        return list(zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups)


class ZeroForward:
    """``function`` of a frozen model under ZeRO-3; weights are gathered as needed. Differentiable in the inputs.

    Args:
        module: the model; ``function`` calls its submodules.
        leaves: submodules that are gathered whole.
    """

    def __init__(
        self, config: Config, module: nn.Module, function: Callable[..., Any], leaves: Sequence[nn.Module]
    ) -> None:
        whole = _Whole(module, function)
        self._engine = _initialize(whole, leaves, deepspeed_config(config, trains=False))

    def __call__(self, *inputs: Any) -> Any:
        return self._engine.module(*inputs)

    def drop(self) -> None:
        """Frees all gathered weights."""
        self._engine.optimizer.empty_partition_cache()


class _Holder(nn.Module):
    """A module of the LoRA's tensors alone: ZeRO-1 and 2 do not touch a model's frozen weights."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(tensors)


class _Whole(nn.Module):
    """Makes ``function`` a module's ``forward``: DeepSpeed restarts its trace of submodule calls at each forward."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self._function = module, function

    def forward(self, *inputs: Any) -> Any:
        return self._function(*inputs)


def _initialize(
    model: nn.Module,
    leaves: Sequence[nn.Module],
    settings: dict[str, Any],
    optimizer: Any = None,
    parameters: Any = None,
) -> Any:
    deepspeed = import_deepspeed()
    from deepspeed.utils import set_z3_leaf_module

    for leaf in leaves:
        set_z3_leaf_module(leaf, True)
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints its settings
        return deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=parameters, config=settings)[0]


def _zero_gradient(parameter: Any) -> None:
    """Sets a zero gradient of the parameter's full shape, even while the parameter is partitioned."""
    here = parameter.data
    # torch compares the shapes of gradient and tensor only when the gradient is set
    parameter.data = here.new_empty(()).expand(parameter.ds_shape)
    parameter.grad = torch.zeros(parameter.ds_shape, dtype=here.dtype, device=here.device)
    parameter.data = here


def _shape(parameter: Any) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def import_deepspeed() -> Any:
    try:
        import deepspeed
    except Exception as error:  # its import looks for compilers and the CUDA toolkit, and may raise anything
        raise LowmemError(
            f"engine = zero1, zero2 or zero3 needs DeepSpeed, which cannot be imported ({error}). "
            "pip install 'lowmem-drf[deepspeed]'"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # use gloo to sum over processes on CPUs: DeepSpeed would compile its operator in every new environment
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # warnings about DeepSpeed's own use of torch: a user cannot act on them
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\.\w+` is deprecated")
    hook = "Full backward hook is firing when gradients are computed with respect to module outputs"
    for message in (hook, "A module has unknown inputs or outputs type"):
        warnings.filterwarnings("ignore", category=UserWarning, message=message)
    return deepspeed
