"""DeepSpeed's ZeRO (arXiv 1910.02054, 2104.07857; deepspeed 0.19) under the relay: partitioned weights, partitioned
training state.

The relay asks for one thing that ZeRO-3 gives: at any time one forward and its backward are under way. A pass of the
transformer is a forward of the engine, and its pull-back a backward through the engine's hooks, which gather a block's
weights as it is entered and give them up behind it. Blocks are gathered whole (leaf modules), since their code reads
weights without calling the submodules that hold them.

Gradients of the LoRA stay on each process through all micro-batches and graded steps of an update, and are averaged
over the processes once (``DeepSpeedEngine.coalesce_grad_reduction``). DeepSpeed is told of no number format, so it
casts nothing: the base keeps its 16 bits, norms and the LoRA their fp32. The optimizer is torch's AdamW on each
process's part: the LoRA is small, and DeepSpeed's own would have to be compiled first.
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
"""Numbers of a gradient that are averaged at once: DeepSpeed keeps a buffer of this size on the card."""

PREFETCH_NUMEL = 355_000_000
"""Weights that ZeRO-3 gathers ahead of their use: one block of Wan 14B with its LoRA. Smaller models gather more blocks
ahead, in no more memory."""
LIVE_NUMEL = 710_000_000
"""Gathered weights above which ZeRO-3 gathers nothing ahead. It bounds the card's memory: the block that computes and
the next one, three blocks where a backward begins."""
PERSIST_NUMEL = 40_000
"""Tensors of no more numbers stay on every card: norms, biases and modulation, two thirds of the tensors of a block of
Wan 14B and 0.03% of its weights."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every number, besides the count of its steps."""

_PINNED = -1
"""Among the modules that use a parameter: it is not given up while this is there. DeepSpeed numbers modules from 0."""


def deepspeed_config(config: Config, trains: bool = True) -> dict[str, Any]:
    """The configuration that DeepSpeed gets, as its JSON.

    Args:
        trains: ``False``: of the critic's engine, which has no optimizer.
    """
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
        # in the relay's order of passes it would keep nothing, and look for it in every one
        optimization["stage3_max_reuse_distance"] = 0
        optimization["overlap_comm"] = True  # gathers run on a stream of their own
    return {
        "train_micro_batch_size_per_gpu": 1,  # of no effect: the relay makes its own micro-batches
        "gradient_accumulation_steps": 1,  # DeepSpeed divides by it, and the relay's gradients are means already
        "gradient_clipping": config.optim.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": optimization,
    }


