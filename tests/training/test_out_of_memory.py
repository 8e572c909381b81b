"""Out of memory: every stage says where, what is saved and what takes less; ``adapt`` goes on with that."""

import importlib
import math
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from _root import ROOT

from lowmem_drf import __main__, cli, shortage
from lowmem_drf.assembly.assemble import resolve_device
from lowmem_drf.assembly.rungs import HOST, LADDERS, OUTSIDE, ROUNDED, keeps_gradient
from lowmem_drf.commands.train import MAY_CHANGE, train_command
from lowmem_drf.config import change, load_config, to_toml
from lowmem_drf.errors import BadInputError, LowmemError, explain
from lowmem_drf.memory.meter import Meter
from lowmem_drf.models.weights.sources import loading
from lowmem_drf.planner.ladder import Lowered, differences, lowered
from lowmem_drf.shared.out_of_memory import surviving
from lowmem_drf.shortage import during, shortage_of
from lowmem_drf.training.checkpoint import checkpoint_folder, checkpoint_steps
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.pace import Pace

GIB = 1024**3
SHORT = [
    *("batch=1", "micro_batch=1", "critic.questions=phrases", "critic.normalize=false", "video.frames=5"),
    *("sampler.steps=1", "sampler.graded_steps=1", "sampler.guidance=1", "critic.frames=1"),
    *("log.sample_every=0", "log.checkpoint_every=5", "steps=3"),
]
CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1073741824 bytes. Error code 12 (Cannot allocate memory)"
)
CARD_WORDS = (
    "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 23.65 GiB of which 128.00 MiB is "
    "free. Including non-PyTorch memory, this process has 22.50 GiB memory in use. Of the allocated memory 20.00 GiB "
    "is allocated by PyTorch, and 2.00 GiB is reserved by PyTorch but unallocated."
)
UPDATE = ("rollout", "decode", "critic", "vae_backward", "denoise_backward", "update")
PLACES = {
    "loading": "lowmem_drf.models.wan.family.load_vae",
    "text": "lowmem_drf.assembly.loading.encode_texts",
    "questions": "lowmem_drf.assembly.references.finish_questions",
    "previews": "lowmem_drf.training.loop.write_previews",
    "watch": "lowmem_drf.scoring.watch.look",
    "evaluation": "lowmem_drf.scoring.evaluate.compare",
}
"""What fails for want of memory in the other stages."""
for _place in PLACES.values():  # imported before any is patched: modules would keep the patched ones
    importlib.import_module(_place.rpartition(".")[0])
WASTEFUL = [
    *("micro_batch=2", "memory.keep_attention=card", "critic.id=Qwen/Qwen2.5-VL-7B-Instruct", "log.eval_batch=8"),
    *("memory.checkpoint=true", "memory.record_rollout=true"),
]
"""A configuration that most rungs change."""


def no_memory(*args, **kwargs):
    raise RuntimeError(CPU_WORDS)


@contextmanager
def full(stage, entry=1):
    """Memory runs out when this stage is entered for the ``entry``-th time."""
    with pytest.MonkeyPatch.context() as patch:
        if stage in PLACES:
            patch.setattr(PLACES[stage], no_memory)
        original, entered = Meter.stage, []

        @contextmanager
        def failing(self, name):
            with original(self, name):
                entered.extend([name] if name == stage else [])
                if name == stage and len(entered) == entry:
                    no_memory()
                yield

        patch.setattr(Meter, "stage", failing)
        yield


def train(preset, run, *settings, resume=False):
    train_command(None if resume else str(preset), None, run, None, None, resume, [*SHORT, *settings], False)


def lora_bytes(run):
    return (checkpoint_folder(run) / "lora.safetensors").read_bytes()


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in (*UPDATE, *PLACES) if stage != "vae_backward"]


