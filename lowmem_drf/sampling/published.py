"""How the publishers of a generator sample it: what a configuration takes where it says nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_drf.sampling.levels import TRAINING_TIMESTEPS, ddim_levels
from lowmem_drf.schema.generator import Model, Sampler, Video
from lowmem_drf.texts import parse_toml

AS_PUBLISHED = ("sampler.shift", "sampler.guidance", "sampler.negative_prompt")
"""Keys whose default is that of the model's publishers."""
TIMESTEPS = "sampler.timesteps"
_TABLES = sorted((Path(__file__).parents[1] / "models").glob("*/sampling.toml"))
"""Of each family of generators that has published its sampling."""
_LARGE = 600_000
"""Pixels of a frame: 720p has more, 480p fewer."""


def as_published(values: Mapping[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    """With the sampling that the model's publishers use, where a value is left out or ``auto``. A table with
    ``snr_shift`` is that of a model trained by discrete diffusion (``sampling/levels.py``)."""
    asked = {"model.id": Model().id, "video.width": Video().width, "video.height": Video().height}
    model, *sides = (values.get(key, (default, ""))[0] for key, default in asked.items())
    known: dict[str, tuple[Any, str]] = {}
    for file in _TABLES:
        table = parse_toml(file.read_text(encoding="utf-8"))
        row = next((row for row in table["models"] if re.search(row["id"], str(model), re.IGNORECASE)), None)
        if row:
            large = all(isinstance(side, int) for side in sides) and math.prod(sides) > _LARGE
            shift = row.get("shift_720p", row["shift"]) if large else row["shift"]
            published = (shift, row["guidance"], table["negative_prompt"])
            known = {key: (value, str(file)) for key, value in zip(AS_PUBLISHED, published, strict=True)}
            steps = values.get("sampler.steps", (Sampler().steps, ""))[0]
            if "snr_shift" in row and isinstance(steps, int) and 1 <= steps <= TRAINING_TIMESTEPS:
                known[TIMESTEPS] = (ddim_levels(row["snr_shift"], steps), str(file))
    kept = {key: value for key, value in values.items() if key not in AS_PUBLISHED or value[0] != "auto"}
    return known | kept


def grid_of(model: str) -> tuple[int, ...]:
    """Pixel frames of a latent and pixels on a side, of a generator whose family has published them; else empty."""
    for file in _TABLES:
        table = parse_toml(file.read_text(encoding="utf-8"))
        if "grid" in table and any(re.search(row["id"], model, re.IGNORECASE) for row in table["models"]):
            return tuple(table["grid"])
    return ()
