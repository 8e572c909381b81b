"""The folder of a run: creates it, finds it, refuses one that is taken.

config.toml  questions.json  left_out.json  kernels.json  run.json  metrics.jsonl  watch.jsonl  eval.json  tracker.json
tensorboard/  samples/step-000050/  saliency/step-000050/  checkpoints/step-000050/  report.html
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lowmem_drf.config import change, load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.files import RUN_FILES, make_writable, release, write_text
from lowmem_drf.models.rewards.users import is_entry
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.prompts import PromptRow, as_jsonl, with_absolute_files
from lowmem_drf.questions.file import WRITERS
from lowmem_drf.schema import Config
from lowmem_drf.schema.running import Zero
from lowmem_drf.texts import expanded, read_text
from lowmem_drf.training.checkpoint import last_manifest, resume_command
from lowmem_drf.training.manifest import require_settings
from lowmem_drf.training.run_lock import locked

RUNS = Path("runs")
PROMPTS = "prompts.jsonl"
"""Of a run that was given its prompts as texts, by the Python API."""
_CONTENTS = ("config.toml", "metrics.jsonl", "checkpoints", "samples", "tensorboard")


def with_absolute_paths(config: Config) -> Config:
    """Makes the paths of files absolute, so that the run can be resumed from any folder."""

    def absolute(path: str) -> str:
        return str(expanded(path).absolute())

    model, critic, changes = config.model, config.critic, dict[str, object]()

    def found(file: str) -> str:
        return absolute(file) if file and expanded(file).exists() else file

    loras = model.base_lora
    files = {
        "transformer": found(model.transformer),
        "decoder_file": found(model.decoder_file),
        "base_lora": found(loras) if isinstance(loras, str) else [found(lora) for lora in loras],
    }
    changes["model"] = model.model_copy(update=files)
    if config.lora.init:
        changes["lora"] = config.lora.model_copy(update={"init": absolute(config.lora.init)})
    if config.rewards:
        rewards = {
            name: one.model_copy(update={"id": one.id if is_entry(one.id) else found(one.id)})
            for name, one in config.rewards.items()
        }
        changes["rewards"] = rewards
    if config.prompts not in ("", TOYWORLD):
        changes["prompts"] = absolute(config.prompts)
    if critic.questions not in WRITERS:
        changes["critic"] = critic.model_copy(update={"questions": absolute(critic.questions)})
    if isinstance(config.log.sample_prompts, str):
        shown = absolute(config.log.sample_prompts)
        changes["log"] = config.log.model_copy(update={"sample_prompts": shown})
    return config.model_copy(update=changes)


def default_output(preset: str) -> Path:
    """``runs/<preset>-<time>``, with a number where that exists already."""
    stem = f"{Path(preset).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = RUNS / stem, 1
    while path.exists():
        number += 1
        path = RUNS / f"{stem}-{number}"
    return path


@contextmanager
def claim(folder: Path, say: Callable[[str], None], resume: bool = False) -> Iterator[None]:
    """Inside the block the run's folder is there, and this process alone trains in it (``locked``, which may ``say``
    something). Folders that it made and that are empty at the end go again: a run that did not start leaves no trace.

    Raises:
        BadInputError: another process trains in it, it cannot be written to, or without ``resume`` it holds a run.
    """
    made = make_writable(folder)
    try:
        with locked(folder, say):
            held = [name for name in _CONTENTS if os.path.exists(folder / name)]
            if held and not resume:
                cure = f"Go on with it: {resume_command(folder)}; or give another --output."
                raise BadInputError(f"{folder} already holds a run ({', '.join(held)}). {cure}")
            if not resume and (edited := [name for name in RUN_FILES if os.path.exists(folder / name)]):
                cure = f"Move {'them' if edited[1:] else 'it'} elsewhere, or give another --output."
                raise BadInputError(f"{folder} holds {' and '.join(edited)}, which the run would overwrite. {cure}")
            yield
    finally:
        release(made)


@contextmanager
def own_prompts(run: Path, rows: Sequence[PromptRow]) -> Iterator[Path]:
    """Inside the block the run's folder holds these prompts as a file, with which it can be resumed. If no run begins
    there, the file is gone at the end.

    Raises BadInputError: the folder has other prompts, or a run that took its own from elsewhere.
    """
    file = run / PROMPTS
    text = "".join(f"{as_jsonl(with_absolute_files(row))}\n" for row in rows)
    if file.is_file() and read_text(file, str(file)) == text:
        yield file
        return
    if file.exists() or (run / "config.toml").exists():
        raise BadInputError(
            f"{run} has other prompts already. To go on with its run, leave prompts out; else give another folder."
        )
    made = make_writable(run)
    try:
        write_text(file, text)
        yield file
    finally:
        if not (run / "config.toml").exists():
            file.unlink(missing_ok=True)
        release(made)


def find_run(folder: Path | None = None, besides: str = "") -> Path:
    """The given run, by default the one under ``runs/`` that was written to last. Raises BadInputError if there is
    none; ``besides`` ends its cure."""
    if folder is not None:
        if not (folder / "config.toml").is_file():
            raise BadInputError(f"{folder} is not a run: it has no config.toml. Train one with: lowmem-drf train")
        return folder
    found = [path.parent for path in RUNS.glob("*/config.toml")]
    if not found:
        raise BadInputError(
            f"there is no run under runs/ yet. Train one with: lowmem-drf train; or name a run's folder{besides}."
        )
    return max(found, key=_last_written)


def run_of(lora: Path) -> Path | None:
    """The run whose checkpoint a LoRA's file or folder is, if any."""
    checkpoint = Path(os.path.abspath(lora if lora.is_dir() else lora.parent))
    run = checkpoint.parent.parent
    return run if checkpoint.parent.name == "checkpoints" and (run / "config.toml").is_file() else None


def saved_config(run: Path) -> Config:
    """The resolved configuration of a run. Raises BadInputError if it was edited in a key that may not change."""
    config = load_config(run / "config.toml")
    if saved := last_manifest(run):
        require_settings(run, config, saved)
    return config


def run_config(folder: Path, overrides: Iterable[str] = ()) -> Config:
    """``saved_config`` with overrides, for a command that runs in one process."""
    return in_one_process(change(saved_config(folder), overrides))


def in_one_process(config: Config) -> Config:
    """The configuration without its engine. Models whose weights it partitions over processes are streamed."""
    partitioned = ["transformer", *(["critic"] if config.zero.critic else [])] if config.engine == "zero3" else []
    memory = config.memory.model_copy(update={"stream": [*config.memory.stream, *partitioned]})
    return config.model_copy(update={"engine": "single", "processes": 1, "zero": Zero(), "memory": memory})


def _last_written(run: Path) -> tuple[float, str]:
    files = [run / "config.toml", run / "metrics.jsonl"]
    return max(file.stat().st_mtime for file in files if file.exists()), run.name
