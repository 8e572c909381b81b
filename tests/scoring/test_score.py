"""``score`` on ToyWorld's clips: right answers from an MP4 file, saliency on the object, a JSON and a table that say
the same."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from _root import ROOT
from PIL import ImageFont

from lowmem_drf.assembly.loading import load_run_critic
from lowmem_drf.commands.score import score_command
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError, NonFiniteError
from lowmem_drf.method.preprocess import resized
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.questions.make import make_questions
from lowmem_drf.scoring.heatmap import PERCENTILE, _wrap, colormap, draw, glow
from lowmem_drf.scoring.saliency import Saliency, saliency
from lowmem_drf.scoring.score import ClipScore, QuestionScore, score_clip
from lowmem_drf.toy.captions import caption
from lowmem_drf.toy.scenes import BACKGROUNDS, FPS, Combo, combos_of, coverage, draw_tracks, render
from lowmem_drf.types import Answer, Question
from lowmem_drf.video import read_video, watchable_upscale, write_mp4

sys.path.insert(0, str(ROOT))

from bench.critic.saliency import main as bench_saliency
from bench.critic.saliency import ratios

SEED = 0


@pytest.fixture(scope="module")
def critic():
    return load_run_critic(load_config("toy"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Held-out combinations as ``lowmem-drf sample`` writes them (H.264, each pixel 8 x 8): (combination, file,
    object's share of each pixel)."""
    folder = tmp_path_factory.mktemp("clips")
    combos = combos_of("heldout", "unseen")[::6]
    tracks = draw_tracks(combos, torch.Generator().manual_seed(SEED))
    masks_BTHW = coverage(tracks.x, tracks.y, tracks.radius, tracks.shape)
    paths = [
        write_mp4(folder / f"{i}.mp4", frames, FPS, watchable_upscale(32, 32))
        for i, frames in enumerate(render(tracks))
    ]
    return list(zip(combos, paths, masks_BTHW, strict=True))


def seen_by(critic, path):
    return resized(read_video(path)[0][None], critic.geometry)[0]


def test_answers_about_a_file_are_right(critic, clips):
    """Every yes/no question of every clip, and a wrong caption is noticed."""
    assert {combo.background for combo, _, _ in clips} == {0, 1, 2}
    for combo, path, _ in clips:
        frames = seen_by(critic, path)
        assert frames.shape[-2:] == (32, 32)
        questions = make_questions(caption(combo), "yesno", "toyworld")
        score = score_clip(critic, frames, questions, critic(frames[None], [questions])[0], RewardSpec())
        assert [v.question.text for v in score.verdicts if v.disagrees] == []
        other = Combo(combo.shape, (combo.color + 1) % 6, combo.motion, combo.background)
        questions = [q for q in make_questions(caption(other), "yesno", "toyworld") if q.name == "color"]
        assert all(
            v.disagrees
            for v in score_clip(critic, frames, questions, critic(frames[None], [questions])[0], RewardSpec()).verdicts
        )


def test_saliency_lies_on_the_object(critic, clips):
    """Mean |d reward / d pixel| on the object at least 5 times the background's (``bench.critic.saliency``): of the
    joint reward, which the saliency video shows, in every clip; of each alignment question about the object, on every
    background."""
    by_question: dict[tuple[str, str], list[float]] = {}
    for combo, path, mask_THW in clips:
        found = ratios(critic, seen_by(critic, path), mask_THW, combo)
        assert found.pop("all") > 5, caption(combo)
        for name, ratio in found.items():
            by_question.setdefault((BACKGROUNDS[combo.background], name), []).append(ratio)
    assert set(by_question) == {
        (background, name) for background in BACKGROUNDS for name in ("color", "shape", "direction")
    }
    means = {key: sum(values) / len(values) for key, values in by_question.items()}
    assert min(means.values()) > 5, means


def test_the_bench_prints_every_background(tmp_path, capsys, monkeypatch):
    some = combos_of("heldout", "unseen")[::6]
    monkeypatch.setattr("bench.critic.saliency.combos_of", lambda *names: some)
    assert bench_saliency(["--json", str(tmp_path / "made" / "out.json")]) == 0
    rows = json.loads((tmp_path / "made" / "out.json").read_text())["rows"]
    assert set(rows) == set(BACKGROUNDS) and sum(row["clips"] for row in rows.values()) == len(some)
    out = capsys.readouterr().out
    assert all(f"{row['least']:.2f}" in out and f"{row['median']:.2f}" in out for row in rows.values())


