"""Questions about every clip: physics and visual quality. Each property is asked both ways, so that always saying yes
gains nothing. A property that the prompt contradicts (melting, film grain) is replaced by another.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from lowmem_drf.questions.clauses import NEGATION, either
from lowmem_drf.questions.still import OVER_TIME, about_image, of_image
from lowmem_drf.types import Aspect, Question

ANSWER = " Answer yes or no."
"""Ends every yes/no question: the critic's probability moves to the two scored words (as in VQAScore)."""
PAIRS, FEWEST = 5, 3
"""Properties of an aspect: at most, and at least even if the prompt contradicts them."""


@dataclass(frozen=True, slots=True)
class Check:
    """One property. Each question has a wording for training and a held-out one for evaluation."""

    name: str
    clause: str
    """Its words in an explanation."""
    good: tuple[str, str]
    """Questions with the answer yes for a good clip."""
    bad: tuple[str, str]
    """Questions with the answer no for a good clip."""
    contradicted: str
    """Stems in prompts that contradict the property."""
    needs: str = ""
    """Stems; the prompt must contain one of them. Empty: every prompt."""
    about: str = ""
    """``needs`` as a question about the prompt, for a critic that reads it."""


# Stems are the beginnings of words, in the syntax of ``clauses.either``.
CHANGE = "melt morph transform metamorph turn(?:s|ing)_into becom evolv dissolv verwandel 变成 融化 変身 溶け "
LIMB = "(?:los|cut|rip|tear|miss)[a-z]*_(?:off_)?(?:an?|his|her|its|one|the)_(?:[a-z]+_)?(?:arm|leg|head|hand|wing) "
BREAK = LIMB + "explo shatter crumbl collaps break(?!f) broke burst smash crush burn tear(?:s|ing)_ slic cuts?_ 破碎 "
GROW = "grow grew shrink shrank inflat deflat bloom unf(?:old|url) expand stretch swell wilt squeez deform bend 盛开 "
FLUID = "liquid fluid ink$ smoke flame fires?$ lava "
UNREAL = "surreal psychedel dream abstract magic ghost teleport glitch impossible fractal kaleidoscop 超现实 魔法 "
LAPSE = "time_?lapse hyper_?lapse stop_motion claymation zeitraffer 延时 定格 タイムラプス "
OLD = "vintage vhs super_8 (?:8|16)mm old_(?:film|movie) silent_film retro found_footage cctv surveil 老电影 胶片 "
PAINTED = (
    "water_?colou?r paint anime manga cartoon comic pixel (?:8|16)_bit low_poly sketch drawing illustrat ink_wash lego "
    "animat ghibli pixar disney cubis style_of aquarell acuarela 水彩 油画 动漫 动画 卡通 水墨 アニメ 漫画 油絵 "
)
LIGHTS = "flicker strob flash lightning candle fires?$ firework flame torch neon blink disco concert spark laser 霓虹 "
BODIES = LIMB + "zombie alien monster mutant demon creature [a-z]+_headed one_?(?:eyed|legged|armed) headless skeleton "
PEOPLE = (
    "(?:wo)?m[ae]n$ boys?$ girls?$ [a-z]+(?:wom[ae]n|m[ae]n|girl|boy)s?$ persons?$ people$ child kids?$ baby toddler "
    "lady guys?$ s?he$ his$ her$ they$ [a-z]*dancer players?$ musician riders?$ worker soldier knights?$ sailor crowd "
    "couple hands?$ faces?$ [0-9]+(?:girl|boy) mann frau hommes?$ femme enfant hombre mujer bailarin 人 男 女 孩 "
)
ANIMALS = "dogs?$ cats?$ horse birds?$ fox wolf lion tiger bears?$ rabbit cows?$ robots?$ hund katze 猫 狗 马 犬 "

