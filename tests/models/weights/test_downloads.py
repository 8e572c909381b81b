"""Checks before loading a model: files missing, cut or of another format, downloads, disk, host memory. No network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from _tiny import save_tiny_critic, save_tiny_generator
from huggingface_hub import DryRunFileInfo
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.models.weights import downloads
from lowmem_drf.models.weights.downloads import available_host_bytes, check_host_memory, hub_file, prepare
from lowmem_drf.models.weights.files import damage, find_problems, weight_count

COMMIT = "1" * 40
SAVED = {"generator": save_tiny_generator, "critic": save_tiny_critic}
WEIGHTS = {"generator": "transformer/diffusion_pytorch_model.safetensors", "critic": "model.safetensors"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return {role: save(tmp_path_factory.mktemp(role)) for role, save in SAVED.items()}


@pytest.fixture(params=["generator", "critic"])
def role(request) -> str:
    return request.param


@pytest.fixture
def folder(originals, role: str, tmp_path) -> Path:
    """A copy for tests to damage."""
    return Path(shutil.copytree(originals[role], tmp_path / "model"))


def quiet(text: str) -> None:
    raise AssertionError(f"nothing is to be said, and not {text!r}")


def shard(folder: Path, weights: str) -> Path:
    """Splits a weights file in two shards with an index, as the libraries write them. Returns the index."""
    file = folder / weights
    state = load_file(file)
    stem = file.name.removesuffix(".safetensors")
    halves = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = sorted(state)
    where = {name: halves[i % 2] for i, name in enumerate(names)}
    for half in halves:
        save_file(
            {name: state[name] for name in names if where[name] == half},
            file.with_name(half),
            metadata={"format": "pt"},
        )
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    file.unlink()
    return index


def test_a_complete_folder_is_as_it_is(folder: Path, role: str) -> None:
    assert prepare(str(folder), role, quiet) == folder
    assert prepare("toyworld", role, quiet).is_dir()


def test_shards_are_complete_and_still_load(folder: Path, role: str) -> None:
    before = weight_count((folder / WEIGHTS[role]).parent)
    index = shard(folder, WEIGHTS[role])
    assert prepare(str(folder), role, quiet) == folder
    assert weight_count(index.parent) == before
    if role == "generator":
        from lowmem_drf.models.wan.denoiser import load_denoiser

        assert sum(parameter.numel() for parameter in load_denoiser(str(folder)).parameters()) == before


def test_a_missing_shard_is_named(folder: Path, role: str) -> None:
    index = shard(folder, WEIGHTS[role])
    missing = next(index.parent.glob("*-00002-of-00002.safetensors"))
    missing.unlink()
    with pytest.raises(BadInputError, match=f"{missing.name} is missing"):
        prepare(str(folder), role, quiet)
    index.unlink()
    with pytest.raises(BadInputError, match=r"safetensors\.index\.json is missing"):
        prepare(str(folder), role, quiet)


@pytest.mark.parametrize("left", [0, 5, 8, 40, 0.5, -1], ids=str)
def test_a_cut_file_is_named(folder: Path, role: str, left: float) -> None:
    file = folder / WEIGHTS[role]
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(BadInputError, match=f"{WEIGHTS[role]} is cut off") as caught:
        prepare(str(folder), role, quiet)
    assert "Delete" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda good: good + b"more", "is too long"),
        (lambda good: b"\x80\x02}q\x00." * 100, "does not begin with the header"),
        (lambda good: b"\x10" + bytes(7) + b"x" * 16, "does not begin with the header"),
        (lambda good: b"\x02" + bytes(7) + b"[]", "does not begin with the header"),
        (lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    ],
    ids=["longer", "pickle", "no json", "a list", "lfs"],
)
def test_a_damaged_file_is_named(folder: Path, role: str, content, message: str) -> None:
    file = folder / WEIGHTS[role]
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(BadInputError, match=message) as caught:
        prepare(str(folder), role, quiet)
    assert WEIGHTS[role] in str(caught.value)


def test_every_intact_file_is_intact(originals) -> None:
    for folder in originals.values():
        files = [*folder.rglob("*.safetensors")]
        assert files and not any(damage(file) for file in files)


def test_an_empty_file_of_tensors_is_intact(tmp_path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    assert damage(tmp_path / "empty.safetensors") == ""


def test_pickles_are_refused(folder: Path, role: str) -> None:
    file = folder / WEIGHTS[role]
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    assert not find_problems(folder, role), "beside safetensors they do not matter"
    file.unlink()
    with pytest.raises(BadInputError, match=r"pytorch_model\.bin.*pickles can run code"):
        prepare(str(folder), role, quiet)


def test_all_that_is_missing_is_named(originals, tmp_path) -> None:
    folder = Path(shutil.copytree(originals["generator"], tmp_path / "model"))
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "tokenizer")
    (folder / "text_encoder" / "config.json").unlink()
    with pytest.raises(BadInputError) as caught:
        prepare(str(folder), "generator", quiet)
    for name in ("vae/config.json", "vae/*.safetensors", "tokenizer/", "text_encoder/config.json"):
        assert f"{name} " in str(caught.value)
    shutil.copytree(originals["generator"] / "vae", folder / "vae")
    shutil.copytree(originals["generator"] / "tokenizer", folder / "tokenizer")
    assert prepare(str(folder), "generator", quiet, without=("text_encoder",)) == folder


class Hub:
    """A hub with one repository, cached in the test's folder. ``fails``: raised after the first downloaded file."""

    def __init__(self, cache: Path, repository: str, source: Path) -> None:
        self.cache, self.repository, self.source = cache, repository, source
        self.fails: Exception | None = None
        self.online = True
        self.downloaded: list[str] = []

    @property
    def snapshot(self) -> Path:
        return self.cache / f"models--{self.repository.replace('/', '--')}" / "snapshots" / COMMIT

    def list_repo_files(self, repository: str) -> list[str]:
        if not self.online:
            raise OfflineModeIsEnabled("offline")
        if repository != self.repository:
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return [path.relative_to(self.source).as_posix() for path in sorted(self.source.rglob("*")) if path.is_file()]

    def _info(self, name: str) -> DryRunFileInfo:
        here = self.snapshot / name
        return DryRunFileInfo(
            COMMIT,
            (self.source / name).stat().st_size,
            name,
            str(here),
            is_cached=here.exists(),
            will_download=not here.exists(),
        )

    def _fetch(self, name: str) -> None:
        target = self.snapshot / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.source / name, target)
            refs = self.snapshot.parent.parent / "refs"
            refs.mkdir(exist_ok=True)
            (refs / "main").write_text(COMMIT)
            self.downloaded.append(name)

    def snapshot_download(
        self, repository: str, allow_patterns: list[str], dry_run: bool = False
    ) -> str | list[DryRunFileInfo]:
        if dry_run:
            return [self._info(name) for name in allow_patterns]
        for name in sorted(allow_patterns):
            self._fetch(name)
            if self.fails is not None:
                raise self.fails
        return str(self.snapshot)

    def hf_hub_download(self, repository: str, name: str, dry_run: bool = False) -> str | DryRunFileInfo:
        if dry_run:
            return self._info(name)
        self._fetch(name)
        return str(self.snapshot / name)


