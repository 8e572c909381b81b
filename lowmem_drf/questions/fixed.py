"""What is asked of every clip: physical fidelity and visual quality, each property both ways, so that a critic that
always says yes gains nothing. A property that the prompt contradicts (melting, film grain) gives its place to another
one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowmem_drf.questions.clauses import NEGATION
from lowmem_drf.types import Aspect, Question

ANSWER = " Answer yes or no."
"""Ends every yes/no question: it moves the critic's probability onto the two words that are scored (as in VQAScore)."""
PAIRS, FEWEST = 5, 3
"""Properties of an aspect: as many as do not contradict the prompt, and never fewer."""


@dataclass(frozen=True, slots=True)
class Check:
    """One property. Each question has a wording for training and a held-out one for evaluation."""

    name: str
    clause: str
    """Its part of an explanation."""
    contradicted: str
    """Stems of prompts that ask for its opposite."""
    good: str
    """Answered yes by a good clip."""
    good_heldout: str
    bad: str
    """Answered no by a good clip."""
    bad_heldout: str
    needs: str = ""
    """Stems, one of which the prompt has to have."""


# Stems are the beginnings of words. Those of other languages stand for what their prompts ask for most.
CHANGE = "melt|morph|transform|metamorph|turn(?:s|ing|ed)? into|becom|evolv|dissolv|verwandel|变成|变身|融化|変身|溶け"
LIMB = (
    r"(?:los|cut|sever|rip|tear|break|miss)\w* (?:off )?(?:an?|his|her|its|one|the) (?:\w+ )?(?:arm|leg|limb|head|"
    "hand|wing)"
)
BREAK = (
    f"{LIMB}|explo|shatter|crumbl|collaps|break(?!fast)|broke|burst|smash|crush|burn|disintegrat|erupt|tear(?:s|"
    "ing)? |demolish|slic|chop|"
    "cuts? |cutting|爆炸|破碎|zerbr"
)
GROW = "grow|grew|shrink|shrank|inflat|deflat|bloom|unfold|unfurl|expand|stretch|swell|sprout|wilt|ripen|rott|knead|squish|squeez|deform|bend|盛开|开花"
FLUID = r"liquid|fluid|ink\b|smoke|flame|fires?\b|lava|abstract|fractal|kaleidoscop"
UNREAL = "surreal|psychedel|dreamlike|abstract|magic|spell|ghost|teleport|glitch|impossible|escher|fractal|kaleidoscop|超现实|魔法"
LAPSE = "time-?lapse|hyper-?lapse|stop[- ]motion|claymation|zeitraffer|延时|定格|タイムラプス"
OLD = "vintage|vhs|super 8|(?:8|16)mm|old film|old movie|silent film|retro|glitch|found footage|cctv|surveillance|老电影|胶片"
PAINTED = (
    "water-?colou?r|paint|anime|manga|cartoon|comic|pixel|(?:8|16)-bit|low[- ]poly|sketch|drawing|illustrat|"
    "ink[- ]wash|ukiyo|pop[- ]art|"
    "impressionis|expressionis|cubis|lego|animat|ghibli|pixar|disney|van gogh|picasso|monet|cel[- ]shad|style of|"
    "aquarell|acuarela|"
    "水彩|油画|动漫|动画|卡通|水墨|アニメ|漫画|油絵"
)
LIGHTS = (
    r"flicker|strob|flash|lightning|thunder|candle|fires?\b|firework|campfire|flame|torch|neon|blink|disco|nightclub|"
    "concert|twinkl|spark|"
    "laser|霓虹|闪"
)
BODIES = (
    rf"{LIMB}|zombie|alien|monster|mutant|demon|creature|\w+-headed|one-?(?:eyed|legged|armed)|three-?legged|"
    "headless|skeleton|amput"
)
PEOPLE = (
    r"(?:man|men|woman|women|boy|girl|\w+(?:woman|man|girl|boy|women|men)|person|people|child|children|kid|baby|"
    "toddler|lady|guy|he|she|his|"
    "her|they|him|dancer|player|musician|rider|worker|soldier|knight|sailor|chef|crowd|couple|hand|face|mann|frau|"
    "homme|femme|enfant|hombre|mujer|"
    r"bailarina)s?\b|\d+(?:girl|boy)|人|男|女|孩"
)
ANIMALS = (
    "(?:dog|cat|horse|bird|fox|wolf|lion|tiger|bear|elephant|monkey|rabbit|cow|sheep|deer|robot|hund|"
    r"katze)(?:e?s)?\b|猫|狗|马|犬"
)

