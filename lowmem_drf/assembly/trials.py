"""What is timed at the start of a run on a card, on inputs of the run's own sizes: the attention back ends, 8 bit
beside 16, and the tiles of our kernels. A timer takes no memory of its own, and what fails, for want of memory too, is
only not chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lowmem_drf.assembly.conditions import DTYPES
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.weights.packed_linear import PackedLinear
from lowmem_drf.ops import (
    int8_forward,
    packed_ranges,
    ranged_attention,
    require_int8_products,
    why_no_int8,
    window_ranges,
)
from lowmem_drf.schema import Config
from lowmem_drf.shortage import let_go
from lowmem_drf.texts import one_line

if TYPE_CHECKING:
    from lowmem_drf.models.family import GeneratorSizes
    from lowmem_drf.models.qwen_vl.critic import VLMCritic
    from lowmem_drf.ops import Attention, RowOps

MOST, ENOUGH_S, ROUNDS = 20, 0.05, 2
"""Runs between two events: at most, and until they take so long; and how often, of which the fastest counts."""
VAE_BYTES = 64 * 1024**2
"""Of the tensor that the VAE's norm is timed on."""
QUESTIONS, QUESTION_TOKENS = 24, 48
"""Of the critic's sequence behind the video. Their true numbers differ from clip to clip."""


T = TypeVar("T")
Timer = Callable[[Callable[[], Any]], float]


