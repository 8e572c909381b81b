"""Nouns that change what is asked: people, animals, clothes, places, times, and those whose presence is no question.

There is no list of all nouns: a word that is nothing else is one.
"""

from __future__ import annotations

from lowmem_drf.questions.english.lexicon import wordset

GROUPS = wordset(
    """
    army array band bunch cluster collection colony couple crowd dozen dozens family fleet flock gaggle group handful herd hundreds
    litter lot number pack pair pod pride procession school series set swarm team thousands trio troupe variety
    """
)
"""Nouns before ``of`` that count what follows."""
MATERIALS = wordset(
    """
    aluminium aluminum bamboo brass brick bronze cardboard ceramic chrome clay concrete copper cotton crystal denim felt glass gold
    granite iron lace leather limestone linen marble metal oak paper pine plastic porcelain rubber sandstone silk silver steel stone
    straw velvet wicker wood wool
    """
)
IRREGULAR_PLURALS = wordset(
    """
    bikinis cacti cattle children dice feet firemen fishermen fungi geese graffiti men mice oxen people police policemen skis snowmen
    taxis teeth wolves women
    """
)
SINGULAR_S = wordset(
    """
    always atlas ballas bus canvas chess christmas gas gymnastics kansas las lens mars news pancreas paris perhaps physics series sports
    tennis texas towards venus
    """
)
PLURAL_ONLY = wordset(
    """
    binoculars boots clothes glasses gloves goggles headphones jeans leggings overalls pajamas pants pyjamas scissors shoes shorts socks
    stairs sunglasses trousers
    """
)
INVARIANT = wordset(
    """
    aircraft bison deer fish hovercraft jellyfish koi moose offspring salmon sheep shrimp spacecraft squid trout
    """
)
PERSON = wordset(
    """
    adult artist astronaut astronauts athlete athletes audience babies baby ballerina ballerinas barber barista boy boys bride brother
    brothers captain cellist chef chefs child children clown clowns commuters couple cowboy cowboys crowd cyclist cyclists dad daughter
    detective elf family father figure figures friends geisha gentleman gentlemen girl girls goalkeeper grandfather grandma grandmother
    grandpa groom guitarist guy guys human humans kid kids king knight knights ladies lady man mechanic men mermaid mom monk monks
    mother mum musician ninja ninjas nun nurse pedestrians people person pianist pilot pilots pirate pirates priest prince princess
    queen sailor sailors samurai scientist scientists shepherd sister sisters soldier soldiers son spectators student students superhero
    surgeon teenager teenagers toddler tourist tourists twins vampire vendor villagers violinist warrior warriors witch wizard woman
    women
    """
)
FEMALE = wordset(
    """
    actress ballerina bride daughter geisha girl girls goddess grandma grandmother lady mermaid mom mother mum nun princess queen sister
    waitress witch woman women
    """
)
MALE = wordset(
    """
    boy boys brother cowboy dad father fisherman gentleman grandfather grandpa groom guy king man men monk priest prince samurai son
    wizard
    """
)
ANIMALS = wordset(
    """
    alligator alpaca animal ant ape badger beagle bear beaver bee beetle bird bison buffalo bull bulldog bunny butterfly calf camel cat
    caterpillar chameleon cheetah chicken chihuahua chimpanzee cockatoo corgi cow crab creature crocodile crow cub dachshund dalmatian
    deer dinosaur dog dolphin donkey dove dragon dragonfly duck duckling eagle elephant elk falcon firefly fish flamingo foal fox frog
    gecko giraffe goat goldfish goose gorilla grasshopper gull hamster hare hawk hedgehog hen heron hippo horse hound hummingbird husky
    insect jaguar jellyfish kangaroo kingfisher kitten koala labrador ladybird ladybug lamb leopard lion lioness lizard llama lobster
    lynx macaw monkey moose moth mouse mustang octopus orangutan orca ostrich otter owl ox panda parrot peacock pegasus pelican penguin
    pet pig pigeon pony poodle puppy rabbit raccoon rat raven reindeer retriever rex rhino robin rooster salmon seabird seagull seahorse
    seal shark sheep shepherd sloth snail snake sparrow spider squid squirrel stag stallion starfish stingray stork swan tabby terrier
    tiger toad tortoise turkey turtle unicorn walrus whale wolf woodpecker zebra
    """
)
NOT_A_PERSON = wordset(
    """
    air altar amber anchor armor banner bar bear beaver beer binder blazer blender border boulder bumper burger butter calendar canister
    car caviar cellar center centre chair chamber chandelier charger cinder clear clover cluster collar color colour computer container
    cooker copper corner counter cover crater cruiser cucumber cylinder deer dinner dollar door drawer drier dryer ear elevator ember
    exterior feather fighter filler filter finger floor flower folder freighter fur gear ginger glacier guitar gutter hair hammer
    hamster hanger harbor heater helicopter humor interior jar jumper ladder lantern laser lavender layer leather letter lighter lobster
    locker marker matter meteor mirror mixer monitor motor mower nectar number order otter oyster pair panther paper pear pepper pier
    pillar planter platter poker poster powder power prayer printer projector propeller pulsar quarter radiator razor rear recorder
    river rocker roller rooster rudder saucer scar scooter sensor sewer shoulder shower shutter silver skyscraper slipper soccer speaker
    spear spider stair star steamer sticker streamer streetcar sugar summer supper sweater tear theater theatre tier tiger timber
    toaster tower tractor trailer trouser tumbler vapor vinegar water weather winter wrapper year
    """
)
CLOTHES = wordset(
    """
    apron armor armour attire backpack bandana beanie bikini blazer blouse boots bracelet cap cape cardigan cloak clothes clothing coat
    costume costumes crown dress dresses earrings gear glasses gloves goggles gown hard_hat hat hats headband headphones helmet hoodie
    jacket jackets jeans jersey jerseys jumper kilt kimono lab_coat leotard mask necklace outfit overalls pajamas pants poncho pyjamas
    raincoat robe robes sandals sari scarf shawl shirt shirts shoes shorts skirt sneakers spacesuit suit suits sunglasses sweater
    swimsuit t-shirt t-shirts tank_top tie tracksuit trench_coat trousers turban tutu tuxedo uniform uniforms veil vest wetsuit
    """
)
BODY = wordset(
    """
    antlers arm arms back beak beard belly body braids bun cheeks chest claws ear ears expression eye eyebrows eyes face feathers feet
    fin finger fingers fins foot freckles fur gaze hair hand hands head hips horns hull knees lap leg legs lips mane moustache mouth
    mustache neck nose paw paws ponytail scales shoulder shoulders skin smile tail teeth tentacles tongue trunk waist whiskers wing
    wings
    """
)
PLACES = wordset(
    """
    airport alley alleyway apartment aquarium arcade arena attic avenue backdrop background backyard bakery balcony ballpark ballroom
    bar barbershop barn basement bathroom battlefield bay bazaar beach bedroom bookstore boulevard boutique cafe café campsite canyon
    carnival castle cathedral cave cemetery chapel church cinema circus city cityscape classroom club coast coastline cockpit concert
    cornfield corridor countryside court courtyard crater crossroads desert diner dining_room driveway dunes dungeon environment factory
    fairground farm festival field fields fjord football_field forest forests galaxy gallery garage garden gardens glacier gorge
    grassland graveyard greenhouse gym hallway harbor harbour highlands highway hill hills hillside home hospital hotel house ice inn
    interior intersection island jungle kingdom kitchen lab laboratory lagoon lake lakeside land landscape landscapes lawn library
    living_room lobby lounge mall marina market mars marsh meadow metro metropolis monastery moon mosque mountain mountains mountainside
    museum nightclub ocean office orchard pagoda palace park parking_lot pasture path patio pavement pier pitch plain plains planet
    platform playground plaza pond pool porch port prairie pub racetrack rainforest ranch rapids ravine realm reef restaurant rink river
    riverbank riverside road roads rooftop room ruins runway salon saloon savanna savannah school sea seabed seafloor seaside setting
    shop shore shrine sidewalk skatepark skyline slope slopes snow space square stadium stage station steppe store stream street streets
    studio subway supermarket surface swamp swimming_pool tavern temple terrace terrain theater theatre town track trail train_station
    tundra tunnel underwater university valley valleys village vineyard warehouse waterfall waters wetland wharf wheatfield wilderness
    woods workshop world yard zoo
    """
)
PLACE_PREPOSITIONS = {
    "in": "in", "on": "on", "at": "at", "across": "in", "through": "in", "throughout": "in", "over": "over", "along": "along", "inside":
    "inside", "within": "in", "around": "in", "down": "on", "up": "on", "above": "above", "outside": "outside", "aboard": "aboard",
    "against": "against", "by": "by", "amid": "amid", "amidst": "amidst", "atop": "atop", "beneath": "beneath",
}  # fmt: skip
"""How an action runs through a place -> how a scene is set there."""
WITHIN = wordset(
    """
    avenue beach boulevard bridge coast coastline farm highway hill hillside ice lawn mountain path pavement pier platform playground
    road roads rooftop runway shore sidewalk slope slopes stage street streets surface track trail
    """
)
"""Places that one is on rather than in."""
TIMES = {
    "sunset": "at", "sunrise": "at", "dawn": "at", "dusk": "at", "twilight": "at", "night": "at", "nighttime": "at", "midnight": "at",
    "noon": "at", "midday": "at", "daybreak": "at", "nightfall": "at", "daytime": "in the", "day": "on a", "morning": "in the",
    "afternoon": "in the", "evening": "in the", "hour": "during the", "winter": "in", "summer": "in", "autumn": "in", "spring": "in",
    "fall": "in", "season": "in the", "rain": "in the", "snowfall": "in the", "fog": "in the", "mist": "in the", "storm": "in a",
    "thunderstorm": "in a", "blizzard": "in a", "snowstorm": "in a", "sandstorm": "in a", "drizzle": "in the", "downpour": "in a",
    "christmas": "at", "halloween": "on", "weather": "in", "moonlight": "in", "sunlight": "in", "candlelight": "in", "daylight": "in",
    "starlight": "in", "light": "in", "lighting": "in", "lights": "", "sunshine": "in", "darkness": "in", "glow": "in", "haze": "in the",
    "sun": "under the", "sky": "under the", "moon": "under the", "skies": "under", "stars": "under the",
}  # fmt: skip
"""Noun of time, weather or light -> the preposition it takes when the prompt has none."""
MOVING = wordset(
    """
    burn glow melt spin rotate fall roll flow rise run shine sparkle float fly flicker shimmer crash bubble boil wind move rush swirl drift bloom
    tower dangle hang sink swing blaze smoke steam speed blink flash sway drip crumble collapse explode spark smile laugh set sleep cry erupt
    gleam glisten glitter twinkle tumble cascade billow wave ripple churn smolder smoulder open close pulse pulsate revolve turn
    """
)
"""Verbs whose -ing form before a thing says what it does (``a spinning top``); others name its use (``a welding
torch``)."""
LIGHT = wordset("candlelight daylight glow light lighting moonlight starlight sunlight sunshine")
LOCATIVE = wordset(
    """
    air arms back background bottom center centre corner distance edge foreground front hand hands horizon lap left middle mouth rear
    right shoulder side sky top
    """
)
VAGUE = wordset(
    """
    aesthetic air ambiance ambience angle anybody anyone anything atmosphere back backdrop background badminton ballet baseball beauty
    bottom braid braids breeze bun camera center centre chess clip color colors colour colours composition contrast corner cricket day
    depth detail details direction directions distance edge effect elegance end energy environment everybody everyone everything feeling
    film focus footage foreground frame front game glow golf half hockey horizon hour image inside karate kind knot left life light
    lighting look middle moment moments mood motion movement movie music nobody nothing outside overall pace palette part parts
    perspective picture place poker ponytail position quality reality rest right salsa scene scenery sense setting shape shot side
    soccer solo somebody someone something song speed story style surface tag tango tennis time times tone top touch trailer type
    variety vibe video view volleyball waltz way wind yoga
    """
)
"""Nouns whose presence is no question."""
COMPOUNDS = wordset(
    """
    baking_tray bald_eagle bald_eagles barbed_wire baseball_bat beach_ball black_belt black_hole black_tea blue_whale boxing_gloves
    boxing_ring brown_bear cell_phone cherry_blossom cherry_blossoms chewing_gum christmas_lights city_lights climbing_wall clock_tower
    cruise_ship cutting_board dance_floor dining_room dining_table driving_range fairy_lights ferris_wheel fire_engine fire_hydrant
    fishing_boat fishing_boats fishing_rod flower_petals flying_saucer flying_saucers french_fries fried_egg fried_eggs fried_rice
    fruit_flies frying_pan full_moon golden_retriever golden_retrievers grand_piano great_wall great_white_shark green_tea grizzly_bear
    hard_hat headlights high_heels hiking_trail hot_air_balloon hot_air_balloons hot_dog hot_dogs ice_cream ice_skates lab_coat
    light_bulb light_bulbs light_rays light_saber light_trails living_room living_rooms merry-go-round milky_way mixing_bowl
    mobile_phone northern_light northern_lights ocean_waves old_town palm_leaves palm_trees paper_crane parking_garage parking_lot
    pine_trees pirate_ship playing_cards polar_bear polar_bears potted_plant potted_plants power_lines power_plant racing_car
    racing_cars racing_track rain_drops red_carpet red_panda red_pandas red_wine rocking_chair roller_coaster rolling_pin roof_rack
    running_shoes running_track sailing_boat sailing_boats sailing_ship scrambled_eggs sea_turtle sea_waves sewing_machine shooting_star
    shopping_mall skate_park skating_rink sleeping_bag snow_globe snow_leopard solar_panel solar_panels spinning_top spinning_wheel
    sports_car sports_cars spring_roll spring_rolls stained_glass steam_engine steam_locomotive steam_train street_light street_lights
    string_lights surfboard swimming_pool t-rex tall_ship tank_top teddy_bear teddy_bears traffic_jam traffic_light traffic_lights
    train_tracks training_ground tree_house trench_coat turning_table vending_machine walking_stick washing_machine watch_tower
    water_buffalo water_drops water_tower wedding_cake wedding_dress whipped_cream white_wine wild_boar wind_chimes wind_turbine
    wind_turbines window_box wrapping_paper
    """
)
"""Nouns of several words whose first word would otherwise be read as an adjective or a verb."""
ING_NOUNS = wordset(
    """
    anything awning beijing being bling boxing building buildings ceiling clearing clothing crossing darling duckling ducklings dwelling
    earring evening everything frosting icing king kings lighting lightning morning nothing opening painting paintings ping pudding
    railing railings ring rings sapling sibling siblings sing sling something spring starling stocking string strings surroundings thing
    things viking vikings wedding weddings wing wings
    """
)
ED_NOUNS = wordset(
    """
    bed biped bleed breed creed feed flatbed greed hundred moped need red reed riverbed seabed seaweed seed shed sled speed steed tweed
    watershed weed
    """
)
MASS = wordset(
    """
    beef beer blood bread butter cake cheese chicken chocolate clay coffee concrete condensation confetti corn cotton cream dew dough
    dust electricity energy fabric fire flour foam fog foliage food frost fruit fur furniture glass gold graffiti grass gravel hair hay
    honey ice ink ivy jam jewellery jewelry juice lava lemonade light lightning luggage machinery magma meat metal milk mist moonlight
    moss mud music neon oil paint paper pasta pavement pizza plasma pork pottery rain ramen rice salt sand silk silver slime smoke snow
    soup spaghetti steam straw sugar sunlight sushi sweat tea thunder traffic vegetation water wheat wind wine wood wool
    """
)
BACKDROPS = wordset("backdrop background")
SKY = wordset("moon skies sky stars sun")
IGNORED = wordset(
    """
    animation camera clip composition film focus footage frame image movie perspective photography scene sequence shot trailer video
    view visual visuals
    """
)
"""Nouns that mean the video itself: nothing is claimed of them."""
COLLECTIVE = wordset("army audience band couple crew crowd family flock group herd pair police staff team")
THE = wordset(
    """
    air background beach countryside desert distance foreground jungle ocean rain sea sky street wind
    """
)
PARTS = wordset(
    """
    back deck edge front image inside rear reflection reflections roof shadow shadows side sound surface top window windows
    """
)
"""What comes before ``of`` and does not move by itself."""
NATURAL = wordset(
    """
    blossom blossoms branch branches bush bushes cheese cone cones factory field fields flowers forest forests garden gardens grove
    juice leaf leaves mine needles oil petal petals plant plants quarry reef reefs root sauce seeds tea tree trees worker
    """
)
TOWNS = wordset(
    """
    city forest harbor harbour kitchen metropolis neighborhood neighbourhood room town village
    """
)
TOOLS = wordset(
    """
    axe bat broom brush camera chopsticks cloth finger fingers flashlight fork hammer hand hands hose knife ladle mop needle net
    paintbrush pen pencil pick racket rake rope saw scissors shovel spatula sponge spoon stick sword tongs tool tools torch towel whisk
    """
)
