"""DeepSpeed's ZeRO with two processes on the CPU (gloo): gradients, report and state equal those of one process; the
amount gathered and averaged."""

import json

import pytest
import torch
from _processes import Processes
from _zero_updates import COMMON, all_updates, ready, spoilt_updates, updates

from lowmem_drf.config import load_config
from lowmem_drf.distributed.ranks import ALONE
from lowmem_drf.distributed.zero import REDUCE_BUCKET, deepspeed_config
from lowmem_drf.errors import BadInputError

OFFLOADED = "engine=zero3"
GATHERED = "engine=zero3 zero.rollout=gathered"
LEAN = "engine=zero3 zero.critic=true memory.token_slices=2 memory.checkpoint=host kernels.ops=naive"
ONE_STEP = "engine=zero3 sampler.graded_steps=1 sampler.guidance=2.0 zero.offload=none"
"""The transformer's input needs no gradient in the first backward. With guidance, weights on the cards, small ones
whole on each, and nothing gathered ahead."""
TAKEN_UP = ("engine=zero1", OFFLOADED)
REPLICATED = ("engine=zero1", "engine=zero2")
PARTITIONED = (OFFLOADED, GATHERED, LEAN)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def single():
    return updates(["engine=single"], ALONE)


@pytest.fixture(scope="module")
def two(single, pair, tmp_path_factory):
    """The results of two processes, by variant. ``taken up by``: one process's state, loaded and saved again."""
    file = tmp_path_factory.mktemp("zero") / "two.pt"
    state = single["lora"], single["state"]
    asked = [(variant, None) for variant in (*REPLICATED, *PARTITIONED, ONE_STEP)]
    asked += [(variant, state) for variant in TAKEN_UP]
    pair(all_updates, asked, str(file), ONE_STEP)
    names = [f"taken up by {variant}" if state else variant for variant, state in asked]
    return dict(zip(names, torch.load(file, weights_only=False), strict=True))


@pytest.fixture(scope="module")
def rounding(single):
    return rounded(["engine=single"], flat(single["gradients"][0]))


def rounded(overrides, exact):
    """The relative change of one process's gradient when every weight of the transformer changes by one fp32 rounding.

    Another memory alignment of the same weights changes the same sums by about this much. Two gradients that are both
    off by this much differ by at most twice as much."""
    config, models, prompts, questions = ready(overrides)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in models.transformer.parameters():
            if not parameter.requires_grad:
                signs = torch.randint(0, 3, parameter.shape, generator=noise) - 1
                parameter.mul_(1 + torch.finfo(torch.float32).eps * signs)
    moved = first_gradient(config, models, prompts, questions)
    return ((moved - exact).norm() / exact.norm()).item()


def first_gradient(config, models, prompts, questions):
    from _trainer import Keeping

    from lowmem_drf.models.lora.adapter import lora_parameters
    from lowmem_drf.training.update import update

    trainer = Keeping(config, models.transformer)
    update(config, models, models.parts(lora_parameters(models.transformer)), trainer, 0, prompts, questions, None, {})
    return torch.cat([gradient.flatten() for gradient in trainer.gradients[0]])


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("variant", PARTITIONED)
def test_two_processes_under_zero_3_have_the_gradient_of_one(single, two, rounding, variant):
    exact, got = flat(single["gradients"][0]), flat(two[variant]["gradients"][0])
    assert (got - exact).norm() <= 2 * rounding * exact.norm()


def test_one_graded_step_with_guidance_too(two):
    overrides = ["engine=single", "sampler.graded_steps=1", "sampler.guidance=2.0"]
    config, models, prompts, questions = ready(overrides)
    exact, got = first_gradient(config, models, prompts, questions), flat(two[ONE_STEP]["gradients"][0])
    assert (got - exact).norm() <= 2 * rounded(overrides, exact) * exact.norm()


@pytest.mark.parametrize("variant", REPLICATED)
def test_two_processes_with_whole_weights_add_the_same_numbers_in_another_order(single, two, variant):
    """Tolerance: four fp32 sums (two clips, two graded steps), one rounding each."""
    exact, got = flat(single["gradients"][0]), flat(two[variant]["gradients"][0])
    assert (got - exact).norm() <= 4 * torch.finfo(torch.float32).eps * exact.norm()


@pytest.mark.parametrize("variant", [*REPLICATED, *PARTITIONED])
def test_the_report_and_the_saved_tensors_are_those_of_one_process(single, two, variant):
    ours = two[variant]
    for one, many in zip(single["report"], ours["report"], strict=True):
        assert (one.prompts, one.seed, one.lr, one.step) == (many.prompts, many.seed, many.lr, many.step)
        assert one.reward_by_question.keys() == many.reward_by_question.keys()
        assert one.stage_s.keys() == many.stage_s.keys()
    for kind in ("lora", "state"):
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours[kind].items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in single[kind].items()
        }
    assert all(tensor == 2 for name, tensor in ours["state"].items() if name.endswith(".step"))


@pytest.mark.parametrize("variant", PARTITIONED)
def test_gradients_are_averaged_once_an_update(single, two, variant):
    """Independent of the number of graded steps: each element once per update, in two updates."""
    numbers = sum(tensor.numel() for tensor in single["lora"].values())
    assert two[variant]["reduced"] == 2 * numbers


