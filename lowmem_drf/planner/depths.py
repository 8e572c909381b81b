"""Stacks of equal blocks: a plan runs two shorter stacks and extends their figures exactly.

All blocks of a stack have the same sizes. So between two neighbouring blocks of a pass (a *span*: from where a block
begins to where the next one does) the bytes that are alive are linear in the number of blocks: the weights of all, the
kept inputs of those that ran. A span's highest moment is therefore the same one at every depth, and its bytes are
extended as a line through two depths. Spans have names that both depths share: the first blocks of a stack, its last
ones, and what lies outside. Those in between are never above both ends. Operations and copied bytes are linear too;
seconds are where every block waits as long as its neighbours do.

Several stacks are extended at once, along one line: each grows by a whole number of blocks, and the true depths are as
many such steps away for all of them (``Line``). ``tests/planner/test_depths.py`` compares with plans of all blocks.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowmem_drf.assembly.assemble import Models
from lowmem_drf.models.generators import family_of
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stages import MIDDLE
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from lowmem_drf.models.family import GeneratorConfig

Depths = Mapping[str, int]
"""Blocks by stack: ``transformer``, ``text`` (encoder), ``language`` and ``windowed`` (of the critic)."""

FIRST, LAST = 2, 2
"""Blocks at the ends of a stack whose spans have names of their own."""
LEAST = FIRST + LAST
COSTS = {"transformer": 6.0, "text": 0.2, "language": 2.0, "windowed": 1.5}
"""What planning a block of a stack takes, relative to the others."""


@dataclass(frozen=True)
class Line:
    """The true depths are ``second + steps * (second - first)``."""

    first: Depths
    second: Depths
    steps: int


def line_to(depths: Depths) -> Line | None:
    """The line of least cost; ``None`` if it would cost more than the true depths."""
    best, least = None, sum(COSTS[name] * depth for name, depth in depths.items())
    for steps in range(1, max(depths.values(), default=0)):
        grown = {name: max(0, depth - LEAST) // (steps + 1) for name, depth in depths.items()}
        first = {name: depth - (steps + 1) * grown[name] for name, depth in depths.items()}
        second = {name: first[name] + grown[name] for name in depths}
        cost = sum(COSTS[name] * (first[name] + second[name]) for name in depths)
        if cost < least and any(grown.values()):
            best, least = Line(first, second, steps), cost
    return best


def depths_of(generator: GeneratorConfig, critic: Mapping[str, Any] | None) -> dict[str, int]:
    """The stacks of a run that consist of equal blocks; none if the transformer's are not: two runs of all would
    take longer than one of everything. ``critic``: its ``config.json``, if one is asked."""
    if not _equal_blocks(generator):
        return {}
    depths = {"transformer": generator.transformer["num_layers"]}
    if generator.transformer_2 is not None and generator.transformer_2["num_layers"] != depths["transformer"]:
        del depths["transformer"]
    if critic is None:
        return depths
    text, vision = critic["text_config"], critic["vision_config"]
    if len(set(text.get("layer_types") or [0])) == 1 and not text.get("use_sliding_window"):
        depths["language"] = text["num_hidden_layers"]
    whole = vision.get("fullatt_block_indexes")
    ends = bool(whole) and max(whole) == vision["depth"] - 1 and 0 not in whole and len(whole) <= LEAST
    if ends and "deepstack_visual_indexes" not in vision:
        depths["windowed"] = vision["depth"] - len(whole)
    return depths


def _equal_blocks(generator: GeneratorConfig) -> bool:
    """Whether the parameters of all blocks of the transformer have the same names and shapes."""
    family, blocks = family_of(generator), defaultdict[str, set[object]](set)
    for name, shape in family.parameter_shapes(generator.transformer).items():
        if name.startswith(f"{family.BLOCKS}."):
            _, place, inner = name.split(".", 2)
            blocks[place].add((inner, shape))
    return len({frozenset(one) for one in blocks.values()}) == 1


def shallow_generator(generator: GeneratorConfig, depths: Depths) -> GeneratorConfig:
    layers = {"num_layers": depths["transformer"]} if "transformer" in depths else {}
    text, second = {"num_layers": depths["text"]} if "text" in depths else {}, generator.transformer_2
    return replace(
        generator,
        transformer=generator.transformer | layers,
        transformer_2=None if second is None else second | layers,
        text=generator.text | text,
    )


def shallow_critic(config: Mapping[str, Any], depths: Depths) -> dict[str, Any]:
    """The critic's ``config.json`` with these depths. The vision tower keeps its blocks of full attention: one is the
    last, as before, and one block with windows stands between two of them."""
    short = copy.deepcopy(dict(config))
    text, vision = short["text_config"], short["vision_config"]
    if "language" in depths:
        text["num_hidden_layers"] = depths["language"]
        if text.get("layer_types"):
            text["layer_types"] = text["layer_types"][: depths["language"]]
    count = len(vision.get("fullatt_block_indexes", ()))
    if "windowed" in depths and depths["windowed"] + count < vision["depth"]:
        vision["depth"] = depth = depths["windowed"] + count
        vision["fullatt_block_indexes"] = list(range(depth - 1, -1, -2))[:count][::-1]
    return short


GROUPS = {"transformer": ("rollout", "denoise_backward"), "vae": ("decode", "vae_backward"), "critic": ("critic",)}
"""The model that works in these stages."""
_VAE = {f"memory.{name}" for name in ("vae_strips", "vae_cache_every", "vae_caches", "vae_grad_dtype", "record_decode")}
_TRANSFORMER = {
    *("lora", "model.quant", "model.products"),
    *(f"memory.{name}" for name in ("checkpoint", "token_slices", "keep_attention", "record_rollout")),
}
_CRITIC = {"critic.id", "critic.quant", "rewards"}
_STEPS = {f"sampler.{name}" for name in ("steps", "graded_steps", "graded")}
_OTHERS = {
    "transformer": _VAE | _CRITIC,
    "vae": _TRANSFORMER | _CRITIC | _STEPS,
    "critic": (_TRANSFORMER | _VAE | _STEPS) - {"memory.checkpoint"},
}
"""Settings that change nothing in the stages of a model but what is there when they begin."""


def settings_of(group: str, config: Config) -> str:
    """All settings that may change what a model's stages do, as a key."""
    left_out = _OTHERS[group] | {"optim", "memory.text_device", "memory.vram_gib"}
    rows: dict[str, Any] = config.model_dump(mode="json")
    memory = rows["memory"]
    for where in ("park", "stream"):
        memory[where] = group in memory[where]
    for name in left_out:
        table, _, key = name.rpartition(".")
        (rows[table] if table else rows).pop(key)
    rows["anchor"] = group == "transformer" and config.optim.anchor > 0
    return f"{group} {json.dumps(rows, sort_keys=True)}"


