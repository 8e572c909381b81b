"""What a plan leaves out of an update: repeated steps and micro-batches, repeated blocks and chunks, idle models.

``shortened`` cuts the configuration, ``with_records`` and ``scaled`` scale the figures up again. ``with_shortcuts``
skips repeats inside a stage, and ``one_stage`` leaves out the models that a stage does not use.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from lowmem_drf.assembly.assemble import Models, derive_seed
from lowmem_drf.memory.activations import HookedForward
from lowmem_drf.memory.host import Held
from lowmem_drf.memory.recorded_rollout import RecordedForward
from lowmem_drf.memory.streaming import StreamedForward
from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.models.experts import boundary_after
from lowmem_drf.models.generators import blocks_of
from lowmem_drf.planner.cards import GIB, Card
from lowmem_drf.planner.depths import begins, marker
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stages import ONCE, STAGES, SUMS, Plan, StagePlan
from lowmem_drf.planner.stand_ins import passed_on, trace_again, waiting_in
from lowmem_drf.schema import Config
from lowmem_drf.types import Answer, Decoder, Parts, Question, Scalar

if TYPE_CHECKING:
    from lowmem_drf.models.family import GeneratorConfig

Caches = tuple[Any, ...]


def shortened(config: Config, graded: int) -> Config:
    """The same update with at most ``graded`` graded steps, at most one ungraded step and one micro-batch. The ungraded
    step comes first; with the high-noise expert it comes last."""
    sampler = config.sampler
    graded = min(graded, sampler.graded_steps)
    steps = graded + (sampler.steps > sampler.graded_steps)
    places: str | list[int] = "last" if graded == 1 else "tail"
    if config.model.expert == "high":
        places = list(range(graded))
    some = {"steps": steps, "graded_steps": graded, "graded": places, "timesteps": sampler.timesteps[-steps:]}
    changes: dict[str, Any] = {"sampler": sampler.model_copy(update=some)}
    if config.optim.anchor:  # drawn to be at the last graded step: at the first one it is cheap
        drawn = (seed for seed in itertools.count() if derive_seed(seed, "anchor", 0) % graded == graded - 1)
        changes["seed"] = next(drawn)
    return one_micro_batch(config.model_copy(update=changes))


def boundary_moved(generator: GeneratorConfig, short: Config) -> GeneratorConfig:
    """Moves the boundary between two experts so that the trained one runs exactly the graded steps of ``short``."""
    if generator.boundary is None:
        return generator
    sampler = short.sampler
    high = sampler.graded_steps if short.model.expert == "high" else sampler.steps - sampler.graded_steps
    sigmas = flow_sigmas(sampler.steps, sampler.shift, sampler.timesteps).tolist()
    return replace(generator, boundary=boundary_after(sigmas, high))


def one_micro_batch(config: Config) -> Config:
    """The configuration of an update of one micro-batch: all micro-batches have the same peak."""
    return config.model_copy(update={"batch": config.micro_batch})


def of_one_process(config: Config) -> Config:
    """One process's share of an update. ``processes`` is unchanged."""
    batch = config.batch // config.processes
    return config.model_copy(update={"batch": batch, "micro_batch": min(config.micro_batch, batch)})


def with_records(
    config: Config, short: Config, stages: dict[str, StagePlan], step_bytes: int, card: Card
) -> dict[str, StagePlan]:
    """Adds the records of the graded steps that ``shortened`` left out: their host memory and copies.

    Only graded steps are recorded, but ``scaled`` multiplies a rollout's copies by all its steps; this corrects them in
    advance. Stalls stay multiplied: which copies they waited for is unknown.
    """
    left_out = config.sampler.graded_steps - short.sampler.graded_steps
    more = {
        name: replace(stage, host_gib=stage.host_gib + left_out * step_bytes / GIB)
        for name, stage in stages.items()
        if name not in ONCE
    }
    if (stage := more.get("rollout")) is not None:
        repeats = config.sampler.steps / short.sampler.steps
        copied = (config.sampler.graded_steps / repeats - short.sampler.graded_steps) * step_bytes
        copy_s, moved_gib = stage.copy_s + copied / card.link_rate, stage.moved_gib + copied / GIB
        more["rollout"] = replace(stage, copy_s=copy_s, moved_gib=moved_gib)
    return stages | more