def card_seconds(run: Callable[[], Any]) -> float:
    """Seconds of one run on the card, by CUDA events."""

    def timed(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / count

    run()  # compiles
    count = max(1, min(MOST, int(ENOUGH_S / max(timed(1), 1e-6))))
    return min(timed(count) for _ in range(ROUNDS))


def tried(run: Callable[[], T]) -> T | str:
    """The result, or why there is none: what libraries raise has many types, and memory may be short."""
    try:
        return run()
    except Exception as error:
        reason = str(error) if isinstance(error, BadInputError) else f"{type(error).__name__}: {error}"
        let_go(error)
        return one_line(reason)


@dataclass(frozen=True)
class Work:
    """The sizes that a run's operations work on."""

    config: Config
    sizes: GeneratorSizes
    critic: VLMCritic | None
    critic_frames: int
    latent: tuple[int, int, int, int]
    """(C, F, h, w)."""
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, L, H, d) of the transformer's self-attention."""
        sizes = self.sizes
        return self.config.micro_batch, sizes.tokens(self.latent[1:]), sizes.heads, sizes.head_dim

    @property
    def slice_tokens(self) -> int:
        """Tokens that everything but the self-attention works on at a time."""
        return -(-self.shape[1] // self.config.memory.token_slices)

    @property
    def passes(self) -> tuple[int, int, int]:
        """Attentions of one layer in an update: forwards of the rollout, those of graded steps and their records, and
        backwards."""
        sampler, memory = self.config.sampler, self.config.memory
        guided = 1 if sampler.guidance == 1 else 2
        graded = sampler.graded_steps * (guided if sampler.guidance_grad == "both" else 1)
        again = 2 if memory.checkpoint and memory.keep_attention == "none" else 1
        recorded = graded if memory.record_rollout else 0
        return sampler.steps * guided - recorded, graded * again, graded

    def layers_seconds(self, int8: bool, seconds: Timer = card_seconds) -> float:
        """Of the frozen layers of a block in an update, without cross-attention's few keys and values: stored in int8,
        and multiplied in 8 bit or unpacked. Raises BadInputError: they cannot be."""
        if self.config.model.storage != "int8":
            raise BadInputError("nf4 has no integers")
        require_int8_products()
        rollout, _, graded = self.passes
        forwards, total = rollout + graded * (2 if self.config.memory.checkpoint else 1), 0.0
        for sizes, count in self._layers.items():
            layer, x = self._layer(*sizes, int8)
            y = layer(x)
            total += count * graded * seconds(partial(torch.autograd.grad, y, x, y.detach(), retain_graph=True))
            with torch.no_grad():
                total += count * forwards * seconds(partial(layer, x))
        return total

    def int8_seconds(self, seconds: Timer = card_seconds) -> float:
        """Of a forward of the attention in 8 bit, with the rounding of its inputs. Raises whatever it raises."""
        attention = int8_forward(self.device)
        if reason := why_no_int8(self.dtype, self.shape[-1]):
            raise BadInputError(reason)
        with torch.no_grad():
            return seconds(partial(attention, *(self._random(*self.shape) for _ in range(3))))

    def attention_seconds(self, attention: Attention, seconds: Timer = card_seconds) -> tuple[float, float]:
        """Of the forward without gradient and of the backward, as the run computes them. Raises whatever the back end
        raises."""
        q, k, v = (self._random(*self.shape) for _ in range(3))
        if self.config.memory.keep_attention != "none":
            forward, backward = attention.pair
            with torch.no_grad():
                out, lse = forward(q, k, v)
                return seconds(lambda: forward(q, k, v)), seconds(lambda: backward(out, q, k, v, out, lse))
        out = attention.call(q, k, v)
        d_out = out.detach()

        def without_gradient() -> None:
            with torch.no_grad():
                attention.call(q, k, v)

        back = seconds(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))
        return seconds(without_gradient), back

    def trials(
        self, rows: RowOps, attention: Attention, int8: Callable[..., Tensor] | None, ranged: bool
    ) -> Iterator[Callable[[], Any]]:
        """Calls that launch every kernel of ours that the run launches and that was not timed, once each."""
        if attention.name == "triton":
            yield lambda: self._to_text(attention)
        if int8 is not None:
            yield lambda: int8(*(self._random(*self.shape).detach() for _ in range(3)))
        if rows.name == "fused":
            yield lambda: self._modulated(rows)
            yield lambda: self._rotated(rows)
        if self.config.model.products == "int8":
            for sizes in self._layers:
                yield partial(self._multiplied, *sizes)
        if rows.norm_silu is not None:
            memory = self.config.memory
            for dtype in {DTYPES[memory.vae_dtype], DTYPES[memory.vae_grad_dtype]}:
                for channels in sorted(set(self.sizes.vae_widths)):
                    yield partial(self._normed, rows.norm_silu, channels, dtype)
        if ranged and self.critic is not None:
            yield self._critic_reads
            yield self._critic_sees

    def _to_text(self, attention: Attention) -> None:
        batch, _, heads, dim = self.shape
        q = self._random(batch, self.slice_tokens, heads, dim)
        k, v = (self._random(batch, self.config.model.text_tokens, heads, dim) for _ in range(2))
        _backward(attention.call(q, k, v), q, k, v)

    def _modulated(self, rows: RowOps) -> None:
        batch, _, heads, dim = self.shape
        x, y = (self._random(batch, self.slice_tokens, heads * dim) for _ in range(2))
        row = torch.ones(batch, 1, heads * dim, device=self.device)
        _backward(rows.norm_modulate(x, row, row, 1e-6), x)
        _backward(rows.gate_residual(x, y, row), x, y)
        _backward(rows.layer_norm(x, row[0, 0], row[0, 0], 1e-6), x)

    def _rotated(self, rows: RowOps) -> None:
        batch, _, heads, dim = self.shape
        q, k = (self._random(batch, self.slice_tokens, heads * dim) for _ in range(2))
        weight = torch.ones(heads * dim, device=self.device, dtype=self.dtype)
        angle = torch.ones(1, self.slice_tokens, 1, dim, device=self.device)
        _backward(rows.rms_norm(q, weight, 1e-6), q)
        turned = rows.rope_qk(q, k, weight, weight, angle, angle, heads, 1e-6)
        torch.autograd.grad(turned, (q, k), [x.detach() for x in turned])

    @property
    def _layers(self) -> dict[tuple[int, int], int]:
        """(in, out) of a block's frozen layers, and how many see all tokens: four of self-attention, two of
        cross-attention, and the feed-forward's."""
        width, inner = self.sizes.width, self.sizes.hidden
        return {(width, width): 6, (width, inner): 1, (inner, width): 1}

    def _layer(self, inside: int, outside: int, int8: bool) -> tuple[PackedLinear, Tensor]:
        """A layer, and tokens for it."""
        layer = PackedLinear(inside, outside, True, "int8")
        layer.pack(self._random(outside, inside))
        layer.bias = torch.nn.Parameter(self._random(outside).detach(), requires_grad=False)
        layer.int8_products = int8
        return layer, self._random(self.shape[0] * self.slice_tokens, inside)

    def _multiplied(self, inside: int, outside: int) -> None:
        layer, x = self._layer(inside, outside, True)
        _backward(layer(x), x)

    def _normed(self, norm_silu: Callable[..., Tensor], channels: int, dtype: torch.dtype) -> None:
        _, _, h, w = self.latent
        frames = max(1, min(4, VAE_BYTES // (channels * h * w * 16 * dtype.itemsize)))
        x = torch.randn(1, channels, frames, 4 * h, 4 * w, device=self.device, dtype=dtype, requires_grad=True)
        _backward(norm_silu(x, torch.ones(channels, device=self.device, dtype=dtype)), x)

    def _critic_grid(self) -> tuple[VLMCritic, Tensor]:
        assert self.critic is not None
        video = self.config.video
        frames = torch.zeros(1, self.critic_frames, 3, video.height, video.width, device=self.device)
        return self.critic, self.critic.family.patches(frames, self.critic.geometry)[1]

    def _critic_reads(self) -> None:
        """The language model: a prefix with the video, and questions behind it."""
        critic, grid = self._critic_grid()
        text, prefix = critic.model.config.get_text_config(), len(critic.prefix(grid).ids_P)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        tokens = prefix + QUESTIONS * QUESTION_TOKENS
        ranges = packed_ranges(prefix, [QUESTION_TOKENS] * QUESTIONS, tokens).to(self.device)
        self._ranged(ranges, tokens, text.num_attention_heads, text.num_key_value_heads, width)

    def _critic_sees(self) -> None:
        """The vision tower's layers that see whole frames."""
        critic, grid = self._critic_grid()
        vision, (frames, height, width) = critic.model.config.vision_config, grid[0, :3].tolist()
        ranges = window_ranges(range(0, (frames + 1) * height * width, height * width)).to(self.device)
        heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
        self._ranged(ranges, frames * height * width, heads, heads, vision.hidden_size // heads)

    def _ranged(self, ranges: Tensor, tokens: int, heads: int, key_heads: int, width: int) -> None:
        attention, widths = ranged_attention()
        if width in widths:
            q = self._random(1, tokens, heads, width)
            k, v = (self._random(1, tokens, key_heads, width) for _ in range(2))
            _backward(attention(q, k, v, width**-0.5, ranges), q, k, v)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype, requires_grad=True)


def _backward(out: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(out, inputs, out.detach())