@pytest.mark.parametrize("stage", ["vae_backward", *SLOW])
def test_every_stage_says_where_what_is_saved_and_what_takes_less(stage, tiny_preset, tmp_path):
    run = tmp_path / "a run"
    settings = {"evaluation": ["log.eval_prompts=1", "steps=1"], "previews": ["log.sample_every=1"]}
    more = (settings | {"watch": ["log.watch_every=1"]}).get(stage, [])
    with full(stage, entry=2), pytest.raises(LowmemError) as caught:
        train(tiny_preset, run, *more)
    message = str(caught.value)
    assert len(message.splitlines()) <= 6 and caught.value.exit_code == 1
    assert message.startswith(f"out of host memory in {stage}: 1.0 GiB more were asked for")
    if stage in UPDATE:
        assert "Update 1 is saved." in message and checkpoint_steps(run) == [1]
    elif stage == "evaluation":
        assert "The run is complete" in message and message.endswith(f"lowmem-drf eval '{run}'")
    else:
        assert "No update is saved yet." in message and checkpoint_steps(run) == []
        assert ("--resume" in message) == (stage in ("previews", "watch"))
    if stage == "vae_backward":  # what it advises, pasted, ends in the weights of an unbroken run
        last = message.splitlines()[-1]
        assert last == f"  lowmem-drf train --resume --output '{run}' -s memory.vae_strips=4"
        assert cli.app(shlex.split(last)[1:], standalone_mode=False) is None
        assert read_metrics(run)[-1]["step"] == 3 and load_config(run / "config.toml").memory.vae_strips == 4


@pytest.mark.slow
def test_weights_that_a_step_changed_half_way_are_not_saved(tiny_preset, tmp_path, monkeypatch):
    run, step, calls = tmp_path / "run", torch.optim.AdamW.step, []

    def half(self, *rest):
        calls.append(None)
        if len(calls) < 3:
            return step(self, *rest)
        self.param_groups[0]["params"][0].data.add_(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("torch.optim.AdamW.step", half)
    with pytest.raises(
        LowmemError, match=r"card in update\.\n.*No update is saved yet \(updates 1 to 2 are lost: the n"
    ):
        train(tiny_preset, run)
    assert checkpoint_steps(run) == []


@pytest.mark.slow
def test_adapting_goes_on_in_a_new_process_to_the_bytes_of_an_unbroken_run(tiny_preset, tmp_path, monkeypatch):
    """Checkpointing computes the same numbers twice. After it the ladder of a CPU is at its end."""
    whole, adapted, prompts = tmp_path / "whole", tmp_path / "adapted", tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves left on a gray background\na dog\n", encoding="utf-8")
    settings = [*SHORT, "memory.on_oom=adapt", "memory.token_slices=4"]
    train_command(str(tiny_preset), prompts, whole, None, None, False, settings, False)
    program = (
        "import sys; from test_out_of_memory import full; from lowmem_drf import cli\n"
        "with full('denoise_backward', entry=2): cli.main(sys.argv[1:])"
    )
    files = ["--preset", str(tiny_preset), "--prompts", str(prompts), "--output", str(adapted)]
    command = [sys.executable, "-c", program, "train", *files, *(word for text in settings for word in ("-s", text))]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "tests/support", "tests/training"))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "in denoise_backward: 1.0 GiB more were asked for" in done.stderr and "Update 1 is saved." in done.stderr
    assert "the same gradient from less memory: -s memory.checkpoint=true" in done.stderr
    assert "resumed after update 1" in done.stdout
    assert lora_bytes(adapted) == lora_bytes(whole) and [row["step"] for row in read_metrics(adapted)] == [1, 2, 3]
    assert load_config(adapted / "config.toml").memory.checkpoint is True
    monkeypatch.setattr("os.execv", lambda *rest: pytest.fail("no rung is left"))
    with full("denoise_backward"), pytest.raises(LowmemError, match="No setting that is known here"):
        train_command(None, None, adapted, 4, None, True, [], False)


