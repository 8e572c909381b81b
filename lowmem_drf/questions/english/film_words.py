"""Camera and style in the words of video prompts, and phrases of captioners that are about the video instead of the
world."""

from __future__ import annotations

import re

from lowmem_drf.questions.english.lexicon import wordset

SHOT_WORD = r"(?:shots?|views?|angles?|perspective|footage|videos?|photography|photo|photograph|frame|framing|sequence|clip|camera|camerawork|scene)"
LEAD = (
    r"(?:\b(?:an?|the|in|as|with|from|filmed|shot|captured|using|featuring|through|by|then|into|to|via|and)\s+)*"
    r"(?:\b(?:slow|smooth|extreme|dramatic|sweeping|beautiful|stunning|breathtaking|steady|detailed|intimate|epic|long|full|soft|cinematic)\s+)*"
)
"""What may stand before a shot: ``in a slow …``."""
TAIL = (
    rf"(?:[\s-]+(?:{SHOT_WORD}|movements?|motion|lens|technique|effect))*"
    r"(?:\s+(?:of|showing|capturing|captures|shows|featuring|depicting)\b)?"
)
"""What may stand behind it: ``… shot of``."""
ALONE = r"(?:^|(?<=, )|(?<=\. )|(?<=; ))"

SHOTS = (
    (
        r"(?:ultra[- ])?wide(?:[- ]angle)?(?= (?:\w+ )?(?:shot|view|lens|footage|angle)|,|$)|wide[- ]angle",
        "a wide shot",
    ),
    (rf"drone(?=[- ]{SHOT_WORD}|[- ]photography)|{ALONE}drone(?=\s*[,.;]|\s*$)", "a drone shot"),
    (r"fpv", "an FPV shot"),
    (rf"aerial(?= (?:\w+ )?{SHOT_WORD}|\s*\x02)|{ALONE}aerial(?=\s*[,.;]|\s*$)", "an aerial view"),
    (r"bird'?s[- ]eye", "a bird's-eye view"),
    (r"overhead(?= (?:shot|view|angle|camera))", "an overhead shot"),
    (r"top[- ]down", "a top-down view"),
    (r"close[- ]?ups?", "a close-up"),
    (r"macro", "a macro shot"),
    (r"underwater(?= (?:shot|footage|view|video|scene))", "an underwater shot"),
    (r"lens[- ]flares?", "filmed with lens flare"),
    (r"establishing(?= shot)", "an establishing shot"),
    (r"medium(?= shot)", "a medium shot"),
    (r"long(?= shot)", "a long shot"),
    (r"full(?= shot)", "a full shot"),
    (r"low[- ]angle", "filmed from a low angle"),
    (r"high[- ]angle", "filmed from a high angle"),
    (r"eye[- ]level", "filmed at eye level"),
    (r"dutch(?= angle)", "filmed at a dutch angle"),
    (r"pov", "a POV shot"),
    (r"point[- ]of[- ]view", "a point-of-view shot"),
    (r"first[- ]person", "a first-person view"),
    (r"third[- ]person(?= (?:view|perspective|shot))", "a third-person view"),
    (r"over[- ]the[- ]shoulder", "an over-the-shoulder shot"),
    (r"tracking(?= (?:shot|camera))", "a tracking shot"),
    (r"dolly zoom", "filmed with a dolly zoom"),
    (r"dolly(?= shot)", "a dolly shot"),
    (r"crane(?= shot)", "a crane shot"),
    (r"panning(?= (?:shot|camera))|pan(?= shot)", "a panning shot"),
    (r"orbit(?:ing|al)?(?= (?:shot|camera))", "an orbit shot"),
    (r"steadicam", "filmed with a steadicam"),
    (
        r"hand[- ]?held(?= (?:\w+ )?(?:shot|camera|camerawork|footage|video|style)|\s*[,.;]|\s*$)",
        "filmed with a handheld camera",
    ),
    (
        r"(?:static|fixed|stationary|locked[- ]off)(?= (?:shot|camera|frame|view|framing))",
        "filmed with a static camera",
    ),
    (r"(?:super |ultra )?slow[- ]?mo(?:tion)?", "in slow motion"),
    (r"time[- ]?lapse", "a time-lapse"),
    (r"hyper[- ]?lapse", "a hyperlapse"),
    (r"fish[- ]?eye", "filmed with a fisheye lens"),
    (r"tilt[- ]shift", "filmed with a tilt-shift lens"),
    (r"anamorphic", "filmed with an anamorphic lens"),
    (r"shallow depth of field", "filmed with a shallow depth of field"),
    (r"bokeh", "filmed with bokeh"),
    (r"soft[- ]focus", "in soft focus"),
    (r"still(?= (?:frame|shot))", "a still frame"),
    (r"steady and smooth(?= perspective)", "filmed from a steady and smooth perspective"),
    (r"rack(?:ing)? focus", "filmed with a rack focus"),
    (r"(?:one|single)[- ](?:continuous )?take", "a single take"),
    (r"split[- ]screen", "in split screen"),
    (r"selfie(?= (?:shot|video|camera))", "a selfie video"),
    (r"motion blur", "filmed with motion blur"),
)
"""Pattern -> what the video is. The shot's own nouns around it are cut with it."""