def scaled(config: Config, short: Config, stages: dict[str, StagePlan], card: Card, vram_gib: float) -> Plan:
    """Scales seconds, operations and traffic up to the whole update. The anchor's one step counts as a graded one."""
    batches = -(-config.batch // config.micro_batch)
    sampler, done, anchor = config.sampler, short.sampler, int(config.optim.anchor > 0)
    graded = (sampler.graded_steps + anchor) / (done.graded_steps + anchor)
    repeats = {"rollout": sampler.steps / done.steps, "denoise_backward": graded}
    rows = {}
    for name in (name for name in STAGES if name in stages):
        factor = 1.0 if name in ONCE else batches * repeats.get(name, 1.0)
        rows[name] = replace(stages[name], **{key: getattr(stages[name], key) * factor for key in SUMS})
    rollout = config.zero.rollout if config.engine == "zero3" and config.zero.rollout != "auto" else None
    update_s = sum(stage.s for name, stage in rows.items() if name != "text")
    return Plan(card.name, vram_gib, rows, update_s, processes=config.processes, rollout=rollout)


Frame = tuple[torch.Size, torch.dtype]
Frames = list[Frame]


def with_shortcuts(parts: Parts, models: Models, ledger: Ledger, frames: Frames | None) -> Parts:
    """Computations that keep no graph run once per shape: a block of the rollout, a chunk of the VAE. Marks where the
    transformer's blocks begin (``depths``).

    ``frames``: gets shape and dtype of what each chunk makes. ``None``: the decoder stays as it is.
    """
    for model in (models.transformer, models.expert):
        blocks = [] if model is None else blocks_of(model)
        for place, block in enumerate(blocks):
            holder = block  # recording a pass and fetching weights still happen every time
            while isinstance(holder.forward, RecordedForward | StreamedForward | HookedForward):
                holder = holder.forward
            mark = marker(ledger, "transformer" if model is models.transformer else "expert", place, len(blocks))
            kind = " ".join(type(module).__name__ for module in block.modules())
            holder.forward = _ShortcutBlock(holder.forward, ledger, mark, kind)
    return parts if frames is None else with_decoders(parts, lambda one: _ShortcutDecoder(one, ledger, frames))


def with_decoders(parts: Parts, changed: Callable[[Decoder], Decoder]) -> Parts:
    """The parts with a change of the decoder, and of the one that is compared with it."""
    other = parts.compared
    return replace(parts, decoder=changed(parts.decoder), compared=None if other is None else changed(other))


class _ShortcutBlock:
    """A block's ``forward``. Runs passes with gradient, and recorded ones (they get ``kept_attention``), every time.

    ``kind``: blocks of one kind are equal.
    """

    def __init__(self, forward: Any, ledger: Ledger, mark: Callable[[str], None], kind: str) -> None:
        self._forward, self._ledger, self._mark, self._kind = forward, ledger, mark, kind

    def unread(self, hidden_BLD: Tensor, *rest: Any, **arguments: Any) -> Any:
        begins(hidden_BLD, self._mark)
        return self._forward.unread(hidden_BLD, *rest, **arguments)

    def __call__(self, hidden_BLD: Tensor, *rest: Any, **arguments: Any) -> Tensor:
        begins(hidden_BLD, self._mark)
        if torch.is_grad_enabled() or arguments:
            return self._forward(hidden_BLD, *rest, **arguments)
        run = partial(self._forward, hidden_BLD, *rest)
        return self._ledger.shortcut(
            ("block", self._kind, hidden_BLD.shape), run, partial(torch.zeros_like, hidden_BLD)
        )


class _ShortcutDecoder:
    """A decoder that skips chunks once the caches they pass on are as large as those they received."""

    def __init__(self, decoder: Decoder, ledger: Ledger, frames: Frames) -> None:
        self._decoder, self._ledger, self._frames = decoder, ledger, frames
        self._steady: dict[Hashable, bool] = {}
        self._trace_again: dict[Hashable, Callable[[Sequence[Any]], Any]] = {}
        self._stored: WeakSet[Held] = WeakSet()
        self.temporal_factor, self.causal, self.group = decoder.temporal_factor, decoder.causal, decoder.group
        self.start, self.decode = decoder.start, decoder.decode

    def store(self, caches: Caches) -> Caches:
        stored = self._decoder.store(caches)
        self._stored.update(cache for cache in stored if isinstance(cache, Held))
        return stored

    def _shortcut(self, key: Hashable, run: Callable[[], Any], stand_in: Callable[[], Any]) -> Any:
        return self._ledger.shortcut(key, run, stand_in) if self._steady.get(key, True) else run()

    def _key(self, name: str, latents_BC1hw: Tensor, caches: Sequence[Any]) -> Hashable:
        """Entering caches that are stored too are not freed on the way."""
        stays = any(isinstance(cache, Held) and cache in self._stored for cache in caches)
        return name, latents_BC1hw.shape, _sizes(caches), stays

    def chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches]:
        received, key = _sizes(caches), self._key("chunk", latents_BC1hw, caches)

        def run() -> tuple[Tensor, Caches]:
            made, handed = self._decoder.chunk(latents_BC1hw, caches)
            self._steady[key] = _sizes(handed) == received
            self._blank = partial(torch.zeros, made.shape, dtype=made.dtype, device=made.device)
            return made, handed

        result: tuple[Tensor, Caches] = self._shortcut(key, run, lambda: (self._blank(), passed_on(caches)))
        self._frames.append((result[0].shape, result[0].dtype))
        return result

    def recorded_chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches, Any]:
        received, key = _sizes(caches), self._key("recorded_chunk", latents_BC1hw, caches)

        def run() -> tuple[Tensor, Caches, Any]:
            waiting = waiting_in(caches)
            made, handed, trace = self._decoder.recorded_chunk(latents_BC1hw, caches)
            self._steady[key] = _sizes(handed) == received
            self._blank = partial(torch.zeros, made.shape, dtype=made.dtype, device=made.device)
            self._trace_again[key] = trace_again(trace, waiting)
            return made, handed, trace

        def stand_in() -> tuple[Tensor, Caches, Any]:
            trace = self._trace_again[key](caches)
            return self._blank(), passed_on(caches), trace

        result: tuple[Tensor, Caches, Any] = self._shortcut(key, run, stand_in)
        self._frames.append((result[0].shape, result[0].dtype))
        return result

    def advance(
        self, latents_BC1hw: Tensor, caches: Sequence[Any], keep: Literal["nothing", "trace", "last"]
    ) -> tuple[Caches, Any]:
        received, key = _sizes(caches), self._key(f"advance {keep}", latents_BC1hw, caches)

        def run() -> tuple[Caches, Any]:
            waiting = waiting_in(caches)
            handed, trace = self._decoder.advance(latents_BC1hw, caches, keep)
            self._steady[key] = keep == "last" or _sizes(handed) == received
            self._trace_again[key] = trace_again(trace, waiting)
            return handed, trace

        def stand_in() -> tuple[Caches, Any]:
            trace = self._trace_again[key](caches)
            return () if keep == "last" else passed_on(caches), trace

        return self._shortcut(key, run, stand_in)

    def chunk_backward(
        self, latents_BC1hw: Tensor, trace: Any, local: Sequence[int],
        d_made: Tensor, d_handed: Caches, hands_back: bool,
    ) -> tuple[Tensor, Caches]:  # fmt: skip
        received = _sizes(d_handed)
        key = ("chunk_backward", latents_BC1hw.shape, d_made.shape, _sizes(_parts(trace)), received, hands_back)

        def run() -> tuple[Tensor, Caches]:
            d_z, d_caches = self._decoder.chunk_backward(latents_BC1hw, trace, local, d_made, d_handed, hands_back)
            self._steady[key] = _sizes(d_caches) == received
            return d_z, d_caches

        return self._shortcut(key, run, lambda: (torch.zeros_like(latents_BC1hw), d_handed))


