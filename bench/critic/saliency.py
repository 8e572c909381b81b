"""Does the critic's gradient point at the object?

    python -m bench.critic.saliency

ToyWorld's critic on drawn clips, for the alignment questions about the object (color, shape, direction) and for their
joint reward: the mean of |d reward / d pixel| on the object over the mean on the background, which starts a token's
width away from the object. Prints the least and the median ratio over clips and questions, per background.
"""

from __future__ import annotations

import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench.script import make_parser, save
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.models.qwen_vl.critic import VLMCritic, load_critic
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.questions.make import make_questions
from lowmem_drf.scoring.saliency import saliency
from lowmem_drf.toy.captions import caption
from lowmem_drf.toy.scenes import BACKGROUNDS, Combo, combos_of, coverage, draw_tracks, render


def ratios(critic: VLMCritic, frames_TCHW: Tensor, mask_THW: Tensor, combo: Combo) -> dict[str, float]:
    """Object over background per question; ``all``: their joint reward. ``mask``: the object's share of each pixel."""
    every = make_questions(caption(combo), "yesno", "toyworld")
    questions = [question for question in every if question.name in ("color", "shape", "direction")]
    found = saliency(critic, frames_TCHW, questions, RewardSpec())
    token = critic.geometry.factor
    far = F.max_pool2d(mask_THW[:, None], 2 * token + 1, 1, token)[:, 0] == 0
    maps = {"all": found.total_THW} | {q.name: heat for q, heat in zip(questions, found.by_question_QTHW, strict=True)}
    return {name: (heat[mask_THW > 0.5].mean() / heat[far].mean()).item() for name, heat in maps.items()}


def measure(critic: VLMCritic, seed: int = 11) -> dict[str, dict[str, float]]:
    """Background -> ``clips``, ``least`` and ``median`` ratio, over all held-out combinations of that background."""
    combos = combos_of("heldout", "unseen")
    tracks = draw_tracks(combos, torch.Generator().manual_seed(seed))
    masks_BTHW = coverage(tracks.x, tracks.y, tracks.radius, tracks.shape)
    found: dict[str, list[dict[str, float]]] = {}
    for combo, frames, mask in zip(combos, render(tracks), masks_BTHW, strict=True):
        found.setdefault(BACKGROUNDS[combo.background], []).append(ratios(critic, frames, mask, combo))
    rows = {}
    for background, clips in found.items():
        values = [value for clip in clips for value in clip.values()]
        rows[background] = {"clips": len(clips), "least": min(values), "median": statistics.median(values)}
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    options = parser.parse_args(arguments)
    rows = measure(load_critic(resolve(TOYWORLD, "critic")))
    made = Table("background", "clips", "least", "median", title="object / background", title_justify="left")
    for background, row in rows.items():
        made.add_row(background, str(row["clips"]), f"{row['least']:.2f}", f"{row['median']:.2f}")
    Console().print(made)
    save(options.json, {"rows": rows}, "torch", "transformers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
