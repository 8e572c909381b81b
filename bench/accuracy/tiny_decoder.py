"""How near the tiny decoder's gradient is to the VAE's, on ToyWorld.

    python -m bench.accuracy.tiny_decoder --json bench/results/tiny_decoder.json

Updates of the preset ``toy`` that change nothing, from the base generator: the cosine between both decoders' gradients
at the latents (of all clips, as ``metrics.jsonl`` has it) and between both gradients of the LoRA, what the frames
differ by, the rewards by either, and seconds of the decode and of the VAE backward. The LoRA's gradient is one sum over
the clips of an update, in which what is not common to them cancels.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from bench.script import add_overrides, device_name, make_parser, reports_errors, save
from lowmem_drf.assembly.assemble import Models, derive_seed, run_prompts, step_spec
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.config import load_config
from lowmem_drf.method.step import StepSpec, drf_step
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.tiny.decoder_check import Uses
from lowmem_drf.types import StepStats


def gradient(models: Models, spec: StepSpec, uses: Uses, *batch: Any) -> tuple[Tensor, StepStats]:
    """The LoRA's, as one vector."""
    lora = lora_parameters(models.transformer)
    for tensor in lora:
        tensor.grad = torch.zeros_like(tensor)
    stats = drf_step(models.parts(lora, uses), spec, *batch)
    return torch.cat([tensor.grad.flatten() for tensor in lora if tensor.grad is not None]), stats


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints a line per update and the means; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--updates", type=int, default=4)
    add_overrides(parser)
    options = parser.parse_args(arguments)
    config = load_config("toy", ["model.decoder=tiny", *options.overrides])
    prompts = run_prompts(config)[: options.updates * config.batch]
    questions = draft_questions(config, prompts)
    models = load_models(config, prompts)
    add_lora(models.transformer, **config.lora.adapter, seed=0)
    rows = []
    for update in range(options.updates):
        some, spec = prompts[update * config.batch : (update + 1) * config.batch], step_spec(config, update)
        noise = models.noise([derive_seed(config.seed, "noise", update, clip) for clip in range(len(some))])
        texts, nothing = models.condition(some), models.no_condition(some)
        batch = noise, texts, nothing, [questions[prompt.id] for prompt in some]
        row: dict[str, float] = {}
        made: dict[Uses, tuple[Tensor, StepStats]] = {}
        for uses in ("exact", "tiny"):
            made[uses] = gradient(models, spec, uses, *batch)
            seconds, _ = models.meter.take()
            row |= {f"{uses}_{stage}_s": seconds[stage] for stage in ("decode", "vae_backward")}
            row[f"{uses}_reward"] = made[uses][1].reward
        (exact, seen), (tiny, others) = made["exact"], made["tiny"]
        compared = gradient(models, spec, "both", *batch)[1].compared
        row["cosine"] = compared.cosine if compared else 0.0
        row["lora_cosine"] = torch.cosine_similarity(exact, tiny, dim=0).item()
        row["lora_ratio"] = (tiny.norm() / exact.norm()).item()
        row["levels_of_255"] = 255 * (seen.frames_BTCHW - others.frames_BTCHW).abs().mean().item()
        rows.append(row)
        print(f"update {update}:", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    print("mean:", "  ".join(f"{key} {value:.3f}" for key, value in mean.items()), f" ({device_name('cpu')})")
    save(options.json, {"rows": rows, "mean": mean}, "torch", "diffusers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