STYLES = (
    (
        r"in black[- ]and[- ]white"
        r"|black[- ]and[- ]white(?= (?:film|movie|noir|footage|photo|video|scene|shot|cinematography|style|image|animation|clip|\x02)|,|\.|$)"
        r"|b&w",
        "in black and white",
    ),
    (r"monochrome", "in monochrome"),
    (r"water[- ]?colou?rs?(?: painting| paint)?", "in {0} style"),
    (r"anime|manga", "in {0} style"),
    (r"claymation|stop[- ]motion(?: animation)?|clay animation", "in {0} style"),
    (r"pixel[- ]art|8-bit|16-bit", "in {0} style"),
    (r"oil[- ]paint(?:ing|ed)?", "in the style of an oil painting"),
    (
        r"(?:2d |3d )?cartoon|comic[- ]book|pop[- ]art|ukiyo-e|paper[- ]?cut(?:out)?|low[- ]poly|papercraft"
        r"|line[- ]art|ink[- ]wash|origami art|art deco|art nouveau|cel[- ]shaded",
        "in {0} style",
    ),
    (r"lo-?fi", "in lo-fi style"),
    (r"isometric|voxel(?: art)?", "in {0} style"),
    (r"3d[- ](?:render(?:ing|ed)?|model)", "a 3D render"),
    (r"3d(?:[- ](?:animation|animated))?(?=,|\.|$| style)|3d[- ]animat(?:ion|ed)", "a 3D animation"),
    (r"cgi(?: animation)?", "in CGI style"),
    (r"2d animation", "a 2D animation"),
    (r"(?:pencil|charcoal|ink|chalk) (?:drawing|sketch)", "in the style of a {0}"),
    (r"film noir|neo-noir|noir", "in film noir style"),
    (r"sepia(?:[- ]toned?)?", "in sepia"),
    (r"cinematic(?:ally)?", "cinematic"),
    (r"photo-?realis(?:tic|m)|hyper-?realis(?:tic|m)|ultra-?realistic|lifelike(?= (?:style|video))", "{0}"),
    (r"cyberpunk|steampunk|vaporwave|synthwave|solarpunk", "in {0} style"),
    (r"impressionis(?:t|m)(?:ic)?|expressionist|cubis(?:t|m)|surrealis(?:t|m)", "in {0} style"),
    (r"documentary(?: style)?", "in documentary style"),
    (r"(?:studio )?ghibli|pixar|disney", "in {0} style"),
    (r"vhs|super 8|8mm|16mm|35mm|found footage|cctv", "in {0} style"),
    (r"film grain|grainy", "grainy"),
    (r"psychedelic|surreal|dreamlike", "{0}"),
)
"""Pattern -> what the video is; ``{0}`` is the text found."""

