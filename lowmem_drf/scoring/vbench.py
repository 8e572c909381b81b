"""Clips for VBench (https://github.com/Vchitect/VBench), and its scores.

VBench runs in an environment of its own: it pins old libraries. ``eval --export vbench DIR`` writes ``base/`` and
``tuned/`` with clips named ``<prompt>-<index>.mp4``, which VBench reads the prompt from; ``prompts.json``, file name ->
prompt, for names that cannot hold theirs (``--prompt_file``); and ``eval.json``, the result of ``eval``. VBench's
results are read from ``base-scores/`` and ``tuned-scores/``.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, FiniteFloat, TypeAdapter

from lowmem_drf.errors import BadInputError, quoted
from lowmem_drf.files import readable_name, short_hash, write_text
from lowmem_drf.scoring.evaluate import Trial
from lowmem_drf.scoring.intervals import changes
from lowmem_drf.scoring.result import Result
from lowmem_drf.texts import parse_json, read_text
from lowmem_drf.video import write_mp4

if TYPE_CHECKING:
    from torch import Tensor

SIDES = ("base", "tuned")
EXPORTED = "lowmem-drf eval --export vbench DIR"
RESULT, PROMPTS = "eval.json", "prompts.json"
DIMENSIONS = (
    *("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality"),
    "imaging_quality",
)
"""What VBench measures of prompts that are not its own."""
HUNDREDTHS = {"imaging_quality"}
"""Dimensions whose scores of single clips are a hundred times their mean."""
LARGEST = 1e9
"""No score of a clip is larger."""
FORBIDDEN = '<>:"/\\|?*' if sys.platform == "win32" else "/"
ASIDE_BYTES = 20
"""Longest addition to a name while a file is written."""


class Export:
    """Writes clips as they are made (``watch``). Raises BadInputError: the folder is not empty, or cannot be made."""

    def __init__(self, folder: Path, trial: Trial, fps: float) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInputError(
                f"--export vbench {folder}: it is not empty, and VBench scores all clips that it finds. Give a new one."
            )
        for side in SIDES:
            (folder / side).mkdir(parents=True, exist_ok=True)
        self.folder, self._fps = folder, fps
        self._names = clip_names([prompt.text for prompt in trial.prompts], trial.seeds, most=_most_bytes(folder))
        texts = (prompt.text for prompt in trial.prompts for _ in range(trial.seeds))
        write_text(folder / PROMPTS, _dumped(dict(zip(self._names, texts, strict=True))))

    def watch(self, side: str, here: Sequence[int], frames_BTCHW: Tensor) -> None:
        """Writes clips: ``both_sides``'s ``watch``."""
        for i, clip in zip(here, frames_BTCHW, strict=True):
            write_mp4(self.folder / side / self._names[i], clip, self._fps)

    def finish(self, result: dict[str, Any]) -> list[str]:
        """Writes the result, and returns the commands that come next."""
        write_text(self.folder / RESULT, _dumped(result))
        about = f"--dimension {quoted(' '.join(DIMENSIONS))} --prompt_file {quoted(self.folder / PROMPTS)}"
        folders = [(quoted(self.folder / side), quoted(self.folder / f"{side}-scores")) for side in SIDES]
        return [
            *(
                f"vbench evaluate --mode custom_input {about} --videos_path {clips} --output_path {scores}"
                for clips, scores in folders
            ),
            f"lowmem-drf eval --vbench-scores {quoted(self.folder)}",
        ]


def clip_names(texts: Sequence[str], seeds: int, most: int) -> list[str]:
    """``<prompt>-<index>.mp4`` of each clip. A prompt that cannot be a file name of ``most`` bytes, or differs from
    another one only in case, which some file systems do not tell apart, is shortened."""
    names: list[str] = []
    taken: set[str] = set()
    for place, text in enumerate(texts):
        stem = text
        if not _fits(text, most - len(f"-{seeds}.mp4")) or text.casefold() in taken:
            stem = readable_name(text, after=f"-{short_hash(text)}-{place}p")
        taken.add(text.casefold())
        names += [f"{stem}-{index}.mp4" for index in range(seeds)]
    return names


def with_scores(folder: Path) -> dict[str, Any]:
    """The result of the exported evaluation with VBench's scores.

    Raises BadInputError: the folder is not from ``--export vbench``, or VBench's results are missing or damaged.
    """
    found = _parsed(folder / RESULT, Result, f"Give the folder of {EXPORTED}.")
    names = list(_parsed(folder / PROMPTS, dict[str, str], f"Give the folder of {EXPORTED}."))
    result: dict[str, Any] = found.model_dump(exclude_unset=True)
    if len(names) != result["seeds"] * len(result["by_prompt"]):
        raise BadInputError(f"{folder}: {PROMPTS} and {RESULT} are of different clips. Export again: {EXPORTED}")
    place_of = {name: i // result["seeds"] for i, name in enumerate(names)}
    for side in SIDES:
        scores, clips = _scores(folder / f"{side}-scores")
        result[side]["vbench"] = scores
        for dimension, values in clips.items():
            of_prompts: dict[int, list[float]] = defaultdict(list)
            for name, value in values.items():
                if name in place_of:
                    of_prompts[place_of[name]].append(value)
            for place, some in of_prompts.items():
                result["by_prompt"][place][side][f"vbench.{dimension}"] = sum(some) / len(some)
    base, tuned = ([row[side] for row in result["by_prompt"]] for side in SIDES)
    return result | {"change": changes(base, tuned)}


class _Clip(BaseModel):
    """A clip in VBench's results."""

    video_path: str
    video_results: Any = None


def _scores(folder: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """VBench's scores by dimension, and of each clip by dimension and file name. Later files replace earlier ones."""
    files = sorted(folder.glob("*_eval_results.json"))
    if not files:
        raise BadInputError(
            f"there are no scores of VBench in {folder} (*_eval_results.json). Give it this folder: "
            f"--output_path {quoted(folder)}"
        )
    scores: dict[str, float] = {}
    clips: dict[str, dict[str, float]] = {}
    for file in files:
        found = _parsed(file, dict[str, tuple[FiniteFloat, list[_Clip]]], "Let VBench write it again.")
        for dimension, (mean, rows) in found.items():
            scale = 0.01 if dimension in HUNDREDTHS else 1.0
            scores[dimension] = mean
            clips[dimension] = {
                os.path.basename(row.video_path): scale * float(row.video_results)
                for row in rows
                if isinstance(row.video_results, int | float) and abs(row.video_results) < LARGEST
            }
    return scores, clips


def _parsed(file: Path, kind: Any, cure: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(parse_json(read_text(file, f"{file}")))
    except ValueError as error:  # pydantic's too
        raise BadInputError(f"{file} has not the form that it is written in. {cure}") from error


def _fits(text: str, most: int) -> bool:
    try:
        name = text.encode(sys.getfilesystemencoding())
    except UnicodeEncodeError:
        return False
    return len(name) <= most and text.isprintable() and not set(text) & set(FORBIDDEN) and text == text.strip()


def _most_bytes(folder: Path) -> int:
    limit = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    return limit - ASIDE_BYTES


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"
