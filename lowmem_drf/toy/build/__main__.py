"""``python -m lowmem_drf.toy.build``: trains ToyWorld's models from nothing and writes them as model folders.

A build that was stopped goes on where it was when it is started again with the same ``--work``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch


def main(arguments: list[str] | None = None) -> None:
    """Stages, in this order because each needs the one before: vae, generator, tower, language, critic, reader.
    ``fewstep``, ``tiny`` and ``looks`` need the generator alone."""
    parser = argparse.ArgumentParser(prog="python -m lowmem_drf.toy.build", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent.parent / "weights",
        help="folder to write the models to; a stage alone finds the models it needs here",
    )
    parser.add_argument("--work", type=Path, default=Path("toy-build"), help="folder for checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training steps, for a quick try")
    parser.add_argument(
        "--stages",
        default="vae,generator,tower,language,critic,reader,fewstep,tiny,looks",
        help="which to run; the others must be in --work",
    )
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile (it needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    build(options.output, options.work, options.seed, options.scale, options.stages.split(","), not options.no_compile)


def build(output: Path, work: Path, seed: int, scale: float, stages: list[str], compiled: bool = True) -> None:
    """Runs the stages; a finished one is taken from its checkpoint. Writes what is complete: after ``generator``,
    ``critic``, ``reader``, ``fewstep``, ``tiny`` and ``looks``. The last four need nothing but ``output``."""
    from lowmem_drf.toy.build.critic_model import save_critic
    from lowmem_drf.toy.build.fewstep import save_fewstep, train_fewstep
    from lowmem_drf.toy.build.looks import save_looks
    from lowmem_drf.toy.build.reader import build_reader, train_reader
    from lowmem_drf.toy.build.tiny import save_tiny, train_tiny

    def log(line: str) -> None:
        print(line, flush=True)

    work.mkdir(parents=True, exist_ok=True)
    if {"vae", "generator", "tower", "language", "critic"} & set(stages):
        _build(output, work, seed, scale, stages, compiled, log)
    if "reader" in stages:
        critic = build_reader(output / "critic", seed)
        train_reader(critic, output / "generator", work, seed, scale, log)
        save_critic(critic.model, output / "reader", reader=True)
    if "fewstep" in stages:
        save_fewstep(train_fewstep(output / "generator", work, seed, scale, log), output / "fewstep.safetensors")
    if "tiny" in stages:
        save_tiny(train_tiny(output / "generator", work, seed, scale, log), output / "tiny" / "decoder.safetensors")
    if "looks" in stages:
        save_looks(output / "generator", output / "looks.safetensors", log)


def _build(
    output: Path, work: Path, seed: int, scale: float, stages: list[str], compiled: bool, log: Callable[[str], None]
) -> None:
    from lowmem_drf.toy.build.critic import train_language, train_together
    from lowmem_drf.toy.build.critic_model import build_critic, save_critic
    from lowmem_drf.toy.build.generator import draw_samples, save_generator, train_generator
    from lowmem_drf.toy.build.tower import train_tower
    from lowmem_drf.toy.build.vae import train_vae

    vae = train_vae(work, seed, scale, log)
    if "generator" in stages:
        save_generator(train_generator(vae, work, seed, scale, compiled, log=log), vae, output / "generator")
    if {"tower", "language", "critic"} & set(stages):
        critic = build_critic(seed)
        train_tower(critic, work, seed, scale, log)
        if {"language", "critic"} & set(stages):
            train_language(critic, vae, work, seed, scale, log)
        if "critic" in stages:
            # the clips of the generator's first part: more of them break physics, which is what the critic is to learn
            # from
            first = train_generator(vae, work, seed, scale, compiled, parts=1, log=log)
            clips = partial(draw_samples, first, vae, seed, max(24, int(1536 * min(1.0, scale))))
            train_together(critic, vae, clips, work, seed, scale, log)
            save_critic(critic.model, output / "critic")


if __name__ == "__main__":
    main()
