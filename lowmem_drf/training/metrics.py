"""``metrics.jsonl`` and ``tensorboard/``: one line and one point per curve for every update; and the same to the
trackers of ``log.trackers``, which get the sample clips too."""

from __future__ import annotations

import importlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.files import write_text
from lowmem_drf.libraries import cure
from lowmem_drf.schema import Config
from lowmem_drf.terminal import say
from lowmem_drf.texts import one_line, parse_json, read_text
from lowmem_drf.training.run_lock import lost
from lowmem_drf.training.update import Skipped, UpdateReport


class Tracker(Protocol):
    """One of ``log.trackers``."""

    name: str

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """A point of each curve."""
        ...

    def clips(self, step: int, files: Sequence[Path]) -> None:
        """The sample clips of an update, MP4."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


class Metrics:
    """Writes all of them. A resumed run (``done`` updates) first drops everything after its checkpoint; what trackers
    have of it, they keep, and get again: the same values."""

    def __init__(self, run: Path, done: int, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)
        self._path = run / "metrics.jsonl"
        self.skipped = 0
        """Lines of skipped updates."""
        if self._path.exists():
            rows = [row for row in read_metrics(run) if row["step"] <= done]
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
            self.skipped = sum("skipped" in row for row in rows)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = _Board(run / "tensorboard", done)

    def gone(self) -> bool:
        """Whether the run's folder was deleted or moved: then nobody finds what is written."""
        return lost(self._path.parent, self._path)

    def write(self, report: UpdateReport | Skipped) -> dict[str, Any]:
        """Writes and flushes one update. Returns what its line says."""
        self.skipped += isinstance(report, Skipped)
        row = {key: value for key, value in asdict(report).items() if value not in ({}, None)}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        scalars = _scalars(row)
        self._board.write(report.step, scalars)
        self._tell(lambda tracker: tracker.write(report.step, dict(scalars)))
        return row

    def clips(self, step: int, folder: Path) -> None:
        """Gives the clips in a folder to the trackers."""
        files = sorted(folder.glob("*.mp4")) if self._trackers else []
        if files:
            self._tell(lambda tracker: tracker.clips(step, files))

    def close(self) -> None:
        self._file.close()
        self._board.close()
        self._tell(lambda tracker: tracker.close())

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        """A tracker that fails gets no more: a run of hours does not end because a server cannot be reached."""
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                reason = one_line(f"{type(error).__name__}: {error}")
                say(f"{tracker.name} failed and gets no more of this run ({reason}). The run goes on.")


class _Board:
    """TensorBoard's file. Not ``SummaryWriter``, which writes it in a thread: that prints a traceback where it cannot
    write, and is up to two minutes late."""

    def __init__(self, folder: Path, done: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._event = Event
        self._records = RecordWriter((folder / name).open("ab"))
        self._add(file_version="brain.Event:2")
        # hides what was written after the checkpoint
        self._add(step=done + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: list[tuple[str, float]]) -> None:
        """Writes and flushes a point of each curve."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars]
        self._add(step=step, summary=Summary(value=values))

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()


class _Wandb:
    """Weights & Biases. Its environment variables hold: ``WANDB_MODE=offline``, ``WANDB_ENTITY``."""

    name = "wandb"

    def __init__(self, config: Config, run: Path, id_: str) -> None:
        import wandb

        quiet = wandb.Settings(console="off", silent=True)
        settings = config.model_dump(mode="json")
        self._run = wandb.init(
            project=config.log.project, name=run.name, id=id_, resume="allow", dir=run, config=settings, settings=quiet
        )
        self._video = wandb.Video
        say(f"wandb: {self._run.dir if self._run.offline else self._run.url}")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def clips(self, step: int, files: Sequence[Path]) -> None:
        self._run.log({f"samples/{file.stem}": self._video(str(file), format="mp4") for file in files}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """Trackio, on the disk; ``trackio show`` shows it."""

    name = "trackio"

    def __init__(self, config: Config, run: Path, id_: str) -> None:
        import trackio

        self._trackio, settings = trackio, config.model_dump(mode="json")
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            self._run = trackio.init(
                project=config.log.project, name=f"{run.name}-{id_}", config=settings, resume="allow", embed=False
            )
        say(f"trackio: {run.name}-{id_}; see it with: trackio show --project {config.log.project}")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def clips(self, step: int, files: Sequence[Path]) -> None:
        videos = {f"samples/{file.stem}": self._trackio.Video(str(file)) for file in files}
        self._run.log(videos, step=step)

    def close(self) -> None:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            self._trackio.finish()


TRACKER_ID = "tracker.json"
"""In a run's folder: the id by which its trackers know it again when it is resumed."""


def require_trackers(names: Sequence[str]) -> None:
    """Imports the packages of ``log.trackers``. Raises BadInputError, with the pip command, for one that is missing."""
    for name in names:
        try:
            # a folder of this name, which wandb makes, would be imported too
            found = hasattr(importlib.import_module(name), "init")
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            found = False
        if not found:
            rest = json.dumps([other for other in names if other != name])
            raise BadInputError(f"log.trackers: {name} is not installed. {cure(name)}; or -s log.trackers='{rest}'")


def open_trackers(config: Config, run: Path) -> list[Tracker]:
    """The trackers of a run, which say where they write. Raises LowmemError for one that does not begin."""
    kinds: dict[str, Callable[[Config, Path, str], Tracker]] = {"wandb": _Wandb, "trackio": _Trackio}
    file, opened = run / TRACKER_ID, list[Tracker]()
    for name in config.log.trackers:
        if not file.is_file():
            write_text(file, json.dumps({"id": secrets.token_hex(4)}) + "\n")
        try:
            opened.append(kinds[name](config, run, str(parse_json(read_text(file, str(file)))["id"])))
        except Exception as error:
            login = "wandb login, WANDB_MODE=offline" if name == "wandb" else "Try it by itself"
            reason = one_line(f"{type(error).__name__}: {error}", 240)
            raise LowmemError(f"{name} does not begin ({reason}). {login}, or -s log.trackers=[]") from error
    return opened


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run, without those that are damaged, such as a last one that a killed process left unfinished."""
    rows: list[dict[str, Any]] = []
    for line in (run / "metrics.jsonl").read_bytes().split(b"\n"):
        with suppress(ValueError, RecursionError):  # json.loads, because runs of earlier versions may hold NaN
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    """``{"reward": 1.0, "stage_s": {"decode": 2}}`` -> reward, stage_s/decode. Lists and texts are dropped."""
    flat: list[tuple[str, float]] = []
    for key, value in row.items():
        if isinstance(value, dict):
            flat += [(f"{key}/{name}", number) for name, number in value.items() if isinstance(number, float)]
        elif isinstance(value, float):
            flat.append((key, value))
    return flat
