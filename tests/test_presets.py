"""Every preset loads, is short, and states its purpose."""

import tomllib

import pytest
from _root import ROOT

from lowmem_drf.config import load_config, to_toml
from lowmem_drf.errors import BadInputError
from lowmem_drf.preset_files import (
    DEFAULT_PRESET,
    copy_preset,
    default_preset,
    preset_card,
    preset_summary,
    presets,
    require_card,
)
from lowmem_drf.sampling.published import AS_PUBLISHED, TIMESTEPS
from lowmem_drf.schema import Config

CARDS = ("rtx3060", "rtx3090", "rtx4060", "rtx4080", "rtx4090", "rtx5090")
OTHERS = ("toy", "toy-fast", "rtx4080-wan14b", "rtx4090-wan14b", "rtx4090-wan14b-i2v", "rtx4090-wan22-5b", "zero3-2gpu")
IMAGES = ("rtx3060-sd35",)
COGVIDEOX = ("rtx3060-cogvideox", "rtx4090-cogvideox")
LTX = ("rtx3060-ltx", "rtx4080-ltx", "rtx4080-ltx13b", "rtx4090-ltx", "rtx4090-ltx13b")
NAMES = {*OTHERS, *LTX, *IMAGES, *COGVIDEOX, *CARDS, *(f"{card}-20step" for card in CARDS)}


def test_these_presets_and_no_others_are_in_the_package():
    assert set(presets()) == {path.stem for path in (ROOT / "presets").rglob("*.toml")} == NAMES
    assert DEFAULT_PRESET in NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_preset_holds_only_what_differs_from_what_it_extends(name):
    table = tomllib.loads(presets()[name].read_text(encoding="utf-8"))
    below = load_config(extended) if (extended := table.pop("extends", "")) else Config()
    below, loaded = leaves(below.model_dump()), leaves(load_config(name).model_dump())
    own = leaves(table)
    assert {key: loaded[key] for key in own} == own
    of_the_model = {*AS_PUBLISHED, TIMESTEPS} - own.keys()
    assert {key for key in loaded if loaded[key] != below[key]} - of_the_model == own.keys()


def leaves(table, prefix=""):
    """Dotted key -> value."""
    nested = {prefix + key: value for key, value in table.items()}
    return {
        k: v
        for key, value in nested.items()
        for k, v in (leaves(value, f"{key}.") if isinstance(value, dict) else {key: value}).items()
    }


def test_a_preset_extends_another_by_name_or_by_path(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    base, mine = tmp_path / "base.toml", tmp_path / "inner" / "mine.toml"
    base.write_text('extends = "toy"\nsteps = 3\nbatch = 4\nmicro_batch = 4\n[critic.weights]\nTA = 5\n')
    mine.write_text('extends = "../base.toml"\nsteps = 7\n[critic.weights]\nVQ = 6\n')
    config = load_config(str(mine), ["micro_batch=1"])
    assert (config.steps, config.batch, config.micro_batch, config.model.id) == (7, 4, 1, "toyworld")
    assert config.critic.weights.model_dump() == {"TA": 5.0, "Phy": 2.0, "VQ": 6.0}
    monkeypatch.chdir(mine.parent)
    assert load_config("mine.toml", ["micro_batch=1"]) == config
    assert "extends" not in to_toml(config)
    assert load_config(copy_preset(str(mine), tmp_path / "copy.toml"), ["micro_batch=1"]) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('extends = "mine.toml"', "in a circle: .*mine.toml, .*mine.toml. Take the line out of one of them"),
        ('extends = "other.toml"', "in a circle: .*mine.toml, .*other.toml, .*mine.toml"),
        ('extends = "rtx409"', "mine.toml: extends: there is no preset 'rtx409'. Did you mean rtx4090"),
        ('extends = "no.toml"', "mine.toml: extends: preset file .*no.toml does not exist"),
        ('extends = ["toy"]', "mine.toml: extends: give one preset"),
    ],
)
def test_what_cannot_be_extended(tmp_path, text, said):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    (tmp_path / "other.toml").write_text('extends = "./mine.toml"')
    with pytest.raises(BadInputError, match=said):
        load_config(file)


def test_a_problem_names_the_file_that_has_it(tmp_path):
    (tmp_path / "base.toml").write_text("batch = 0")
    (tmp_path / "mine.toml").write_text('extends = "base.toml"\nsteps = "many"')
    with pytest.raises(BadInputError) as caught:
        load_config(tmp_path / "mine.toml")
    for problem in ("base.toml: batch: ", "mine.toml: steps: "):
        assert f"{tmp_path}/{problem}" in str(caught.value)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_preset_is_short_and_its_header_says_what_and_how(name):
    lines = presets()[name].read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert len(lines) <= 30
    assert len(preset_summary(presets()[name])) > 20
    for word in ("lowmem-drf train", "GPU: "):
        assert word in header


def test_the_default_is_the_largest_preset_that_fits_the_card(tmp_path, monkeypatch):
    files = {}
    cards = {"toy-fast": "none needed", "rtx3060": "12 GB", "rtx4090": "24 GB (Ada)", "rtx4090-long": "24 GB"}
    for name, card in cards.items():
        files[name] = tmp_path / f"{name}.toml"
        files[name].write_text(f"# what\n#\n# GPU: {card}\n")
    assert preset_card(files["rtx4090"]) == "24 GB (Ada)"
    of_this_package = [default_preset(gb) for gb in (None, 7.9, 8.5, 12.6, 16.9, 1000.0)]
    assert of_this_package == ["toy-fast", "toy-fast", "rtx4060", "rtx3060", "rtx4080", "rtx5090"]
    for card, name in (("RTX 4090", "rtx4090"), ("RTX 3090", "rtx3090"), ("another", "rtx3090")):
        assert default_preset(25.3, f"NVIDIA GeForce {card}") == name
    monkeypatch.setattr("lowmem_drf.preset_files.presets", lambda: files)
    chosen = [default_preset(gb) for gb in (None, 8.0, 12.6, 23.0, 25.4, 140.0)]
    assert chosen == ["toy-fast", "toy-fast", "rtx3060", "rtx3060", "rtx4090", "rtx4090"]


def test_a_cards_preset_is_not_begun_unasked_where_torch_sees_no_card(monkeypatch):
    """Before anything is downloaded."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("rtx4090", "zero3-2gpu"):
        with pytest.raises(BadInputError, match=rf"{name} is for a card .* sees no CUDA card here"):
            require_card(name, load_config(name))
    require_card("rtx4090", load_config("rtx4090", ["device=cpu"]))
    require_card("toy-fast", load_config("toy-fast"))


def test_copy_never_overwrites(tmp_path):
    path = copy_preset("toy", tmp_path / "mine.toml")
    assert load_config(path) == load_config("toy")
    path.write_text("steps = 3\n")
    with pytest.raises(BadInputError, match="Give another TARGET, or replace it with --force"):
        copy_preset("toy", path)
    assert path.read_text() == "steps = 3\n"
    copy_preset("toy", path, force=True)
    assert load_config(path) == load_config("toy")
    assert copy_preset("toy", tmp_path) == tmp_path / "toy.toml"
    assert load_config(copy_preset("toy", tmp_path / "new" / "mine.toml")) == load_config("toy")
