"""ToyWorld's update with frozen weights on the card, parked or streamed: bitwise equal gradients. (The effect of
quantisation on a gradient: test_quant_error.py.)"""

from __future__ import annotations

import json

import pytest
import torch
from _tiny import randomise_lora

from lowmem_drf.assembly import assemble as parts
from lowmem_drf.assembly.assemble import step_spec
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands.train import train_command
from lowmem_drf.config import load_config
from lowmem_drf.method.step import drf_step
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stand_ins import planned_store
from lowmem_drf.prompts import as_prompts
from lowmem_drf.questions.make import make_questions

TEXT = "a red circle moves right on a gray background"
SMALL = (
    *("batch=1", "micro_batch=1", "sampler.steps=3", "sampler.graded_steps=2", "video.frames=5"),
    *("critic.frames=3", "critic.token_weights=uniform", "memory.checkpoint=true"),
    *("log.eval_prompts=0", "log.sample_every=0", "log.watch_every=0"),
)
CASES = [
    ("none", ["transformer"], []),
    ("nf4", ["transformer"], ["critic"]),
    ("int8 products", ["transformer", "critic"], []),
    ("none", ["critic"], ["transformer"]),
    ("nf4", ["transformer", "critic"], ["transformer", "critic", "vae"]),
]
"""(quantisation, memory.stream, memory.park). The transformer is streamed in each format; it is streamed
with the critic resident, parked and streamed, and parked with a streamed critic; the last case sets everything at once.
Quantisation is the transformer's alone, so formats and places of the critic are not combined."""


def gradient(quant, stream=(), park=(), *overrides):
    """Flat gradient of one update, two graded steps, in bf16 where the model is not always fp32."""
    places = [f"memory.stream={json.dumps(list(stream))}", f"memory.park={json.dumps(list(park))}"]
    quant, *integers = quant.split()
    products = ["model.products=int8"] if integers else []
    config = load_config("toy", [*SMALL, "dtype=bf16", f"model.quant={quant}", *products, *places, *overrides])
    prompts = as_prompts([TEXT])
    models = load_models(config, prompts)
    add_lora(models.transformer, rank=4, alpha=4.0)
    randomise_lora(models.transformer)
    lora = lora_parameters(models.transformer)
    inputs = (
        models.noise([3]),
        models.condition(as_prompts([TEXT])),
        models.no_condition(as_prompts([TEXT])),
        [make_questions(TEXT, "dense")],
    )
    for _ in range(2):  # the second one reuses the weights, as all updates after the first do
        for parameter in lora:
            parameter.grad = None
        drf_step(models.parts(lora), step_spec(config, 0), *inputs)
    return torch.cat([parameter.grad.flatten() for parameter in lora])


@pytest.fixture(scope="module")
def resident():
    return {quant: gradient(quant) for quant in ("none", "nf4", "int8 products")}


@pytest.mark.parametrize(
    ("quant", "stream", "park"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value) or "-"
)
def test_gradients_do_not_depend_on_where_weights_wait(resident, quant, stream, park):
    assert resident[quant].abs().max() > 0
    assert torch.equal(gradient(quant, stream, park), resident[quant])


def test_nor_when_every_arrival_is_a_copy(monkeypatch):
    """A planned store copies to new memory on each fetch, as a card does. All ways of saving activations are on."""
    everything = (
        *("memory.checkpoint=host", "memory.keep_attention=host"),
        *("memory.token_slices=2", "memory.vae_caches=host"),
    )
    exact = gradient("int8", (), (), *everything)
    monkeypatch.setattr(parts, "HostStore", lambda device: planned_store())
    with Ledger():
        assert torch.equal(gradient("int8", ["transformer", "critic"], ["vae"], *everything), exact)


def test_a_run_goes_through_and_resumes_elsewhere(tmp_path):
    """Two updates streamed in 8 bit, a third with resident weights: places may change in a run, formats may not."""
    run = tmp_path / "run"
    places = ['memory.stream=["transformer", "critic"]', 'memory.park=["vae"]']
    train_command("toy", None, run, 2, None, False, [*SMALL, "model.quant=int8", *places], False)
    train_command(None, None, run, 3, None, True, ["memory.stream=[]", "memory.park=[]"], False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["grad_norm"] > 0 for line in lines)