PHYSICS = (
    Check("smooth", "the motion is smooth, without jumps",
      ("Is the motion in the video smooth and continuous?", "Does everything move fluidly in this clip?"),
      ("Are there sudden jumps in the motion in the video?", "Can you see anything skip about in this clip?"),
      LAPSE + "glitch teleport jump_cut fast_cuts quick_cuts montage strob jerk stutter jitter shaky"),
    Check("body", "bodies are complete and well proportioned",
      ("Do the bodies in the video have the right number of limbs?", "Are arms, legs and heads complete in this clip?"),
      ("Are there deformed or missing body parts in the video?", "Can you see too many or odd limbs in this clip?"),
      CHANGE + UNREAL + BODIES + "cubis without_an?_(?:arm|leg|tail|head)", PEOPLE + ANIMALS,
      "Are there people or animals in the video?"),
    Check("appear", "nothing appears or vanishes",
      ("Does everything in the video stay in existence?", "Do all things in this clip persist from frame to frame?"),
      ("Does anything suddenly appear or vanish in the video?", "Can you see something pop in or out of this clip?"),
      CHANGE + UNREAL + LAPSE + LIGHTS + "explo burst appear disappear vanish fad emerg bubbl invisib 消失 出现"),
    Check("shape", "solid things keep their shape",
      ("Do solid objects keep their shape throughout the video?", "Does no solid thing deform in this clip?"),
      ("Does any solid object change its shape unnaturally?", "Can you see something deform oddly in this clip?"),
      CHANGE + BREAK + GROW + FLUID + UNREAL + LAPSE + "shape_?shift"),
    Check("contact", "gravity and contact look right",
      ("Do gravity and contact look plausible in the video?", "Do things weigh and rest as they should in this clip?"),
      ("Do things float without support in the video?", "Can you see anything defy gravity in this clip?"),
      UNREAL + "float levitat weightless gravity (?:in|outer)_space space(?:walk|ship) astronaut galaxy nebula "
      "underwater hover upside_down flying superhero fairy wizard witch hologra 漂浮 悬浮"),
    Check("constant", "size and color stay constant",
      ("Does everything in the video keep its size and color?", "Do things keep their size and color in this clip?"),
      ("Does anything change its size or color for no reason?", "Can you see something switch its color in this clip?"),
      CHANGE + GROW + FLUID + UNREAL + LAPSE + LIGHTS + "explo burn chang(?:e|es|ing)_(?:its_)?colou?r colou?r_?chang "
      "chameleon rainbow iridescen shimmer glow rust fad"),
    Check("hands", "hands and faces are well formed",
      ("Are all hands and faces in the video well formed?", "Do faces and fingers look natural in this clip?"),
      ("Are any hands or faces in the video malformed?", "Can you see fused fingers or odd faces in this clip?"),
      CHANGE + UNREAL + BODIES + PAINTED + "mask silhouette claw robot", PEOPLE,
      "Are there people in the video?"),
    Check("through", "solid things do not pass through each other",
      ("Do solid things in the video stay outside of one another?", "Do things touch without merging in this clip?"),
      ("Do solid things pass through each other in the video?", "Can you see things go through others in this clip?"),
      "pass(?:es|ing)?_through through_(?:walls|a_wall) merg fus(?:es|ing) ghost hologra swallow absorb 穿过"),
    Check("forward", "time runs forward",
      ("Does time run forward in the video?", "Does everything in this clip happen in its natural order?"),
      ("Does any motion in the video run backwards in time?", "Can you see a motion played in reverse in this clip?"),
      "revers rewind backward boomerang loop 倒放 rückwärts"),
)  # fmt: skip
QUALITY = (
    Check("sharp", "sharp",
      ("Is the video sharp and clear?", "Are the edges and details of this clip crisp?"),
      ("Is the video blurry?", "Does this clip look out of focus?"),
      OLD + "blur bokeh depth_of_field shallow soft_(?:focus|light) out_of_focus unfocused rack_focus dream haz[ey] "
      "mist fog impressionis ink_wash pixel (?:8|16)_bit underwater smok tilt_?shift unscharf flou 模糊 景深 雾"),
    Check("noise", "clean",
      ("Is the video free of noise and artifacts?", "Is the picture of this clip clean?"),
      ("Is there visible noise or grain in the video?", "Can you see speckles in this clip?"),
      OLD + "nois[ey] grain 35mm night_vision noir$ polaroid analog scratch low_quality pixel (?:8|16)_bit lo_?fi$ "
      "glitch static (?:sand|snow)storm blizzard dust 1[0-9][0-9]0s körn grano 颗粒 噪点 フィルム"),
    Check("flicker", "free of flicker",
      ("Is the brightness of the video stable over time?", "Does the light in this clip stay even over time?"),
      ("Does the video flicker?", "Does the brightness of this clip jump up and down?"),
      OLD + LIGHTS + LAPSE + "noir$ explo pulsat glitch weld"),
    Check("warp", "free of distortion",
      ("Is the picture free of warping, up to its edges?", "Do straight lines stay straight in this clip?"),
      ("Is the picture warped or distorted?", "Can you see wobbling outlines in this clip?"),
      CHANGE + UNREAL + "fish_?eye distort warp ripple haze mirage dolly_zoom vertigo cubis wavy liquid underwater "
      "bend twist swirl anamorphic flare crystal_ball"),
    Check("light", "natural in light and color",
      ("Are the lighting and colors of the video natural?", "Do light and colors look true in this clip?"),
      ("Are the colors oversaturated or the lighting unnatural?", "Are colors garish or exposure wrong in this clip?"),
      OLD + UNREAL + PAINTED + LIGHTS + "black_and_white monochrom noir$ sepia gr[ae]yscale [a-z]*punk [a-z]+wave$ "
      "infrared thermal night_vision hologra glow vibrant vivid saturated colou?rful fantasy sci_?fi alien futuristic "
      "3d cgi render duotone silhouette pastel muted spotlight aurora exposed high_contrast toy 黑白 モノクロ"),
    Check("overlay", "without watermark or caption",
      ("Is the picture free of watermarks, logos and captions?", "Is nothing stamped or written over this clip?"),
      ("Does the video have a watermark, a logo or subtitles?", "Can you see a stamp or caption over this clip?"),
      '["“«「『] watermark logo subtitle caption title credits text$ letter typograph words?$ writ reads say news '
      "broadcast score hud$ interface screen poster billboard advert brand label signs?$ banner cctv vhs graffiti "
      "game book magazine 字 看板 招牌 schild letrero"),
    Check("ghosting", "free of ghosting",
      ("Are moving things in the video free of ghost images?", "Does what moves in this clip leave no trail?"),
      ("Do moving things in the video leave ghost images?", "Can you see doubled outlines in this clip?"),
      "ghost spirit (?:double|multiple|long)_exposure motion_blur trail strob hologra glitch vhs reflect 残影"),
    Check("blocking", "free of blocks",
      ("Is the video free of blocky compression artifacts?", "Is this clip free of squares and color bands?"),
      ("Are there blocky compression artifacts in the video?", "Can you see squares or color bands in this clip?"),
      "pixel (?:8|16)_bit glitch vhs datamosh minecraft voxel lego mosaic low_quality 像素 ドット"),
    Check("subject", "clear in its subject",
      ("Can the main subject of the video be made out clearly?", "Is it easy to tell what this clip is about?"),
      ("Is the main subject of the video hard to make out?", "Does the main thing in this clip look like mush?"),
      "abstract fractal silhouette fog mist blur out_of_focus hidden camouflag darkness"),
)  # fmt: skip


