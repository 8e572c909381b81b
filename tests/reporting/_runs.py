"""Folders that look like a run's, written by hand."""

import json
import math
import random
import shutil

import av
import numpy as np

from lowmem_drf.config import load_config, to_toml
from lowmem_drf.files import readable_name
from lowmem_drf.scoring.measures import MEASURES

PROMPTS = [
    "a corgi surfing a wave at sunset, its fur wet, the board cutting through foam",
    "an old woman kneads dough on a wooden table",
    "a glass of water falls from a shelf & breaks <slowly>",
    "two kids fly a kite over a field of tall grass",
]
STEPS = 200
ALARM, BEST = 160, 150
CHECKS = {
    "TA": ["subject", "action", "place", "look"],
    "Phy": ["gravity", "contact", "permanence", "motion", "limbs"],
    "VQ": ["sharp", "flicker", "artefacts"],
}
STAGES = {
    "text": (0.4, 3.1),
    "rollout": (9.2, 6.0),
    "decode": (11.3, 9.4),
    "critic": (6.1, 11.2),
    "vae_backward": (41.0, 13.7),
    "denoise_backward": (19.5, 12.9),
    "update": (0.02, 4.0),
}
"""Planned seconds and GiB."""


def big_run(run, clips=True):
    """A run of the preset rtx4090 with everything that a report shows: 200 updates, two of them skipped, an alarm."""
    run.mkdir(parents=True)
    config = load_config("rtx4090", [f"prompts={(run / 'prompts.txt').as_posix()}", f"steps={STEPS}"])
    (run / "config.toml").write_text(to_toml(config), encoding="utf-8")
    dice = random.Random(0)
    write_lines(run / "metrics.jsonl", [_update(step, dice) for step in range(1, STEPS + 1)])
    write_lines(run / "watch.jsonl", [_look(step, dice) for step in range(0, STEPS + 1, 20)])
    write_json(run / "questions.json", [{"prompt": text, "questions": _questions(text)} for text in PROMPTS])
    write_json(run / "left_out.json", _left_out())
    write_json(run / "run.json", _notes())
    write_json(run / "eval.json", _result())
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best").write_text(f"{BEST}\n", encoding="utf-8")
    if clips:
        add_clips(run, {0: 0.0, BEST: 0.6, STEPS: 1.0})
    return run


def add_clips(run, strengths, size=(832, 480, 81), noise=12):
    """Sample clips of some updates: a step -> how much the picture differs from the base's. Each is drawn once."""
    for step, strength in strengths.items():
        folder = run / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        names = [readable_name(text, f"{i:02d}-", ".mp4") for i, text in enumerate(PROMPTS, 1)]
        write_clip(folder / names[0], *size, strength, noise)
        for name in names[1:]:
            shutil.copy(folder / names[0], folder / name)


def write_clip(path, width, height, frames, strength=0.0, noise=12):
    """A disc that moves over a gradient, with grain."""
    grain = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "12", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            along = width * (0.2 + 0.6 * t / frames)
            disc = (x - along) ** 2 + (y - height / 2) ** 2 < (height * (0.16 + 0.1 * strength)) ** 2
            picture = np.stack([x * 200 / width, y * 200 / height, np.full_like(x, 60 + int(120 * strength))], -1)
            picture = np.where(disc[..., None], [230, 120, 40], picture)
            picture = picture + grain.integers(0, noise + 1, (height, width, 1))
            image = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _update(step, dice):
    spent = {
        "step": step,
        "lr": 1e-4,
        "update_s": 92.0 + dice.gauss(0, 1),
        "stage_s": {name: s * (1.05 + dice.gauss(0, 0.01)) for name, (s, _) in STAGES.items()},
        "stage_peak_gib": {name: gib * 1.01 for name, (_, gib) in STAGES.items()},
        "prompts": ["0001", "0002"],
        "seed": [step, step + 1],
    }
    if step in (61, 62):
        cause = {"what": "the gradient", "stage": "vae_backward", "dtype": "bf16", "prompts": ["0001"], "seed": [step]}
        return spent | {"skipped": cause}
    done = 1 - math.exp(-step / 60)
    rewards = {
        name: -worst * (1 - 0.85 * done) + dice.gauss(0, 0.06)
        for worst, names in zip((0.9, 0.5, 0.25), CHECKS.values(), strict=True)
        for name in names
    }
    by_aspect = {aspect: sum(rewards[n] for n in names) / len(names) for aspect, names in CHECKS.items()}
    shown = {"reward_by_aspect": by_aspect, "reward_by_question": rewards, "grad_norm": 0.4}
    return spent | {"reward": sum(by_aspect.values()) / 3} | shown


