"""Which decoder an update uses: the tiny one, except where it is compared, and no more once it is too far off."""

from __future__ import annotations

from typing import Literal

from lowmem_drf.schema.generator import Model

Uses = Literal["exact", "tiny", "both"]
"""``both``: frames and gradient are the VAE's, and the tiny decoder's gradient is compared with it."""


class DecoderCheck:
    """``fell``: the cosine for which the run went back to the VAE, before the first update of this process."""

    def __init__(self, settings: Model, fell: float | None = None) -> None:
        self._settings, self.fell = settings, fell

    def uses(self, step: int) -> Uses:
        """Of update ``step`` (from 0)."""
        if self._settings.decoder == "exact" or self._is_off:
            return "exact"
        return "both" if step % self._settings.decoder_check_every == 0 else "tiny"

    def look(self, done: int, cosine: float | None) -> str:
        """Takes the cosine of an update, if it has one; ``done``: its number, from 1. Returns a line to print, or
        nothing."""
        if cosine is None or cosine >= self._settings.decoder_least_cosine:
            return ""
        self.fell = cosine
        return f"update {done}: {self.why}"

    @property
    def why(self) -> str:
        """Why the run has gone back; empty if it has not."""
        if not self._is_off:
            return ""
        return (
            f"the tiny decoder's gradient has a cosine of {self.fell:.2f} with the VAE's, below "
            f"model.decoder_least_cosine = {self._settings.decoder_least_cosine:g}: from here on the VAE alone is used."
        )

    @property
    def _is_off(self) -> bool:
        # of a bound that a resumed run has lowered, the cosine may be good enough again
        return self.fell is not None and self.fell < self._settings.decoder_least_cosine
