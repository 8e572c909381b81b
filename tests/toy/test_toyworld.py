"""ToyWorld's scenes, captions and oracle: what is drawn is what is measured."""

import itertools

import pytest
import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.questions.make import MODES, make_questions
from lowmem_drf.toy.captions import WORDINGS, caption, heldout_prompts, parse, train_prompts
from lowmem_drf.toy.defects import DEFECTS, PHYSICS, break_physics, break_quality
from lowmem_drf.toy.oracle import judge, judge_clips, measure
from lowmem_drf.toy.scenes import FRAMES, SIZE, SPLIT, Combo, all_combos, combos_of, coverage, draw_tracks, render


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    """Every combination once: combos, tracks, frames."""
    combos = all_combos()
    tracks = draw_tracks(combos, generator(3))
    return combos, tracks, render(tracks)


def test_there_are_270_combinations_and_a_fifth_is_held_out():
    assert len(all_combos()) == len(set(all_combos())) == len(SPLIT) == 270
    assert (len(combos_of("train")), len(combos_of("heldout")), len(combos_of("unseen"))) == (216, 27, 27)
    for column, size in enumerate((3, 6, 5, 3)):  # every value of every attribute is trained on
        assert {c[column] for c in combos_of("train")} == set(range(size))


def test_clips_have_the_contracted_form_and_stay_in_the_frame(world):
    _, tracks, frames = world
    assert frames.shape == (270, FRAMES, 3, SIZE, SIZE) and frames.dtype == torch.float32
    assert frames.min() >= 0 and frames.max() <= 1
    drawn = coverage(tracks.x, tracks.y, tracks.radius, tracks.shape).flatten(2).sum(-1)
    assert (drawn / (torch.pi * tracks.radius**2) - 1).abs().max() < 0.04  # no part of a shape is cut off


def test_the_same_seed_draws_the_same_clips():
    combos = all_combos()[:5]
    assert torch.equal(render(draw_tracks(combos, generator(7))), render(draw_tracks(combos, generator(7))))
    assert not torch.equal(render(draw_tracks(combos, generator(7))), render(draw_tracks(combos, generator(8))))


@pytest.mark.parametrize("noise", [0.0, 0.035], ids=["clean", "noisy"])
def test_the_oracle_is_right_on_ground_truth(world, noise):
    combos, _, frames = world
    seen = measure((frames + noise * torch.randn(frames.shape, generator=generator())).clamp(0, 1))
    hits = seen.matches(combos)
    for name, value in {**hits, "physics": seen.physics, "quality": seen.quality}.items():
        assert value.float().mean() > 0.97, name


def test_the_oracle_measures_on_the_device_where_the_clips_are(world):
    """``meta`` stands for a card: torch refuses to mix its tensors with those of the CPU."""
    combos, tracks, frames = world
    seen = measure(frames.to("meta"))
    drawn = render(type(tracks)(*(part.to("meta") for part in tracks)))
    found = [*seen.matches(combos).values(), seen.physics, seen.quality, drawn]
    assert {tensor.device.type for tensor in found} == {"meta"}


def test_the_oracle_is_at_chance_on_shuffled_captions(world):
    combos, _, frames = world
    order = torch.randperm(len(combos), generator=generator(1)).tolist()
    hits = measure(frames).matches([combos[i] for i in order])
    chances = {"shape": 1 / 3, "color": 1 / 6, "direction": 1 / 5, "background": 1 / 3, "all": 1 / 90}
    for name, chance in chances.items():
        spread = 4 * (chance * (1 - chance) / len(combos)) ** 0.5  # four standard deviations of a fair guess
        assert abs(hits[name].float().mean().item() - chance) < spread, name


@pytest.mark.parametrize("kind", DEFECTS)
def test_the_oracle_sees_every_defect_and_no_other_aspect(world, kind):
    tracks, frames = type(world[1])(*(part[::2] for part in world[1])), world[2][::2]
    draw = generator(2)
    broken = render(break_physics(tracks, kind, draw)) if kind in PHYSICS else break_quality(frames, kind, draw)
    seen = measure(broken)
    assert getattr(seen, kind).float().mean() > 0.9
    other = seen.quality if kind in PHYSICS else seen.physics
    assert other.float().mean() > 0.97


@pytest.mark.parametrize("kind", ["typo", ""])
def test_an_unknown_defect_is_refused_by_name(world, kind):
    with pytest.raises(ValueError, match="not a physics defect: jump"):
        break_physics(world[1], kind, generator())
    with pytest.raises(ValueError, match="not a quality defect: noise"):
        break_quality(world[2][:1], kind, generator())


