"""Every preset of the package loads, is short, and says what it is."""

import tomllib

import pytest
from _root import ROOT

from lowmem_drf.config import (
    DEFAULT_PRESET,
    copy_preset,
    default_preset,
    load_config,
    preset_card,
    preset_summary,
    presets,
)
from lowmem_drf.errors import BadInputError
from lowmem_drf.schema import Config

CARDS = ("rtx3060", "rtx3090", "rtx4060", "rtx4080", "rtx4090", "rtx5090")
NAMES = {"toy", *CARDS, *(f"{card}-fast" for card in CARDS), "rtx4090-wan14b", "rtx4090-wan22-5b", "zero3-2gpu"}


def test_these_presets_and_no_others_are_in_the_package():
    assert set(presets()) == {path.stem for path in (ROOT / "presets").rglob("*.toml")} == NAMES
    assert DEFAULT_PRESET in NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_preset_loads_and_holds_only_what_differs_from_the_defaults(name):
    config, defaults = load_config(name).model_dump(), Config().model_dump()
    table = tomllib.loads(presets()[name].read_text(encoding="utf-8"))
    for section, value in config.items():
        assert (section in table) == (value != defaults[section]), section


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_preset_is_short_and_its_header_says_what_and_how(name):
    lines = presets()[name].read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert len([line for line in lines if line and not line.startswith("#")]) <= 40
    assert len(preset_summary(presets()[name])) > 20
    for word in ("lowmem-drf train", "GPU: "):
        assert word in header


def test_the_default_is_the_largest_preset_that_fits_the_card(tmp_path, monkeypatch):
    files = {}
    for name, card in {
        "toy": "none needed",
        "rtx3060": "12 GB",
        "rtx4090": "24 GB (Ada)",
        "rtx4090-long": "24 GB",
    }.items():
        files[name] = tmp_path / f"{name}.toml"
        files[name].write_text(f"# what\n#\n# GPU: {card}\n")
    assert preset_card(files["rtx4090"]) == "24 GB (Ada)"
    of_this_package = [default_preset(gb) for gb in (None, 7.9, 8.5, 12.6, 16.9, 1000.0)]
    assert of_this_package == ["toy", "toy", "rtx4060", "rtx3060", "rtx4080", "rtx5090"]
    for card, name in (("RTX 4090", "rtx4090"), ("RTX 3090", "rtx3090"), ("another", "rtx3090")):
        assert default_preset(25.3, f"NVIDIA GeForce {card}") == name
    monkeypatch.setattr("lowmem_drf.config.presets", lambda: files)
    chosen = [default_preset(gb) for gb in (None, 8.0, 12.6, 23.0, 25.4, 140.0)]
    assert chosen == ["toy", "toy", "rtx3060", "rtx3060", "rtx4090", "rtx4090"]


def test_copy_never_overwrites(tmp_path):
    path = copy_preset("toy", tmp_path / "mine.toml")
    assert load_config(path) == load_config("toy")
    path.write_text("steps = 3\n")
    with pytest.raises(BadInputError, match="exists already"):
        copy_preset("toy", path)
    assert path.read_text() == "steps = 3\n"
    assert copy_preset("toy", tmp_path) == tmp_path / "toy.toml"
    with pytest.raises(BadInputError, match="Make it first"):
        copy_preset("toy", tmp_path / "none" / "mine.toml")
