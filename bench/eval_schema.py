"""Writes docs/eval.schema.json, the JSON schema of ``lowmem-drf eval --json``.

    python -m bench.eval_schema

The texts are the docstrings of ``lowmem_drf/scoring/result.py``. ``tests/scoring/test_evaluate.py`` fails when the file
differs from them.
"""

from __future__ import annotations

import json
from pathlib import Path

from lowmem_drf.scoring.result import Result

FILE = Path(__file__).resolve().parent.parent / "docs" / "eval.schema.json"


def schema_text() -> str:
    """The content of the file."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(dialect | Result.model_json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(schema_text(), encoding="utf-8")