PHYSICS = (
    Check("smooth", "the motion is smooth, without jumps",
          f"{LAPSE}|glitch|teleport|jump cut|fast cuts|quick cuts|montage|strob|jerk|stutter|jitter|shaky",
          "Is the motion in the video smooth and continuous?", "Does everything move fluidly in this clip?",
          "Are there sudden jumps in the motion in the video?",
          "Can you see anything skip from one place to another in this clip?"),
    Check("body", "bodies are complete and well proportioned",
          f"{CHANGE}|{UNREAL}|{BODIES}|cubis|picasso|without an? (?:arm|leg|tail|head)",
          "Do the bodies in the video have the right number of limbs?",
          "Are arms, legs and heads complete in this clip?",
          "Are there deformed, extra or missing body parts in the video?",
          "Can you see limbs that are malformed or too many in this clip?", needs=f"{PEOPLE}|{ANIMALS}"),
    Check("appear", "nothing appears or vanishes",
          f"{CHANGE}|{UNREAL}|{LAPSE}|{LIGHTS}|explo|burst|appear|disappear|vanish|fad(?:e|es|ing)|emerg|materiali|"
          "evaporat|bubbl|"
          "jump cut|invisib|消失|出现",
          "Does everything in the video stay in existence?", "Do all things in this clip persist from frame to frame?",
          "Does anything suddenly appear or vanish in the video?",
          "Can you see something pop in or out of this clip?"),
    Check("shape", "solid things keep their shape", f"{CHANGE}|{BREAK}|{GROW}|{FLUID}|{UNREAL}|{LAPSE}|shape-?shift",
          "Do solid objects keep their shape throughout the video?",
          "Does every solid thing stay the same shape in this clip?",
          "Does any solid object change its shape unnaturally in the video?",
          "Can you see something deform without a cause in this clip?"),
    Check("contact", "gravity and contact look right",
          f"{UNREAL}|float|levitat|weightless|gravity|in space|outer space|spacewalk|astronaut|spaceship|spacecraft|"
          "galaxy|nebula|"
          "underwater|hover|upside[- ]down|flying (?:car|carpet|whale|island|house)|superhero|fairy|wizard|witch|"
          "hologra|漂浮|悬浮",
          "Do gravity and contact between things look plausible in the video?",
          "Do things rest on one another as in the real world in this clip?",
          "Do things float without support in the video?", "Can you see anything defy gravity in this clip?"),
    Check("constant", "size and color stay constant",
          rf"{CHANGE}|{GROW}|{FLUID}|{UNREAL}|{LAPSE}|{LIGHTS}|explo|burn|chang\w* colou?r|colou?r-?chang|chameleon|"
          "rainbow|"
          "iridescen|shimmer|glow|rust|fad(?:e|es|ing)",
          "Does everything in the video keep its own size and color?",
          "Do things stay equally large and keep their colors in this clip?",
          "Does anything change its size or color for no reason in the video?",
          "Can you see something switch its color or grow in this clip?"),
    Check("hands", "hands and faces are well formed",
          f"{CHANGE}|{UNREAL}|{BODIES}|{PAINTED}|mask|silhouette|claw|robot",
          "Are all hands and faces in the video well formed?", "Do faces and fingers look natural in this clip?",
          "Are any hands or faces in the video malformed?",
          "Can you see fused fingers or a distorted face in this clip?",
          needs=PEOPLE),
    Check("through", "solid things do not pass through each other",
          "pass(?:es|ing)? through|phas(?:e|es|ing) through|through walls|merg|fus(?:e|es|ing)|ghost|hologra|swallow|"
          "absorb|穿过",
          "Do solid things in the video stay outside of one another?",
          "Do things that meet in this clip touch without merging?",
          "Do solid things pass through each other in the video?",
          "Can you see one thing go through another solid one in this clip?"),
    Check("forward", "time runs forward", "revers|rewind|backward|boomerang|loop|倒放|rückwärts",
          "Does time run forward in the video?", "Does everything in this clip happen in its natural order?",
          "Does any motion in the video run backwards in time?",
          "Can you see a motion played in reverse in this clip?"),
)  # fmt: skip
QUALITY = (
    Check("sharp", "sharp",
          f"{OLD}|blur|bokeh|depth of field|shallow|soft[- ](?:focus|light)|out of focus|unfocused|rack focus|dream|"
          "haz[ey]|mist|fog|"
          "impressionis|monet|ink[- ]wash|pixel|(?:8|16)-bit|underwater|smok|tilt-?shift|low[- ]resolution|unscharf|"
          "flou|desenfoc|模糊|景深|雾",
          "Is the video sharp and clear?", "Are the edges and details of this clip crisp?",
          "Is the video blurry?", "Does this clip look out of focus?"),
    Check("noise", "clean",
          f"{OLD}|nois[ey]|grain|35mm|night vision|film noir|polaroid|analog|scratch|low[- ]quality|pixel|(?:8|"
          r"16)-bit|lo-?fi\b|static|"
          r"sandstorm|snowstorm|blizzard|dust|archive|1\d[0-9]0s|körn|grano|颗粒|噪点|フィルム",
          "Is the video free of noise and artifacts?", "Is the picture of this clip clean?",
          "Is there visible noise or grain in the video?", "Can you see speckles in this clip?"),
    Check("flicker", "free of flicker", f"{OLD}|{LIGHTS}|{LAPSE}|film noir|explo|pulsat|weld|muzzle",
          "Is the brightness of the video stable from frame to frame?",
          "Does the light in this clip stay even over time?",
          "Does the video flicker?", "Does the brightness of this clip jump up and down?"),
    Check("warp", "free of distortion",
          f"{CHANGE}|{UNREAL}|fish-?eye|distort|warp|ripple|heat haze|mirage|funhouse|dolly zoom|vertigo|cubis|"
          "picasso|van gogh|wavy|"
          "liquid|underwater|bend|twist|swirl|anamorphic|flare|crystal ball|raindrops on|black hole",
          "Is the picture free of warping, up to its edges?", "Do straight lines and outlines stay true in this clip?",
          "Is the picture warped or distorted?", "Can you see bent or wobbling outlines in this clip?"),
    Check("light", "natural in light and color",
          rf"{OLD}|{UNREAL}|{PAINTED}|{LIGHTS}|black[- ]and[- ]white|monochrom|noir\b|sepia|gr[ae]yscale|\w*punk|"
          r"\w+wave\b|infrared|thermal|"
          "night vision|hologra|glow|vibrant|vivid|saturated|colou?rful|fantasy|sci-?fi|science fiction|alien|"
          "futuristic|bioluminesc|"
          "3d|cgi|render|duotone|silhouette|pastel|muted|teal and orange|spotlight|aurora|exposed|high[- ]contrast|"
          "dramatic|toy|黑白|モノクロ",
          "Are the lighting and colors of the video natural?",
          "Do the colors and the light of this clip look true to life?",
          "Are the colors of the video oversaturated or the lighting unnatural?",
          "Does this clip have garish colors or wrong exposure?"),
    Check("overlay", "without watermark or caption",
          r'["“«「『]|watermark|logo|subtitle|caption|title|credits|text\b|letter|typograph|words?\b|writ|reads|say|news|broadcast|score|hud\b|'
          r"interface|screen|poster|billboard|advert|brand|label|signs?\b|banner|timestamp|cctv|vhs|graffiti|jersey|"
          "menu|game|book|magazine|"
          "字|看板|招牌|schild|letrero",
          "Is the picture free of watermarks, logos and captions?",
          "Is this clip free of stamps and overlaid writing?",
          "Does the video have a watermark, a logo or subtitles?",
          "Can you see a stamp or caption laid over this clip?"),
    Check("ghosting", "free of ghosting",
          "ghost|spirit|(?:double|multiple|long) exposure|motion blur|trail|strob|hologra|glitch|vhs|reflect|残影",
          "Are moving things in the video free of ghost images?",
          "Does everything that moves in this clip leave no trail behind?",
          "Do moving things in the video leave ghost images behind?",
          "Can you see doubled, see-through outlines in this clip?"),
    Check("blocking", "free of blocks",
          "pixel|(?:8|16)-bit|glitch|vhs|datamosh|minecraft|voxel|lego|mosaic|low[- ]quality|像素|ドット",
          "Is the video free of blocky compression artifacts?",
          "Are smooth areas of this clip free of squares and bands?",
          "Are there blocky compression artifacts in the video?",
          "Can you see squares or color bands in smooth areas of this clip?"),
    Check("subject", "clear in its subject",
          "abstract|fractal|silhouette|fog|mist|blur|out of focus|hidden|camouflag|darkness|unrecogni",
          "Can the main subject of the video be made out clearly?", "Is it easy to tell what this clip is about?",
          "Is the main subject of the video smeared or hard to make out?",
          "Does the main thing in this clip look like mush?"),
)  # fmt: skip


