"""The last finished update of a run, to be saved when memory runs out in the one that follows."""

from __future__ import annotations

from collections.abc import Callable

from lowmem_drf.prompts import Cursor
from lowmem_drf.training.trainer import SingleTrainer, Trainer


class Finished:
    """Where a run was between two updates. ``cursor``: of its prompts; those of a failed update come again."""

    def __init__(self, trainer: Trainer, step: int, cursor: Cursor) -> None:
        self.step, self.cursor = step, cursor
        self._trainer, self._begun = trainer, _begun(trainer)

    def rescue(self, saved: int, save: Callable[[int, Cursor], None]) -> str:
        """Saves it, unless the last checkpoint (of update ``saved``) is of it, or the optimizer has begun to change the
        weights since. Returns what is lost, in words."""
        if self.step <= saved:
            return ""
        lost = f"updates {saved + 1} to {self.step} are" if self.step > saved + 1 else f"update {self.step} is"
        if _begun(self._trainer) != self._begun:
            return f"{lost} lost: the next one had begun to change the weights"
        try:
            save(self.step, self.cursor)
        except Exception as error:  # there may be no memory for this either, or no disk
            return f"{lost} lost: saving failed ({type(error).__name__}: {error})"
        return ""


def _begun(trainer: Trainer) -> int:
    return trainer.steps_begun if isinstance(trainer, SingleTrainer) else 0
