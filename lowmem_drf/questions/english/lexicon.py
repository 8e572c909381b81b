"""Word lists: the closed classes of English and the adjectives that video prompts use. Nouns are in ``nouns``, verbs in
``verbs``."""

from __future__ import annotations


def wordset(text: str) -> frozenset[str]:
    """The words of a text. An underscore joins words that belong together (``in_front_of``)."""
    return frozenset(text.split())


NUMBERS = {
    "one": 1, "single": 1, "lone": 1, "solitary": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip
DETERMINERS = wordset("a all an another any both each every no some that the these this those")
POSSESSIVES = {"his": "he", "her": "she", "hers": "she", "its": "it", "their": "they", "my": "", "our": "", "your": ""}
PRONOUNS = {
    "he": "he",
    "him": "he",
    "she": "she",
    "it": "it",
    "they": "they",
    "them": "they",
    "himself": "he",
    "herself": "she",
    "itself": "it",
    "themselves": "they",
}
QUANTIFIERS = wordset("countless dozen dozens few hundreds many multiple numerous several thousands various")
BE = wordset("'re 's am are be been being is was were")
HAVE = wordset("had has have having")
MODALS = wordset("can could did do does may might must should will would")
CONJUNCTIONS = wordset("& and but or plus then")
SUBORDINATORS = wordset("after although as because before if once so though until when where whereas while whilst")
RELATIVES = wordset("that which who whose")
PARTICLES = wordset(
    """
    along apart around away back backward backwards by down downward downwards forward forwards home left off out over overhead past
    right sideways together up upward upwards
    """
)
PREPOSITIONS = wordset(
    """
    aboard about above across against along alongside amid amidst among amongst around as_well_as at at_the_bottom_of at_the_center_of
    at_the_edge_of at_the_end_of at_the_foot_of at_the_top_of atop away_from because_of behind below beneath beside between beyond by
    close_to down during for from in in_between in_front_of in_the_center_of in_the_centre_of in_the_corner_of in_the_middle_of inside
    instead_of into like near next_to of off on on_both_sides_of on_either_side_of on_the_edge_of on_the_side_of on_top_of onto opposite
    out out_of outside over past round such_as through throughout to toward towards under underneath up upon via with within without
    """
)
ADVERBS = wordset(
    """
    above again almost aloft alone also always away below clearly completely downstream downtown each_other even eventually everywhere
    far fast finally fully half hand_in_hand here high in_unison indoors inside just low meanwhile mostly nearby never not now often
    once one_another only outdoors outside overhead partially quite rather really side_by_side slightly slowly so sometimes still
    straight suddenly there throughout together too twice underneath underwater upside upside_down upstream very well
    """
)
NOT_ADVERBS = wordset(
    """
    ally assembly belly bubbly bully burly butterfly chilly costly cuddly curly daily deadly doily dragonfly early elderly family
    firefly fly friendly frilly ghostly gully heavenly hilly holy homely italy jelly jolly july leisurely lily lively lonely lovely oily
    prickly rally reply scaly silly smelly stately supply trolley ugly valley wobbly woolly wooly wrinkly
    """
)
COLORS = wordset(
    """
    amber azure beige black blond blonde blue bronze brown burgundy charcoal copper coral cream crimson cyan emerald ginger gold golden
    gray green grey indigo ivory khaki lavender lilac magenta maroon mint mustard navy olive orange pastel peach pink purple red ruby
    scarlet silver tan teal turquoise violet white yellow
    """
)
SHADES = wordset(
    """
    baby bright burnt dark deep dull dusty emerald forest hot light lime muted navy neon pale pastel rich royal sky soft vibrant vivid
    """
)
ADJECTIVES = COLORS | wordset(
    """
    abandoned abstract active adorable adult aerial african aged agile alien alone american ancient angry antique anxious aquatic arched
    arctic arid armored armoured ashen asian asleep athletic autumnal average awake baggy bald bare barefoot barefooted baroque barren
    bearded beautiful bespectacled big bioluminescent bitter blank bleak blind blurred blustery boiled bold bored braided brambly brave
    breathtaking breezy brief bright brilliant british broad broken brutalist bubbly bumpy bushy bustling busy calm candid candlelit
    caped careful carved caucasian cavernous certain checkered cheerful chequered chic chilly chinese chubby chunky circular classic
    classical clean clear clever cloudless cloudy clumsy cluttered coastal cobbled cold colonial colorful colossal colourful comfortable
    compact complex confident content cool cosy cozy cracked craggy crazy creamy creepy crisp crispy crowded cruel crunchy crusty
    crystalline curious curly curved cute damp dangerous dark dazzling dead decrepit deep delicate delicious dense derelict deserted
    detailed determined diagonal different dilapidated dim dirty disheveled dishevelled distant domed dotted dramatic dreamy drizzly dry
    dull dusty eager early eastern eclectic eerie elaborate elderly elegant embroidered empty endless energetic english enormous entire
    epic european evil excited exotic expansive expensive expressive exquisite faint fallen familiar famous fancy fast fat female
    ferocious fertile festive fierce fiery fine firm flaky flat floral floured flowery fluffy fluorescent foamy foggy foreign formal
    former fragile fragrant freckled free freezing french fresh friendly frightened frilly frizzy frosty frothy frozen full funny
    furious furry futuristic fuzzy gentle german giant gigantic gilded glamorous glassy glittery gloomy glorious glossy golden-haired
    gooey gorgeous gothic graceful grand granular grassy gravelly greasy great greek grim grimy gritty grubby grumpy hairy handmade
    handsome happy hard harsh hazy healthy heavy hefty hidden high hilly historic hollow holographic holy hooded horizontal hot huge
    humanoid humble humid icy identical imaginary immaculate immense immersive imposing impressive incandescent indian industrial infant
    innocent intense interested intricate iridescent irish italian jagged japanese jolly joyful joyous juicy jumpy juvenile kind
    kneeling knotty korean lacy lanky large last late latter lavish lazy leafy lean leathery left lifelike light lit little lively
    loaded lone lonely long loose loud lovely low lower loyal lucky luminescent luminous lumpy lunar lush luxurious luxury magical
    magnificent main majestic male masked massive matte mature meaty mechanical medieval melancholic mellow menacing messy metallic
    mexican middle-aged mighty mini miniature minimal minimalist misty modern moist moody moonlit mossy mountainous muddy muggy
    multi-colored multicolored multicoloured muscled muscular mushy musical mysterious mystical mythical naked narrow native natural
    naughty near neat nervous new next nice nocturnal noisy northern nostalgic nutty oblong odd old one-eyed opalescent opaque open
    opulent orderly ordinary organic ornate other outdoor oval overall overcast overgrown own pale panoramic parallel pastel-colored
    pasty patient paved peaceful pearly pebbly perfect petite phosphorescent picturesque plaid plain playful pleasant plump pointed
    pointy polar polished polite polka-dotted poor popular portable powdery powerful precious pretty pristine private professional proud
    puffy pure quaint quick quiet quilted radiant ragged rainy ramshackle rapid rare raw real realistic rectangular reflective regal
    relaxed remote retro rich rife ripe roasted robed robotic robust rocky romantic rosy rough round royal rubbery rugged ruined rural
    russian rustic rusty sad safe salty same sandy satin satisfied scared scary scenic scorching scruffy sea-green secluded senior
    sequined serene serious shabby shadowy shaggy shallow sharp shaven sheer shimmery shiny short shy sick silent silky silly silvery
    simple single skilled skimpy skinny sleek sleepy slender slick slim slimy slippery slow slushy small smart smoky smooth smug
    snowless snowy snug soft solar sole solemn solid somber sombre sooty sophisticated southern spacious spanish sparkly sparse speckled
    spectacular spherical spicy spiky spiny spiral spooky sporty spotless square stable stark starlit starry startled stationary steady
    steep stern sticky stiff still stocky stormy straight strange striking stringy striped stripy strong stubbly stubby stunning sturdy
    stylish subtle sudsy sunken sunlit sunny surreal swampy sweaty sweet sweltering swift swollen symmetrical tabby tall tame tanned
    tartan tasty tattered tattooed teen teenage tender tense terraced thick thin thorny tidy tight tiny tired toned torn tousled
    towering traditional tranquil translucent transparent triangular tribal tropical turbulent turkish twinkly twisty ugly undulating
    uniformed unique unkempt unpaved unseen unshaven untidy unusual upper upright urban vast vaulted veiled velvety verdant vertical
    vibrant victorian vietnamese vintage violent vivid warm wavy waxy weary weathered weedy western wet whimsical whole wicked wide wild
    windy wintry wiry wise wispy wobbly wooden woody woolen woollen woolly wooly worn wounded woven wrinkled young youthful zen
    """
)
NO_QUESTION = wordset(
    """
    adult average baby back certain close different entire familiar father first former fourth free front individual inner last late
    latter left lone lower main mother native near nearby next other outer overall own real rife right same second single single-handed
    sole solitary third unique unseen unusual upper various visible whole
    """
)
"""Adjectives that nobody can see or that only point: read, never asked."""
ADJECTIVE_ENDINGS = ("ful", "ous", "less", "ish", "able", "ible", "like", "esque", "ive", "tic", "ical")
NOT_ADJECTIVES = wordset(
    """
    antic archive attic bookish british cable captive catfish chive clinic constable crayfish critic detective dish dive english
    executive fabric fictive finish fish goldfish handful handkerchief harness hive house jellyfish locomotive mouse mouthful mystic
    native octopus olive parish plastic polish radish relative spanish spoonful starfish swordfish table vegetable vehicle wireless wish
    """
)
FOREIGN = wordset(
    """
    auf avec con dans das de del della dem den der di die du e een ein eine einen el em en est et ett het il im ist la las le les los
    mit na nel o och os por pour på que som sur um uma un und une wird y è
    """
)
PROPER = wordset(
    """
    africa african alps america american amsterdam antarctica arctic asian australia bangkok beijing berlin brazil british brooklyn
    california canada cappadocia china chinese christmas disney dubai egypt eiffel england english europe european everest france french
    fuji german ghibli gogh greek halloween hawaii hong iceland india indian ireland irish italian italy japan japanese jupiter kong
    korean kyoto london manhattan mars mexican mexico monet moscow norway paris picasso pixar rome russian sahara santa santorini saturn
    scotland shanghai spain spanish sydney thailand tokyo turkish venice venus victorian vietnam vietnamese york
    """
)
"""Words that keep their capital letter where the prompt has no lower case to tell."""
ALSO_NOUNS = wordset(
    """
    adult cold dark deep elderly female gold human iron light male native open orange rose round silver square toast
    """
)
"""Adjectives that are nouns just as often."""
PLANT_COLORS = wordset(
    """
    amber coral cream emerald ginger ivory lavender lilac mint mustard olive orange peach rose ruby tan violet
    """
)
ALONE = wordset("single lone solitary")
"""Adjectives that count one."""