def mark_critic(models: Models, ledger: Ledger) -> None:
    """Marks where each block of the critic begins, also in its recompute, and where its backward ends. Of the scalar
    rewards it marks nothing: they have the same depth in every plan."""
    if models.critic is None:
        return
    stacks, vision = models.critic.stacks, models.critic.model.config.vision_config
    kinds: dict[str, list[Any]] = {"language": [layer.input_layernorm for layer in stacks.language.layers]}
    whole = set(getattr(vision, "fullatt_block_indexes", None) or ())
    for place, block in enumerate(stacks.blocks):
        norm = getattr(block, "norm1", None) or block.layer_norm1
        kinds.setdefault("whole" if place in whole else "windowed", []).append(norm)
    for kind, norms in kinds.items():
        for place, norm in enumerate(norms):
            norm.register_forward_pre_hook(_Begins(marker(ledger, kind, place, len(norms))))


def marker(ledger: Ledger, stack: str, place: int, depth: int) -> Callable[[str], None]:
    """Called with what happens to this block of a stack."""
    if FIRST <= place < depth - LAST:
        return lambda event: ledger.mark(MIDDLE)
    near = place if place < FIRST else place - depth
    return lambda event: ledger.mark((event, stack, near))


class _Begins:
    """A forward pre-hook of a block's first module."""

    def __init__(self, mark: Callable[[str], None]) -> None:
        self._mark = mark

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> None:
        begins(inputs[0], self._mark)


def begins(hidden: Tensor, mark: Callable[[str], None]) -> None:
    """A block begins with this input. Its backward ends with the gradient at it."""
    mark("begins")
    if hidden.requires_grad:
        hidden.register_hook(partial(_ends, mark))


def _ends(mark: Callable[[str], None], gradient: Tensor) -> None:
    mark("ends")
