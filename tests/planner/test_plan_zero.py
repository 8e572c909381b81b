"""Plans of runs on DeepSpeed: partitioned weights against derived bytes, and the figures for several processes."""

import io
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from _plans import FAKES
from rich.console import Console
from torch import nn

from lowmem_drf.assembly.rungs import LADDERS
from lowmem_drf.config import change, load_config
from lowmem_drf.distributed.zero import LIVE_NUMEL, PERSIST_NUMEL, PREFETCH_NUMEL, REDUCE_BUCKET
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.wan.random_generator import random_transformer
from lowmem_drf.planner.cards import GIB, LARGEST_SHARE, SPARE, card_named
from lowmem_drf.planner.ladder import _changed
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.plan import decide_rollout, make_plan
from lowmem_drf.planner.stages import STAGES, StagePlan
from lowmem_drf.planner.words import print_plan
from lowmem_drf.planner.zero import PlannedZero3
from lowmem_drf.preset_files import default_preset

CARD = card_named("")
COMMON = (
    *("batch=4", "micro_batch=1", "sampler.steps=4", "sampler.graded_steps=2"),
    *("video.frames=5", "critic.frames=2", "memory.checkpoint=true"),
)
ZERO3 = (*COMMON, "engine=zero3", "processes=2")
WIDTH = 96
BLOCK = WIDTH * WIDTH + WIDTH
"""Numbers in a block of ``_Chain``, fp32."""


