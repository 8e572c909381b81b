"""``metrics.jsonl`` and ``tensorboard/``: one line and one point per curve for every update."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem_drf.files import write_text
from lowmem_drf.training.run_lock import lost
from lowmem_drf.training.update import Skipped, UpdateReport


class Metrics:
    """Writes both. A resumed run (``done`` updates) first drops everything after its checkpoint."""

    def __init__(self, run: Path, done: int) -> None:
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
        self._board.write(report.step, _scalars(row))
        return row

    def close(self) -> None:
        self._file.close()
        self._board.close()


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