def test_a_gathered_rollout_moves_the_weights_once(two):
    """Two updates with two steps each; the graded steps gather as before."""
    often, once = (two[variant]["gathered"] for variant in (OFFLOADED, GATHERED))
    assert often["rollout"] == 2 * once["rollout"]
    assert often["denoise_backward"] == once["denoise_backward"]


def test_the_critic_under_its_own_engine_is_gathered_in_its_stage_alone(two):
    assert two[LEAN]["gathered"]["critic"] > 0
    assert "critic" not in two[OFFLOADED]["gathered"]
    assert two[LEAN]["gathered"]["rollout"] == two[OFFLOADED]["gathered"]["rollout"]


def test_where_several_engines_take_the_same_gradient_the_state_of_the_rollout_is_no_matter(two):
    for kind in ("lora", "state"):
        assert all(torch.equal(tensor, two[GATHERED][kind][name]) for name, tensor in two[OFFLOADED][kind].items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process under DeepSpeed."""
    pytest.importorskip("deepspeed", reason="an optional library")
    file, process = tmp_path_factory.mktemp("zero") / "one.pt", Processes(1)
    process(all_updates, [(variant, None) for variant in REPLICATED], str(file))
    process.close()
    return dict(zip(REPLICATED, torch.load(file, weights_only=False), strict=True))


@pytest.mark.parametrize("variant", REPLICATED)
def test_one_process_is_the_same_to_the_byte(single, alone, variant):
    """DeepSpeed's sums, clipping and AdamW compute exactly what torch does."""
    assert alone[variant]["report"][0].grad_norm > load_config("toy").optim.grad_clip
    for kind in ("lora", "state"):
        assert all(torch.equal(tensor, alone[variant][kind][name]) for name, tensor in single[kind].items())


@pytest.mark.parametrize("variant", TAKEN_UP)
def test_the_state_of_any_number_of_processes_is_taken_up_exactly_by_any_other(single, two, variant):
    """Two processes load one process's state and save the same bytes."""
    for kind in ("lora", "state"):
        again = two[f"taken up by {variant}"][kind]
        assert again.keys() == single[kind].keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in single[kind].items())


@pytest.mark.slow
def test_a_nan_in_one_process_skips_the_update_in_all_and_the_next_one_is_made(pair):
    variants = ("engine=zero1", GATHERED, LEAN)
    of_one, of_other = pair(spoilt_updates, variants)
    assert of_one == of_other
    for said, blamed, unchanged, changed, finite, steps in of_one:
        assert said.startswith("update 1 was skipped: latents at the end of the rollout") and blamed == ["0002"]
        assert unchanged and changed and finite
        assert steps == {1}


def test_what_deepspeed_is_told():
    config = load_config("toy", [*COMMON, "engine=zero3", "processes=2", "optim.grad_clip=0.25"])
    told = deepspeed_config(config)
    assert told["gradient_clipping"] == 0.25  # DeepSpeed's default is 1.0
    assert told["gradient_accumulation_steps"] == 1  # DeepSpeed divides by it
    assert not {"fp16", "bf16"} & told.keys()  # it would cast the LoRA
    zero = told["zero_optimization"]
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert zero["reduce_bucket_size"] == REDUCE_BUCKET
    assert zero["stage3_max_reuse_distance"] == 0
    assert "offload_optimizer" not in deepspeed_config(config, trains=False)["zero_optimization"]
    replicated = deepspeed_config(load_config("toy", ["engine=zero1", "processes=2"]))
    assert "offload_param" not in replicated["zero_optimization"]
    json.dumps(told)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["processes=2"], 'engine: "single" is one process'),
        (["engine=zero1", "processes=9"], "processes: 9 are more than the batch"),
        (["engine=zero1", "processes=3"], "batch: 8 prompts cannot be split evenly over 3 processes; nearest: 6 or 9"),
        (["engine=zero3", "model.quant=nf4"], "nf4 does not go with ZeRO-3.*more of its memory, not less"),
        (["engine=zero3", "model.products=int8"], "model.products: .*8-bit weights"),
        (["engine=zero3", "zero.critic=true", "critic.quant=nf4"], "critic.quant: nf4 does not go with ZeRO-3"),
        (["engine=zero3", 'memory.park=["transformer"]'], "memory.park: has transformer"),
        (["engine=zero3", "memory.checkpoint=true", 'memory.stream=["transformer"]'], "memory.stream: has transformer"),
        (["engine=zero3", "memory.checkpoint=true", "memory.record_rollout=true"], "memory.record_rollout"),
        (["engine=zero2", "optim.name=adamw8bit"], "optim.name: adamw8bit does not go"),
        (["engine=zero2", "zero.critic=true"], "zero.critic"),
        (["engine=zero3", "zero.offload=nvme"], "zero.offload: input should be 'cpu' or 'none'"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(overrides, said):
    with pytest.raises(BadInputError, match=said):
        load_config("toy", overrides)


def test_a_4_bit_critic_of_its_own_goes_with_zero_3():
    assert load_config("toy", ["engine=zero3", "critic.quant=nf4", "processes=2"]).critic.quant == "nf4"
