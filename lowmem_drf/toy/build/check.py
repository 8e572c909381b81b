"""Prints how good ToyWorld's parts are: ``python -m lowmem_drf.toy.build.check [--critic toyworld-reader] [--json]``.

The oracle's rates on drawn scenes, the VAE's fidelity, the rates of the base generator and of ``toyworld-fewstep`` by
the oracle, the critic's recall of yes and of no, and the share of its explanations that are right. The critic answers
every kind of question, in both wordings and both ways, on clips of combinations that no model was trained on, half of
them VAE reconstructions.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import Any

import torch

from lowmem_drf.models.qwen_vl.critic import VLMCritic, load_critic
from lowmem_drf.models.wan.vae.decoder import load_vae
from lowmem_drf.models.weights.sources import FEWSTEP, TOYWORLD, resolve
from lowmem_drf.questions import toyworld
from lowmem_drf.scoring.evaluate import diversity
from lowmem_drf.toy.build.critic import ask, drawn_labels, half_reconstructed, reconstruct
from lowmem_drf.toy.build.fewstep import SHIFT as FEW_SHIFT
from lowmem_drf.toy.build.fewstep import STEPS as FEW
from lowmem_drf.toy.build.generator import SHIFT, folder_samples
from lowmem_drf.toy.build.tower import draw_labelled
from lowmem_drf.toy.captions import WORDINGS, caption, heldout_prompts, parse
from lowmem_drf.toy.defects import DEFECTS, PHYSICS, QUALITY
from lowmem_drf.toy.oracle import Measured, measure
from lowmem_drf.toy.scenes import Combo, all_combos, draw_tracks, render
from lowmem_drf.types import Question

GENERATORS: dict[str, dict[str, Any]] = {
    "base, 10 steps": {},
    "base, 4 steps": {"steps": FEW, "shift": FEW_SHIFT},
    "fewstep, 4 steps": {"steps": FEW, "shift": FEW_SHIFT, "lora": FEWSTEP},
}
CRITIC_COLUMNS = ("yes", "no", "sound? no", "sound? yes")


def _rates(seen: Measured, combos: list[Combo]) -> dict[str, float]:
    hits = {**seen.matches(combos), "physics": seen.physics, "quality": seen.quality}
    return {name: value.float().mean().item() for name, value in hits.items()}


@torch.no_grad()
def check_oracle(seed: int = 100, every: int = 1) -> dict[str, Any]:
    """Rates on ground truth: clean clips, VAE reconstructions of every ``every``-th clip, shuffled captions; recall of
    each defect; the VAE's PSNR."""
    generator = torch.Generator().manual_seed(seed)
    combos = all_combos() * 2
    tracks = draw_tracks(combos, generator)
    frames = render(tracks)
    vae = load_vae(resolve(TOYWORLD, "generator"))
    again = torch.cat([reconstruct(vae, part) for part in frames[::every].split(90)])
    order = torch.randperm(len(combos), generator=generator).tolist()
    labelled, _, _, defect = draw_labelled(900, generator, clean_share=0.0, splits=("train", "heldout", "unseen"))
    clean, broken = measure(frames), measure(labelled)
    caught = {kind: getattr(broken, kind)[defect == i].float().mean().item() for i, kind in enumerate(DEFECTS)}
    return {
        "clean": _rates(clean, combos),
        "vae": _rates(measure(again), combos[::every]),
        "shuffled captions": _rates(clean, [combos[i] for i in order]),
        "chance": {"shape": 1 / 3, "color": 1 / 6, "direction": 1 / 5, "background": 1 / 3, "all": 1 / 90},
        "defect recall": caught,
        "vae psnr db": -10 * (again - frames[::every]).pow(2).mean().log10().item(),
    }


@torch.no_grad()
def check_generator(
    prompts: int = 256, seeds: int = 2, steps: int = 10, shift: float = SHIFT, lora: str = ""
) -> dict[str, float]:
    """The oracle's rates on the base generator's clips of held-out prompts, and their diversity as in ``eval``.
    ``lora``: merged into it."""
    texts = heldout_prompts(prompts) * seeds
    clips = folder_samples(resolve(TOYWORLD, "generator"), texts, 0, steps, shift, lora)
    combos = [combo for combo in (parse(t) for t in texts) if combo is not None]
    of_a_prompt = clips.unflatten(0, (seeds, prompts)).transpose(0, 1)
    return {**_rates(measure(clips), combos), "diversity": diversity(of_a_prompt)}


def _truths(label: Any, combo: list[int], wording: int, generator: torch.Generator) -> list[Question]:
    """Every yes/no question whose answer is known: each attribute right and wrong, each defect, the caption right and
    wrong."""
    out = []
    for name, wordings in toyworld.ALIGNMENT.items():
        true = label.value[name]
        if true >= 0:
            options = toyworld.ATTRIBUTES[name]
            wrong = (true + 1 + int(torch.randint(len(options) - 1, (1,), generator=generator))) % len(options)
            out += [
                Question("TA", wordings[wording].format(value=options[v]), a, name=name)
                for v, a in ((true, "yes"), (wrong, "no"))
            ]
    for kind in DEFECTS:
        there = kind in label.defects
        for wordings, yes in (((toyworld.PHYSICS | toyworld.QUALITY)[kind], there), (toyworld.SOUND[kind], not there)):
            out.append(
                Question("VQ" if kind in QUALITY else "Phy", wordings[wording], "yes" if yes else "no", name=kind)
            )
    if label.combo is not None:
        told = list(combo)
        at = int(torch.randint(4, (1,), generator=generator))
        told[at] = (told[at] + 1) % (3, 6, 5, 3)[at]
        for values, answer in ((combo, "yes"), (told, "no")):
            text = caption(Combo(*values), int(torch.randint(WORDINGS, (1,), generator=generator)))
            out.append(Question("TA", toyworld.GLOBAL[wording].format(caption=text), answer, name="global"))
    return out


