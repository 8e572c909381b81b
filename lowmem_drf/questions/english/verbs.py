"""Verbs that video prompts use, in all their forms. A word that is not here is no verb, unless it ends in -ing."""

from __future__ import annotations

from lowmem_drf.questions.english.lexicon import wordset

REGULAR = wordset(
    """
    accelerate accept accompany add adjust admire advance aim alight amble appear applaud approach argue arrange arrive ascend ask
    assemble assist attach attack attempt babysit backflip bake balance bark bathe battle beam belong bend bid billow blast blaze blend
    blink block bloom blossom blur blush board bob boil bolt bounce bow box brake brew brighten brush bubble buckle burn burst bustle
    button buzz call canter capture caress carpet carry cartwheel carve cascade cast celebrate change chant charge chase chat check
    cheer chew chirp chop circle clap clash clasp clean clear cleave climb cling close cluster clutch coast coil collaborate collapse
    collect collide comb combine compete compose conduct connect contain continue contort converge cook count cover crack crackle cradle
    crash crawl create creep croak crochet cross crouch crowd crown crumble crumple crush cry cuddle curl curve cycle dance dangle dart
    dash debate decorate deflate deliver demonstrate depart depict descend destroy devour dice dig dine dip disappear discuss dismantle
    dispense display dissect dissolve dive dock dodge dominate dot double drag drain drape drench dress dribble drift drip drizzle drop
    drum duel dunk dust dwarf edge embrace embroider emerge empty encase encircle engage engrave engulf enjoy enter erode erupt escape
    etch evaporate evolve examine exchange exercise exit expand explain explode explore extend face fade fall fan fasten feature fence
    fetch fiddle fidget file fill film finish fish fix flank flap flare flash flee flex flick flicker flinch flip flit float flock flood
    flow flower flutter foam focus fold follow form frame frolic frost frown fry fumble gallop garnish gasp gather gaze gesture giggle
    glance glaze gleam glide glimmer glimpse glint glisten glitter glow glue gnaw grab grate graze greet grill grimace grin grind grip
    groom growl guard guide gulp gush hail hammer hand harvest hatch haul head heave help hem hesitate hike hiss hobble hoist honk hop
    house hover howl hug hula hum hunch hunt hurl hurry ignite illuminate illustrate imagine inch inflate infuse inhale inscribe inspect
    install interact invade iron irrigate jam jiggle jive jog join jolt jostle juggle jump kayak kick kiss knead kneel knit knock labor
    labour ladle land lap lash lasso laugh launch lean leap level lick lift light line linger listen litter live load lob locate lock
    look loom loop loosen lounge lower lumber lunge lurch maneuver manoeuvre march marinate mark mask massage measure meditate melt mend
    merge milk mimic mince mingle miss mix mold moo moor mop morph mould mount mourn move mow munch mutter nail nap narrate navigate
    near neigh nest nestle nibble nod nudge nurse nuzzle obscure observe occupy offer open operate orbit overflow overlook own pace pack
    paddle paddleboard paint parachute parade park pass patrol pave paw peck pedal peek peel peer perch perfect perform pet photograph
    pick pierce pile pilot pirouette pitch place plank plant plate play plod plop plough plow pluck plug plummet plunge pogo point poke
    polish pop pose position pounce pound pour pout practice practise praise pray preen prepare present press primp print prod project
    prowl prune pull pulsate pulse pummel pump punch purr push putt quiver race radiate rage rain raise rake ram rappel rattle reach
    react rearrange recline reel reflect rehearse rejoice relax release reload remain remove repair reply rescue rest resurface retreat
    return reveal revolve ring ripen ripple roam roar roast rock roll roost rot rotate row rub rummage rush rustle sail salute sample
    sashay saunter savor savour saw scale scamper scan scatter scold scoop score scramble scrape scratch scream screw scroll scrub
    sculpt scurry scuttle seal sear search season seat secure serve sew shade shape share sharpen shatter shave shield shift shimmer
    shimmy shiver shoulder shout shovel shower shroud shrug shudder shuffle sift signal silhouette simmer sip sit sizzle skate
    skateboard sketch skewer ski skid skim skip skitter skulk skydive slam slap slice slip slither slouch slow slump slurp smash smell
    smile smoke smolder smooth smoulder snap snarl sneak sneeze snicker sniff snip snooze snore snorkel snow snowboard snuggle soak soar
    sob solder solve somersault sort spar spark sparkle speed spike spill spin spiral splash splatter splinter spray spread sprinkle
    sprint sprout spurt squat squawk squeal squeeze squint squirm squirt stack stagger stain stalk stamp stare start stay steam steer
    step stir stitch stomp stoop stop strap stretch stride stripe stroke stroll struggle strum strut study stuff stumble submerge suit
    sunbathe support surf surface surge surround survey suspend swarm swat sway swell swerve swipe swirl swish swivel swoop tackle talk
    tangle tango tap taper taste taxi tease teleport tend tether thread throb thunder tickle tie tighten tilt tinker tiptoe toast top
    topple toss totter touch tour tow tower track trail train tramp trample transform transition transport trap travel tread trek
    tremble trickle trim trot trudge trundle try tuck tug tumble turn tweet twerk twinkle twirl twist twitch type unbutton unfold unfurl
    unite unlace unload unlock unpack unplug unroll unscrew untie unveil unwrap use vanish varnish vault veil vibrate vlog volley waddle
    wade wag wait wake walk wallow waltz wander warm wash watch water wave weather weed weigh welcome weld wet wheel whip whirl whisk
    whisper whistle whizz wield wiggle wilt wince wink wipe wither wobble work wrap wrestle wriggle yank yawn yell zigzag zip zoom
    """
)

