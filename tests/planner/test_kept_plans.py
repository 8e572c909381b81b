"""Finished plans on the disk: read again for the same question, never for another one."""

import io
import json

import pytest
from rich.console import Console

from lowmem_drf.assembly import cache
from lowmem_drf.config import load_config
from lowmem_drf.planner import cards, report
from lowmem_drf.planner.cards import SHARES, Room, card_named, learn, learned, room_of
from lowmem_drf.planner.stages import Outcome, Plan, StagePlan

CARD = card_named("")
ROOM = room_of(24.0)
STAGE = StagePlan(1 / 3, 0.1, 0.2, 1e-9, 2 / 7, 0.0, 0.1, 3.5, 0.7, "2 x mm 3x4 bfloat16")


@pytest.fixture
def planner(tmp_path, monkeypatch):
    """Counts the plans that are made. They take no time here."""
    made = []

    def plan(config, card, room, console, advice, host_gib):
        made.append(config)
        outcome = Outcome(1 / 3, 0.1, 2 / 7)
        return Plan(
            card.name, room.vram_gib, {"text": STAGE}, len(made) / 3, changes=("micro_batch=1",), changed=outcome
        )

    monkeypatch.setenv("LOWMEM_DRF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(report, "_planned", plan)
    return made


def ask(*overrides, card=CARD, room=ROOM, **options):
    return report.planned(load_config("toy", overrides), card, room, Console(file=io.StringIO()), **options)


def test_a_plan_is_made_once_and_the_same_when_read(planner):
    first = ask()
    assert first == ask() and len(planner) == 1


def test_anything_else_is_planned_anew(planner, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("A red ball.\n")
    ask(f"prompts={prompts}")
    others = [
        lambda: ask(),
        lambda: ask("lora.rank=3"),
        lambda: ask("seed=5"),
        lambda: ask(room=room_of(12.0)),
        lambda: ask(room=Room(24.0, 20.0)),
        lambda: ask(host_gib=20),
        lambda: ask(card=card_named("RTX 3060")),
        lambda: ask(advice=False),
        lambda: (prompts.write_text("A red ball that rolls far away.\n"), ask(f"prompts={prompts}")),
        lambda: (monkeypatch.setattr(cache, "LIBRARIES", ("torch",)), cache.code_versions.cache_clear(), ask()),
    ]
    for number, other in enumerate(others, start=2):
        other()
        assert len(planner) == number
    cache.code_versions.cache_clear()


def test_another_source_file_or_model_folder_is_another_plan(planner, tiny_folders, monkeypatch):
    generator, critic = tiny_folders
    ask(f"critic.id={critic}")
    settings = critic / "config.json"
    before = settings.read_text()
    settings.write_text(before + "\n")
    ask(f"critic.id={critic}")
    settings.write_text(before)
    ask(f"critic.id={critic}")
    assert len(planner) == 2
    source = cache.code_versions()
    monkeypatch.setattr(report, "code_versions", lambda: source | {"source": "other"})
    ask(f"critic.id={critic}")
    assert len(planner) == 3


def test_the_source_is_read_from_its_files(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("a")
    first = cache.files_hash([file])
    file.write_text("b")
    assert cache.files_hash([file]) != first != cache.files_hash([])
    assert cache.code_versions()["torch"]


@pytest.mark.parametrize("value", ["{", "[]", '{"key": {}, "value": 1}', None], ids=["damaged", "list", "key", "value"])
def test_a_damaged_or_foreign_file_is_replaced(planner, tmp_path, value):
    ask()
    (file,) = (tmp_path / "cache" / "plans").iterdir()
    row = json.loads(file.read_text())
    file.write_text(value or json.dumps(row | {"value": {"stages": {"text": {"peak": 1}}}}))
    again = ask()
    assert len(planner) == 2 and again == ask() and len(planner) == 2


def test_the_folder_stays_small(planner, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_PLANS", 3)
    for seed in range(5):
        ask(f"seed={seed}")
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 3
    ask("seed=4")
    assert len(planner) == 5


def test_plans_use_what_bench_measured_on_such_a_card(planner, monkeypatch):
    ask()
    learn(CARD, {"matmul": 0.5, "conv3d": 99.0, "of another version": 1.0})
    card = learned(CARD)
    assert (card.share("matmul"), card.share("conv3d")) == (0.5, SHARES["conv3d"].of) and card.measured.keys() == {
        "matmul"
    }
    assert ask() == ask() and len(planner) == 2  # planned anew, and kept
    assert learned(card_named("RTX 3060")).measured == {}
    monkeypatch.setattr(cards, "version_of", lambda name: "another")
    assert learned(CARD).measured == {}