@torch.no_grad()
def check_critic(critic: VLMCritic | None = None, clips: int = 1200, seed: int = 200) -> dict[str, dict[str, float]]:
    """Question -> recall of yes and of no, on clips of the split ``unseen``; half of the clips clean, every other one a
    reconstruction.

    Asked for a defect, "yes" is for the few clips that have it; asked whether a clip is sound ("sound? no"), "no" is.
    Each has its own column: together, the many sound clips would hide what the critic misses.
    """
    critic = critic or load_critic(resolve(TOYWORLD, "critic"))
    vae = load_vae(resolve(TOYWORLD, "generator"))
    generator = torch.Generator().manual_seed(seed)
    right: dict[tuple[str, str], list[float]] = defaultdict(list)
    for start in range(0, clips, 60):
        frames, _, combos, defect = draw_labelled(60, generator, clean_share=0.4, splits=("unseen",))
        labels = drawn_labels(combos, defect)
        questions = [
            _truths(label, c, (start // 60) % 2, generator) for label, c in zip(labels, combos.tolist(), strict=True)
        ]
        for asked, answers in zip(questions, critic(half_reconstructed(vae, frames, defect), questions), strict=True):
            for question, answer in zip(asked, answers, strict=True):
                row = answer.logits_AV[0]
                said = "yes" if row[list(answer.yes)].max() > row[list(answer.no)].max() else "no"
                other_way = question.text in toyworld.SOUND.get(question.name, ())
                right[question.name, f"sound? {question.answer}" if other_way else question.answer].append(
                    float(said == question.answer)
                )
    names = [*toyworld.ALIGNMENT, "global", *PHYSICS, *QUALITY]
    return {
        name: {column: sum(found) / len(found) for column in CRITIC_COLUMNS if (found := right[name, column])}
        for name in names
    }


@torch.no_grad()
def check_explanations(
    critic: VLMCritic | None = None, clips: int = 1200, seed: int = 300
) -> dict[str, dict[str, float]]:
    """Dense question -> share of clips of the split ``unseen`` of which the critic, left to itself, would say exactly
    what is true: of clips with nothing to find fault with (``sound``), and of those with a defect to be named."""
    critic = critic or load_critic(resolve(TOYWORLD, "critic"))
    vae = load_vae(resolve(TOYWORLD, "generator"))
    generator = torch.Generator().manual_seed(seed)
    right: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(0, clips, 60):
        frames, _, combos, defect = draw_labelled(60, generator, clean_share=0.4, splits=("unseen",))
        lessons = [
            [lesson for lesson in ask(label, generator) if lesson.question.kind == "dense"]
            for label in drawn_labels(combos, defect)
        ]
        asked = [[lesson.question for lesson in clip] for clip in lessons]
        for clip, answers in zip(lessons, critic(half_reconstructed(vae, frames, defect), asked), strict=True):
            for (question, _, correction), answer in zip(clip, answers, strict=True):
                # the words before the critic are true, so the likeliest next ones are what it would say
                if correction is None:
                    named = question.answer.startswith(tuple(toyworld.EXPLANATIONS.values()))
                    right[question.name, "defect" if named else "sound"].append(
                        float(answer.logits_AV.argmax(-1).equal(answer.target_A))
                    )
    names = [*(f"{name}_word" for name in toyworld.OPEN), "description", "motion", "picture"]
    return {
        name: {kind: sum(found) / len(found) for kind in ("sound", "defect") if (found := right[name, kind])}
        for name in names
    }


def _table(title: str, rows: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [f"{title:<22}" + "".join(f"{c:>12}" for c in columns)]
    lines += [
        f"{name:<22}" + "".join(f"{row[c]:>12.3f}" if c in row else f"{'':>12}" for c in columns)
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m lowmem_drf.toy.build.check", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--critic", default=TOYWORLD, help="toyworld, toyworld-reader or a folder")
    options = parser.parse_args(arguments)
    judge = load_critic(resolve(options.critic, "critic"))
    oracle, generators = check_oracle(), {name: check_generator(**given) for name, given in GENERATORS.items()}
    critic, explanations = check_critic(judge), check_explanations(judge)
    if options.json:
        print(
            json.dumps(
                {"oracle": oracle, "generator": generators, "critic": critic, "explanations": explanations}, indent=2
            )
        )
        return
    print(_table("oracle", {k: oracle[k] for k in ("clean", "vae", "shuffled captions", "chance")}))
    print("\n" + _table("defects", {"recall": oracle["defect recall"]}), f"\nVAE PSNR {oracle['vae psnr db']:.1f} dB")
    print("\n" + _table("generator, 256 x 2", generators))
    print("\n" + _table("critic, recall of", critic))
    print("\n" + _table("explanations right of", explanations))


if __name__ == "__main__":
    main()
