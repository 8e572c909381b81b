"""Fewer training prompts: a run on tiny models spends most of its time on ToyWorld's 432."""

from lowmem_drf.toy import captions


def few_prompts(count: int = 24) -> None:
    """Runs of this process train on the first ``count`` prompts of ToyWorld."""
    chosen = captions.train_prompts()[:count]
    captions.train_prompts = lambda: chosen