SEGMENT_STYLES = (
    r"(?:vintage|retro|realistic|minimalist|minimalistic|fantasy|sci-fi|science fiction|documentary|dreamy|moody|whimsical|abstract|nostalgic"
    r"|gothic|futuristic|epic|dramatic|melancholic|flickering|shaky|sketch|illustration|animation|animated|painterly|noir)"
)
"""Styles only where they stand alone between commas: a vintage car is no style."""
PLAIN = wordset(
    """
    realistic minimalist minimalistic dreamy moody whimsical abstract nostalgic futuristic epic dramatic melancholic flickering shaky animated
    painterly
    """
)
"""Those of them that the video itself can be."""
QUALITY = (
    r"(?:(?:ultra|highly|very|extremely|super|hyper)[- ]?)?"
    r"(?:4k|8k|2k|hd|uhd|1080p|720p|hdr|high[- ](?:quality|resolution|definition|detail|fidelity)|detailed?(?: textures?)?|masterpiece|best quality"
    r"|award[- ]winning|trending on \w+|unreal engine(?: \d)?|octane render|ray[- ]tracing|60 ?fps|30 ?fps|sharp focus|professional|stunning"
    r"|beautiful|intricate(?: details?)?|hd quality|resolution|quality)"
)
"""Wishes for quality: VQ asks for it anyway."""
ARTISTS = (
    r"(?:vincent )?van gogh|(?:katsushika )?hokusai|(?:pablo )?picasso|(?:claude )?monet|(?:salvador )?dal[ií]|rembrandt|(?:gustav )?klimt"
    r"|(?:andy )?warhol|(?:wassily )?kandinsky|vermeer|banksy|(?:leonardo )?da vinci|(?:edvard )?munch|(?:henri )?matisse"
)
SPELLINGS = {
    "vhs": "VHS",
    "ghibli": "Ghibli",
    "studio ghibli": "Studio Ghibli",
    "pixar": "Pixar",
    "disney": "Disney",
    "cctv": "CCTV",
}

MOVES = wordset(
    """
    pan tilt zoom dolly track orbit circle rotate spin pull push move glide sweep rise descend fly follow truck crane arc swoop drift float soar
    hover stay remain shake slide travel hold lift lower turn advance retreat ascend swivel roll trail climb dive
    """
)
"""What a camera does."""
MOVE_FORMS = {
    "pans": "pan",
    "panning": "pan",
    "pan": "pan",
    "dollies": "dolly",
    "dollying": "dolly",
    "cranes": "crane",
    "arcs": "arc",
    "trucks": "truck",
}
DIRECTIONAL = re.compile(
    r"(?:^|(?<=[,.;]))\s*(?:an? |the )?(?:slow(?:ly)? |smooth(?:ly)? |gentle |gently |fast |quick(?:ly)? |camera )*"
    r"(pan|zoom|tilt|dolly|truck|push|pull|orbit|crane|arc|pans|zooms|tilts|panning|zooming|tilting)[- ]?(?:shot )?"
    r"((?:to the )?(?:left|right|up|down|in|out|forwards?|backwards?|back|around|upwards?|downwards?)"
    r"(?: (?:on|to|toward|towards|from) [^,.;]+)?)?(?=\s*(?:[,.;]|$))",
    re.IGNORECASE,
)
"""A move between commas: ``slow zoom in``."""
CAMERA = re.compile(
    r"(?:,?\s*\b(?:while|as|and|with|then|when|where|but)\b)*\s*\b(?:the |a |our )?camera(?:'s view| view| angle| movement| motion)?:?\s+"
    r"((?:\w+ly |then |is |stays? |remains? |starts? |begins? (?:to |by )?|continues? (?:to )?)*)(\w+)\b([^.;]*?)"
    r"(?=[.;]|$|,?\s+(?:while|as|revealing|to reveal|showing|capturing|which|where)\s|,\s+(?!\w+ing\b|\w+ly\b|then\b|handheld|slow)"
    r"|,?\s+and\s+(?:the|a|an|his|her|its|their|two|three)\s)",
    re.IGNORECASE,
)
"""A clause about the camera: adverbs and helpers, verb, rest."""