class Linear:
    """A critic with a yes logit that is linear in the frames, so that its gradient is known."""

    def __init__(self, weights_QTCHW):
        self.weights = weights_QTCHW

    def __call__(self, frames_BTCHW, questions):
        logits = [torch.stack([(w * frames_BTCHW[0]).sum(), frames_BTCHW.new_zeros(())])[None] for w in self.weights]
        return [[Answer(row, torch.tensor([0]), yes=(0,), no=(1,)) for row in logits]]


def test_saliency_is_the_gradient():
    weights = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64)
    questions = [Question("TA", "a", "yes", weight=3.0), Question("TA", "b", "no", weight=1.0)]
    found = saliency(Linear(weights), torch.rand(3, 3, 4, 5, dtype=torch.float64), questions, RewardSpec("yes_margin"))
    assert torch.equal(found.by_question_QTHW, weights.float().abs().sum(2))
    expected = ((3 * weights[0] - weights[1]) / 4).abs().sum(1)
    assert ((found.total_THW - expected).abs() / expected).max() <= 4 * torch.finfo(torch.float32).eps
    assert not found.answers[0].logits_AV.requires_grad


def test_saliency_refuses_a_gradient_that_is_not_finite():
    with pytest.raises(NonFiniteError, match="dtype=fp32"):
        saliency(
            Linear(torch.full((1, 1, 3, 2, 2), math.inf)),
            torch.zeros(1, 3, 2, 2),
            [Question("TA", "a", "yes")],
            RewardSpec(),
        )


def test_probabilities_and_words():
    """p_answer of a yes/no question is over all tokens and casings, p_said over yes and no alone; of a dense one the
    mean over tokens."""

    class Speaker:
        def generate(self, text, frames, max_new_tokens):
            return f"{text} {len(frames)}"

    yesno = Answer(torch.tensor([[0.1, 0.2, 0.15, 0.55]]).log(), torch.tensor([0]), yes=(0, 1), no=(2,))
    dense = Answer(torch.tensor([[0.5, 0.5], [0.125, 0.875]]).log(), torch.tensor([0, 0]))
    questions = [
        Question("TA", "wanted?", "no"),
        Question("VQ", "explain", "words", kind="dense"),
        Question("TA", "it?", "Yes"),
    ]
    no, spoken, yes = score_clip(
        Speaker(), torch.zeros(7, 3, 2, 2), questions, [yesno, dense, yesno], RewardSpec()
    ).verdicts
    assert (no.said, spoken.said, yes.said) == ("yes", "explain 7", "yes")
    assert (no.disagrees, spoken.disagrees, yes.disagrees) == (True, False, False)
    assert [v.p_answer for v in (no, spoken, yes)] == pytest.approx([0.15, 0.25, 0.3])
    assert no.p_said == yes.p_said == pytest.approx(2 / 3)
    assert spoken.p_said is None
    assert no.reward == pytest.approx(math.log(0.15))


def test_a_reward_that_is_not_finite_is_refused():
    answer = Answer(torch.full((1, 2), math.nan), torch.tensor([0]), yes=(0,), no=(1,))
    with pytest.raises(NonFiniteError, match="reward"):
        score_clip(None, torch.zeros(1, 3, 2, 2), [Question("TA", "a", "yes")], [answer], RewardSpec())


def run_score(video, prompt, *overrides, **options):
    names = ("saliency", "as_json", "preset", "critic", "quant", "frames", "mode")
    values = {**dict.fromkeys(names), "as_json": False, "preset": "toy", **options}
    score_command(video, prompt, *(values[name] for name in names), overrides)


