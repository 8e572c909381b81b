"""Processes of their own for runs that are killed or interrupted, and models that are ready for an update."""

import pytest
from _killed import forked
from _trainer import PROMPTS

from lowmem_drf.assembly.loading import load_models
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.config import load_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.prompts import as_prompts


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have torch and the model libraries imported already."""
    return forked()


@pytest.fixture
def ready(tiny_preset):
    """(configuration, models with a fresh LoRA, parts, prompts, questions)."""

    def make(*overrides):
        config, prompts = load_config(tiny_preset, overrides), as_prompts(PROMPTS)
        models = load_models(config, prompts)
        add_lora(models.transformer, config.lora.rank, config.lora.alpha, config.lora.targets, seed=0)
        parts = models.parts(lora_parameters(models.transformer))
        return config, models, parts, prompts, draft_questions(config, prompts)

    return make
