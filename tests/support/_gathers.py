"""What DeepSpeed has gathered as each block of a tiny Wan transformer is entered, beside what the plan's stand-in says:
``python _gathers.py``, one process.

Prints JSON: {"ahead live": [[real, planned], ...]} with a row for every entering: {block: numbers of weights}.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from unittest import mock

import torch
from _tiny import tiny_transformer

from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.wan.denoiser import set_activations
from lowmem_drf.planner.gathering import Rules
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.partitioned import Partitioned, Sharing, in_backward

LAYERS = 8
ASKED = ((1.0, 3.0), (0.5, 2.0))
"""Numbers gathered ahead, and alive, in blocks."""
Row = dict[int, int]


def model() -> Any:
    made = tiny_transformer(layers=LAYERS)
    add_lora(made, 4, 4.0)
    return made


def passes(made: Any, call: Any, between: Any) -> None:
    """Of an update with two steps, both graded: two forwards, then each with its backward. ``call``: as ``made``.
    ``between``: the context of the last two."""
    torch.manual_seed(0)
    x, text = torch.randn(1, made.config.in_channels, 3, 4, 4), torch.randn(1, 6, made.config.text_dim)
    with torch.no_grad():
        for _ in range(2):
            call(x, torch.full((1,), 500), text, return_dict=False)
    with between:
        for _ in range(2):
            call(x.requires_grad_(), torch.full((1,), 500), text, return_dict=False)[0].square().mean().backward()


def real(ahead: int, live: int) -> list[Row]:
    """The second update, whose passes follow a recorded one."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import set_z3_leaf_module

    made, rows = model(), []
    set_activations(made, True, hooked=True)
    for block in made.blocks:
        set_z3_leaf_module(block, True)
    zero = {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
        "stage3_prefetch_bucket_size": ahead,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": 10**9,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 10**6,
    }
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    lora = lora_parameters(made)
    engine, *_ = deepspeed.initialize(
        model=made, optimizer=torch.optim.AdamW(lora), model_parameters=lora, config=settings
    )

    def count(*_: Any) -> None:
        gathered = ((place, weight) for place, block in enumerate(made.blocks) for weight in block.parameters())
        rows.append(
            _summed(
                (place, weight.ds_numel)
                for place, weight in gathered
                if weight.ds_status != ZeroParamStatus.NOT_AVAILABLE
            )
        )

    for block in made.blocks:
        block.register_forward_pre_hook(count)
    for _ in range(2):
        rows.clear()
        passes(made, engine, engine.coalesce_grad_reduction())
        engine.step()
    return rows


def planned(ahead: int, live: int) -> list[Row]:
    made, rows = model(), []
    with Ledger():
        stand_in = Partitioned(made, list(made.blocks), Sharing(1, "cpu", False, Rules(ahead, live, 0)))
        set_activations(made, True, streamed=stand_in)
        inside = {
            id(weight): number for number, place in enumerate(stand_in._places) for weight in stand_in._weights[place]
        }

        def count() -> None:
            weights = (weight for module in stand_in._weights for weight in module if id(weight) in inside)
            rows.append(
                _summed((inside[id(weight)], weight.numel) for weight in weights if weight.here or weight.flight)
            )

        enter, enter_again = stand_in._enter, stand_in.enter_again

        def entering(place: int | None) -> None:
            enter(place)
            if place in stand_in._places and not in_backward():
                count()

        def entering_again(place: int) -> None:
            enter_again(place)
            count()

        with (
            mock.patch.object(stand_in, "_enter", entering),
            mock.patch.object(stand_in, "enter_again", entering_again),
        ):
            passes(made, made, torch.enable_grad())
    return rows


def _summed(pairs: Any) -> Row:
    row: Row = {}
    for place, numel in pairs:
        row[place] = row.get(place, 0) + numel
    return row


if __name__ == "__main__":
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": sys.argv[1],
    }
    block = sum(weight.numel() for weight in model().blocks[0].parameters())
    asked = {f"{ahead} {live}": (int(ahead * block), int(live * block)) for ahead, live in ASKED}
    print(
        json.dumps({name: list(zip(real(*numbers), planned(*numbers), strict=True)) for name, numbers in asked.items()})
    )