@pytest.mark.slow
def test_a_process_that_may_take_no_more_memory_fails_with_the_explanation(tiny_preset, tmp_path):
    """For real: the limit of the address space."""
    program = (
        "import resource, sys\n"
        "from lowmem_drf import cli; from lowmem_drf.libraries import import_all; from lowmem_drf.planner import plan\n"
        "import_all()\n"
        "pages = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages + (250 << 20), resource.RLIM_INFINITY))\n"
        "cli.main(sys.argv[1:])"
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n", encoding="utf-8")
    large = [*SHORT, "video.frames=9", "video.width=128", "video.height=128"]
    files = ["--preset", str(tiny_preset), "--prompts", str(prompts), "--output", str(tmp_path / "run")]
    command = [sys.executable, "-c", program, "train", *files, *(word for text in large for word in ("-s", text))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    said = done.stderr[done.stderr.index("Error: ") :].splitlines()
    assert done.returncode == 1 and len(said) <= 6 and "Traceback" not in done.stderr
    assert said[0].startswith("Error: out of host memory in ")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError(CARD_WORDS), "card"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "card"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "card"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "card"),
        (RuntimeError("CUDA driver error: out of memory"), "card"),
        (torch.AcceleratorError("CUDA error: out of memory", 2), "pinned"),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), "pinned"),
        (RuntimeError(CPU_WORDS), "host"),
        (RuntimeError("could not create a primitive"), "host"),
        (MemoryError(), "host"),
        (OSError(12, "Cannot allocate memory"), "host"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), None),  # its library may be broken
        (RuntimeError("shapes differ"), None),
        (LowmemError("under a cap: CUDA out of memory"), None),  # has its own message
    ],
)
def test_the_memories_are_told_apart(error, kind):
    assert getattr(shortage_of(error), "kind", None) == kind
    with pytest.raises(type(error)) as caught, during("outside"), during("critic"):
        raise error
    found = shortage_of(caught.value)
    assert (found and found.stage) == ("critic" if kind else None)
    words = {"card": "on the card in critic", "host": "host memory in critic", "pinned": "be locked: memory= in .wsl"}
    if kind:
        message, code = explain(caught.value)
        assert words[kind] in message and "micro_batch=1" in message and code == 1
        with pytest.raises(type(error)), loading("the VAE", "folder"):  # not the folder's fault
            raise error


@pytest.mark.parametrize(("free_mib", "kinds"), [(100, ("card", "card")), (5000, ("pinned", None))])
def test_words_that_may_mean_two_things_are_decided_by_what_is_free_on_the_card(free_mib, kinds, monkeypatch):
    monkeypatch.setattr(shortage, "_card", lambda: (5 * GIB, 6 * GIB, free_mib << 20, GIB, 24 * GIB))
    errors = RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED")
    assert tuple(getattr(shortage_of(error), "kind", None) for error in errors) == kinds


