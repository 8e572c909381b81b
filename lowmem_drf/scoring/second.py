"""A second critic, which training never asked, about the clips of an evaluation.

It is loaded when the generator and the first critic are gone: neither memory nor the plan has to hold both. Until then
the host keeps the frames that a critic sees of each clip. Making the clips again would take as long as the evaluation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lowmem_drf.assembly.assemble import resolve_device, reward_spec
from lowmem_drf.assembly.loading import load_run_critic
from lowmem_drf.assembly.questions import grammar_of
from lowmem_drf.assembly.references import finish_questions
from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import HostStore
from lowmem_drf.memory.residency import bring
from lowmem_drf.models.weights.downloads import available_host_bytes, prepare
from lowmem_drf.models.weights.sources import READER, TOYWORLD
from lowmem_drf.questions import toyworld
from lowmem_drf.schema import Config
from lowmem_drf.scoring.evaluate import Trial, checked_heldout, evenly, heldout_questions, rewards
from lowmem_drf.shortage import GIB
from lowmem_drf.terminal import counted, say, showing
from lowmem_drf.types import Question

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lowmem_drf.models.qwen_vl.critic import VLMCritic

SHARE = 0.8
"""Of the host's free memory that kept frames may take."""


class SecondCritic:
    """Keeps frames while clips are made (``watch``), then asks about them (``ask``).

    Raises BadInputError: the critic is the one that was trained on, knows other words, cannot be loaded, or the frames
    would not fit into the host's memory.
    """

    def __init__(self, config: Config, critic: str, trial: Trial) -> None:
        if not config.critic.weights.asked:
            raise BadInputError(f"--critic {critic}: this run asks no critic, so there are no questions for another.")
        if critic == config.critic.id:
            raise BadInputError(f"--critic {critic} is the critic that this run was trained on. Name another one.")
        if critic in (TOYWORLD, READER) and not all(toyworld.attributes(prompt.text) for prompt in trial.prompts):
            raise BadInputError(
                f"--critic {critic} knows ToyWorld's words only, and these prompts have others. Name a real one: "
                "--critic Qwen/Qwen2.5-VL-3B-Instruct"
            )
        # nobody writes or replaces questions: both critics are asked the same
        named = config.critic.model_copy(update={"id": critic, "questions": "grammar"})
        self.config, self._clips = config.model_copy(update={"critic": named}), trial.seeds * len(trial.prompts)
        # ToyWorld's default critic does not understand quoted phrases
        self._phrases = critic == TOYWORLD and grammar_of(config) != "toyworld"
        self._kept, self._rate = evenly(config)
        # what a critic makes of them is computed in the run's dtype, and half precision is finer than bf16 there
        self._dtype = torch.float32 if config.dtype == "fp32" else torch.float16
        self._seen: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self._require_room()
        prepare(critic, "critic", say)

    def _require_room(self) -> None:
        video, clips = self.config.video, 2 * self._clips
        needed = clips * len(self._kept) * 3 * video.width * video.height * self._dtype.itemsize
        free = available_host_bytes()
        if free is not None and needed > SHARE * free:
            raise BadInputError(
                f"--critic: frames of {clips} clips are kept for the second critic, {needed / GIB:.1f} GiB of the "
                f"host's memory, of which {free / GIB:.1f} are free. Evaluate fewer prompts (--prompts FILE) or clips "
                "of each (--seeds 1)."
            )

    def watch(self, side: str, here: Sequence[int], frames_BTCHW: Tensor) -> None:
        """Keeps the frames that a critic sees: ``both_sides``'s ``watch``."""
        for i, seen in zip(here, frames_BTCHW[:, self._kept].to("cpu", self._dtype), strict=True):
            self._seen[side][i] = seen

    @torch.no_grad()
    def ask(self, trial: Trial, console: Console) -> dict[str, list[float]]:
        """Loads the critic, and returns its mean reward of each prompt, by side. The frames are gone afterwards."""
        with showing(console):
            critic, size = load_critic_alone(self.config), self.config.log.eval_batch
        if critic.fps is not None:  # of these frames, not of those that updates show
            critic.fps = self._rate
        questions, spec = self._questions(trial, critic, console), reward_spec(self.config)
        found: dict[str, list[float]] = {}
        for side, seen in self._seen.items():
            of_clips: list[float] = []
            for first in counted(console, f"second critic, {side}", range(0, self._clips, size)):
                here = range(first, min(first + size, self._clips))  # seen shrinks
                frames = torch.stack([seen.pop(i) for i in here]).to(resolve_device(self.config.device)).float()
                some = [trial.prompts[i // trial.seeds] for i in here]
                asked = [questions[prompt.id] for prompt in some]
                of_clips += [row["reward"] for row in rewards(critic, frames, asked, spec)]
            values = torch.tensor(of_clips, dtype=torch.float64).view(-1, trial.seeds)
            found[side] = values.mean(1).tolist()
        return found

    def _questions(self, trial: Trial, critic: VLMCritic, console: Console) -> Mapping[str, Sequence[Question]]:
        """The held-out questions without those that this critic does not answer as wanted from the prompt; where there
        are none, those of training, with its own reference answers and token weights."""
        still = self.config.video.frames == 1
        if trial.heldout:
            heldout = heldout_questions(trial.prompts, "toyworld", still) if self._phrases else trial.heldout
            return checked_heldout(self.config, trial.prompts, heldout, critic, console)
        asked = {name: tuple(_unweighted(question) for question in some) for name, some in trial.questions.items()}
        return finish_questions(self.config, trial.prompts, asked, critic, console).questions


def load_critic_alone(config: Config) -> VLMCritic:
    """The critic by itself on the card, streamed if the run's critic is."""
    device = resolve_device(config.device)
    if "critic" not in config.memory.stream:
        return load_run_critic(config)
    critic = load_run_critic(config, torch.device("cpu"))
    critic.stream(device, HostStore(device))
    critic.set_checkpointing(bool(config.memory.checkpoint))
    bring(critic.model, device)
    return critic


def _unweighted(question: Question) -> Question:
    """Without the weights of tokens, which belong to another critic's tokenizer and probabilities."""
    return replace(question, token_weights=())