FIRST_FRAME = Check("first_frame", "true to its first frame",
  ("Does the video keep the subject, the colors and the background of its first frame?",
   "Do people, things and scenery in this clip look to the end as they did in its first frame?"),
  ("Does the video turn into another subject or scene after its first frame?",
   "Does what this clip shows soon differ in its looks from the first frame?"),
  CHANGE + BREAK + GROW + FLUID + UNREAL + LAPSE + LIGHTS + "cuts?_to scene_chang transition another_scene next_scene "
  "chang(?:e|es|ing) fad(?:e|es|ing) zoom pans_ panning camera_(?:fl|mov|pan|turn|orbit)")  # fmt: skip
"""Of the quality of a clip that begins with a given image: as the subject and background consistency of VBench
(arXiv 2311.17982). Asked first, in the place of the last."""

_DENSE = (
    "Explain whether the motion in this video is physically plausible.",
    "Explain the visual quality of this video.",
)


def texts() -> frozenset[str]:
    """Every question of this file, in both wordings, of clips and of images."""
    every = (text + ANSWER for check in (*PHYSICS, *QUALITY, FIRST_FRAME) for text in (*check.good, *check.bad))
    return frozenset(said for text in (*every, *_DENSE) for said in (text, of_image(text)))


def about_text(still: bool = False, begins: bool = False) -> list[Question]:
    """What a critic that reads the prompt answers to choose the properties. If it gives the opposite of an answer, its
    ``name`` belongs to ``contradicted`` of ``checks``. ``still``, ``begins``: as there."""
    quality = (FIRST_FRAME, *QUALITY) if begins else QUALITY
    every = (*PHYSICS, *quality)
    abouts = dict.fromkeys(check.about for check in every if check.about)
    made = [
        *yesno({"Phy": PHYSICS, "VQ": quality}),
        *(Question("TA", about + ANSWER, "yes", name=about) for about in abouts),
    ]
    return [*about_image(made)] if still else made