def _parts(trace: Any) -> Caches:
    """All that a trace keeps."""
    return tuple(trace) if isinstance(trace, tuple) else (*trace.inputs, *trace.caches)


def _sizes(caches: Sequence[Any]) -> Caches:
    """Equal if two tuples of caches take the same memory in the same places."""
    return tuple((type(cache).__name__, cache.nbytes) if hasattr(cache, "nbytes") else cache for cache in caches)


def with_stand_ins(parts: Parts, absent: Collection[str]) -> Parts:
    """The parts of a step whose transformer and critic compute nothing in the stages of ``absent``."""
    if "rollout" in absent:
        first = parts.lora[0]
        parts = replace(parts, velocity=lambda x, sigma, cond: x + first.sum().to(x.dtype))
    return replace(parts, critic=_no_critic) if "critic" in absent else parts


def one_stage(parts: Parts, stage: str, models: Models) -> Parts:
    """The parts of a step without the models that do not work in ``stage``."""
    if stage not in ("rollout", "denoise_backward"):
        parts = with_stand_ins(parts, ("rollout",))
    if stage not in ("decode", "vae_backward"):
        parts = with_decoders(parts, lambda one: _NoDecoder(one, models.decoder.spatial_factor))
    if stage != "critic":
        parts = replace(parts, critic=_no_critic)
    return parts