IRREGULAR = {
    "be": "is was been", "bear": "bears bore borne", "begin": "begins began begun", "bite": "bites bit bitten", "blow": "blows blew blown",
    "break": "breaks broke broken", "bring": "brings brought brought", "build": "builds built built", "buy": "buys bought bought",
    "catch": "catches caught caught", "choose": "chooses chose chosen", "come": "comes came come", "cut": "cuts cut cut", "draw": "draws drew drawn",
    "drink": "drinks drank drunk", "drive": "drives drove driven", "eat": "eats ate eaten", "fall": "falls fell fallen", "feed": "feeds fed fed",
    "feel": "feels felt felt", "fight": "fights fought fought", "fly": "flies flew flown", "freeze": "freezes froze frozen", "get": "gets got got",
    "give": "gives gave given", "go": "goes went gone", "grow": "grows grew grown", "hang": "hangs hung hung", "hide": "hides hid hidden",
    "hit": "hits hit hit", "hold": "holds held held", "keep": "keeps kept kept", "lead": "leads led led", "leave": "leaves left left", "lie": "lies lay lain",
    "lay": "lays laid laid", "light": "lights lit lit", "make": "makes made made", "meet": "meets met met", "put": "puts put put",
    "read": "reads read read", "ride": "rides rode ridden", "ring": "rings rang rung", "rise": "rises rose risen", "run": "runs ran run",
    "see": "sees saw seen", "sell": "sells sold sold", "send": "sends sent sent", "set": "sets set set", "shake": "shakes shook shaken",
    "shine": "shines shone shone", "shoot": "shoots shot shot", "show": "shows showed shown", "shrink": "shrinks shrank shrunk",
    "sing": "sings sang sung", "sink": "sinks sank sunk", "sit": "sits sat sat", "sleep": "sleeps slept slept", "slide": "slides slid slid",
    "speak": "speaks spoke spoken", "spin": "spins spun spun", "split": "splits split split", "spring": "springs sprang sprung",
    "stand": "stands stood stood", "steal": "steals stole stolen", "stick": "sticks stuck stuck", "strike": "strikes struck struck",
    "sweep": "sweeps swept swept", "swim": "swims swam swum", "swing": "swings swung swung", "take": "takes took taken",
    "teach": "teaches taught taught", "tear": "tears tore torn", "throw": "throws threw thrown", "wear": "wears wore worn", "weave": "weaves wove woven",
    "win": "wins won won", "wind": "winds wound wound", "write": "writes wrote written", "weep": "weeps wept wept", "dream": "dreams dreamt dreamt",
    "cling": "clings clung clung", "fling": "flings flung flung", "creep": "creeps crept crept", "leap": "leaps leapt leapt", "say": "says said said",
    "find": "finds found found", "lose": "loses lost lost", "tell": "tells told told", "spread": "spreads spread spread", "shut": "shuts shut shut",
    "burst": "bursts burst burst", "bend": "bends bent bent", "dig": "digs dug dug", "kneel": "kneels knelt knelt", "become": "becomes became become",
    "wake": "wakes woke woken", "have": "has had had", "think": "thinks thought thought", "stride": "strides strode stridden",
}  # fmt: skip
"""Base -> third person, past, participle."""

DOUBLED = {"begin", "permit", "forget"}
NEVER = {"left", "rose", "shot", "wound", "bore", "lit", "rung", "stuck", "sewn"}
"""Past forms that are nearly always something else in a caption."""
NOUNY = wordset(
    """
    arches beams blooms blossoms boards boats bows boxes brushes bubbles butterflies buttons cards clouds colors colours cooks cracks
    crowds dances drinks drops drums dusts falls fans fences files fish flies flocks floods flowers folds forms frames
    grills guards hands harvests heads houses irons kisses lands leaves lights lines loads loops marks masks moors mops nests nurses
    offers packs paddles paints parks peels pets piles pilots pitches plants plates pots presents presses prints races rakes rams ranks
    rings ripples rocks rolls rows sails scales seasons seats shades shadows shapes shares shots shovels showers skates sketches skis
    slices smiles spaces sparks spirals splashes sprouts squats stacks stalks stamps steams steps stitches stops strikes stripes
    students surfaces swarms swings swirls tackles taps tears ties tilts toasts tops tours towers tracks trails trains trims trips turns
    types uses views visits walks watches waters waves works wraps zips
    """
)
"""-s forms that are read as plural nouns unless a single subject stands before them."""

