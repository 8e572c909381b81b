"""The pages name files, commands and settings that exist."""

import re

from _root import ROOT

from lowmem_drf.config import known_keys
from lowmem_drf.files import RUN_FILES
from lowmem_drf.preset_files import presets

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_FILES = {"modeling_qwen2_5_vl.py"}


def spans(page):
    """The text between single backticks, outside code blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def test_files_exist():
    known = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".git" not in path.parts]
    named = {(page.name, name) for page in PAGES for span in spans(page) for name in re.findall(r"[\w/]+\.py\b", span)}
    assert len(named) > 60
    assert not [row for row in named if not any(f"/{file}".endswith(f"/{row[1]}") for file in known)]


def test_benches_exist():
    named = {name for page in PAGES for name in re.findall(r"python -m (bench\.[\w.]*\w)", page.read_text("utf-8"))}
    assert len(named) > 15
    places = {name: ROOT / name.replace(".", "/") for name in named}
    files = {name: (place.with_suffix(".py"), place / "__main__.py") for name, place in places.items()}
    assert not [name for name, either in files.items() if not any(file.is_file() for file in either)]


def test_settings_and_presets_exist():
    """In the pages for users; docs/decisions.md also names what went."""
    keys, sections = set(known_keys()), {key.partition(".")[0] for key in known_keys() if "." in key}
    pages = [page for page in PAGES if page.name != "decisions.md"]
    named = {span.split(" ")[0] for page in pages for span in spans(page) if re.match(r"[a-z]+\.[a-z_]+( =|$)", span)}
    settings = {name for name in named if name.partition(".")[0] in sections}
    assert len(settings) > 30
    assert not [name for name in settings - keys - {*RUN_FILES} if not any(key.startswith(f"{name}.") for key in keys)]
    cards = {span for page in pages for span in spans(page) if re.fullmatch(r"rtx\d{4}[\w-]*|zero3-\w+", span)}
    assert len(cards) > 10 and cards <= set(presets())
