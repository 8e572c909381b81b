"""Is it that training never saw these combinations: a run's clips of the prompts it learned from, and of others.

    python -m bench.evidence.splits RUN [RUN ...] [--clips N]

RUN: a run of the study (``--work`` of ``bench.evidence``), or of ToyWorld's presets, at its last update. ToyWorld's
combinations are split in three: the base has seen ``train`` and ``heldout``, Diffusion-DRF ``train`` alone, in two of
24 wordings each.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

from bench.script import make_parser, reports_errors, save
from bench.toyworld.seeds import LIBRARIES
from lowmem_drf.assembly.generate import generate
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.models.lora.adapter import lora_scale
from lowmem_drf.prompts import Prompt
from lowmem_drf.scoring.oracle_rates import oracle_rates
from lowmem_drf.toy.captions import WORDINGS, caption, train_prompts
from lowmem_drf.toy.scenes import combos_of
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.run_folder import run_config

AT_ONCE = 32
SPLITS = ("train", "heldout", "unseen")


def groups(clips: int) -> dict[str, list[Prompt]]:
    """Name -> so many prompts, drawn once for all runs."""
    learned = set(train_prompts())
    every = {split: [caption(c, i) for c in combos_of(split) for i in range(WORDINGS)] for split in SPLITS}
    made = {
        "learned from": sorted(learned),
        "other wordings": [text for text in every["train"] if text not in learned],
        "held out": every["heldout"],
        "unseen by the base": every["unseen"],
    }
    return {
        name: [Prompt(f"{name} {i}", text) for i, text in enumerate(random.Random(name).choices(texts, k=clips))]
        for name, texts in made.items()
    }


@torch.no_grad()
def rates(folder: Path, clips: int) -> dict[str, dict[str, float]]:
    """Group -> the oracle's all-correct rate of the base (``base``) and of the run (``tuned``)."""
    config, asked = run_config(folder), groups(clips)
    models = load_models(config, [prompt for some in asked.values() for prompt in some])
    load_run_lora(models.transformer, checkpoint_folder(folder), config)
    found: dict[str, dict[str, float]] = {}
    for name, prompts in asked.items():
        for who, scale in (("base", 0.0), ("tuned", 1.0)):
            frames = []
            with lora_scale(models.transformer, scale):
                for first in range(0, clips, AT_ONCE):
                    some = prompts[first : first + AT_ONCE]
                    seeds = range(first, first + len(some))
                    frames.append(generate(models, config.sampler, some, list(seeds)).frames_BTCHW)
            texts = [prompt.text for prompt in prompts]
            found.setdefault(name, {})[who] = oracle_rates(torch.cat(frames), texts)["all"]
    return found


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = make_parser("bench.evidence.splits", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--clips", type=int, default=432, help="of each group. Default: %(default)s")
    options = parser.parse_args(arguments)
    result = {}
    for folder in options.runs:
        result[folder.name] = found = rates(folder, options.clips)
        for name, of in found.items():
            print(f"{folder.name}  {name:18s}  base {of['base']:6.1%}  tuned {of['tuned']:6.1%}", flush=True)
    save(options.json, {"clips": options.clips, "runs": result}, *LIBRARIES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
