"""Fixtures of several rooms: folders of tiny random models, a preset that uses them, and a run of that preset."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

# a shell starts what runs in the background with SIGINT ignored, and nohup SIGHUP: tests of interruptions need both
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# helpers of the tests; bench
sys.path[:0] = [str(Path(__file__).resolve().parent / "support"), str(Path(__file__).resolve().parents[1])]

TINY_PRESET = """\
# Tiny random models learn nothing, but everything runs. In the fourth update the normalisation has scales.
prompts = "toyworld"
steps = 4
batch = 3
micro_batch = 2
dtype = "fp32"
device = "cpu"

[video]
width = 16
height = 16
frames = 9
fps = 8

[model]
id = "{generator}"
text_tokens = 12

[sampler]
steps = 3
graded_steps = 2
graded = "random"
guidance = 2.0
update = "renoise"

[critic]
id = "{critic}"
questions = "grammar"
check = false
quant = "none"
normalize = true
frames = 3
frame_sampling = "random_phase"

[lora]
rank = 2
alpha = 2.0

[memory]
checkpoint = false

[log]
checkpoint_every = 1
keep = 2
sample_every = 2
sample_prompts = 1
eval_prompts = 0
watch_every = 0
eval_batch = 4
"""


def pytest_collection_finish():
    """What the libraries made when they were imported stays: each full garbage collection would walk it again, for a
    fifth of the time of tests of plans and streaming."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Otherwise Triton's bindings report leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _small():
    """One thread, because tiny models are slower on several and sums depend on their number; and few prompts."""
    from _root import few_prompts

    torch.set_num_threads(1)
    few_prompts()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Questions, texts and plans of tests are not those of this machine's user."""
    os.environ["LOWMEM_DRF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def device():
    """The card if there is one; else kernels are interpreted on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """(generator folder, critic folder) in the layouts of diffusers and transformers."""
    from _tiny import save_tiny_critic, save_tiny_generator

    folder = tmp_path_factory.mktemp("models")
    return save_tiny_generator(folder / "generator"), save_tiny_critic(folder / "critic")


@pytest.fixture(scope="session")
def tiny_preset(tiny_folders, tmp_path_factory):
    """A preset file on the tiny models: random graded steps, random frames, guidance, fresh noise, an uneven last
    micro-batch."""
    path = tmp_path_factory.mktemp("presets") / "tiny.toml"
    generator, critic = (folder.as_posix() for folder in tiny_folders)
    path.write_text(TINY_PRESET.format(generator=generator, critic=critic), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_preset, tmp_path_factory):
    """The folder of a complete run of 4 updates, read-only for tests."""
    from lowmem_drf.commands.train import train_command

    run = tmp_path_factory.mktemp("runs") / "run"
    train_command(str(tiny_preset), None, run, None, None, False, [], False)
    return run