VOWELS = "aeiou"


def ing(base: str) -> str:
    """``run`` -> ``running``."""
    if base.endswith("ie"):
        return base[:-2] + "ying"
    if base.endswith("e") and not base.endswith(("ee", "oe", "ye")) and base not in {"be", "singe"}:
        return base[:-1] + "ing"
    return _double(base) + "ing"


def third(base: str) -> str:
    """``chase`` -> ``chases``, ``have`` -> ``has``."""
    if base in IRREGULAR:
        return IRREGULAR[base].split()[0]
    if base.endswith("y") and base[-2:-1] not in VOWELS:
        return base[:-1] + "ies"
    return base + ("es" if base.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")


def _past(base: str) -> str:
    if base.endswith("e"):
        return base + "d"
    if base.endswith("y") and base[-2:-1] not in VOWELS:
        return base[:-1] + "ied"
    return _double(base) + "ed"


def _double(base: str) -> str:
    """The last consonant twice where English wants it: one short vowel before it, in a word of one syllable."""
    short = len(base) > 2 and base[-1] not in VOWELS + "wxyh" and base[-2] in VOWELS and base[-3] not in VOWELS
    syllables = sum(a in VOWELS and b not in VOWELS for a, b in zip(base, base[1:] + "b", strict=True))
    qu = base[-3:-2] == "u" and base[-4:-3] == "q"
    return base + base[-1] if (short or qu) and (syllables == 1 or base in DOUBLED) else base


def _table() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = {}

    def put(word: str, form: str, base: str) -> None:
        if word not in NEVER:
            table.setdefault(word, {}).setdefault(form, base)

    for base in (*IRREGULAR, *sorted(REGULAR)):
        if base == "be":
            continue
        past, participle = IRREGULAR[base].split()[1:] if base in IRREGULAR else (_past(base),) * 2
        for word, form in (
            (base, "base"),
            (third(base), "s"),
            (ing(base), "ing"),
            (past, "past"),
            (participle, "part"),
        ):
            put(word, form, base)
        if base.endswith("l") and base[-2] in VOWELS:  # British travelling, travelled
            put(base + "ling", "ing", base)
            put(base + "led", "past", base)
            put(base + "led", "part", base)
    return table


FORMS = _table()
"""Word -> {form: base}; forms are ``base``, ``s``, ``ing``, ``past`` and ``part``."""

STATIVE = wordset(
    """
    crouch hang hover kneel lean lie live loom lounge meditate nestle park perch pose recline relax remain rest seat sit sleep snooze
    squat stand stay tower wait
    """
)
"""Verbs after which ``on the sofa`` says where their subject is."""

INTRANSITIVE = wordset(
    """
    appear arrive bounce come crawl creep cry dance descend disappear dive drift emerge erupt explode fall flicker gallop gaze glide
    glow go hop jump kneel laugh leap lie look race remain rise run rush shine sit skip sleep smile soar sparkle sprint stand stare stay
    stroll swim talk trot vanish wait walk wander
    """
)
"""Verbs whose past form is no passive."""

TAKES_PREPOSITION = wordset(
    """
    aim bark become belong bow burst change chat climb cling collide compete consist cover crash dissolve dress enter evolve explode
    fill focus gaze gesture glance grin grind head interact laugh lean listen look melt merge morph nod pass peer play point pray reach
    search smile speak stare surround talk transform turn wait wave wink
    """
)
"""Verbs that say little without the phrase that follows them."""

MANNER_TO = {"begin", "start", "try", "attempt", "continue", "prepare", "struggle", "appear", "stop"}
"""Verbs that go on with ``to`` and another verb."""

ENFOLDING = wordset(
    """
    cover surround fill line decorate dress coat drench soak dot cap dust blanket adorn wrap bathe litter carpet shroud engulf encase frame top flank make
    build tie
    """
)
"""Participles that say nothing without the phrase that follows them."""

CAUSATIVE = {"make", "let", "help", "watch", "see"}
"""``makes a rabbit disappear``"""

SHOWING = {"see", "show", "depict", "capture", "picture", "view", "feature"}
"""``is seen``: said of the video, not of the world."""

PHRASAL = {
    "blow out", "break down", "clean up", "cut down", "cut up", "dig up", "fill up", "flip over", "hang up", "hold up", "kick up",
    "knock down", "knock over", "lay down", "lift up", "light up", "open up", "pick up", "pour out", "pull out", "pull up", "push over",
    "put down", "put on", "put out", "roll up", "set up", "take off", "take out", "tear down", "throw away", "tip over", "try on",
    "turn off", "turn on", "wipe off", "zip up",
}  # fmt: skip
"""Verbs whose preposition is part of them: what follows is their object."""

UNSEEN = {"say", "tell", "think", "find", "lose"}
"""Verbs that a silent clip cannot show."""

INANIMATE = wordset(
    "flow blow flutter billow ripple shimmer glow burn shine rise fall swirl drift flicker steam gleam glisten reflect sway"
)
"""Verbs of things: after "a woman with a scarf", ``fluttering`` is said of the scarf."""
