"""The plan of a run on DeepSpeed: the stand-in for partitioned weights against DeepSpeed and against derived bytes, and
what a plan of many processes says."""

import io
import json
import socket
import subprocess
import sys

import pytest
import torch
from _root import ROOT
from rich.console import Console
from torch import nn

from lowmem_drf.config import change, default_preset, load_config
from lowmem_drf.distributed.zero import REDUCE_BUCKET
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.wan.random_generator import random_transformer
from lowmem_drf.planner.cards import GIB, card_named
from lowmem_drf.planner.costs import Rates
from lowmem_drf.planner.gathering import Rules
from lowmem_drf.planner.ladder import LADDERS, _changed
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.partitioned import DISK_BYTES_PER_S, Partitioned, Sharing
from lowmem_drf.planner.plan import decide_rollout, make_plan, new_fakes
from lowmem_drf.planner.report import print_plan
from lowmem_drf.planner.stages import STAGES

CARD = card_named("")
FAKES = new_fakes()
COMMON = (
    "batch=4",
    "micro_batch=1",
    "sampler.steps=4",
    "sampler.graded_steps=2",
    "video.frames=5",
    "critic.frames=2",
    "memory.checkpoint=true",
)
ZERO3 = (*COMMON, "engine=zero3", "processes=2", "zero.stage3_param_persistence_threshold=0")
WIDTH = 96
BLOCK = WIDTH * WIDTH + WIDTH
"""Numbers of a ``_Chain``'s block, fp32."""


class _Chain(nn.Module):
    """Blocks, one linear each, that forwards enter one after another."""

    def __init__(self, before=0):
        super().__init__()
        self.before = nn.ModuleList(nn.Identity() for _ in range(before))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.requires_grad_(False)

    def forward(self, x):
        for module in (*self.before, *self.blocks):
            x = module(x)
        return x


def chain(ranks, ahead=0, live=10**9, offload="cpu", pinned=False, gathered=False, stays=0, rates=None, before=0):
    """(model, stand-in, ledger): within the ledger."""
    ledger = Ledger(rates=rates)
    ledger.__enter__()
    model = _Chain(before)
    ledger.adopt(model.parameters())
    stand_in = Partitioned(
        model, list(model.blocks), Sharing(ranks, offload, pinned, Rules(ahead, live, stays), gathered)
    )
    for place, block in enumerate(model.blocks):
        block.forward = stand_in.forward(place, block.forward)
    return model, stand_in, ledger


@pytest.fixture(autouse=True)
def no_ledger_is_left():
    yield
    for ledger in list(Ledger._stack):
        ledger.__exit__(None, None, None)


def a_pass(model, ledger):
    """Peak bytes of a forward without gradient above what was there, its activations left out."""
    x = torch.zeros(1, WIDTH)
    before = ledger.card_bytes
    ledger.reset_peak()
    with torch.no_grad():
        model(x)
    # what a block is given; what it returns comes when nothing is doubled
    return ledger.peak_card_bytes - before - x.nbytes


@pytest.fixture(scope="module")
def gathers():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests" / "_gathers.py"), str(port)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests", timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_stand_in_has_gathered_what_deepspeed_has(gathers):
    """As every block is entered, in forwards alone, in forwards with gradient and in backwards: block by block, to the
    number."""
    assert len(gathers) == 2
    for rows in gathers.values():
        assert len(rows) == 48  # 8 blocks: two forwards, and two with a backward
        assert all(real == planned for real, planned in rows)
        assert any(len(real) > 1 for real, _ in rows)  # something was gathered ahead


