"""What do all questions of a clip in one pass save against a pass for each?

    python -m bench.critic.packing --json bench/results/critic_packing.json

ToyWorld's critic, from frames to the gradient at the frames: time, bytes kept for the backward, and peak of what is
allocated, packed and separately, yes/no and dense questions mixed. Promised: 12 questions packed take at most twice the
time of one. Exit code 1 if they take more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.versions import versions
from lowmem_drf.errors import LowmemError
from lowmem_drf.method.reward import RewardSpec, total_reward
from lowmem_drf.models.qwen_vl.critic import QwenCritic, load_critic
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.questions import toyworld
from lowmem_drf.toy.scenes import all_combos, draw_tracks, render
from lowmem_drf.types import Question

COUNTS = (1, 4, 12, 24)
PROMISED = (12, 2.0)
"""So many questions in one pass, at most so many times one question's time."""
MIB = 1024**2
CAPTION = "a red circle moves left on a gray background"


def mixed_questions(count: int) -> list[Question]:
    """The first is yes/no; every fourth asks for an explanation, as long as there are any."""
    values = toyworld.attributes(CAPTION)
    assert values is not None
    yesno, dense = iter(toyworld.yesno(values)), iter(toyworld.dense(values))
    return [next(dense if i % 4 == 3 else yesno) for i in range(count)]


def gradient(critic: QwenCritic, frames_BTCHW: Tensor, passes: Sequence[Sequence[Question]]) -> Tensor:
    """d mean reward / d frames, one pass after the other."""
    frames = frames_BTCHW.detach().requires_grad_()
    total = torch.zeros_like(frames)
    for asked in passes:
        answers = critic(frames, [asked] * len(frames))
        reward = torch.stack([total_reward(clip, asked, RewardSpec())[0] for clip in answers]).mean()
        total += torch.autograd.grad(reward, frames)[0]
    return total


def median_s(runs: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each; by turns, so that a busy machine is busy for all of them."""
    taken: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, times in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first warms up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def kept_bytes(run: Callable[[], object], model: torch.nn.Module) -> int:
    """The most that autograd keeps for a backward at one time, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: dict[int, int] = {}
    peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal peak
            storage = tensor.untyped_storage()
            self.tensor, self.key = tensor, storage.data_ptr()
            alive[self.key] = alive.get(self.key, 0) + 1
            if self.key not in weights:
                sizes[self.key] = storage.nbytes()
                peak = max(peak, sum(sizes[key] for key in alive if key in sizes))

        def __del__(self) -> None:
            alive[self.key] -= 1
            if not alive[self.key]:
                del alive[self.key]

    sizes: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: Kept(t.detach()), lambda kept: kept.tensor):
        run()
    return peak


class Allocated(TorchDispatchMode):
    """Adds up the storages of tensors that are made while it is on, and takes off those that are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if id(storage) not in self.alive and id(storage) not in known:
                self.alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, id(storage))
        self.peak = max(self.peak, sum(self.alive.values()))
        return made


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that is allocated at one time beyond what was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with Allocated() as allocated:
        run()
    return allocated.peak


def measure(critic: QwenCritic, frames_BTCHW: Tensor, counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row a count: ``questions`` and, for ``packed`` and ``separate``, ``s``, ``kept_mib``, ``peak_mib``."""
    ways = {
        count: {"packed": [mixed_questions(count)], "separate": [[question] for question in mixed_questions(count)]}
        for count in counts
    }
    runs = {
        (count, way): (lambda p=passes: gradient(critic, frames_BTCHW, p))
        for count, both in ways.items()
        for way, passes in both.items()
    }
    seconds = dict(zip(runs, median_s(list(runs.values()), repeats, frames_BTCHW.device), strict=True))
    rows: list[dict[str, Any]] = [{"questions": count} for count in counts]
    for row in rows:
        for way in ("packed", "separate"):
            key = row["questions"], way
            kept, peak = kept_bytes(runs[key], critic.model), peak_bytes(runs[key], frames_BTCHW.device)
            row[way] = {"s": seconds[key], "kept_mib": kept / MIB, "peak_mib": peak / MIB}
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table("questions", "packed", "separate", "packed / one", "MiB kept", "separate", "MiB peak", "separate")
    one = rows[0]["packed"]["s"]
    for row in rows:
        packed, separate = row["packed"], row["separate"]
        memory = [f"{side[key]:.1f}" for key in ("kept_mib", "peak_mib") for side in (packed, separate)]
        made.add_row(
            str(row["questions"]),
            f"{packed['s'] * 1e3:.0f} ms",
            f"{separate['s'] * 1e3:.0f} ms",
            f"{packed['s'] / one:.2f}",
            *memory,
        )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.critic.packing", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--clips", type=int, default=8, help="clips in a batch")
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats, of which the median counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    try:
        critic = load_critic(resolve(TOYWORLD, "critic"), torch.float32, options.device)
    except LowmemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    combos = (all_combos() * options.clips)[:: len(all_combos())][: options.clips]
    frames = render(draw_tracks(combos, torch.Generator().manual_seed(0))).to(options.device)
    rows = measure(critic, frames, COUNTS, options.repeats)
    console.print(table(rows))
    count, bound = PROMISED
    ratio = next(row["packed"]["s"] for row in rows if row["questions"] == count) / rows[0]["packed"]["s"]
    console.print(
        f"{count} questions packed take {ratio:.2f} times one question's time: the promise of {bound:g} is {'kept' if ratio <= bound else 'BROKEN'}"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        device = (
            torch.cuda.get_device_name(options.device)
            if frames.device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        result = {
            "clips": options.clips,
            "repeats": options.repeats,
            "device": device,
            "versions": versions("torch", "transformers"),
            "ratio": ratio,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if ratio <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