class _Chain(nn.Module):
    """Blocks of one linear each, called one after another, between two smaller linears."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.requires_grad_(False)


ENDS = sum(tensor.numel() for part in (_Chain().before, _Chain().after) for tensor in part.parameters())
BYTES = 4 * (6 * BLOCK + ENDS)


@contextmanager
def chain(ranks, offload="cpu", pinned=False, gathered=False, share=1.0, rate=22.0):
    """(stand-in, ledger)"""
    zero = (f"zero.offload={offload}", f"zero.pin_memory={str(pinned).lower()}")
    config = load_config("toy", [*ZERO3, f"processes={ranks}", f"batch={ranks}", *zero])
    with Ledger() as ledger:
        model = _Chain()
        ledger.adopt(model.parameters())
        stages = ("rollout", "denoise_backward")
        card = replace(CARD, link=rate)
        yield PlannedZero3(config, ledger, card, model, model.blocks, stages, gathered, share), ledger


def row(s=10.0):
    """A stage that computes for ``s`` seconds."""
    return StagePlan(
        peak_gib=0, weights_gib=0, kept_gib=0, host_gib=0, s=s, stall_s=0, copy_s=0, moved_gib=0, tflop=0, what=""
    )


def passed(stand_in, stage, gradients):
    """The stage's figures after one pass for each entry of ``gradients`` (with gradient or without)."""
    with stand_in.stage(stage):
        for gradient in gradients:
            with torch.set_grad_enabled(gradient):
                stand_in.called(lambda: None)()
    return stand_in.with_gathers(stage, row())


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_process_keeps_a_padded_part_of_each_tensor(ranks):
    parts = 4 * sum(-(-tensor.numel() // ranks) for tensor in _Chain().parameters())
    with chain(ranks) as (_, ledger):
        assert (ledger.card_bytes, ledger.host_bytes) == (0, parts)
    with chain(ranks, offload="none") as (_, ledger):
        assert (ledger.card_bytes, ledger.host_bytes) == (parts, 0)


def test_pinned_parts_take_powers_of_two():
    with chain(2, pinned=True) as (_, ledger):
        ends = 2 * 4 * 8 * WIDTH // 2 + 4 * WIDTH // 2 + 4 * 8 // 2  # 1536 rounds up to 2048, 192 to 256
        assert ends == 2 * 1536 + 192 + 16 and WIDTH * WIDTH // 2 * 4 == 18432
        assert ledger.host_bytes == 6 * (32768 + 256) + 2 * 2048 + 256 + 16


def test_space_for_gathered_weights():
    """Two blocks, with several processes a third one for the gather's buffer; in a gathered rollout all weights."""
    for ranks, gathered in ((1, False), (2, False), (2, True)):
        few = 4 * BLOCK * (2 if ranks == 1 else 3)
        with chain(ranks, gathered=gathered) as (stand_in, ledger):
            for stage, nbytes in (("rollout", BYTES if gathered else few), ("denoise_backward", few), ("decode", 0)):
                with stand_in.stage(stage):
                    assert ledger.card_bytes == nbytes
                assert ledger.card_bytes == 0


def test_traffic_of_a_pass():
    """A process reads its part from the host, receives the others' parts, and sends its own to each of them. A backward
    gathers the blocks again."""
    for ranks, offload in ((1, "cpu"), (2, "cpu"), (4, "cpu"), (4, "none")):
        with chain(ranks, offload=offload) as (stand_in, _):
            for stage, gradients, nbytes in (
                ("rollout", (False, False), 2 * BYTES),
                ("denoise_backward", (True,), BYTES + 4 * 6 * BLOCK),
                ("decode", (), 0),
            ):
                made = passed(stand_in, stage, gradients)
                own, others = nbytes / ranks * (offload != "none"), nbytes / ranks * (ranks - 1)
                assert made.moved_gib * GIB == pytest.approx(own + 2 * others)
                assert made.between_gib * GIB == pytest.approx(2 * others)


def test_a_gathered_rollout_moves_the_weights_once():
    """Half of the rollout is planned, so half the bytes are counted; the plan doubles them later."""
    with chain(2, gathered=True, share=0.5) as (stand_in, _):
        assert passed(stand_in, "rollout", [False] * 4).moved_gib * GIB == pytest.approx(0.5 * BYTES * 1.5)


def test_gathers_run_beside_computation_and_are_waited_for_where_they_take_longer():
    with chain(2, rate=1.0) as (stand_in, _):
        fast = passed(stand_in, "rollout", [False])
        assert (fast.s, fast.stall_s) == (10.0, 0.0) and fast.copy_s == pytest.approx(1.5 * BYTES / 1e9)
    with chain(2, rate=1e-6) as (stand_in, _):  # 1000 bytes a second
        slow = passed(stand_in, "rollout", [False])
        assert slow.s == pytest.approx(BYTES / 1000) and slow.stall_s == pytest.approx(slow.s - 10.0)


def test_peaks_are_those_of_one_card_with_three_blocks_in_the_place_of_the_weights(plans):
    """Up to the allocator's rounding. The backward allocates the LoRA's gradients; on one card they exist before it."""
    config = load_config("toy", COMMON)
    transformer = random_transformer(generator_config(config.model.id).transformer, torch.float32)
    add_lora(transformer, config.lora.rank, config.lora.alpha, config.lora.targets)
    three = 3 * sum(tensor.nbytes for tensor in transformer.blocks[0].parameters())
    for stage, gradients in (("rollout", 0), ("denoise_backward", sum(lora_sizes(config)))):
        one, many = (plans[name].stages[stage] for name in ("single", "partitioned"))
        own = [(row.peak_gib - row.kept_gib - row.weights_gib) * GIB for row in (one, many)]
        assert own[1] == pytest.approx(own[0] + three + gradients, rel=0, abs=512 * 4)


@pytest.fixture(scope="module")
def plans():
    variants = {
        "single": COMMON,
        "zero1": (*COMMON, "engine=zero1", "processes=2"),
        "zero2 on cards": (*COMMON, "engine=zero2", "processes=2", "zero.offload=none"),
        "partitioned": (*ZERO3, "zero.rollout=partitioned"),
        "gathered": (*ZERO3, "zero.rollout=gathered"),
        "four": (*ZERO3, "zero.rollout=partitioned", "processes=4"),
        "critic": (*ZERO3, "zero.rollout=partitioned", "zero.critic=true"),
    }
    return {name: make_plan(load_config("toy", overrides), CARD, fakes=FAKES) for name, overrides in variants.items()}


def test_a_process_does_its_share_of_the_batch(plans):
    tflop = {
        name: sum(stage.tflop for key, stage in plan.stages.items() if key not in ("text", "update"))
        for name, plan in plans.items()
    }
    assert tflop["zero1"] == pytest.approx(tflop["single"] / 2, rel=1e-6) == tflop["zero2 on cards"]
    # a recompute goes on to the block's end
    assert tflop["partitioned"] == pytest.approx(tflop["single"] / 2, rel=0.01)
    assert tflop["four"] == pytest.approx(tflop["partitioned"] / 2, rel=1e-6)


def test_traffic_between_cards_adds_up_and_is_of_the_stages_that_gather(plans):
    for name, plan in plans.items():
        assert plan.between_gib == sum(stage.between_gib for stage in plan.stages.values())
        assert all(stage.between_gib <= stage.moved_gib for stage in plan.stages.values())
        moving = {key for key, stage in plan.stages.items() if stage.between_gib}
        gathering = {"rollout", "denoise_backward"} if plan.rollout else set()
        assert moving == gathering | ({"critic"} if name == "critic" else set()) | (
            {"update"} if name != "single" else set()
        )


def test_a_partitioned_rollout_moves_the_weights_in_every_pass(plans):
    """Four steps without guidance, and once under gathered weights."""
    assert plans["partitioned"].stages["rollout"].between_gib == pytest.approx(
        4 * plans["gathered"].stages["rollout"].between_gib
    )
    assert plans["gathered"].stages["rollout"].peak_gib >= plans["partitioned"].stages["rollout"].peak_gib
    assert (
        plans["gathered"].stages["denoise_backward"].moved_gib
        == plans["partitioned"].stages["denoise_backward"].moved_gib
    )


def test_host_memory_is_the_weights_divided(plans):
    two, four = plans["partitioned"], plans["four"]
    assert two.all_host_gib == 2 * two.host_gib and four.all_host_gib == 4 * four.host_gib
    assert four.stages["update"].host_gib < two.stages["update"].host_gib < 1.1 * 2 * four.stages["update"].host_gib
    assert plans["critic"].stages["update"].host_gib > two.stages["update"].host_gib


def test_the_training_state_is_split(plans):
    """A single process keeps two moments and gradients. Under DeepSpeed the card holds a bucket, and either a buffer
    for the largest gradient (state on the host) or a part of weights, gradients and moments. In the first case the host
    also holds a copy of the weights and that buffer."""
    sizes = lora_sizes(load_config("toy", COMMON))
    lora, bucket = sum(sizes), 4 * REDUCE_BUCKET
    kept = {name: plan.stages["rollout"].kept_gib * GIB for name, plan in plans.items()}
    rounding = 512 * 3 * len(sizes)  # the single process's are tensors by themselves
    assert kept["zero1"] == pytest.approx(kept["single"] - 3 * lora + bucket + max(sizes), abs=rounding)
    assert kept["zero2 on cards"] == pytest.approx(kept["single"] - 3 * lora + bucket + 4 * lora / 2, abs=rounding)
    assert plans["zero1"].stages["update"].host_gib * GIB == pytest.approx(5 * lora / 2 + max(sizes), abs=rounding)


def test_auto_gathers_where_that_fits(plans):
    config = load_config("toy", ZERO3)
    peaks = [plans[name].stages["rollout"].peak_gib for name in ("partitioned", "gathered")]
    between = sum(peaks) / 2 * (1 + SPARE) / (1 - LARGEST_SHARE)
    assert decide_rollout(config, CARD, 24.0, FAKES).zero.rollout == "gathered"
    assert decide_rollout(config, CARD, between, FAKES).zero.rollout == "partitioned"
    assert decide_rollout(load_config("toy", COMMON), CARD, 24.0).zero.rollout == "auto"
    assert plans["gathered"].rollout == "gathered" and plans["single"].rollout is None
    large = load_config("zero3-2gpu")
    assert decide_rollout(large, CARD, 22.0).zero.rollout == "partitioned"


def test_what_is_printed(plans):
    def printed(name):
        console = Console(width=400, file=io.StringIO())
        print_plan(plans[name], "toy", load_config("toy"), console)
        return console.file.getvalue()

    single, two = printed("single"), printed("partitioned")
    assert "processes" not in single and "between the cards" not in single and "zero.rollout" not in single
    assert "each of 2 processes" in two and "between the cards" in two and "zero.rollout = partitioned" in two
    row = json.loads(json.dumps(plans["partitioned"].as_json("toy")))
    assert (row["processes"], row["rollout"], set(row["stages"])) == (2, "partitioned", set(STAGES))
    assert row["between_gib"] == pytest.approx(sum(stage["between_gib"] for stage in row["stages"].values()))


def test_the_advice_leaves_out_what_the_schema_refuses():
    """ZeRO-3 partitions the transformer: it cannot be streamed, parked or packed, nor have moments in 8 bit."""
    config = load_config("toy", ZERO3)
    offered = {override for ladder in LADDERS.values() for rung in ladder if (override := rung(config))}
    refused = {override for override in offered if _changed(config, override) is None}
    assert {
        'optim.name="adamw8bit"',
        'model.quant="int8"',
        'memory.stream=["transformer"]',
    } <= refused
    assert 'memory.stream=["critic"]' in offered - refused


def test_no_run_on_one_card_begins_with_the_preset_for_two():
    assert all(default_preset(gb, "NVIDIA GeForce RTX 4090") != "zero3-2gpu" for gb in (None, 23.9, 25.4, 60.0, 1000.0))


def test_the_preset_is_in_blocks_and_for_any_number_of_processes_that_divides_the_batch():
    config = load_config("zero3-2gpu")
    generator = generator_config(config.model.id).transformer
    width, feed_forward = generator["num_attention_heads"] * generator["attention_head_dim"], generator["ffn_dim"]
    linears = 8 * width * width + 2 * width * feed_forward
    lora = config.lora.rank * (8 * 2 * width + 2 * (width + feed_forward))
    block = linears + lora
    assert pytest.approx(block, rel=0.01) == PREFETCH_NUMEL and LIVE_NUMEL == 2 * PREFETCH_NUMEL
    # modulation stays, the LoRA does not
    assert 6 * width <= PERSIST_NUMEL < config.lora.rank * width
    for count in (1, 4):
        assert change(config, [f"processes={count}"]).processes == count


def lora_sizes(config):
    """Bytes."""
    transformer = random_transformer(generator_config(config.model.id).transformer, torch.float32)
    add_lora(transformer, config.lora.rank, config.lora.alpha, config.lora.targets)
    return [tensor.nbytes for tensor in lora_parameters(transformer)]
