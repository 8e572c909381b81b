"""The wheel, built here and used as an installed package."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from _root import ROOT

from lowmem_drf import __version__

BESIDE = {"cli.py": "cli.py", "presets/toy.toml": "presets/toy.toml", "kernels/README.md": "kernels/README.md"}
"""Files beside the package in a checkout -> their place in the package of a wheel."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the backend of ``pyproject.toml``, in a process of its own as pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.strip()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder for ``PYTHONPATH``: what pip unpacks of a pure wheel."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed, folder, *command):
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_what_stands_beside_it(wheel):
    assert wheel.name == f"lowmem_drf-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        packed = {name: archive.read(name) for name in names}
    for source, inside in BESIDE.items():
        assert packed[f"lowmem_drf/{inside}"] == (ROOT / source).read_bytes()
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lowmem_drf").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(package) > 50
    assert package <= set(names)
    assert {name.split("/")[0] for name in names} == {"lowmem_drf", f"lowmem_drf-{__version__}.dist-info"}
    assert "lowmem_drf/kernels/__init__.py" not in names
    assert not [name for name in names if "__pycache__" in name]
    assert (
        packed[f"lowmem_drf-{__version__}.dist-info/entry_points.txt"].decode().split("\n")[1]
        == "lowmem-drf = lowmem_drf.__main__:main"
    )


def test_an_installed_package_works_away_from_the_checkout(installed, tmp_path):
    where = run(
        installed,
        tmp_path,
        "-c",
        "import lowmem_drf, lowmem_drf.cli; print(list(lowmem_drf.__path__), lowmem_drf.cli.__file__, sep='\\n')",
    )
    assert where.splitlines() == [str([str(installed / "lowmem_drf")]), str(installed / "lowmem_drf" / "cli.py")]
    assert run(installed, tmp_path, "-m", "lowmem_drf.cli", "--version") == f"lowmem-drf {__version__}\n"
    script = "import sys; from lowmem_drf.cli import main; sys.exit(main())"  # the console script's own lines
    assert "\ntoy " in run(installed, tmp_path, "-c", script, "presets", "list")
    assert 'id = "toyworld"' in run(installed, tmp_path, "-c", script, "presets", "show", "toy")


def test_a_clone_runs_without_being_installed():
    for command in (["cli.py", "--help"], ["-m", "lowmem_drf.cli", "--help"], ["-m", "lowmem_drf", "--help"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "lowmem-drf train" in done.stdout


def test_every_file_the_metadata_names_is_there():
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        assert Path(ROOT, name).read_text(encoding="utf-8").strip()
