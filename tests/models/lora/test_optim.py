"""Optimizers of libraries: their updates, their checkpoints, and their bytes in the plan."""

from __future__ import annotations

import sys

import pytest
import torch
from _plans import FAKES
from safetensors.torch import load, save

from lowmem_drf.assembly.loading import load_models
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.commands.bench import count_bytes
from lowmem_drf.commands.train import train_command
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters, named_lora
from lowmem_drf.models.lora.optimizers import (
    LIBRARIES,
    PAGED_FROM,
    fill_states,
    make_optimizer,
    pack_optimizer,
    paged_moments,
    unpack_optimizer,
)
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.prompts import as_prompts
from lowmem_drf.schema.learning import Optim
from lowmem_drf.toy.captions import train_prompts
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.trainer import SingleTrainer
from lowmem_drf.training.update import update

NAMES = ("adamw", "adamw8bit", "paged_adamw8bit", "lion", "prodigy")
KEYS = ["x.lora_A.weight", "x.lora_B.weight"]
SHORT = ("batch=1", "micro_batch=1", "sampler.steps=2", "sampler.graded_steps=1", "video.frames=5", "critic.frames=2")


def fresh(name):
    """A tensor with moments in 8 bit, a small one of zeros, as B of a LoRA, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, 128, generator=generator).requires_grad_(), torch.zeros(2, 128, requires_grad=True)]
    return tensors, make_optimizer(Optim(name=name, lr=0.1, weight_decay=0.01), tensors)


def step(tensors, optimizer, first, last):
    for n in range(first, last):
        generator = torch.Generator().manual_seed(n)
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_where_it_was(name):
    one, first = fresh(name)
    step(one, first, 0, 5)
    two, second = fresh(name)
    step(two, second, 0, 3)
    three, third = fresh(name)
    with torch.no_grad():
        for new, old in zip(three, two, strict=True):
            new.copy_(old)
    unpack_optimizer(third, KEYS, load(save(pack_optimizer(second, KEYS))))
    assert all(torch.equal(a, b) for a, b in zip(three, two, strict=True))
    step(three, third, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    now, then = pack_optimizer(third, KEYS), pack_optimizer(first, KEYS)
    assert now.keys() == then.keys() and all(torch.equal(now[key], then[key]) for key in now)


def test_the_names_in_a_checkpoint_stay():
    """From runs that an earlier version started."""
    tensors, optimizer = fresh("adamw")
    step(tensors, optimizer, 0, 1)
    assert set(pack_optimizer(optimizer, KEYS)) == {
        f"{key}.{moment}" for key in KEYS for moment in ("step", "exp_avg", "exp_avg_sq")
    }


def test_a_large_tensors_moments_take_a_byte_each_and_the_tables_are_shared():
    tensors, optimizer = fresh("adamw8bit")
    step(tensors, optimizer, 0, 1)
    packed = pack_optimizer(optimizer, KEYS)
    blocks = tensors[0].numel() // 256
    assert (
        sum(tensor.nbytes for name, tensor in packed.items() if name.startswith(KEYS[0]))
        == 2 * (tensors[0].numel() + 4 * blocks) + 8
    )
    assert packed[f"{KEYS[1]}.state1"].dtype == torch.float32
    assert packed["qmap1"].nbytes == packed["qmap2"].nbytes == 4 * 256


@pytest.mark.parametrize("name", NAMES)
def test_making_the_states_early_changes_nothing(name):
    (one, first), (two, second) = fresh(name), fresh(name)
    fill_states(second)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert second.param_groups[0]["lr"] == 0.1
    step(one, first, 0, 1)
    assert pack_optimizer(first, KEYS).keys() == pack_optimizer(second, KEYS).keys()


def test_the_state_of_another_optimizer_is_refused():
    for kept, name in (("adamw", "adamw8bit"), ("adamw8bit", "adamw"), ("prodigy", "lion"), ("lion", "adamw")):
        tensors, optimizer = fresh(kept)
        step(tensors, optimizer, 0, 1)
        with pytest.raises(BadInputError, match="optim.name"):
            unpack_optimizer(fresh(name)[1], KEYS, pack_optimizer(optimizer, KEYS))


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_missing_library_is_named_with_the_key(monkeypatch, name):
    library = LIBRARIES[name]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BadInputError, match=f"optim.name = {name} needs {library}.*pip .*optim.name=adamw"):
        fresh(name)


@pytest.mark.parametrize(("name", "lr"), [("lion", 3e-4), ("prodigy", 1.0)])
def test_a_run_of_a_librarys_optimizer_in_two_halves_equals_one_in_one(name, lr, tiny_preset, tmp_path):
    settings = [f"optim.name={name}", f"optim.lr={lr}", "optim.weight_decay=0.01", "log.sample_every=0", "batch=1"]
    settings += ["micro_batch=1", "optim.warmup_steps=2"]
    for run, steps in ((tmp_path / "whole", (4,)), (tmp_path / "halves", (2, 4))):
        train_command(str(tiny_preset), None, run, steps[0], None, False, settings, False)
        if len(steps) > 1:
            train_command(None, None, run, steps[1], None, True, [], False)
    whole, halves = (checkpoint_folder(tmp_path / run) / "lora.safetensors" for run in ("whole", "halves"))
    assert whole.read_bytes() == halves.read_bytes()


def test_prodigy_wants_no_rate_of_adamw():
    with pytest.raises(BadInputError, match="optim.lr.*set it to 1"):
        load_config("toy", ["optim.name=prodigy"])
    assert load_config("toy", ["optim.name=prodigy", "optim.lr=1"]).optim.lr == 1


def test_a_run_in_two_halves_equals_one_in_one(tiny_preset, tmp_path):
    """Rank 192: the tiny transformer's matrices are just large enough for moments in 8 bit."""
    settings = ["optim.name=paged_adamw8bit", "lora.rank=192", "log.sample_every=0", "batch=1", "micro_batch=1"]
    for run, steps in ((tmp_path / "whole", (3,)), (tmp_path / "halves", (1, 3))):
        train_command(str(tiny_preset), None, run, steps[0], None, False, settings, False)
        if len(steps) > 1:
            with pytest.raises(BadInputError, match="cannot go on with another optim.name"):
                train_command(None, None, run, steps[1], None, True, ["optim.name=adamw"], False)
            train_command(None, None, run, steps[1], None, True, [], False)
    whole, halves = (checkpoint_folder(tmp_path / run) for run in ("whole", "halves"))
    assert (whole / "lora.safetensors").read_bytes() == (halves / "lora.safetensors").read_bytes()
    one, other = (load((folder / "state.safetensors").read_bytes()) for folder in (whole, halves))
    moments = [key for key, tensor in one.items() if key.endswith("state1") and tensor.dtype == torch.uint8]
    assert moments and all(torch.equal(tensor, other[key]) for key, tensor in one.items() if not key.startswith("rng."))


