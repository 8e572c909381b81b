"""Processes forked from a server that has imported everything once. A test process has one server for all its tests."""

import multiprocessing
import os
from multiprocessing import forkserver
from unittest import mock


def forked():
    """The context whose ``Process`` is forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "_killed",
            "deepspeed",
            "peft",
            "torch.utils.tensorboard",
            "diffusers.models.autoencoders.autoencoder_kl_wan",
            "diffusers.models.transformers.transformer_wan",
            "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
            "transformers.models.umt5.modeling_umt5",
            "lowmem_drf.commands.train",
            "lowmem_drf.training.loop",
        ]
    )
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # deepspeed chooses it when the server imports it
        forkserver.ensure_running()
    return context
