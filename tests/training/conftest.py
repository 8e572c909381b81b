"""Processes of their own for runs that are killed or interrupted."""

import multiprocessing

import pytest


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have torch and the model libraries imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["_killed", "diffusers", "transformers.models.qwen2_5_vl", "peft", "torch.utils.tensorboard"]
    )
    return context