@pytest.fixture
def hub(folder: Path, role: str, tmp_path, monkeypatch) -> Hub:
    """Contains many files that loading does not need."""
    hub = Hub(tmp_path / "hub", "someone/model", folder)
    for name in (
        "README.md",
        "model.gguf",
        "assets/demo.mp4",
        "image_encoder/model.safetensors",
        "model.fp16.safetensors",
        "transformer/x.fp16.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"unused")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.cache))
    for name in ("list_repo_files", "snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


def test_only_what_is_used_is_downloaded_and_its_size_said_first(hub: Hub, role: str) -> None:
    said = []
    place = prepare(hub.repository, role, lambda text: said.append((text, list(hub.downloaded))))
    size = sum((hub.source / name).stat().st_size for name in hub.downloaded)
    assert place == hub.snapshot and not find_problems(place, role)
    (text, before), *others = said
    assert not others and not before
    assert text.startswith(f"{hub.repository}: {size / 1e6:.1f} MB to download, 0 of it is here; to ")
    assert not [name for name in hub.downloaded if (hub.source / name).read_bytes() == b"unused"]


def test_what_is_in_the_cache_needs_no_network(hub: Hub, role: str) -> None:
    place = prepare(hub.repository, role, lambda text: None)
    hub.online = False
    assert prepare(hub.repository, role, quiet) == place


def test_a_stopped_download_goes_on(hub: Hub, role: str) -> None:
    hub.fails = ConnectionError("connection reset by peer")
    with pytest.raises(LowmemError, match=r"connection reset by peer.*not downloaded twice"):
        prepare(hub.repository, role, lambda text: None)
    hub.fails, said = None, []
    (first,) = hub.downloaded
    prepare(hub.repository, role, said.append)
    assert "0.0 MB of it is here" in said[0] and hub.downloaded.count(first) == 1


def test_without_a_network_and_incomplete(hub: Hub, role: str) -> None:
    hub.online = False
    with pytest.raises(BadInputError, match="hf download someone/model"):
        prepare(hub.repository, role, quiet)


def test_a_cut_file_in_the_cache_is_named_and_not_downloaded_around(hub: Hub, role: str) -> None:
    file = prepare(hub.repository, role, lambda text: None) / WEIGHTS[role]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(BadInputError, match="is cut off"):
        prepare(hub.repository, role, quiet)
    file.unlink()
    assert prepare(hub.repository, role, lambda text: None) == hub.snapshot


def test_a_subfolder_that_is_not_needed_is_not_downloaded(hub: Hub, role: str) -> None:
    if role == "generator":
        prepare(hub.repository, role, lambda text: None, without=("transformer",))
        assert [name for name in hub.downloaded if name.startswith("transformer/")] == ["transformer/config.json"]


def test_a_full_disk(hub: Hub, role: str, monkeypatch) -> None:
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000_000))
    with pytest.raises(LowmemError, match=r"10\.0 MB are free.*HF_HOME"):
        prepare(hub.repository, role, lambda text: None)
    assert not hub.downloaded


def test_a_repository_of_pickles(hub: Hub, role: str) -> None:
    file = hub.source / WEIGHTS[role]
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(BadInputError, match=r"someone/model on the Hugging Face hub holds its weights as .*\.bin"):
        prepare(hub.repository, role, quiet)
    file.with_suffix(".bin").unlink()
    with pytest.raises(BadInputError, match="has no safetensors"):
        prepare(hub.repository, role, quiet)
    assert not hub.downloaded


@pytest.mark.parametrize(
    ("name", "message"), [("someone/else", "no such model"), ("/no/folder", "There is no folder /no/folder")]
)
def test_what_there_is_not(hub: Hub, role: str, name: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        prepare(name, role, quiet)


def test_one_file_of_a_repository(hub: Hub, role: str) -> None:
    said = []
    assert hub_file(hub.repository, "model.gguf", said.append).read_bytes() == b"unused" and len(said) == 1
    hub.online = False
    assert hub_file(hub.repository, "model.gguf", quiet).is_file()
    hub.online = True
    with pytest.raises(BadInputError, match=r"no file nothing\.safetensors.*README\.md"):
        hub_file(hub.repository, "nothing.safetensors", quiet)


def test_host_memory(folder: Path, role: str, monkeypatch) -> None:
    largest = max(weight_count(path) for path in (folder / name for name in downloads.SUBFOLDERS[role]))
    monkeypatch.setattr(downloads, "available_host_bytes", lambda: downloads.HOST_MARGIN + 4 * largest)
    check_host_memory(folder, role, 4)
    monkeypatch.setattr(downloads, "available_host_bytes", lambda: downloads.HOST_MARGIN + 4 * largest - 1)
    with pytest.raises(LowmemError, match=r"2\.1 GB are free.*dtype=bf16"):
        check_host_memory(folder, role, 4)
    check_host_memory(folder, role, 2)
    with pytest.raises(LowmemError, match=r"Loading the transformer.*2\.1 GB are free"):
        check_host_memory(folder, role, 2, ("transformer",), single=2 * largest)
    monkeypatch.setattr(downloads, "available_host_bytes", lambda: None)
    check_host_memory(folder, role, 4)


def test_free_host_memory_is_what_the_system_says() -> None:
    free = available_host_bytes()
    total = (
        next(
            int(line.split()[1])
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemTotal")
        )
        * 1024
    )
    assert free is not None and 0 < free <= 4 * total
