"""What is asked of every clip: physical fidelity and visual quality, each property asked for and its defect asked for,
so that a critic that says yes to everything gains nothing. A property that the prompt itself breaks (melting, film
grain) is not asked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.facts import Facts
from lowmem_drf.questions.english.lexicon import wordset
from lowmem_drf.types import Aspect


@dataclass(frozen=True, slots=True)
class Check:
    aspect: Aspect
    name: str
    good: tuple[str, str]
    """Answered yes by a good clip: the training wording and the held-out one."""
    bad: tuple[str, str]
    """Answered no by a good clip."""
    clause: str
    """Its part of a dense explanation."""
    cancelled: str
    """Stems in the prompt that contradict it."""


def _any(*stems: str) -> str:
    return "|".join(stems)


CHANGE = r"melt|morph|transform|metamorph|turn(?:s|ing|ed)? into|becom|evolv|dissolv|time-?lapse|hyper-?lapse"
BREAK = (
    r"explod|explos|shatter|crumbl|collaps|break(?:s|ing)?\b|broke|burst|smash|crush|burn|disintegrat|erupt|splash|tear(?:s|ing)? apart|demolish|slic"
    r"|chop|cut(?:s|ting)? "
)
GROW = (
    r"grow(?:s|n|ing|th)?\b|grew|shrink|shrank|inflat|deflat|bloom|blossoming|unfold|expand|stretch|swell|sprout|wilt|ripen|rott|wither|knead|mold"
    r"|mould|squish|squeez|deform|distort|bend"
)
LIQUID = r"liquid|fluid|ink|smoke swirl|lava|abstract|fractal|swirl of|kaleidoscop"
UNREAL = r"surreal|psychedelic|dreamlike|abstract|magic|spell|ghost|spirit|teleport|glitch|impossible|escher|dali|fractal|kaleidoscop"
PAINTED = (
    r"water-?colou?r|paint(?:ing|ed|erly)|anime|manga|cartoon|comic|pixel[- ]art|8-bit|16-bit|low[- ]poly|sketch|drawing|illustrat"
    r"|line[- ]art|ink[- ]wash|ukiyo|pop[- ]art|impressionis|expressionis|cubis|claymation|stop[- ]motion|lego|paper[- ]?cut"
    r"|animation|animated|ghibli|pixar|disney|van gogh|picasso|monet|cel[- ]shad|style of"
)

CHECKS = (
    Check(
        "Phy",
        "shape",
        (
            "Do solid objects keep their shape throughout the video?",
            "Does every solid thing stay the same shape in this clip?",
        ),
        (
            "Does any solid object change its shape unnaturally in the video?",
            "Can you see something deform without a cause in this clip?",
        ),
        "solid things keep their shape",
        _any(
            CHANGE,
            BREAK,
            GROW,
            LIQUID,
            UNREAL,
            r"shape-?shift",
        ),
    ),
    Check(
        "Phy",
        "appear",
        (
            "Does everything in the video stay in existence, with nothing appearing from nowhere?",
            "Do all things in this clip persist from frame to frame?",
        ),
        ("Does anything suddenly appear or vanish in the video?", "Can you see something pop in or out of this clip?"),
        "nothing appears or vanishes",
        _any(
            CHANGE,
            UNREAL,
            r"explod|explos|burst|appear|disappear|vanish|fad(?:e|es|ing)|emerg|materiali|evaporat|blink|flash|firework|lightning|bubbl"
            r"|spark|flicker|fast cuts|montage|jump cut|invisib",
        ),
    ),
    Check(
        "Phy",
        "smooth",
        ("Is the motion in the video smooth and continuous?", "Does everything move fluidly in this clip?"),
        (
            "Are there sudden jumps in the motion in the video?",
            "Can you see anything skip from one place to another in this clip?",
        ),
        "the motion is smooth, without jumps",
        (
            r"time-?lapse|hyper-?lapse|stop[- ]motion|claymation|clay animation|glitch|teleport|jump cut|fast cuts|quick cuts"
            r"|montage|strob|jerk|stutter|robotic|jitter|shaky|stop-?action"
        ),
    ),
    Check(
        "Phy",
        "contact",
        (
            "Do gravity and contact between things look plausible in the video?",
            "Do things rest on and touch one another as in the real world in this clip?",
        ),
        (
            "Do things float without support or pass through each other in the video?",
            "Can you see anything defy gravity or go through something solid in this clip?",
        ),
        "gravity and contact look right",
        _any(
            UNREAL,
            r"float|levitat|weightless|zero[- ]gravity|gravity|outer space|in space|spacewalk|astronaut|spaceship|spacecraft|galaxy"
            r"|nebula|underwater|hover|pass(?:es|ing)? through|phas(?:e|es|ing) through|walks? through walls|upside[- ]down|morph"
            r"|antigravity|flying (?:car|carpet|whale|island|house|elephant|vehicle)|superhero|fairy|wizard|witch|hologra|mars\b|moon\b",
        ),
    ),
    Check(
        "Phy",
        "body",
        (
            "Do the bodies in the video have the right number of limbs and natural proportions?",
            "Are arms, legs, hands and heads formed correctly in this clip?",
        ),
        (
            "Are there deformed, extra or missing body parts in the video?",
            "Can you see limbs that are malformed or too many in this clip?",
        ),
        "bodies are complete and well proportioned",
        _any(
            CHANGE,
            UNREAL,
            r"zombie|alien|monster|mutant|demon|creature|headed|one-?eyed|one-?legged|cubis|picasso|headless|skeleton|amput"
            r"|three-legged|hybrid|centaur",
        ),
    ),
    Check(
        "Phy",
        "constant",
        (
            "Does everything in the video keep its own size and color?",
            "Do things stay equally large and keep their colors in this clip?",
        ),
        (
            "Does anything change its size or color for no reason in the video?",
            "Can you see something switch its color or grow in this clip?",
        ),
        "size and color stay constant",
        _any(
            CHANGE,
            GROW,
            LIQUID,
            UNREAL,
            r"explod|explos|burn|colou?r-?chang|chang\w* colou?r|changing|chameleon|rainbow|iridescen|pulsat|shimmer|glow|flash|blink|neon"
            r"|rust(?:s|ing|y)?\b|fad(?:e|es|ing)|disco|firework|flicker|sunset to|day to night|seasons",
        ),
    ),
    Check(
        "VQ",
        "sharp",
        ("Is the video sharp and clear?", "Are the edges and details of this clip crisp?"),
        ("Is the video blurry?", "Does this clip look out of focus?"),
        "sharp",
        (
            r"blur|bokeh|depth of field|soft[- ]focus|out of focus|unfocused|rack focus|dreamy|dreamlike|haz[ey]|mist|fog"
            r"|impressionis|monet|ink[- ]wash|vhs|found footage|pixel[- ]art|8-bit|16-bit|underwater|smok|tilt-?shift"
            r"|low[- ]resolution|vaseline|old film|super 8"
        ),
    ),
    Check(
        "VQ",
        "noise",
        ("Is the video free of noise and artifacts?", "Is the picture of this clip clean?"),
        ("Is there visible noise or grain in the video?", "Can you see blocky artifacts or speckles in this clip?"),
        "clean",
        (
            r"nois[ey]|grain|vintage|vhs|\b(?:8|16|35)mm|super 8|old film|old movie|silent film|retro|glitch|found footage|cctv"
            r"|surveillance|night vision|film noir|polaroid|analog|scratch|low[- ]quality|pixel[- ]art|8-bit|16-bit|lo-?fi"
            r"|tv static|static noise|sandstorm|snowstorm|blizzard|dust|archive|1\d[0-9]0s"
        ),
    ),
    Check(
        "VQ",
        "flicker",
        (
            "Is the brightness of the video stable from frame to frame?",
            "Does the light in this clip stay even over time?",
        ),
        ("Does the video flicker?", "Does the brightness of this clip jump up and down?"),
        "free of flicker",
        (
            r"flicker|strob|flash|lightning|thunder|candle|\bfires?\b|firelight|fireplace|campfire|bonfire|flame|torch|firework"
            r"|neon|blink|glitch|vhs|old film|old movie|silent film|super 8|8mm|16mm|film noir|disco|nightclub|concert|rave\b|twinkl"
            r"|sparkl|time-?lapse|hyper-?lapse|explod|explos|stop[- ]motion|muzzle|pulsat|welding|sparks"
        ),
    ),
    Check(
        "VQ",
        "warp",
        ("Is the picture free of warping and distortion?", "Do straight lines and outlines stay true in this clip?"),
        ("Is the picture warped or distorted?", "Can you see bent or wobbling outlines in this clip?"),
        "free of distortion",
        _any(
            CHANGE,
            UNREAL,
            r"fish-?eye|distort|warp|ripple|heat haze|mirage|funhouse|dolly zoom|vertigo|cubis|picasso|van gogh|wavy|liquid"
            r"|underwater|bend|twist|swirl|anamorphic|lens flare|crystal ball|raindrops on|black hole",
        ),
    ),
    Check(
        "VQ",
        "light",
        (
            "Are the lighting and colors of the video natural?",
            "Do the colors and the light of this clip look true to life?",
        ),
        (
            "Are the colors of the video oversaturated or the lighting unnatural?",
            "Does this clip have garish colors or wrong exposure?",
        ),
        "natural in light and color",
        _any(
            UNREAL,
            PAINTED,
            r"black[- ]and[- ]white|monochrom|b&w|noir|sepia|grayscale|greyscale|neon|cyberpunk|steampunk|vaporwave|synthwave"
            r"|vintage|retro|vhs|infrared|thermal|night vision|hologra|glow|vibrant|vivid|saturated|colou?rful|psychedel|fantasy"
            r"|sci-?fi|science fiction|alien|futuristic|disco|nightclub|bioluminesc|3d|cgi|render|duotone|silhouette|pastel|muted"
            r"|teal and orange|spotlight|laser|firework|aurora|northern lights|glitch|overexpos|underexpos|high[- ]contrast"
            r"|old film|super 8|8mm|cartoon|toys?\b|red light|blue light|dramatic light",
        ),
    ),
    Check(
        "VQ",
        "overlay",
        ("Is the picture free of watermarks, logos and captions?", "Is this clip free of stamps and overlaid writing?"),
        (
            "Does the video have a watermark, a logo or subtitles?",
            "Can you see a stamp or caption laid over this clip?",
        ),
        "without watermark or caption",
        (
            r"\x22|watermark|logo|subtitle|caption|title card|\btitles?\b|credits|\btext\b|lettering|typography|letters|\bwords?\b"
            r"|written|reads|saying|news|broadcast|scoreboard|hud\b|interface|screen|poster|billboard|advert|brand|label|sign\b"
            r"|signs\b|banner|timestamp|cctv|vhs|graffiti|jersey|menu|infographic|screencast|video game|gameplay|book|newspaper"
            r"|magazine"
        ),
    ),
)


def fluid(facts: Facts) -> bool:
    """The first thing in the picture has no shape of its own."""
    shapeless = wordset(
        "smoke fire flames flame clouds cloud waves wave water ink fog mist lava liquid paint steam swirl ocean river waterfall"
    )
    return bool(facts.subjects) and facts.subjects[0].key in shapeless


def checks(facts: Facts) -> tuple[Check, ...]:
    """The checks that hold for a good clip of this prompt."""
    low = facts.prompt.lower()
    living = any(entity.animate for entity in facts.subjects) or bool(
        set(re.findall(r"[a-z]+", low)) & (nouns.PERSON | nouns.ANIMALS)
    )
    kept = []
    for check in CHECKS:
        if re.search(rf"(?<![a-z])(?:{check.cancelled})", low) or check.name == "overlay" and facts.texts:
            continue
        if check.name == "body" and not living or check.name in {"shape", "constant"} and fluid(facts):
            continue
        kept.append(check)
    return tuple(kept)
