"""Writes docs/configuration.md from the schema: the type, default, effect and cost of every key.

    python -m bench.configuration_doc

The texts are the docstrings of the fields in ``lowmem_drf/schema/``. ``tests/test_configuration_doc.py`` fails when
the page differs from them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lowmem_drf import schema
from lowmem_drf.config import known_keys
from lowmem_drf.sampling.published import AS_PUBLISHED
from lowmem_drf.schema import Config
from lowmem_drf.schema.learning import Reward

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
REWARDS = "rewards.<name>."
ABOUT = """\
# Configuration

Every key of a preset, of a run's `config.toml`, and of `-s key=value` \
(`lowmem-drf train -s optim.lr=1e-4 -s memory.park='["critic"]'`), with its
default. A preset holds only what differs from the defaults. Values are TOML. \
This page is generated from `lowmem_drf/schema/`
(`python -m bench.configuration_doc`)."""


def field_docs() -> dict[str, dict[str, str]]:
    """Class -> field -> docstring as Markdown; the field ``""`` has the docstring of the class."""
    docs: dict[str, dict[str, str]] = {}
    files = sorted(Path(schema.__file__).parent.glob("*.py"))
    for node in (node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ClassDef):
            texts = docs[node.name] = {"": _as_markdown(ast.get_docstring(node) or "")}
            for field, below in zip(node.body, node.body[1:], strict=False):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        texts[name] = _as_markdown(text)
    return docs


def _as_markdown(docstring: str) -> str:
    return " ".join(docstring.split()).replace("``", "`")


def section_of(key: str) -> type[BaseModel]:
    """The class that a dotted key is a field of."""
    if key.startswith(REWARDS):
        return Reward
    section: Any = Config
    for name in key.split(".")[:-1]:
        section = section.model_fields[name].annotation
    return section


def what_it_takes(spec: Mapping[str, Any]) -> str:
    """A property of a JSON schema in words."""
    if "anyOf" in spec:
        return " or ".join(what_it_takes(part) for part in spec["anyOf"])
    if choices := spec.get("enum", [spec["const"]] if "const" in spec else []):
        return ", ".join(f"`{json.dumps(choice)}`" for choice in choices)
    if "pattern" in spec:
        pattern = spec["pattern"].strip("^$").replace(r"\d+(\.\d+)?", "<number>")
        readable = pattern.replace(r"\d+", "<number>").strip("()")
        return " or ".join(f'`"{part}"`' for part in readable.split("|"))
    if spec["type"] == "object":
        return "table"
    if spec["type"] == "array":
        return f"list of {what_it_takes(spec['items'])}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {spec[key]:g}" for key, sign in bounds.items() if key in spec)
    return f"{spec['type']} {limits}".strip()


def page() -> str:
    """docs/configuration.md. Raises ValueError for a key that the schema does not explain."""
    docs, properties = field_docs(), Config.model_json_schema()
    specs = {name: part["properties"] for name, part in properties["$defs"].items()}
    specs["Config"] = properties["properties"]
    lines, before = [ABOUT], None
    for key in (*known_keys(), *(f"{REWARDS}{name}" for name in Reward.model_fields)):
        section, name = section_of(key), key.rpartition(".")[2]
        if not docs[section.__name__].get(name):
            raise ValueError(f"{key} has no docstring in lowmem_drf/schema/")
        if section is not before:
            title = f"`{key.rpartition('.')[0]}`" if "." in key else "The run"
            lines += ["", f"## {title}", "", docs[section.__name__][""], ""]
            lines += ["| Key | Takes | Default | What it does, and what it costs |", "|---|---|---|---|"]
            before = section
        default = json.dumps("auto" if key in AS_PUBLISHED else section.model_fields[name].default)
        text = docs[section.__name__][name]
        cells = [f"`{key}`", what_it_takes(specs[section.__name__][name]), f"`{default}`", text]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