def checks(
    prompt: str, contradicted: Collection[str] | None = None, still: bool = False, begins: bool = False
) -> dict[Aspect, tuple[Check, ...]]:
    """The first ``PAIRS`` properties of each aspect that the prompt does not contradict, and at least ``FEWEST``.

    Args:
        contradicted: the names of the others, from a critic that read the prompt (``check``). ``None``: by stems.
        still: only those that an image can have.
        begins: the clip begins with a given image.
    """
    quality = (FIRST_FRAME, *QUALITY) if begins else QUALITY
    low = prompt.casefold()
    if contradicted is None:
        there = re.sub(rf"(?:{NEGATION.pattern})[^,.;，。；、]*", "", low)
        unfit = {check.name for check in (*PHYSICS, *quality) if check.needs and not _has(there, check.needs)}
        contradicted = {check.name for check in (*PHYSICS, *quality) if _has(low, check.contradicted)}
    else:
        unfit = {check.name for check in (*PHYSICS, *quality) if check.about in contradicted}
    chosen: dict[Aspect, tuple[Check, ...]] = {"Phy": PHYSICS, "VQ": quality}
    for aspect, every in chosen.items():
        asked = [check for check in every if check.name not in unfit and not (still and check.name in OVER_TIME)]
        kept = [check for check in asked if check.name not in contradicted][:PAIRS]
        seldom_contradicted = [check for check in reversed(asked) if check not in kept]
        chosen[aspect] = (*kept, *seldom_contradicted[: max(FEWEST - len(kept), 0)])
    return chosen


@cache
def _pattern(stems: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-zà-ÿ])(?:{either(stems)})")


def _has(low: str, stems: str) -> bool:
    return bool(_pattern(stems).search(low))


def yesno(chosen: dict[Aspect, tuple[Check, ...]], heldout: bool = False) -> list[Question]:
    """Each property both ways, at half weight each."""
    return [
        Question(aspect, texts[heldout] + ANSWER, answer, weight=0.5, name=check.name)
        for aspect, kept in chosen.items()
        for check in kept
        for texts, answer in ((check.good, "yes"), (check.bad, "no"))
    ]


def dense(chosen: dict[Aspect, tuple[Check, ...]], still: bool = False) -> list[Question]:
    """One dense question for each aspect."""
    physics, quality = ([check.clause for check in chosen[aspect]] for aspect in ("Phy", "VQ"))
    plausible = f"{'It' if still else 'The motion'} is physically plausible: {'; '.join(physics)}."
    good = f"The {'image' if still else 'video'} is {', '.join(quality[:-1])} and {quality[-1]}."
    return [
        Question("Phy", _DENSE[0], plausible, "dense", name="plausible"),
        Question("VQ", _DENSE[1], good, "dense", name="quality"),
    ]
