"""Commands that run in a process of their own, forked from a server that has imported everything once."""

import multiprocessing
import os
import pkgutil
import signal
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
from _root import few_prompts

from lowmem_drf import cli
from lowmem_drf.commands.train import train_command
from lowmem_drf.training import loop


def forked():
    """The context whose ``Process`` is forked from the server; a test process has one server for all its tests."""
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


def train_until_killed(function: str, call: int, preset: Path, run: Path) -> None:
    """A training run that kills itself (SIGKILL) in call number ``call`` of ``function``, a dotted name that is patched
    where it is looked up."""
    torch.set_num_threads(1)
    few_prompts()
    original = pkgutil.resolve_name(function)
    calls = 0

    def killing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    with mock.patch(function, killing):
        train_command(str(preset), None, run, None, None, False, [], False)


def run_cli(arguments: list[str], folder: Path, blocked: int | None = None, unread: bool = False) -> None:
    """Runs a command with its output in ``folder/out`` and ``folder/err``, or in pipes that nobody reads. Update
    ``blocked`` (from 0) prints "blocked" and lasts for a minute."""
    torch.set_num_threads(1)
    few_prompts()
    for handle, name in ((1, "out"), (2, "err")):
        os.dup2(_unread_pipe() if unread else os.open(folder / name, os.O_WRONLY | os.O_CREAT), handle)
    original = loop.update

    def update(config, models, parts, trainer, step, *rest):
        if step == blocked:
            print("blocked", flush=True)
            time.sleep(60)
        return original(config, models, parts, trainer, step, *rest)

    loop.update = update
    cli.main(arguments)


def _unread_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer
