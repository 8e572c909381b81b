"""``log.trackers``, with a module in place of wandb and trackio: what they get, what happens when they fail."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from lowmem_drf.api import Run, train
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.training.metrics import read_metrics


class StandIn(ModuleType):
    """Notes what it is called with. Takes calls of both packages: of a run, or of the module."""

    def __init__(self, name, fails=()):
        super().__init__(name)
        self.begun, self.points, self.videos, self.finished, self._fails = [], [], [], 0, fails

    def init(self, **asked):
        if "init" in self._fails:
            raise ValueError("no API key")
        self.begun.append(asked)
        return SimpleNamespace(log=self.log, finish=self.finish, url="https://here", offline=False)

    def log(self, values, step):
        if step in self._fails:
            raise OSError("no network")
        self.points.append((step, values))

    def finish(self):
        self.finished += 1

    def Settings(self, **settings):
        return settings

    def Video(self, path, **_):
        self.videos.append(path)
        return f"a video of {path}"


@pytest.fixture
def stand_in(monkeypatch):
    def put(name, *fails):
        module = StandIn(name, fails)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


SETTINGS = {"log": {"sample_every": 1}, "batch": 1, "micro_batch": 1}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_metrics_and_clips_also_of_a_resumed_run(name, stand_in, tiny_preset, tmp_path):
    module = stand_in(name)
    settings = {**SETTINGS, "log.trackers": [name], "log.project": "mine"}
    run = train(tiny_preset, output=tmp_path / "run", steps=1, settings=settings)
    train(output=run, resume=True, steps=2)
    first, again = module.begun
    assert first["project"] == "mine" and first["config"]["lora"]["rank"] == 2 and first["resume"] == "allow"
    known = "id" if name == "wandb" else "name"
    assert first[known] == again[known] and json.loads((run.folder / "tracker.json").read_text())["id"] in first[known]
    points = {step: values for step, values in module.points if "reward" in values}
    rows = {row["step"]: row for row in read_metrics(run.folder)}
    assert set(points) == set(rows) == {1, 2}
    for step, row in rows.items():
        assert points[step]["reward"] == row["reward"] and points[step]["stage_s/decode"] == row["stage_s"]["decode"]
    shown = [str(path) for path in sorted(run.folder.glob("samples/*/*.mp4"))]
    assert module.videos == shown and len(shown) == 3
    assert [step for step, values in module.points if "reward" not in values] == [0, 1, 2]
    assert module.finished == 2


def test_a_run_goes_on_without_a_tracker_that_fails(stand_in, tiny_preset, tmp_path, capsys):
    module, other = stand_in("wandb", 1), stand_in("trackio")
    settings = {**SETTINGS, "log.sample_every": 0, "log.trackers": ["wandb", "trackio"]}
    run = train(tiny_preset, output=tmp_path / "run", steps=2, settings=settings, console=Console(width=200))
    assert [step for step, _ in other.points] == [1, 2] and module.points == []
    assert capsys.readouterr().out.count("wandb failed and gets no more of this run (OSError: no network)") == 1
    assert run.step == 2


def test_a_tracker_that_cannot_begin_says_why(stand_in, tiny_preset, tmp_path):
    stand_in("wandb", "init")
    with pytest.raises(LowmemError, match="no API key.*WANDB_MODE=offline"):
        train(tiny_preset, output=tmp_path / "run", settings={**SETTINGS, "log.trackers": ["wandb"]})
    assert Run(tmp_path / "run").step == 0


def test_a_missing_package_is_said_before_anything_is_loaded(tiny_preset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # what a folder of that name is
    monkeypatch.setattr("lowmem_drf.assembly.loading.import_libraries", lambda config: pytest.fail("imported"))
    for name in ("wandb", "trackio"):
        with pytest.raises(BadInputError, match=f"{name} is not installed") as caught:
            train(tiny_preset, output=tmp_path / "run", settings={"log.trackers": [name]})
        assert "pip " in str(caught.value) and "log.trackers='[]'" in str(caught.value)
    assert not (tmp_path / "run").exists()