def test_bytes_of_a_gather_of_several_processes():
    """The padded bytes of a block in one buffer, and each tensor again by itself; before that the own parts beside the
    buffer."""
    for ranks in (2, 3, 7):
        model, _, ledger = chain(ranks)
        parts = 4 * (-(-WIDTH * WIDTH // ranks) + -(-WIDTH // ranks))
        assert ledger.card_bytes == 0 and ledger.host_bytes == 6 * parts
        assert a_pass(model, ledger) == max(parts * ranks + 4 * BLOCK, parts + parts * ranks)
        ledger.__exit__(None, None, None)


def test_one_process_copies_each_tensor_once():
    model, _, ledger = chain(1)
    assert ledger.host_bytes == 6 * 4 * BLOCK
    assert a_pass(model, ledger) == 4 * BLOCK + 4 * WIDTH  # what the block returns


def test_pinned_parts_take_powers_of_two():
    _, _, ledger = chain(2, pinned=True)
    assert WIDTH * WIDTH // 2 * 4 == 18432 and ledger.host_bytes == 6 * (32768 + 256)


def test_small_tensors_stay_on_the_card():
    model, _, ledger = chain(2, stays=WIDTH)
    assert ledger.card_bytes == 6 * 4 * WIDTH and ledger.host_bytes == 6 * 4 * WIDTH * WIDTH // 2
    assert model.blocks[0].bias.numel() == WIDTH and model.blocks[0].weight.numel() == 0
    assert a_pass(model, ledger) == 4 * WIDTH * WIDTH + 4 * WIDTH * WIDTH // 2  # alone it needs no second copy


def test_parts_without_offload_are_on_the_card():
    _, _, ledger = chain(2, offload="none")
    assert ledger.host_bytes == 0 and ledger.card_bytes == 6 * 4 * BLOCK // 2


@pytest.mark.parametrize(("before", "blocks"), [(0, 2), (1, 3), (9, 4)])
def test_every_module_gathers_a_bucket_ahead_up_to_what_may_be_alive(before, blocks):
    """A bucket of one block. The model itself gathers the first one, each module without weights another, the first
    block one more."""
    model, stand_in, _ = chain(1, ahead=BLOCK, live=4 * BLOCK, before=before)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(stand_in.gathering.numel))
    with torch.no_grad():
        model(torch.zeros(1, WIDTH))
    assert seen[0] == max(seen) == blocks * BLOCK


def test_gathered_weights_stay_until_they_are_dropped():
    for gathered in (True, False):
        model, stand_in, ledger = chain(2, gathered=gathered)
        a_pass(model, ledger)
        assert ledger.card_bytes == (6 * 4 * BLOCK if gathered else 0)
        moved = ledger.link.up_bytes
        a_pass(model, ledger)
        assert ledger.link.up_bytes == (1 if gathered else 2) * moved
        stand_in.drop()
        assert ledger.card_bytes == 0
        ledger.__exit__(None, None, None)


def test_traffic_of_a_pass():
    """The own part from the host, the others' from their cards, and the own part to every other one."""
    for ranks, offload in ((1, "cpu"), (2, "cpu"), (4, "cpu"), (4, "none")):
        model, _, ledger = chain(ranks, offload=offload)
        a_pass(model, ledger)
        own, others = (6 * 4 * BLOCK // ranks) * (offload != "none"), 6 * 4 * BLOCK // ranks * (ranks - 1)
        link = ledger.link
        assert (link.up_bytes, link.down_bytes, link.between_bytes) == (own + others, others, 2 * others)
        ledger.__exit__(None, None, None)


def test_time_of_a_pass_with_nothing_ahead_is_that_of_its_copies():
    never = {torch.float32: 1e30}
    for ranks, offload in ((1, "cpu"), (2, "cpu"), (2, "nvme")):
        model, _, ledger = chain(ranks, offload=offload, rates=Rates(never, 1e30, 1e30, link=1e9))
        a_pass(model, ledger)
        # read before it is sent; the next block's is read when it is asked for
        disk = 4 * BLOCK / DISK_BYTES_PER_S * (offload == "nvme")
        assert ledger.seconds == pytest.approx(6 * (4 * BLOCK / 1e9 + disk), rel=1e-6)
        ledger.__exit__(None, None, None)


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
    """Four steps without guidance, and once under gathered weights. ToyWorld is smaller than what may be gathered
    ahead."""
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
    """One process keeps two moments and gradients besides its weights. DeepSpeed's have a bucket on the card and, with
    the state on the host, a buffer for the largest gradient; else a part of weights, gradients and moments. On the host
    are a copy of the weights and that buffer besides."""
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
    between = sum(peaks) / 2 / 0.9
    assert decide_rollout(config, CARD, 24.0, FAKES).zero.rollout == "gathered"
    assert decide_rollout(config, CARD, between, FAKES).zero.rollout == "partitioned"
    assert decide_rollout(load_config("toy", COMMON), CARD, 24.0).zero.rollout == "auto"
    assert plans["gathered"].rollout == "gathered" and plans["single"].rollout is None
    large = load_config("zero3-2gpu")
    assert decide_rollout(large, CARD, 22.0).zero.rollout == "partitioned"


def test_what_is_printed(plans):
    def printed(name):
        console = Console(width=400, file=io.StringIO())
        print_plan(plans[name], "toy", console)
        return console.file.getvalue()

    single, two = printed("single"), printed("partitioned")
    assert "processes" not in single and "between the cards" not in single and "zero.rollout" not in single
    assert "each of 2 processes" in two and "between the cards" in two and "zero.rollout = partitioned" in two
    row = json.loads(json.dumps(plans["partitioned"].as_json("toy")))
    assert (row["processes"], row["rollout"], set(row["stages"])) == (2, "partitioned", set(STAGES))
    assert row["between_gib"] == pytest.approx(sum(stage["between_gib"] for stage in row["stages"].values()))


def test_the_advice_leaves_out_what_the_schema_refuses():
    """Streams, parks and packs of a transformer that ZeRO-3 partitions, and moments in 8 bit."""
    config = load_config("toy", ZERO3)
    offered = {override for ladder in LADDERS.values() for rung in ladder if (override := rung(config))}
    refused = {override for override in offered if _changed(config, override) is None}
    assert {
        'optim.name="adamw8bit"',
        'model.quant="int8"',
        'memory.stream=["transformer"]',
        'memory.park=["transformer"]',
    } <= refused
    assert 'memory.park=["critic"]' in offered - refused


def test_no_run_on_one_card_begins_with_the_preset_for_two():
    assert all(default_preset(gb, "NVIDIA GeForce RTX 4090") != "zero3-2gpu" for gb in (None, 23.9, 25.4, 60.0, 1000.0))


def test_the_preset_is_in_blocks_and_for_any_number_of_processes_that_divides_the_batch():
    config = load_config("zero3-2gpu")
    generator = generator_config(config.model.id).transformer
    width, feed_forward = generator["num_attention_heads"] * generator["attention_head_dim"], generator["ffn_dim"]
    linears = 8 * width * width + 2 * width * feed_forward
    lora = config.lora.rank * (8 * 2 * width + 2 * (width + feed_forward))
    block, zero = linears + lora, config.zero
    assert (
        zero.stage3_prefetch_bucket_size == pytest.approx(block, rel=0.01)
        and zero.stage3_max_live_parameters == 2 * zero.stage3_prefetch_bucket_size
    )
    # modulation stays, the LoRA does not
    assert 6 * width <= zero.stage3_param_persistence_threshold < config.lora.rank * width
    for count in (1, 4):
        assert change(config, [f"processes={count}"]).processes == count


def lora_sizes(config):
    """Bytes."""
    transformer = random_transformer(generator_config(config.model.id).transformer, torch.float32)
    add_lora(transformer, config.lora.rank, config.lora.alpha, config.lora.targets)
    return [tensor.nbytes for tensor in lora_parameters(transformer)]
