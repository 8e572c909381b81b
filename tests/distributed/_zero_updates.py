"""A few updates of ToyWorld, in one process or in all processes of a run. A variant is overrides of preset ``toy``."""

from __future__ import annotations

import math
from contextlib import contextmanager
from unittest import mock

import torch
from rich.console import Console

from lowmem_drf.assembly.assemble import run_prompts
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.assembly.references import finish_questions
from lowmem_drf.config import load_config
from lowmem_drf.distributed import zero
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.models.lora.adapter import add_lora, load_lora_state, lora_parameters, lora_state, named_lora
from lowmem_drf.training.trainer import make_trainer
from lowmem_drf.training.update import SkippedUpdate, update

COMMON = (
    "video.frames=5",
    "optim.grad_clip=0.5",
    "critic.frames=2",
    "batch=2",
    "micro_batch=1",
    "sampler.steps=2",
    "sampler.graded_steps=2",
    "memory.checkpoint=true",
    "kernels.ops=naive",
    "optim.warmup_steps=0",
    "optim.anchor=0.5",
)


def ready(overrides, ranks: Ranks = ALONE):
    """ToyWorld with a non-zero LoRA: (configuration, models, prompts, questions)."""
    config = load_config("toy", [*COMMON, *overrides, f"processes={ranks.count}"])
    prompts = run_prompts(config)[: config.batch]
    models = load_models(config, prompts, ranks=ranks)
    add_lora(models.transformer, config.lora.rank, config.lora.alpha, config.lora.targets, seed=1)
    with torch.no_grad():
        for place, tensor in enumerate(lora_parameters(models.transformer)):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(place)) * 0.02)
    models.awake("critic")
    drafted = draft_questions(config, prompts)
    questions = finish_questions(config, prompts, drafted, models.asked_critic, Console(quiet=True)).questions
    return config, models, prompts, questions


def updates(overrides, ranks: Ranks, state=None, count=2):
    """Makes ``count`` updates; returns {"gradients", "lora", "state", "report", "reduced", "gathered"}.

    ``state``: (LoRA, optimizer state) to load; then no update is made, and only "lora" and "state" are returned.
    """
    config, models, prompts, questions = ready(overrides, ranks)
    if state:
        load_lora_state(models.transformer, state[0])
    lora = named_lora(models.transformer)
    trainer, models = make_trainer(config, models)
    if state:
        trainer.unpack(state[1])
        with trainer.whole():
            return {"lora": lora_state(models.transformer), "state": trainer.pack()}
    parts = models.parts(list(lora.values()))
    made: dict = {"gradients": [], "gathered": {}}
    step = trainer.step

    def keeping(lr):
        made["gradients"].append(_gradients(trainer, lora))
        return step(lr)

    trainer.step = keeping
    with _counted(made, models) as parts_stage:
        object.__setattr__(parts, "stage", parts_stage(parts.stage))
        made["report"] = [
            update(config, models, parts, trainer, number, prompts, questions, None, {}, ranks)
            for number in range(count)
        ]
    with trainer.whole():
        made["lora"] = lora_state(models.transformer)
    made["state"] = trainer.pack()
    return made


def _gradients(trainer, lora):
    """The averaged gradients before clipping."""
    from deepspeed.utils import safe_get_full_grad

    if type(trainer).__name__ == "SingleTrainer":
        return {name: tensor.grad.clone() for name, tensor in lora.items()}
    return {name: safe_get_full_grad(tensor).clone() for name, tensor in lora.items()}


@contextmanager
def _counted(made, models):
    """Counts the elements gathered from all processes by stage, and the gradient elements averaged."""
    stage_now = ["none"]
    made["reduced"] = 0
    if not any(hasattr(parameter, "ds_status") for parameter in models.transformer.parameters()):
        yield lambda inner: inner
        return
    from deepspeed.comm.torch import TorchBackend

    def gather(self, output_tensor, *rest, **arguments):
        made["gathered"][stage_now[0]] = made["gathered"].get(stage_now[0], 0) + output_tensor.numel()
        return originals["all_gather_into_tensor"](self, output_tensor, *rest, **arguments)

    def scatter(self, output_tensor, input_tensor, *rest, **arguments):
        made["reduced"] += input_tensor.numel()
        return originals["reduce_scatter_tensor"](self, output_tensor, input_tensor, *rest, **arguments)

    def staged(inner):
        @contextmanager
        def stage(name):
            with inner(name):
                stage_now[0] = name
                yield
                stage_now[0] = "none"

        return stage

    originals = {name: getattr(TorchBackend, name) for name in ("all_gather_into_tensor", "reduce_scatter_tensor")}
    with mock.patch.multiple(TorchBackend, all_gather_into_tensor=gather, reduce_scatter_tensor=scatter):
        yield staged


def all_updates(ranks: Ranks, variants, file: str, some_stay: str = ""):
    """Rank 0 saves the results of each (variant, state) to ``file``, in order; they are too large for a pipe.

    ToyWorld's tensors are about as small as those that ZeRO-3 keeps on every card, so here all tensors are partitioned.
    The variant ``some_stay`` makes one update, partitions only the largest tensors, and gathers nothing ahead.
    """
    made = []
    for variant, state in variants:
        settings = {"PERSIST_NUMEL": 40_000, "PREFETCH_NUMEL": 0} if variant == some_stay else {"PERSIST_NUMEL": 0}
        with mock.patch.multiple(zero, **settings):
            made.append(updates(variant.split(), ranks, state, 1 if variant == some_stay else 2))
    if ranks.chief:
        torch.save(made, file)


def spoilt_updates(ranks: Ranks, variants):
    """Of each variant: two updates, in the first of which the text of the last process's clip is NaN.

    Returns (message, prompts to blame, whether it changed no weight, whether the second update did, whether the weights
    are finite, the state's step counts) by variant.
    """
    made = []
    for variant in variants:
        with mock.patch.multiple(zero, PERSIST_NUMEL=0):
            made.append(_spoilt(ranks, variant.split()))
    return made


def _spoilt(ranks, overrides):
    config, models, prompts, questions = ready(overrides, ranks)
    lora, texts = named_lora(models.transformer), dict(models.texts)
    trainer, models = make_trainer(config, models)
    parts = models.parts(list(lora.values()))

    def weights():
        with trainer.whole():
            return torch.cat([tensor.flatten() for tensor in lora_state(models.transformer).values()])

    before, bad = weights(), prompts[-1].text
    models.texts[bad] = texts[bad] * math.nan  # only the last process makes this clip
    try:
        update(config, models, parts, trainer, 0, prompts, questions, None, {}, ranks)
        raise AssertionError("the update was not skipped")
    except SkippedUpdate as error:
        said, blamed = str(error), error.report.skipped.prompts
    between = weights()
    models.texts[bad] = texts[bad]
    update(config, models, parts, trainer, 1, prompts, questions, None, {}, ranks)
    after, steps = weights(), {int(value) for name, value in trainer.pack().items() if name.endswith(".step")}
    return said, blamed, torch.equal(before, between), not torch.equal(between, after), trainer.finite(), steps
