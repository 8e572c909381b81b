"""Outside its own folder (and ToyWorld) no module of the package names a family of generators."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest
from _root import ROOT
from test_imports import modules

from lowmem_drf.models.family import Family
from lowmem_drf.models.generators import FAMILIES

OTHERS = {"hunyuan"}
"""Names of families that may come."""
EXCEPTIONS = {
    "lowmem_drf.models.generators": "the registry: one import and one line for each family",
    "lowmem_drf.schema.generator": "the default of model.id",
}


def words_of(source: str) -> Iterator[str]:
    """The words of names and strings, in lower case: ``WanDecoder`` has two. Not of comments and docstrings, which may
    cite."""
    said: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            said.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT and token.start[0] not in said:
            yield from (word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", token.string))


def folder_of(family: object) -> str:
    return str(family.__name__).removesuffix(".family")  # type: ignore[attr-defined]


def test_no_module_outside_its_folder_names_a_family() -> None:
    named = {family.NAME.lower() for family in FAMILIES} | {folder_of(family).split(".")[-1] for family in FAMILIES}
    own = (*(f"{folder_of(family)}." for family in FAMILIES), "lowmem_drf.toy.")
    others = {name: path for name, path in modules().items() if not f"{name}.".startswith(own)}
    assert len(others) > 150 and "wan" in named
    naming = {name for name, path in others.items() if (named | OTHERS) & set(words_of(path.read_text("utf-8")))}
    assert naming == EXCEPTIONS.keys()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""Wan."""\nx = 1  # Wan\n', False),
        ("import diffusers\ndiffusers.WanTransformer3DModel\n", True),
        ('kind = "wan2.2"\n', True),
        ("lora_wan = is_wan\n", True),
        ('"wants"\nwanted = WANTED\n', False),
    ],
)
def test_the_reader_finds_the_names(source: str, found: bool) -> None:
    assert ("wan" in words_of(source)) is found


def test_a_family_is_one_folder_and_one_line() -> None:
    registry = (ROOT / "lowmem_drf" / "models" / "generators.py").read_text("utf-8")
    for family in FAMILIES:
        folder = ROOT.joinpath(*folder_of(family).split("."))
        assert folder.parent == ROOT / "lowmem_drf" / "models" and (folder / "family.py").is_file()
        lines = [line for line in registry.splitlines() if re.search(rf"\b{folder.name}\b", line)]
        assert len(lines) == 2, f"one import and one line: {lines}"


def test_the_page_for_new_families_names_all_that_they_bring() -> None:
    page = (ROOT / "docs" / "adding-a-generator.md").read_text("utf-8")
    rows = [row for row in page.splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    members = {name for name in (*Family.__annotations__, *vars(Family)) if not name.startswith("_")}
    assert named == members and len(named) > 20