def test_the_card_s_figures_are_those_of_the_moment_and_fragments_are_said(monkeypatch):
    monkeypatch.setattr(shortage, "_card", lambda: (5 * GIB, 22 * GIB, GIB // 8, GIB, 24 * GIB))
    for name in shortage.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shortage, "may_expand", lambda: True)
    found = shortage_of(torch.OutOfMemoryError(CARD_WORDS))
    assert (found.asked, found.allocated, found.reserved, found.room) == (GIB // 2, 20 * GIB, 22 * GIB, 22.125 * GIB)
    lines = found.lines("planned peak: 9.0 GiB")
    assert lines == [
        "out of memory on the card: 0.5 GiB more were asked for (planned peak: 9.0 GiB).",
        "20.0 GiB were allocated and 22.0 GiB reserved by PyTorch; of the card's 24.0 GiB, 0.1 GiB were free, and "
        "other programs and the driver held 1.0 GiB.",
        "Fragmentation: 2.0 GiB lie reserved in pieces that are too small. "
        "Set PYTORCH_ALLOC_CONF=expandable_segments:True",
    ]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert found.lines()[-1].endswith("too small.")
    found.reserved = 20 * GIB
    assert len(found.lines()) == 2


@pytest.mark.parametrize(
    ("system", "release", "given", "told"),
    [
        ("linux", "6.8.0-generic", {}, "expandable_segments:True"),
        ("linux", "6.8.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ("linux", "6.8.0-generic", {"PYTORCH_ALLOC_CONF": ""}, ""),
        ("linux", "6.6.87.2-microsoft-standard-WSL2", {}, ""),
        ("win32", "11", {}, ""),
    ],
)
def test_the_command_line_lets_segments_grow_before_torch_unless_told_otherwise(
    system, release, given, told, monkeypatch
):
    for name in shortage.ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shortage.sys, "platform", system)
    monkeypatch.setattr(shortage.platform, "release", lambda: release)
    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(shortage.allocator_settings()))
    __main__.main()  # of the console script, python -m lowmem_drf, and cli.py, which runs it
    assert seen == [told]


def test_a_driver_that_refuses_segments_that_grow_has_a_cure(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    error = RuntimeError("CUDA driver error: unknown error")
    assert explain(error)[0].endswith("PYTORCH_ALLOC_CONF=expandable_segments:False.")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert explain(error)[0].endswith("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False.")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    assert "expandable_segments" not in explain(error)[0]


def test_a_card_is_always_this_process_s_own_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [str(resolve_device(name)) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]


def ladders():
    return LADDERS | OUTSIDE | {"host": HOST}


def test_a_rung_that_keeps_the_gradient_may_be_climbed_on_resume():
    """``Memory``'s docstring says which of its keys change the gradient."""
    config = load_config("toy", WASTEFUL)
    kept = {rung(config) for rungs in ladders().values() for rung in rungs if rung(config)}
    kept = {part for override in kept if keeps_gradient(override) for part in override.split()}
    assert len(kept) > 12 and all(override.startswith(MAY_CHANGE) for override in kept)
    changing = "optim.", "model.", "critic.", "video.", "sampler.", "memory.vae_backward", "memory.vae_dtype"
    assert not any(override.startswith((*changing, "memory.vae_grad_dtype")) for override in kept)


def climbed(config, on_card, fits=keeps_gradient):
    """With every rung of every ladder that ``fits``."""
    for _ in range(60):
        found = (lowered(config, stage, on_card, fits=fits).overrides for stage in reversed(ladders()))
        if not (overrides := next(filter(None, found), ())):
            return config
        config = change(config, overrides)
    pytest.fail("it goes round in a circle")


@pytest.mark.slow
def test_all_rungs_together_keep_the_gradient_up_to_rounding(tiny_preset, tmp_path):
    base, less, preset = tmp_path / "base", tmp_path / "less", tmp_path / "less.toml"
    settings = ["batch=2", "micro_batch=2", "steps=1", "log.sample_every=0"]
    preset.write_text(to_toml(climbed(load_config(tiny_preset, settings), True)), encoding="utf-8")
    train_command(str(tiny_preset), None, base, None, None, False, settings, False)
    train_command(str(preset), None, less, None, None, False, [], False)
    (before,), (after,) = read_metrics(base), read_metrics(less)
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    assert after["reward_by_question"] == pytest.approx(before["reward_by_question"], rel=1e-5)
    config = load_config(less / "config.toml")
    assert (
        config.micro_batch == 1
        and config.memory.stream == ["transformer", "critic"]
        and config.memory.token_slices == 4
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", [(), ("memory.checkpoint=true", "memory.keep_attention=card")])
def test_rungs_that_do_not_round_keep_the_weights_to_the_bit(tiny_preset, tmp_path, start):
    """Two updates: what ``memory.fit`` sets without naming it."""
    base, less, preset = tmp_path / "base", tmp_path / "less", tmp_path / "less.toml"
    settings = ["batch=2", "micro_batch=1", "steps=2", "log.sample_every=0", *start]
    whole = load_config(tiny_preset, settings)
    config = climbed(whole, True, lambda text: keeps_gradient(text) and not text.startswith(ROUNDED))
    assert len(differences(whole, config)) >= 6 and config.memory.stream and config.memory.checkpoint == "host"
    preset.write_text(to_toml(config), encoding="utf-8")
    train_command(str(tiny_preset), None, base, None, None, False, settings, False)
    train_command(str(preset), None, less, None, None, False, [], False)
    first, second = (run / "checkpoints" / "step-000002" / "lora.safetensors" for run in (base, less))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("on_card", [True, False])
def test_climbing_comes_to_an_end_whatever_fails_next(on_card):
    config = climbed(load_config("toy", WASTEFUL), on_card)
    if not on_card:  # what waits in the host's memory is there already
        assert config.memory.park == config.memory.stream == [] and "host" not in config.memory.model_dump().values()


def test_with_a_plan_rungs_are_taken_that_lower_the_stage_until_it_has_room(monkeypatch):
    class Planner:
        def peak(self, config, stage):
            return 20.0 - 2 * (config.micro_batch == 1) - 5 * config.memory.stream.count("transformer")

    config = load_config("toy", ["micro_batch=2"])
    first = lowered(config, "rollout", True, Planner(), room_gib=30.0)
    assert (first.overrides, first.peak_gib, first.lowered_gib) == (("micro_batch=1",), 20.0, 18.0)
    more = lowered(config, "rollout", True, Planner(), room_gib=14.0)
    assert more.overrides == ("micro_batch=1", 'memory.stream=["transformer"]', "memory.checkpoint=true")
    assert more.lowered_gib == 13.0
    assert lowered(change(config, more.overrides), "rollout", True, Planner(), 1.0).overrides == ()
    monkeypatch.setattr(Planner, "peak", lambda *rest: math.inf)  # it cannot be planned here
    assert lowered(config, "rollout", True, Planner(), 1.0) == Lowered(("micro_batch=1",))


def adapts(config, run, begin, error, monkeypatch):
    """The arguments of the process that is started anew."""
    started = []

    def execv(program, command):
        started.append(command)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execv)
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SystemExit), surviving(config, run, begin, MAY_CHANGE), during("denoise_backward"):
        raise error
    assert started[0][:3] == [sys.executable, "-m", "lowmem_drf"]
    return started[0][3:]


def test_what_is_started_anew(tmp_path, monkeypatch, capsys):
    begin = ["train", "--preset", "toy", "--output", str(tmp_path), "-s", "memory.on_oom=adapt"]
    config = load_config("toy", ["memory.on_oom=adapt", "micro_batch=1"])
    less = ["-s", "memory.checkpoint=true"]
    assert adapts(config, tmp_path, begin, MemoryError(), monkeypatch) == [*begin, *less]
    (tmp_path / "config.toml").touch()
    again = ["train", "--resume", "--output", str(tmp_path)]
    assert adapts(config, tmp_path, begin, MemoryError(), monkeypatch) == [*again, *less]
    assert capsys.readouterr().err.count("No update is saved yet") == 2
    resumed = [*again, "-s", "optim.lr=1e-5"]  # its settings are in no file before the models are loaded
    assert adapts(config, tmp_path, resumed, MemoryError(), monkeypatch) == [*resumed, *less]


def test_the_host_s_memory_in_a_run_on_a_card_has_its_own_ladder(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_drf.shared.out_of_memory.resolve_device", lambda name: torch.device("cuda"))
    stored = ("memory.record_decode=0", "memory.vae_cache_every=8")
    config = load_config("toy", ["memory.checkpoint=true", "memory.keep_attention=host", *stored])
    for error in (MemoryError("2.0 GiB wait in host memory"), RuntimeError("CUDA error: out of memory")):
        with pytest.raises(LowmemError) as caught, surviving(config, tmp_path, ["train"], MAY_CHANGE):
            raise error
        assert "-s 'memory.keep_attention=" in str(caught.value) and len(str(caught.value).splitlines()) <= 6


def test_adapting_is_for_one_process():
    with pytest.raises(BadInputError, match="memory.on_oom.*set .stop."):
        load_config("toy", ["engine=zero1", "memory.on_oom=adapt"])


def test_a_card_that_becomes_slow_is_said_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB // 10, 24 * GIB))
    pace, cpu = Pace(torch.device("cuda")), Pace(torch.device("cpu"))
    seconds = [60.0, 10, 10, 11, 10, 29, 40, 50, 10]
    said = [pace.add(step, s) for step, s in enumerate(seconds, 1)]
    assert [bool(line) for line in said] == [step == 7 for step in range(1, 10)]
    assert said[6].startswith("Update 7 took 40.0 s, the median before it 10.5 s; 0.1 of the card's 24.0 GiB are free.")
    assert not any(cpu.add(step, s) for step, s in enumerate(seconds))
    short = Pace(torch.device("cuda"))
    assert not any(short.add(step, s) for step, s in enumerate([1.0, 1, 1, 1, 9]))
