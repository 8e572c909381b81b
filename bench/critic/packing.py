"""Time and memory of all questions of a clip in one pass, against one pass per question.

    python -m bench.critic.packing --json bench/results/critic_packing.json

ToyWorld's critic, from frames to the gradient at the frames, with yes/no and dense questions mixed, packed and
separate: time, bytes kept for the backward, and peak of the allocated bytes. Promise: 12 packed questions take at most
twice the time of one. Exit code 1 if they take more.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.allocated import Allocated
from bench.script import device_name, make_parser, reports_errors, save
from lowmem_drf.method.reward import RewardSpec, total_reward
from lowmem_drf.models.qwen_vl.critic import VLMCritic, load_critic
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.questions import toyworld
from lowmem_drf.toy.scenes import all_combos, draw_tracks, render
from lowmem_drf.types import Question

COUNTS = (1, 4, 12, 24)
PROMISED = (12, 2.0)
"""Questions in one pass, and their most time as a multiple of one question's."""
MIB = 1024**2
CAPTION = "a red circle moves left on a gray background"


def mixed_questions(count: int) -> list[Question]:
    """Every fourth question asks for an explanation; the others are yes/no."""
    values = toyworld.attributes(CAPTION)
    assert values is not None
    yesno, dense = iter(toyworld.yesno(values)), iter(toyworld.dense(values))
    return [next(dense if i % 4 == 3 else yesno) for i in range(count)]


def gradient(critic: VLMCritic, frames_BTCHW: Tensor, passes: Sequence[Sequence[Question]]) -> Tensor:
    """d mean reward / d frames, summed over the passes."""
    frames = frames_BTCHW.detach().requires_grad_()
    total = torch.zeros_like(frames)
    for asked in passes:
        answers = critic(frames, [asked] * len(frames))
        reward = torch.stack([total_reward(clip, asked, RewardSpec())[0] for clip in answers]).mean()
        total += torch.autograd.grad(reward, frames)[0]
    return total


def median_s(runs: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each run. They take turns, so that other load affects all of them."""
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
    """Peak of the bytes that autograd keeps for a backward, without weights."""
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


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak of the allocated bytes, less those before the run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with Allocated() as allocated:
        run()
    return allocated.peak


def measure(critic: VLMCritic, frames_BTCHW: Tensor, counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One row per count: ``questions`` and, for ``packed`` and ``separate``, ``s``, ``kept_mib``, ``peak_mib``."""
    runs = {}
    for count in counts:
        asked = mixed_questions(count)
        for way, passes in (("packed", [asked]), ("separate", [[question] for question in asked])):
            runs[count, way] = functools.partial(gradient, critic, frames_BTCHW, passes)
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
        times = [f"{side['s'] * 1e3:.0f} ms" for side in (packed, separate)]
        made.add_row(str(row["questions"]), *times, f"{packed['s'] / one:.2f}", *memory)
    return made


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--clips", type=int, default=8, help="clips in a batch")
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats; the median counts")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    critic = load_critic(resolve(TOYWORLD, "critic"), torch.float32, options.device)
    combos = (all_combos() * options.clips)[:: len(all_combos())][: options.clips]
    frames = render(draw_tracks(combos, torch.Generator().manual_seed(0))).to(options.device)
    rows = measure(critic, frames, COUNTS, options.repeats)
    console.print(table(rows))
    count, bound = PROMISED
    ratio = next(row["packed"]["s"] for row in rows if row["questions"] == count) / rows[0]["packed"]["s"]
    verdict = "kept" if ratio <= bound else "BROKEN"
    figure = f"{count} questions packed take {ratio:.2f} times one question's time"
    console.print(f"{figure}: the promise of {bound:g} is {verdict}")
    setting = {"clips": options.clips, "repeats": options.repeats, "device": device_name(options.device)}
    save(options.json, setting | {"ratio": ratio, "rows": rows}, "torch", "transformers")
    return 0 if ratio <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