META = re.compile(
    r"(?:^|(?<=[.;,]))\s*(?:(?:create|generate|make|produce|imagine|picture|visualize|show|render)\s+)?(?:an?\s|the\s|this\s)?"
    rf"(?:(?:\w+(?:ly)?\s){{0,2}}?(?:{SHOT_WORD}|film|movie|image|animation|painting|illustration|portrait|trailer|render(?:ing)?|drawing|sketch"
    r"|montage|depiction|rendition|visualization))\s+(?:of|showing|depicting|featuring|capturing|in which|where|that shows)\s+",
    re.IGNORECASE,
)
"""``A video of``"""
NARRATION = re.compile(
    r"(?:^|(?<=[.;]))\s*(?:in|throughout) (?:this|the) (?:video|scene|clip|shot|footage),\s+(?!we\b|the camera)"
    r"|(?:^|(?<=[.;]))\s*(?:in (?:this|the) (?:video|scene|clip|shot|footage)s?,?\s+)?"
    r"(?:(?:(?:the|this|an?)\s+)?(?:\w+\s)?(?:video|scene|clip|footage|shot|image|sequence|animation|film)|we|it)\s+(?:then\s|also\s|first\s)?"
    r"(?:shows?|features?|depicts?|captures?|opens? (?:with|on)|begins? (?:with|as|on)|starts? (?:with|as)|presents?|showcases?|portrays?|displays?"
    r"|sees?|ends? with|transitions? to|cuts? to|focuses on)\s+",
    re.IGNORECASE,
)
"""``The video shows``"""
TAKES_PLACE = re.compile(
    r"(?:^|(?<=[.;]))\s*(?:the|this)\s+(?:scene|video|action|story|clip)\s+(?:takes place|is set|unfolds|happens|occurs)\s+",
    re.IGNORECASE,
)
COMMENT = re.compile(
    r",?\s*(?:\band\s+)?\b(?:creating|casting|adding|evoking|suggesting|conveying|enhancing|emphasi[sz]ing|highlighting|showcasing|symboli[sz]ing"
    r"|giving (?:the|a|it)|lending|making (?:the|this|it) (?:scene|video|image|feel)|contributing|providing|indicating|hinting)\b[^.;]*",
    re.IGNORECASE,
)
"""``, creating a sense of …``: a captioner's opinion."""
PICTURE = re.compile(
    r"^(?:an?\s+)?((?:\w+ly\s+)?(?:\w+\s+)?)(painting|illustration|drawing|sketch)\s+of\s+", re.IGNORECASE
)
OF_IT = re.compile(r"(^|[,.;])[^,.;\x02]{0,30}\x02[\s\x02]*of\s+")
"""What is left of ``a cinematic drone shot of`` once its parts are cut (``\\x02``)."""
QUOTED = re.compile(r'"([^"]{1,120})"')
SPOKEN = re.compile(
    r"\b(?:he|she|they|man|woman|boy|girl|person|voice|narrator)\s+(?:says?|said|whispers?|shouts?|yells?|asks?|replies)[\s,:]*$",
    re.IGNORECASE,
)
SAYS = re.compile(
    r"(?:\s+(?:that|which))?\s+(?:(?:is |are )?(?:says?|saying|reads?|reading|labell?ed|titled|spelling|spells?(?: out)?|displays?|displaying"
    r"|shows?|showing)|with (?:the )?(?:words?|text|title|letters)|(?:bearing|displaying) the (?:words?|text))[\s,:]*(?=\x01)",
    re.IGNORECASE,
)
"""``that says``, before a quotation (``\\x01``)."""