def test_an_empty_clip_shows_nothing_and_breaks_physics():
    verdict = judge(torch.full((FRAMES, 3, SIZE, SIZE), 0.5), "a red circle moves left on a gray background")
    assert not (verdict.shape or verdict.color or verdict.direction or verdict.physics or verdict.all)


def test_the_oracle_refuses_what_it_cannot_judge(world):
    frames = world[2][:1]
    with pytest.raises(ValueError, match="grammar"):
        judge_clips(frames, ["a corgi surfs"])
    with pytest.raises(ValueError, match="32 x 32"):
        judge_clips(frames[..., :16, :16], ["a red circle moves left on a gray background"])


def test_every_wording_of_every_combination_parses_back():
    for combo in all_combos():
        texts = {caption(combo, i) for i in range(WORDINGS)}
        assert len(texts) == WORDINGS
        assert {parse(text) for text in texts} == {combo}


def test_other_texts_do_not_parse():
    two_colors = "a red blue circle moves left on a gray background"
    for text in ("", "a red circle", two_colors, "a red circle moves left and right on black"):
        assert parse(text) is None


def test_prompts_of_training_and_evaluation_share_no_combination():
    trained = {parse(text) for text in train_prompts()}
    evaluated = {parse(text) for text in heldout_prompts(128)}
    assert len(train_prompts()) == len(set(train_prompts())) == 432
    assert trained == set(combos_of("train")) and evaluated == set(combos_of("heldout", "unseen"))
    assert heldout_prompts(128) == heldout_prompts(128) != heldout_prompts(128, seed=1)


RED = "A red circle moves left on a grey background"


def test_yesno_questions_ask_for_every_part_of_the_prompt():
    questions = make_questions(RED, "yesno", "toyworld")
    asked = {q.name: q for q in questions}
    assert [q.aspect for q in questions] == ["TA"] * 4 + ["Phy"] * 12 + ["VQ"] * 6
    for name, word in (("color", "red"), ("shape", "circle"), ("direction", "left"), ("background", "gray")):
        assert word in asked[name].text
    assert set(asked) == {"color", "shape", "direction", "background", *DEFECTS}
    assert all(q.answer == "yes" for q in questions if q.aspect == "TA")


@pytest.mark.parametrize("mode", ["yesno", "heldout"])
def test_every_defect_is_asked_for_both_ways_so_that_a_leaning_to_yes_cancels(mode):
    both = [q for q in make_questions(RED, mode, "toyworld") if q.aspect != "TA"]
    for defect in DEFECTS:
        assert sorted((q.answer, q.weight) for q in both if q.name == defect) == [("no", 0.5), ("yes", 0.5)]


def test_dense_questions_ask_for_words_a_description_and_explanations():
    answers = {q.name: (q.aspect, q.kind, q.answer) for q in make_questions(RED, "dense", "toyworld")}
    assert answers["color_word"] == ("TA", "dense", "red")
    assert answers["description"] == ("TA", "dense", caption(Combo(0, 0, 0, 1)))
    assert answers["motion"] == ("Phy", "dense", "it moves left and keeps its form , size and color")
    assert answers["picture"][0] == "VQ" and "clean" in answers["picture"][2]


def test_every_caption_is_described_by_its_plainest_wording():
    for combo in all_combos():
        asked = make_questions(caption(combo, 5), "dense", "toyworld")
        (description,) = (question.answer for question in asked if question.name == "description")
        assert description == caption(combo)


def test_modes_of_questions_share_no_wording_but_both_is_both():
    texts = {mode: {q.text for q in make_questions(RED, mode, "toyworld")} for mode in MODES}
    assert texts["both"] == texts["yesno"] | texts["dense"]
    for a, b in itertools.combinations(("yesno", "dense", "vanilla", "heldout"), 2):
        assert not texts[a] & texts[b]
    assert len(texts["vanilla"]) == 1


@pytest.mark.parametrize(
    ("text", "mode", "grammar", "message"),
    [
        ("a corgi surfs", "yesno", "toyworld", "grammar"),
        (RED, "typo", "toyworld", "Use one of"),
        (RED, "yesno", "latin", "Use one of"),
    ],
)
def test_prompts_modes_and_grammars_that_do_not_work_say_so(text, mode, grammar, message):
    with pytest.raises(BadInputError, match=message):
        make_questions(text, mode, grammar)
