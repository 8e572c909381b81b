"""lowmem-drf from Python, in the order of a notebook: plan, train with a callback, look, ask the critic, export.

    python examples/python_api.py

On ToyWorld: no GPU, no download, less than a minute. For a card put its preset in place of "toy", and a prompt file or
a list of texts: train("rtx4090", prompts=["a corgi surfing a wave", "a red ball rolls off a table"]).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_drf import evaluate, export_lora, plan, sample, score, train

PROMPT = "a red circle moves left on a gray background"


def main(folder: Path, updates: int = 8) -> None:
    # what would it take on a card? Nothing is downloaded
    card = plan("rtx4090", settings={"video.frames": 33})
    print(f"rtx4090: {card.peak_gib:.1f} of {card.vram_gib:.0f} GiB in {card.largest}, {card.update_s:.0f} s an update")

    rewards: list[float] = []

    def on_update(row: Mapping[str, Any]) -> bool:
        """Ends the run when it is good enough. It is saved, and train(output=run, resume=True) goes on."""
        if "skipped" in row:  # a reward or gradient was NaN; nothing was changed
            return True
        rewards.append(row["reward"])
        print(f"update {row['step']}: reward {row['reward']:+.3f}, {row['reward_by_aspect']}")
        return len(rewards) < 4 or sum(rewards[-4:]) / 4 < -0.15

    settings = {
        "batch": 4,
        "micro_batch": 4,
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "log": {"sample_every": 0, "watch_every": 0, "eval_prompts": 0},
    }
    run = train("toy", output=folder / "run", steps=updates, settings=settings, on_update=on_update)
    print(f"{run.folder}: update {run.step}, {run.lora.stat().st_size / 1024:.0f} KiB of LoRA")

    # base and tuned side by side, and what the critic says of the tuned clip
    (both,) = sample(run, prompts=[PROMPT], compare=True, output=folder / "both.mp4")
    (tuned,) = sample(run, prompts=[PROMPT], output=folder / "tuned.mp4")
    answers = score(tuned.path, PROMPT, preset="toy", mode="yesno")
    print(f"{both.path}: reward of the tuned clip {answers.reward:+.3f}")
    for answer in answers.verdicts[:3]:
        print(f"  {answer.question.text} {answer.said} (wanted: {answer.question.answer})")

    # base against tuned on prompts of their own, as lowmem-drf eval
    change = evaluate(run, prompts=[PROMPT], seeds=2).change["reward"]
    print(f"reward, tuned against base: {change.mean:+.3f}")
    print(export_lora(run, output=folder / "lora.safetensors").paths[0])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
