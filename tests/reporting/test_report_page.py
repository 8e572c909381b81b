"""``lowmem-drf report``: one page that needs no network and no model, whatever the run's folder holds or lacks."""

import json
import re
import shutil
from html import unescape

import pytest
from _runs import ALARM, BEST, PROMPTS, add_clips, big_run, write_clip, write_json

from lowmem_drf.commands.report import report_command
from lowmem_drf.errors import BadInputError
from lowmem_drf.reporting import clips
from lowmem_drf.reporting.read import read_record

SECTIONS = ("verdict", "clips", "reward", "watch", "saliency", "questions", "cost", "settings")


def page(run, **options):
    report_command(run, options.get("output"), options.get("saliency", False), options.get("force", False))
    return (options.get("output") or run / "report.html").read_text("utf-8")


def words(html):
    """The text that a reader sees."""
    html = re.sub(r"<(style|script|svg)\b.*?</\1>", "", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


@pytest.fixture
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_a_run_becomes_one_page_without_network(run, capsys):
    before = {path.name for path in run.iterdir()}
    html = page(run)
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert {path.name for path in run.iterdir()} - before == {"report.html"}
    assert len(html) < 15e6
    assert [name for name in SECTIONS if f'id="{name}"' not in html] == []
    wanted = re.findall(r"(?:src|href)=\"([^\"]*)\"|url\(([^)]*)\)", html)
    assert wanted and not [link for pair in wanted for link in pair if link and not link.startswith(("data:", "#"))]
    names_of_formats = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in html and set(re.findall(r"https?://[\w./]*", html)) <= names_of_formats
    assert html.count("<video") == 2 and "update 4" in words(html) and "has no watch" in words(html)
    assert "torch" in words(html) and "tiny.toml" in html and "/tiny.toml" not in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_an_edited_page_is_not_replaced(tmp_path):
    run = tmp_path
    shutil.copy(big_run(tmp_path / "run", clips=False) / "config.toml", run)
    first = page(run)
    assert page(run) == first
    (run / "report.html").write_text(first.replace("Clips", "My clips"), encoding="utf-8")
    with pytest.raises(BadInputError, match="edited or made in another way.*--force"):
        page(run)
    assert page(run, force=True) == first
    for name, why in (("page.txt", "ends in .html"), ("config.toml", "ends in .html")):
        with pytest.raises(BadInputError, match=why):
            page(run, output=run / name)


def test_a_comparison_of_an_earlier_update_is_called_so(tmp_path):
    run = big_run(tmp_path / "big", clips=False)
    assert "Base against tuned: 8 prompts" in words(page(run))
    result = json.loads((run / "eval.json").read_text(encoding="utf-8")) | {"step": 20}
    (run / "eval.json").write_text(json.dumps(result), encoding="utf-8")
    assert "Base against tuned, update 20, of " in words(page(run, force=True))


def test_a_reward_that_fell_is_no_good_news_beside_the_alarm(tmp_path):
    run = big_run(tmp_path / "big", clips=False)
    (run / "eval.json").unlink()
    *rows, last = (run / "watch.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(last)
    last["measures"]["heldout_reward"] = -2.0
    (run / "watch.jsonl").write_text("\n".join([*rows, json.dumps(last)]) + "\n", encoding="utf-8")
    said = "The reward on held-out questions fell: −0.620 to −2.000, and the alarm spoke at update 160"
    assert said in words(page(run))


def test_the_verdict_and_the_alarm_come_first(tmp_path):
    html = page(big_run(tmp_path / "anna" / "big", clips=False))
    head, rest = words(html).split("Time and memory", 1)[1].split("Clips", 1)
    assert "The reward on held-out questions rose: −0.620 to −0.240, but the alarm spoke at update 160" in head
    assert f"diversity and velocity norm left their bands. The best checkpoint is that of update {BEST}." in head
    assert "2 updates were skipped, the first is 61: the gradient in vae_backward." in head
    assert "prompts won, held-out 93.8% (72.0% … 99.0%)" in head and "diversity 0.128 from 0.161 · 80%" in head
    assert "91.9 s 88.0 s planned" in head and "13.8 GiB 13.7 GiB planned" in head
    assert f"the alarm, update {ALARM}" in rest and rest.count("outside of the base's spread") == 2
    assert f"Is the sea calm? {PROMPTS[0]} the answer yes does not follow from the prompt" in rest
    assert "1 left out by the check, 1 weigh less" in rest
    assert "breaks &lt;slowly&gt;" in html and "<slowly>" not in html
    assert "prompts.txt" in rest and "anna" not in html
    assert html.count("<svg") == 2 + 3 + 12 + 7
    assert set(re.findall(r"#0000[0-9a-f]{2}\b", html)) == set()


def test_an_alarm_for_answers_worse_than_the_base_s_says_so(tmp_path):
    run = big_run(tmp_path / "run", clips=False)
    rows = [json.loads(line) for line in (run / "watch.jsonl").read_text("utf-8").splitlines()]
    rows = [row | {"worse": True} if row["step"] == ALARM else row for row in rows]
    (run / "watch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = f"From update {ALARM} on held-out answers were worse than the base's, and diversity and velocity norm left"
    assert said in words(page(run))


@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_missing_or_damaged_is_said(damaged, tmp_path):
    run = big_run(tmp_path / "run", clips=False)
    for path in [*run.glob("*.json"), *run.glob("*.jsonl"), run / "checkpoints" / "best"]:
        path.write_bytes(b'\xff{"step": [') if damaged else path.unlink()
    text = words(page(run))
    assert "There is nothing to judge yet" in text and "The run is not complete: 0 of 200 updates." in text
    assert "no sample clips" in text and "has no watch" in text and "No update is finished yet" in text
    assert "has no questions" in text and ("The questions cannot be read" in text) is damaged


def test_the_rewards_of_training_are_the_last_evidence(tmp_path):
    run = big_run(tmp_path / "run", clips=False)
    for name in ("eval.json", "watch.jsonl", "questions.json"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()[:30]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 31, "reward": NaN}', '{"st']), encoding="utf-8")
    head = words(page(run)).split("Clips", 2)[1]
    assert "Training reward rose: −0.5" in head and "30 of 200 updates" in head


def test_clips_that_cannot_be_shown_are_said(tmp_path):
    """Tiny clips are enlarged; the base that was not sampled, a damaged file and want of room are said."""
    run = big_run(tmp_path / "run", clips=False)
    (run / "metrics.jsonl").unlink()
    add_clips(run, {50: 0.3, 200: 1.0}, (32, 32, 4))
    first, second, *_ = sorted((run / "samples" / "step-000200").glob("*.mp4"))
    second.write_bytes(second.read_bytes()[:100])
    text = words(page(run))
    assert "Update 0 was not sampled" in text and text.count("this file cannot be read") == 1
    assert PROMPTS[0] in text and "update 50" not in text
    write_clip(first.with_name("01-a-corgi-0a1b2c3d-seed0-compare.mp4"), 68, 32, 2)
    html = page(run)
    assert "base and tuned" in words(html) and 'width="192"' in html
    rows = clips.embedded(clips.previews(read_record(run)).rows, clips.Room(5, nbytes=100))
    why = {clip.lost for row in rows for clip in row.clips}
    assert why == {"left out: the page would be too large", "this file cannot be read"}
    for path in [*(run / "samples").glob("*/01-*.mp4"), *(run / "samples").glob("*/0[2-9]-*.mp4")]:
        if "compare" not in path.name:
            path.unlink()
    text = words(page(run))  # a run without sample clips of its own
    assert "base and tuned" in text and "no sample clips yet" not in text and "not sampled" not in text


@pytest.mark.slow
def test_saliency_is_made_once_and_stays(run):
    html = page(run, saliency=True)
    assert html.count("<video") == 3 and "reward gradient" not in html
    assert [path.suffix for path in sorted((run / "saliency" / "step-000004").iterdir())] == [".json", ".mp4"]
    assert page(run) == html
    shutil.rmtree(run / "samples")
    with pytest.raises(BadInputError, match="no sample clips"):
        page(run, saliency=True)


def test_the_watch_may_mark_its_best_by_a_link(tmp_path):
    run = big_run(tmp_path / "run", clips=False)
    (run / "checkpoints" / "best").unlink()
    (run / "checkpoints" / "step-000075").mkdir()
    (run / "checkpoints" / "best").symlink_to("step-000075", target_is_directory=True)
    assert read_record(run).best == 75
    write_json(run / "run.json", [])
    assert read_record(run).plan == {}