def checks(prompt: str) -> dict[Aspect, tuple[Check, ...]]:
    """The first properties of each aspect that the prompt does not contradict, as far as stems tell."""
    low = prompt.casefold()
    there = re.sub(rf"(?:{NEGATION.pattern})[^,.;，。；、]*", "", low)
    chosen: dict[Aspect, tuple[Check, ...]] = {"Phy": PHYSICS, "VQ": QUALITY}
    for aspect, every in chosen.items():
        asked = [check for check in every if not check.needs or _has(there, check.needs)]
        kept = [check for check in asked if not _has(low, check.contradicted)][:PAIRS]
        seldom_contradicted = [check for check in reversed(asked) if check not in kept]
        chosen[aspect] = (*kept, *seldom_contradicted[: max(FEWEST - len(kept), 0)])
    return chosen


def _has(low: str, stems: str) -> bool:
    return bool(re.search(rf"(?<![a-zà-ÿ])(?:{stems})", low))


def yesno(chosen: dict[Aspect, tuple[Check, ...]], heldout: bool = False) -> list[Question]:
    """Every property both ways, half a weight each."""
    made = []
    for aspect, kept in chosen.items():
        for check in kept:
            good, bad = (check.good_heldout, check.bad_heldout) if heldout else (check.good, check.bad)
            made.append(Question(aspect, good + ANSWER, "yes", weight=0.5, name=check.name))
            made.append(Question(aspect, bad + ANSWER, "no", weight=0.5, name=check.name))
    return made


def dense(chosen: dict[Aspect, tuple[Check, ...]]) -> list[Question]:
    """One explanation of each aspect."""
    physics, quality = ([check.clause for check in chosen[aspect]] for aspect in ("Phy", "VQ"))
    motion = "Explain whether the motion in this video is physically plausible."
    plausible = f"The motion is physically plausible: {'; '.join(physics)}."
    good = f"The video is {', '.join(quality[:-1])} and {quality[-1]}."
    return [
        Question("Phy", motion, plausible, "dense", name="plausible"),
        Question("VQ", "Explain the visual quality of this video.", good, "dense", name="quality"),
    ]
