"""Out of memory: every stage says where, what is saved and what takes less; ``adapt`` goes on with that."""

import shlex
from contextlib import contextmanager

import pytest
import torch

from lowmem_drf.commands import out_of_memory
from lowmem_drf.commands.train import MAY_CHANGE, train_command
from lowmem_drf.config import change, load_config
from lowmem_drf.errors import BadInputError, LowmemError, explain
from lowmem_drf.memory.meter import Meter
from lowmem_drf.planner.ladder import HOST, LADDERS, OUTSIDE, keeps_gradient, lowered
from lowmem_drf.shortage import shortage_of
from lowmem_drf.training.checkpoint import checkpoint_folder, checkpoint_steps
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.pace import Pace

SHORT = [
    *("batch=2", "micro_batch=2", "critic.questions=phrases", "critic.normalize=false", "video.frames=5"),
    *("sampler.steps=1", "sampler.graded_steps=1", "sampler.guidance=1", "critic.frames=1"),
    *("log.sample_every=0", "log.checkpoint_every=5", "steps=3"),
]
CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1073741824 bytes. Error code 12 (Cannot allocate memory)"
)
CARD_WORDS = (
    "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 23.65 GiB of which 128.00 MiB is "
    "free. Including non-PyTorch memory, this process has 22.50 GiB memory in use. Of the allocated memory 20.00 GiB is "
    "allocated by PyTorch, and 2.00 GiB is reserved by PyTorch but unallocated."
)
UPDATE = ("rollout", "decode", "critic", "vae_backward", "denoise_backward", "update")
PLACES = {
    "loading": "lowmem_drf.models.wan.decoder.load_vae",
    "text": "lowmem_drf.assembly.loading.encode_texts",
    "questions": "lowmem_drf.assembly.references.finish_questions",
    "previews": "lowmem_drf.training.loop.write_previews",
    "evaluation": "lowmem_drf.scoring.evaluate.compare",
}
"""Where the other stages are raised in."""


def no_memory(*args, **kwargs):
    raise RuntimeError(CPU_WORDS)


@pytest.fixture
def full(monkeypatch):
    """``full(stage, entry)``: memory runs out in this stage, of update number ``entry``."""

    def full(stage, entry=1, error=None):
        if stage in PLACES:
            monkeypatch.setattr(PLACES[stage], no_memory)
            return
        original, entered = Meter.stage, []

        @contextmanager
        def failing(self, name):
            with original(self, name):
                entered.extend([name] if name == stage else [])
                if name == stage and len(entered) == entry:
                    raise error or RuntimeError(CPU_WORDS)
                yield

        monkeypatch.setattr(Meter, "stage", failing)

    return full


def train(preset, run, *settings, resume=False):
    train_command(None if resume else str(preset), None, run, None, None, resume, [*SHORT, *settings], False)


def lora_bytes(run):
    return (checkpoint_folder(run) / "lora.safetensors").read_bytes()


def settings_of(message):
    """The options of the command in a message's last line."""
    words = shlex.split(message.splitlines()[-1])
    return [word for before, word in zip(words, words[1:], strict=False) if before == "-s"]


@pytest.mark.parametrize("stage", [*UPDATE, *PLACES])
def test_every_stage_says_where_what_is_saved_and_what_takes_less(stage, full, tiny_preset, tmp_path):
    run = tmp_path / "a run"
    full(stage, entry=2)
    more = ["log.eval_prompts=1", "steps=1"] if stage == "evaluation" else []
    more += ["log.sample_every=1"] if stage == "previews" else []
    with pytest.raises(LowmemError) as caught:
        train(tiny_preset, run, *more)
    message = str(caught.value)
    assert len(message.splitlines()) <= 6 and caught.value.exit_code == 1
    assert message.startswith(f"out of host memory in {stage}: 1.0 GiB more were asked for")
    if stage in UPDATE:
        assert "Update 1 is saved. Go on" in message and checkpoint_steps(run) == [1]
        assert f"--resume --output '{run}'" in message
    elif stage == "evaluation":
        assert "The run is complete" in message and message.endswith(f"lowmem-drf eval '{run}'")
    else:
        assert "No update is saved yet" in message and checkpoint_steps(run) == []
        assert ("--resume" in message) == (stage == "previews")