def _look(step, dice):
    away = max(0.0, step - 130) / 70
    measures = {
        "heldout_reward": -0.62 + 0.4 * (1 - math.exp(-step / 60)),
        "heldout_Phy": -0.62 + 0.4 * (1 - math.exp(-step / 60)),
        "diversity": 0.161 - 0.035 * away,
        "velocity_norm": 1.26 + 0.25 * away + 0.02 * step / STEPS,
        "lora_norm": 0.031 * step / STEPS,
        "motion": 0.052 + 0.003 * dice.random(),
        "blur": 1.21 + 0.02 * dice.random(),
    }
    bands = {
        "diversity": [0.148, 0.174],
        "velocity_norm": [None, 1.4],
        "motion": [0.045, 0.062],
        "blur": [1.1, 1.35],
        "heldout_Phy": [-0.7, None],
    }
    if step == 0:
        return {"step": 0, "measures": measures, "bands": bands, "outside": [], "alarm": None}
    outside = [name for name in ("diversity", "velocity_norm") if step >= ALARM]
    return {"step": step, "measures": measures, "outside": outside, "alarm": ALARM if outside else None}


def _questions(text):
    rows = []
    for aspect, checks in CHECKS.items():
        for name in checks:
            asked = (
                f'Does the clip show the {name} of "{text}"?' if aspect == "TA" else f"Is the {name} as it should be?"
            )
            rows.append(
                {"aspect": aspect, "kind": "yesno", "text": asked, "answer": "yes", "weight": 1.0, "name": name}
            )
    rows.append({"aspect": "TA", "kind": "dense", "text": "What happens?", "answer": text, "weight": 1.0})
    return rows


def _left_out():
    why = {"answer": "yes", "asked": False, "weight": 0.0, "from_text": 0.4, "from_nothing": None}
    rows = [
        {"text": "Is the sea calm?", "why": "the answer yes does not follow from the prompt"} | why,
        {"text": "Is it a video?", "why": "it is answered as wanted without the prompt"} | why | {"asked": True},
    ]
    return [{"id": "0001", "prompt": PROMPTS[0], "questions": rows}]


def _notes():
    stages = {name: {"s": s, "peak_gib": gib} for name, (s, gib) in STAGES.items()}
    plan = {"card": "RTX 4090", "update_s": 88.0, "peak_gib": 13.7, "stages": stages}
    versions = {"lowmem-drf": "0.1.0", "python": "3.12.4", "torch": "2.13.0", "diffusers": "0.42.1"}
    return {"origin": "preset rtx4090", "device": "NVIDIA GeForce RTX 4090", "versions": versions, "plan": plan}


def _result():
    base = _side(-0.55, -0.62, 0.161, 1.26)
    tuned = _side(-0.12, -0.24, 0.128, 1.53)
    changes = {
        "reward": (0.31, 0.52),
        "heldout_reward": (0.2, 0.55),
        "diversity": (-0.05, -0.02),
        "motion": (-0.01, 0.01),
    }
    change = {
        name: {"mean": tuned[name] - base[name], "low": low, "high": high, "prompts": 8}
        for name, (low, high) in changes.items()
    }
    wins = {"heldout_reward": {"mean": 0.9375, "low": 0.72, "high": 0.99, "prompts": 8}}
    result = {"prompts": 8, "seeds": 2, "base": base, "tuned": tuned, "change": change, "wins": wins, "by_prompt": []}
    return {"step": STEPS, "source": "8 prompts x 2 seeds, of the training file", "result": result}


def _side(reward, heldout, diversity, norm):
    by_aspect = {"TA": 2 * reward, "Phy": reward, "VQ": reward / 2}
    measures = dict.fromkeys(MEASURES, 0.05)
    kept = {"diversity": diversity, "velocity_norm": norm, **measures}
    return {"reward": reward, "reward_by_aspect": by_aspect, "heldout_reward": heldout, **kept}
