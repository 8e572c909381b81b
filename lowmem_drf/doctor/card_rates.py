"""What the card at hand reaches for each kind of work, at a configuration's sizes: a second or two of products,
attention, convolutions and copies. Plans for such a card use it in the place of assumed shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_drf.assembly.sizes import latent_shape, sizes_of
from lowmem_drf.assembly.trials import card_seconds
from lowmem_drf.models.generators import generator_config
from lowmem_drf.ops import int8_attention, int8_linear
from lowmem_drf.schema import Config
from lowmem_drf.shortage import let_go

if TYPE_CHECKING:
    from lowmem_drf.ops import Attention

MOST_TOKENS, MOST_HEADS = 16_384, 12
"""Of the products that are measured: enough to fill a card, and a second in all on a small one."""
COPIED = 1 << 28
"""Bytes of a measured copy."""

Timed = tuple[Callable[[], Callable[[], Any]], float]
"""Makes the inputs and returns what is to be timed; its FLOPs or bytes."""


def measured_rates(config: Config, attention: Attention, device: torch.device) -> dict[str, float]:
    """Kind of work (``planner.cards.SHARES``) -> FLOPs or bytes a second. A kind that does not run here, or has no
    room, is left out."""
    rates = {}
    for kind, (prepare, work) in _kinds(config, attention, device).items():
        try:
            rates[kind] = work / max(card_seconds(prepare()), 1e-6)
        except Exception as error:  # out of memory, or no kernel; what libraries raise has many types
            let_go(error)
            continue
        finally:
            torch.cuda.empty_cache()
    return rates


def _kinds(config: Config, attention: Attention, device: torch.device) -> dict[str, Timed]:
    sizes = sizes_of(generator_config(config.model.id))
    heads, d = sizes.heads, sizes.head_dim
    tokens, some = min(MOST_TOKENS, sizes.tokens(latent_shape(config, sizes)[1:])), min(MOST_HEADS, heads)
    scores = 4 * some * tokens**2 * d
    padded = (96, 6, config.video.height + 2, config.video.width + 2)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    def matmul() -> Callable[[], Any]:
        x, weight = tensor(tokens, heads * d), tensor(heads * d, sizes.hidden)
        return lambda: x @ weight

    def attend(graded: bool) -> Callable[[], Any]:
        q, k, v = (tensor(1, tokens, some, d).requires_grad_(graded) for _ in range(3))
        if not graded:
            return lambda: attention.call(q, k, v)
        out = attention.call(q, k, v)
        d_out = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    def attend_int8() -> Callable[[], Any]:
        return partial(int8_attention(device), *(tensor(1, tokens, some, d) for _ in range(3)))

    def multiply_int8() -> Callable[[], Any]:
        integers, weight = int8_linear(), tensor(sizes.hidden, heads * d).to(torch.int8)
        rows, scale = integers.quantise_rows_op(tensor(tokens, heads * d), None), weight[:, 0].float()
        return lambda: integers.int8_product_op(*rows, weight, scale, None, torch.bfloat16, True)

    def conv3d() -> Callable[[], Any]:
        x, weight = tensor(1, *padded), tensor(96, 96, 3, 3, 3)
        return lambda: torch.nn.functional.conv3d(x, weight)

    def copy() -> Callable[[], Any]:
        source, target = (torch.empty(COPIED, device=device, dtype=torch.uint8) for _ in range(2))
        return lambda: target.copy_(source)

    def host() -> Callable[[], Any]:
        here, there = torch.empty(COPIED, device=device, dtype=torch.uint8), torch.empty(COPIED, dtype=torch.uint8)
        pinned = there.pin_memory()

        def both() -> None:
            pinned.copy_(here, non_blocking=True)
            here.copy_(pinned, non_blocking=True)

        return both

    kinds: dict[str, Timed] = {
        "matmul": (matmul, 2 * tokens * heads * d * sizes.hidden),
        "attention": (partial(attend, False), scores),
        "attention backward": (partial(attend, True), 2.5 * scores),
        "conv3d": (conv3d, 2 * 27 * 96 * 96 * 4 * config.video.height * config.video.width),
        "memory": (copy, 2 * COPIED),
        "link": (host, 2 * COPIED),
    }
    if {config.kernels.rollout_attention, config.kernels.graded_attention} != {"same"}:
        kinds["int8 attention"] = (attend_int8, scores)
    if config.model.products != "16bit":
        kinds["int8 products"] = (multiply_int8, kinds["matmul"][1])
    return kinds