class Partition:
    """Weights partitioned over the processes as they are loaded, one by one: no process ever holds a model that is to
    be partitioned.

    Raises:
        LowmemError: DeepSpeed is missing.
    """

    def __init__(self, config: Config) -> None:
        self._settings = deepspeed_config(config)
        self._deepspeed = _import_deepspeed()
        self._first: Any = None

    def take(self, parameter: nn.Parameter) -> None:
        """Leaves of this weight the process's part, where ``zero.offload`` says, and in the parameter nothing. Every
        process is to call it with the same value, in the same order."""
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

    Args: lora: the trainable tensors by name, in the order of the optimizer's. optimizer: on these tensors; DeepSpeed
        takes it over. module: ``zero3``: the model that they are in, whose weights are partitioned. ``zero1``,
        ``zero2``: of no interest, all frozen weights stay as they are. leaves: the modules of ``module`` that are
        gathered whole. abort: is told of an exception within ``accumulate`` before anything else happens, and need not
        return.
    """

    def __init__(
        self,
        config: Config,
        lora: Mapping[str, nn.Parameter],
        optimizer: AdamW,
        module: nn.Module | None = None,
        leaves: Sequence[nn.Module] = (),
        abort: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._lora, self._adamw, self._abort = dict(lora), optimizer, abort
        self._stage = STAGES[config.engine]
        self._gathers = config.zero.rollout == "gathered"
        model = module if module is not None and self._stage == 3 else _Holder(lora.values())
        self._engine = _initialize(model, leaves, deepspeed_config(config), optimizer, list(lora.values()))

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """The module, for ``zero3``: its weights come as they are needed. Outside a graph they stay, where
        ``zero.rollout`` is ``gathered``, until ``drop``."""
        if self._gathers and not torch.is_grad_enabled():
            for parameter in self._engine.module.parameters():
                parameter.ds_active_sub_modules.add(_PINNED)
        return self._engine(*inputs, **arguments)

    def drop(self) -> None:
        """``zero3``: no weights are gathered any more."""
        self._engine.optimizer.empty_partition_cache()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around all backwards of an update: they add to ``.grad``. At its end the gradients are averaged over the
        processes."""
        if self._stage == 3:
            # a block whose input needs no gradient has its backward hook run before its backward, and there DeepSpeed
            # makes gradients
            # that are not there yet, as large as weights that it has given up are: empty
            for parameter in self._lora.values():
                _zero_gradient(parameter)
        with self._engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException as error:
                self._abort(error)  # behind the block the processes meet, and those that did not fail are elsewhere
                raise

    def step(self, lr: float) -> float:
        """Clips and steps. Returns the norm of the gradient before clipping; NaN where that was not finite, and nothing
        was done."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.nan

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block every process can read the LoRA's tensors."""
        if self._stage < 3:
            yield
            return
        with _import_deepspeed().zero.GatheredParameters(list(self._lora.values())):
            yield

    def pack(self) -> dict[str, Tensor]:
        """The optimizer's state, as ``models.lora.optimizers.pack_optimizer`` has it of a single process. Every process
        is to call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = next(iter(self._adamw.state.values()))["step"] if self._adamw.state else None
        if steps is None:
            return {}
        packed = {}
        for name, parameter in self._lora.items():
            packed[f"{name}.step"] = steps.detach().cpu().clone()
            for key in MOMENTS:
                packed[f"{name}.{key}"] = (
                    safe_get_full_optimizer_state(parameter, key).detach().cpu().reshape(_shape(parameter)).contiguous()
                )
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Puts ``pack``'s tensors back, however many processes there were. Raises BadInputError for the state of
        another optimizer."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if packed.keys() != {f"{name}.{key}" for name in self._lora for key in ("step", *MOMENTS)}:
            raise BadInputError(
                "the checkpoint has the state of another optimizer, or of another LoRA. Start a new run."
            )
        optimizer = self._engine.optimizer
        parts = (
            optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        steps = packed[f"{next(iter(self._lora))}.step"]
        for part in parts:
            self._adamw.state[part] = {"step": steps.clone(), **{key: torch.zeros_like(part) for key in MOMENTS}}
        if self._stage < 3:
            # else it is done by the first step, which would be too late
            optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._lora.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, packed[f"{name}.{key}"].to(parameter.device), key)


class ZeroForward:
    """A frozen model under ZeRO-3: ``function``, within which its weights come as they are needed. Differentiable in
    what it is given.

    Args:
        module: whose submodules ``function`` calls.
        leaves: those of them that are gathered whole.
    """

    def __init__(
        self, config: Config, module: nn.Module, function: Callable[..., Any], leaves: Sequence[nn.Module]
    ) -> None:
        whole = _Whole(module, function)
        self._engine = _initialize(whole, leaves, deepspeed_config(config, trains=False))

    def __call__(self, *inputs: Any) -> Any:
        return self._engine.module(*inputs)

    def drop(self) -> None:
        """No weights are gathered any more."""
        self._engine.optimizer.empty_partition_cache()


class _Holder(nn.Module):
    """The LoRA's tensors and nothing else: ZeRO-1 and 2 leave a model's frozen weights alone."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(tensors)


class _Whole(nn.Module):
    """A function as the ``forward`` of the module whose submodules it calls: at its beginning DeepSpeed starts to count
    them anew."""

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
    deepspeed = _import_deepspeed()
    from deepspeed.utils import set_z3_leaf_module

    for leaf in leaves:
        set_z3_leaf_module(leaf, True)
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints what it has built
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=parameters, config=settings
        )
    return engine


def _zero_gradient(parameter: Any) -> None:
    """Of the parameter's full shape, whatever of it is here."""
    here = parameter.data
    # a gradient has to have the shape of its tensor when it is set, and only then
    parameter.data = here.new_empty(()).expand(parameter.ds_shape)
    parameter.grad = torch.zeros(parameter.ds_shape, dtype=here.dtype, device=here.device)
    parameter.data = here


def _shape(parameter: Any) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _import_deepspeed() -> Any:
    try:
        import deepspeed
    # it looks for compilers and the CUDA toolkit while it is imported, and what it raises then is its own
    except Exception as error:
        raise LowmemError(
            f"engine = zero1, zero2 or zero3 needs DeepSpeed, which cannot be imported ({error}). pip install 'lowmem-drf[deepspeed]'"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # for sums over the processes on CPUs it would compile an operator of its own in every new environment: gloo does
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's use of torch, and its guess about hooks on modules whose inputs need no gradient: nothing a user could
    # act on
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\.\w+` is deprecated")
    warnings.filterwarnings(
        "ignore",
        category=UserWarning,
        message="Full backward hook is firing when gradients are computed with respect to module outputs",
    )
    warnings.filterwarnings("ignore", category=UserWarning, message="A module has unknown inputs or outputs type")
    return deepspeed
