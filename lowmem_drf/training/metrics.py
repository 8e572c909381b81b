"""``metrics.jsonl`` and ``tensorboard/``: one line and one point per curve for every update."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem_drf.files import write_text
from lowmem_drf.training.update import UpdateReport


class Metrics:
    """Writes both. A resumed run (``done`` updates) first drops everything after its checkpoint."""

    def __init__(self, run: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / "metrics.jsonl"
        if self._path.exists():
            rows = read_metrics(run)
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= done))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)

    def write(self, report: UpdateReport) -> None:
        """Writes and flushes one update."""
        row = {key: value for key, value in asdict(report).items() if key != "oracle" or value}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in _scalars(row):
            self._board.add_scalar(name, value, report.step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run, without a last line that a killed process left unfinished."""
    rows: list[dict[str, Any]] = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    """``{"reward": 1.0, "stage_s": {"decode": 2}}`` -> reward, stage_s/decode. Lists (prompts, seeds) are dropped."""
    flat: list[tuple[str, float]] = []
    for key, value in row.items():
        if isinstance(value, dict):
            flat += [(f"{key}/{name}", number) for name, number in value.items()]
        elif isinstance(value, float):
            flat.append((key, value))
    return flat