class _NoDecoder:
    """A ``types.Decoder`` with the same shapes that computes nothing."""

    def __init__(self, decoder: Decoder, spatial_factor: int) -> None:
        self.temporal_factor, self.causal, self.group = decoder.temporal_factor, decoder.causal, decoder.group
        self.spatial_factor = spatial_factor

    def start(self, batch: int) -> Caches:
        return (True,)

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        return self._blank(latents_BCFhw, (latents_BCFhw.shape[2] - 1) * self.temporal_factor + 1)

    def advance(self, latents_BC1hw: Tensor, caches: Sequence[Any], keep: str) -> tuple[Caches, Caches]:
        return (False,), ()

    def recorded_chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches, Caches]:
        return *self.chunk(latents_BC1hw, caches), ()

    def store(self, caches: Caches) -> Caches:
        return caches

    def chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches]:
        (first,) = caches
        if not self.causal:
            return self.decode(latents_BC1hw), (False,)
        frames = (latents_BC1hw.shape[2] - first) * self.temporal_factor + first
        return self._blank(latents_BC1hw, frames), (False,)

    def chunk_backward(self, latents_BC1hw: Tensor, *_: Any) -> tuple[Tensor, Caches]:
        return torch.zeros_like(latents_BC1hw), ()

    def _blank(self, latents_BCFhw: Tensor, frames: int) -> Tensor:
        batch, _, _, height, width = latents_BCFhw.shape
        height, width = height * self.spatial_factor, width * self.spatial_factor
        return latents_BCFhw.mean() + torch.zeros(batch, frames, 3, height, width)


class AbsentDecoder(_NoDecoder):
    """A ``_NoDecoder`` that makes ``frames`` as another run of the same update did."""

    def __init__(self, decoder: Decoder, frames: Iterator[Frame]) -> None:
        super().__init__(decoder, 1)
        self._frames = frames

    def chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches]:
        shape, dtype = next(self._frames)
        return latents_BC1hw.new_zeros(shape, dtype=dtype), (False,)


def _no_critic(frames_BTCHW: Tensor, questions: Sequence[Sequence[Question]]) -> Sequence[Sequence[Answer | Scalar]]:
    logits = frames_BTCHW.mean().float() * torch.ones(1, 2)
    answer, value = Answer(logits, torch.tensor([0]), yes=(0,), no=(1,)), Scalar(logits[0, 0])
    return [[value if question.kind == "scalar" else answer for question in asked] for asked in questions]