@pytest.mark.parametrize("name", NAMES[1:])
def test_planned_bytes_are_those_of_a_real_update(name):
    """Rank 256: only the feed-forward matrices of ToyWorld have paged moments. Prodigy's plan has first values of B
    too, which a fresh LoRA has not, as its B is 0, and one that goes on from a file has."""
    rate = "optim.lr=1"  # which prodigy takes
    config = load_config("toy", [*SHORT, f"optim.name={name}", rate, "lora.rank=256", "memory.checkpoint=true"])
    plan = make_plan(config, card_named(""), fakes=FAKES)
    for stage, gib in count_bytes(config).items():
        most = 1.1 if name == "prodigy" else 1.05
        assert 0.95 * gib < plan.stages[stage].peak_gib < most * gib, stage


def test_moments_of_large_tensors_are_paged():
    tensors = [torch.zeros(PAGED_FROM, requires_grad=True), torch.zeros(PAGED_FROM - 1, requires_grad=True)]
    optimizer = make_optimizer(Optim(name="paged_adamw8bit"), tensors)
    fill_states(optimizer)
    assert sum(moment.nbytes for moment in paged_moments(optimizer)) == 2 * PAGED_FROM
    assert paged_moments(make_optimizer(Optim(), tensors)) == []


@pytest.mark.slow
def test_its_updates_follow_those_of_fp32_moments():
    """Twenty updates of ToyWorld's LoRA. The code of 8 bit has steps of 0.7% of a block's largest number down to a
    tenth of it, and finer ones below: a moment is off by 2% on average, the root of the second one by half of that, and
    an angle of 0.045 (cosine 0.999) leaves room for both and for what the one trajectory sees that the other does
    not."""
    texts = train_prompts()[:4]
    moved = {}
    for name in ("adamw", "adamw8bit"):
        config = load_config("toy", [*SHORT, f"optim.name={name}", "lora.rank=32", "critic.mode=vanilla"])
        prompts = as_prompts(texts)
        models = load_models(config, prompts)
        add_lora(models.transformer, config.lora.rank, config.lora.alpha, config.lora.targets, seed=0)
        parts, questions = models.parts(lora_parameters(models.transformer)), draft_questions(config, prompts)
        trainer, before = (
            SingleTrainer(config, named_lora(models.transformer)),
            [tensor.detach().clone() for tensor in parts.lora],
        )
        for n in range(20):
            update(config, models, parts, trainer, n, [prompts[n % 4]], questions, None)
        moved[name] = torch.cat(
            [(tensor.detach() - old).flatten() for tensor, old in zip(parts.lora, before, strict=True)]
        )
        large = [
            tensor for key, tensor in trainer.pack().items() if key.endswith(".state1") and tensor.dtype == torch.uint8
        ]
        assert len(large) == (0 if name == "adamw" else len(parts.lora))
    assert torch.cosine_similarity(moved["adamw"], moved["adamw8bit"], dim=0) > 0.999
    assert moved["adamw8bit"].norm().item() == pytest.approx(moved["adamw"].norm().item(), rel=0.01)
