"""ToyWorld's step distillation, ``toyworld-fewstep``: a LoRA with which the generator makes clips in 4 steps without
guidance, as the LoRAs that distil Wan do.

Trajectory distillation: from the same noise, the student's 4 Euler steps are to pass where 16 guided steps of the base
pass (16 x 2 passes of the transformer). The student walks its own path and the gradient goes back through all of it, so
it learns to make good its own errors. Neither oracle nor critic has a part in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowmem_drf.method.schedule import euler_step, flow_sigmas, guided
from lowmem_drf.models.lora.adapter import add_lora, lora_state
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.lora.formats import adapter_metadata, to_format
from lowmem_drf.models.wan import family as wan
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.toy.build.generator import TEXT_TOKENS
from lowmem_drf.toy.build.loop import Schedule, scaled, train
from lowmem_drf.toy.captions import WORDINGS, caption
from lowmem_drf.toy.scenes import combos_of

STEPS, SHIFT = 4, 5.0
PARTS = 4
"""Steps of the teacher in each of the student's."""
GUIDANCE = 2.0
"""Of the teacher. It follows the prompt and keeps physics better than without; the student has it distilled in."""
PATHS, BATCH = 1024, 16
RANK = 16


@torch.no_grad()
def teacher_paths(folder: str, seed: int, n: int) -> tuple[Tensor, Tensor]:
    """-> n text embeddings, of captions of the combinations that the generator was trained on, and where the base's
    clips are at the student's noise levels (n, STEPS + 1, 16, 3, 8, 8), fp16."""
    draw = torch.Generator().manual_seed(seed + 11)
    combos = combos_of("train", "heldout")
    picks = torch.stack([torch.randint(high, (n,), generator=draw) for high in (len(combos), WORDINGS)], 1).tolist()
    texts = [caption(combos[i], wording) for i, wording in picks]
    *encoded, empty = load_text(folder).encode([*texts, ""], TEXT_TOKENS)
    cond = torch.stack(encoded)
    velocity, levels, paths = as_velocity(load_denoiser(folder)), flow_sigmas(STEPS * PARTS, SHIFT).tolist(), []
    for part in cond.split(64):
        x = torch.randn(len(part), 16, 3, 8, 8, generator=draw)
        path = [x]
        for k, (sigma, sigma_next) in enumerate(zip(levels[:-1], levels[1:], strict=True), 1):
            v = guided(velocity, x, sigma, part, empty.expand_as(part), GUIDANCE)
            x = euler_step(x, v, sigma, sigma_next)
            if k % PARTS == 0:
                path.append(x)
        paths.append(torch.stack(path, 1).half())
    return cond, torch.cat(paths)


def train_fewstep(
    generator_folder: Path, folder: Path, seed: int, scale: float = 1.0, log: Callable[[str], None] = print
) -> dict[str, Tensor]:
    """-> the trained LoRA, as ``lora_state``."""
    place = str(generator_folder)
    # cached, so that a finished training does not compute it
    data = cache(lambda: teacher_paths(place, seed, max(BATCH, int(PATHS * min(1.0, scale)))))
    student = load_denoiser(place)
    add_lora(student, RANK, RANK, seed=seed)
    velocity = as_velocity(student)
    levels = flow_sigmas(STEPS, SHIFT).tolist()  # they are among the teacher's

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        cond, paths = data()
        rows = torch.randint(len(paths), (BATCH,), generator=generator)
        path, x, errors = paths[rows].float(), paths[rows, 0].float(), []
        for k, (sigma, sigma_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
            with sdpa_kernel(SDPBackend.MATH):  # the faster backward, as in ``half_products``
                v = velocity(x, sigma, cond[rows])
            x = euler_step(x, v, sigma, sigma_next)
            errors.append((x - path[:, k + 1]).pow(2).mean())
        return torch.stack(errors).sum(), {"last": errors[-1].item()}

    schedule = Schedule(steps=scaled(300, scale), lr=2e-3, warmup=min(20, scaled(50, scale)), ema=0.98, log_every=20)
    train("fewstep", student, loss, schedule, folder, seed, log=log)
    return lora_state(student)


def save_fewstep(state: dict[str, Tensor], file: Path) -> None:
    """Writes the LoRA in diffusers' format, in fp16: half the bytes, and no measured rate changes."""
    lora = LoraChanges.from_state(state, RANK)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(save(to_format(lora, "diffusers", torch.float16, wan), adapter_metadata(lora)))
