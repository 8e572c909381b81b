"""What all tests of a process share: where the checkout is, and fewer training prompts."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def few_prompts(count: int = 24) -> None:
    """Runs of this process train on the first ``count`` prompts of ToyWorld: a run on tiny models spends most of its
    time on all 432."""
    from lowmem_drf.toy import captions

    chosen = captions.train_prompts()[:count]
    captions.train_prompts = lambda: chosen
