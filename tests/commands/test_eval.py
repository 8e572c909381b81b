"""``lowmem-drf eval`` on a run of tiny models: its JSON, a second critic, and clips for VBench."""

import json
import shutil
import sys

import pytest
from typer.testing import CliRunner

import cli
from bench.eval_schema import FILE, schema_text
from lowmem_drf.commands import eval as commands
from lowmem_drf.prompts import as_prompts
from lowmem_drf.reporting.notes import read_notes
from lowmem_drf.scoring.measures import MEASURES
from lowmem_drf.scoring.result import Result
from lowmem_drf.shared.tuned import choose
from lowmem_drf.terminal import make_console
from lowmem_drf.video import read_video

PROMPTS = ("a red circle moves left on a gray background", "a blue square moves up on a black background")


@pytest.fixture
def evaluate(tmp_path, monkeypatch, tiny_run):
    """Runs ``eval``, on the tiny run unless it shows scores. Returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_flags", set())
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n")

    def run(*words):
        run = [] if "--vbench-scores" in words else [str(tiny_run)]
        result = CliRunner().invoke(cli.app, ["eval", *run, *words])
        return result.exit_code, result.stdout, result.stderr

    return run


def test_the_json_is_the_contract_with_a_second_critic_and_an_export(evaluate, tmp_path, tiny_folders):
    """The second critic is a copy of the first: it has to say the same."""
    shutil.copytree(tiny_folders[1], tmp_path / "again")
    code, plain, err = evaluate("--prompts", "p.txt", "--json")
    assert code == 0, err
    code, out, err = evaluate("--prompts", "p.txt", "--json", "--critic", "again", "--export", "vbench", "vb")
    assert code == 0, err
    result = json.loads(out)
    Result.model_validate(result, strict=True)
    assert (result["prompts"], result["seeds"]) == (2, 2)
    assert result["second"] == {"critic": "again", "questions": "held out"}
    for side in ("base", "tuned"):
        keys = {"reward", "reward_by_aspect", "heldout_reward", "diversity", "velocity_norm", *MEASURES}
        assert set(result[side]) == keys | {"second_reward"}
        assert set(result[side]["reward_by_aspect"]) == {"TA", "Phy", "VQ"}
        assert min(result[side]["diversity"], result[side]["motion"], result[side]["si"]) > 0
        assert result[side]["second_reward"] == pytest.approx(result[side]["heldout_reward"], rel=1e-5)
    assert result["base"] != result["tuned"]
    change = result["change"]["reward"]
    assert change["mean"] == pytest.approx(result["tuned"]["reward"] - result["base"]["reward"])
    assert change["low"] is change["high"] is None  # two prompts say little of others
    assert set(result["wins"]) == {"heldout_reward", "second_reward"}
    assert [row["prompt"] for row in result["by_prompt"]] == list(PROMPTS)
    for side in ("base", "tuned"):
        del result[side]["second_reward"]
        assert json.loads(plain)[side] == result[side]

    # VBench reads clips by their names, and its scores come back
    names = [f"{prompt}-{index}.mp4" for prompt in PROMPTS for index in (0, 1)]
    assert json.loads((tmp_path / "vb" / "prompts.json").read_text()) == {n: n[:-6] for n in names}
    assert f"--videos_path {'vb/tuned'}" in err.replace("\\", "/")
    for side, step in (("base", 0), ("tuned", 0.125)):
        assert sorted(path.name for path in (tmp_path / "vb" / side).iterdir()) == sorted(names)
        assert read_video(tmp_path / "vb" / side / names[0])[0].shape == (9, 3, 16, 16)
        (scores := tmp_path / "vb" / f"{side}-scores").mkdir()
        rows = [{"video_path": f"/far/{name}", "video_results": 50 + 100 * step} for name in names]
        moves = [{"video_path": f"/far/{name}", "video_results": step > 0} for name in names]
        found = {"imaging_quality": [0.5 + step, rows], "dynamic_degree": [float(step > 0), moves]}
        (scores / "results_1_eval_results.json").write_text(json.dumps(found))
    code, out, err = evaluate("--vbench-scores", "vb", "--json")
    assert code == 0, err
    scored = Result.model_validate_json(out)
    assert scored.tuned.vbench == {"imaging_quality": 0.625, "dynamic_degree": 1.0}
    assert scored.change["vbench.imaging_quality"].model_dump() == dict(mean=0.125, low=None, high=None, prompts=2)
    code, out, _ = evaluate("--vbench-scores", "vb")
    assert code == 0 and all(word in out for word in ("vbench: dynamic degree", "prompts won, second critic", "blur"))
    assert max(map(len, out.splitlines())) <= 80


def test_without_held_out_questions_the_second_critic_is_asked_those_of_training(
    evaluate, tmp_path, tiny_folders, monkeypatch
):
    monkeypatch.setattr("lowmem_drf.shared.tuned.best_step", lambda run: 3)
    shutil.copytree(tiny_folders[1], tmp_path / "again")
    questions = [
        {"aspect": "TA", "text": "is the shape red ?", "answer": "yes"},
        {"aspect": "TA", "kind": "dense", "text": "what is it ?", "answer": "a red circle"},
    ]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a dog runs", "questions": questions}) + "\n")
    code, out, err = evaluate(
        "--prompts", "p.jsonl", "--json", "--critic", "again", "--seeds", "6", "--best"
    )  # more than a batch
    assert code == 0, err
    assert "step 3: 1 prompts x 6 seeds" in err
    result = json.loads(out)
    assert result["second"]["questions"] == "of training" and result["base"]["heldout_reward"] is None
    assert result["base"]["second_reward"] == pytest.approx(result["base"]["reward"], rel=1e-5)
    assert set(result["wins"]) == {"reward", "second_reward"}


def test_a_run_keeps_its_own_comparison_for_the_report(tiny_run, tmp_path, monkeypatch, capsys):
    """As after a Ctrl-C in that at training's end. Its checkpoint is known by the file: a newer run lies in runs/."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    newer = shutil.copytree(tiny_run, tmp_path / "runs" / "newer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowmem_drf.scoring.evaluate.EVAL_PROMPTS", 2)
    checkpoint = run / "checkpoints" / "step-000004"
    prompts = as_prompts(PROMPTS)

    def compared(*words, given=None):
        return commands.compared(*words, (), False, given, "", 1, None, None, make_console())[0]

    assert not (run / "eval.json").exists()
    result = compared(run, None, None)
    kept = read_notes(run / "eval.json")
    assert kept["step"] == 4 and kept["result"] == json.loads(json.dumps(result)) and "x 1 seed" in kept["source"]
    before = (run / "eval.json").read_bytes()
    for lora in (checkpoint, checkpoint / "lora.safetensors"):
        assert choose(None, None, lora).run == run and choose(newer, None, lora).run == newer
    other = shutil.copy(checkpoint / "lora.safetensors", tmp_path / "other.safetensors")
    assert choose(None, None, other).run == newer.relative_to(tmp_path)
    compared(run, None, None, given=prompts)
    compared(run, None, checkpoint)
    (newer / "eval.json").mkdir()  # what cannot be written costs no figure
    assert compared(newer, None, None) == result and "cannot be written to" in capsys.readouterr().err
    (newer / "eval.json").rmdir()
    assert (run / "eval.json").read_bytes() == before and not (newer / "eval.json").exists()


def test_bad_requests_are_refused_before_anything_is_loaded(evaluate, tmp_path, tiny_folders, monkeypatch):
    monkeypatch.delitem(sys.modules, "lowmem_drf.commands.eval", raising=False)
    monkeypatch.setattr("lowmem_drf.shared.tuned.load_models", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "dogs.txt").write_text("a dog runs\n")
    (tmp_path / "full" / "base").mkdir(parents=True)
    monkeypatch.setattr("lowmem_drf.scoring.second.available_host_bytes", lambda: 10_000)
    for words, said in (
        (("--critic", str(tiny_folders[1])), "trained on"),
        (("--critic", "toyworld-reader", "--prompts", "p.txt"), "--seeds 1"),
        (("--export", "vbench", "full"), "not empty"),
        (("--export", "csv", "new"), "--export vbench DIR"),
        (("--best",), "watch"),
        (("--vbench-scores", "full"), "eval.json"),
        (("--vbench-scores", "full", "--critic", "toyworld"), "alone"),
    ):
        code, _, err = evaluate(*words)
        assert code == 2 and said in err, err


def test_the_schema_in_the_docs_is_that_of_the_json():
    assert FILE.read_text(encoding="utf-8") == schema_text(), "python -m bench.eval_schema"