def test_json_has_the_contracts_keys_and_the_rewards_of_the_table(clips, capsys, tmp_path):
    combo, path, _ = clips[0]
    run_score(path, caption(combo), as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert {"reward", "questions"} <= printed.keys()
    assert all({"aspect", "kind", "text", "answer", "p_answer", "reward"} <= row.keys() for row in printed["questions"])
    assert {row["kind"] for row in printed["questions"]} == {"yesno", "dense"}
    assert {row["aspect"] for row in printed["questions"]} == {"TA", "Phy", "VQ"}
    assert all(0 <= row["p_answer"] <= 1 for row in printed["questions"])
    target = tmp_path / "new" / "saliency.mp4"
    run_score(path, caption(combo), mode="both", saliency=target)
    table = capsys.readouterr().out
    assert f"{printed['reward']:.3f}" in table
    assert "seen as 32x32" in table
    assert str(target) in table
    frames, fps = read_video(target)
    assert len(frames) == 9
    assert frames.shape[-1] == 1600
    assert 9 / fps == pytest.approx(4)


def test_score_with_a_critic_in_a_folder_on_another_video(clips, tiny_folders, capsys):
    """Free English; frames by number and by rate; the rate of the frames reaches the critic."""
    path = clips[0][1]
    for frames, shown in (("4", "4 frames of 256x256"), ("fps:8", "8 frames of 256x256")):
        options = {"critic": str(tiny_folders[1]), "frames": frames, "mode": "yesno"}
        run_score(path, "two brown dogs chase a red ball", "critic.questions=phrases", **options)
        said = capsys.readouterr().out
        assert shown in said and "questions checked from the prompts' text alone" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt="  "), "prompt is empty"),
        (dict(prompt="two brown dogs"), "ToyWorld's grammar"),
        (dict(prompt="two brown dogs", preset=None), "Name a real one: --critic"),
        (dict(frames="many"), "--frames many"),
        (dict(frames="0"), "--frames 0"),
        (dict(frames="fps:-2"), "--frames fps:-2"),
        (dict(mode="loud"), "critic.mode"),
        (dict(saliency=Path("out.gif")), "ends in .mp4"),
        (dict(saliency="the video itself"), "another --saliency, or replace it with --force"),
        (dict(critic="/no/such/critic"), "critic"),
        (dict(video=Path("no.mp4")), "there is no video"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused(clips, options, message):
    combo, path, _ = clips[0]
    if options.get("saliency") == "the video itself":
        options = {"saliency": path}
    with pytest.raises(BadInputError, match=message):
        run_score(**{"video": path, "prompt": caption(combo), **options})


def test_the_colormap_is_ordered():
    """Lightness rises all the way, in steps of which none is more than three times the mean."""
    colors = colormap(torch.linspace(0, 1, 101)[None, None])[0, :, 0]
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    lightness = 116 * (torch.tensor([0.2126, 0.7152, 0.0722]) @ linear).clamp(min=0.0089) ** (1 / 3) - 16
    steps = lightness.diff()
    assert steps.min() >= 0
    assert steps.max() < 3 * steps.mean()


def test_heat_stands_where_the_map_is():
    map_THW = torch.zeros(2, 10, 20)
    map_THW[1, 2:4, 5:7] = 1e-7
    shown = glow(torch.full((2, 3, 20, 40), 0.5), map_THW)
    hot = shown.amax(1) > 0.9
    assert hot.nonzero().amin(0).tolist() == [1, 4, 10]
    assert hot.sum() == 4 * 4
    assert torch.equal(shown[0], shown[0, :, :1, :1].expand(3, 20, 40))


def test_a_few_extreme_pixels_do_not_darken_the_rest():
    map_THW = torch.ones(1, 50, 50)
    map_THW[0, 0, : int(2500 * (1 - PERCENTILE)) - 1] = 1e6
    assert glow(torch.zeros(1, 3, 50, 50), map_THW)[0, :, 25, 25].tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(("height", "width", "count"), [(32, 32, 29), (480, 832, 3), (832, 480, 1), (9, 301, 13)])
def test_a_page_of_any_size_can_be_drawn(height, width, count):
    verdicts = tuple(
        QuestionScore(Question("TA", "is it a very long question " * (i % 5), "yes"), -1.0, 0.5, "no", 0.9)
        for i in range(count)
    )
    maps = Saliency([], torch.rand(2, height, width), torch.zeros(count, 2, height, width))
    page = draw(torch.rand(2, 3, height, width), maps, ClipScore(-1.0, {"TA": -1.0}, verdicts), "a prompt " * 60)
    assert page.shape[:2] == (2, 3)
    assert page.shape[3] == 1600
    assert page.shape[2] % 2 == 0
    assert bool(page.isfinite().all())


def test_text_is_wrapped_and_cut():
    font = ImageFont.load_default(15)
    assert _wrap("short", font, 200, 2) == ["short"]
    for text in ("many words " * 30, "MANY WORDS " * 30, "x" * 500):
        lines = _wrap(text, font, 200, 2)
        assert len(lines) == 2 and lines[1].endswith("…")
        assert all(font.getlength(line) <= 200 for line in lines)
    assert _wrap("", font, 200, 2) == []
