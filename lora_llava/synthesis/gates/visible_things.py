"""Words for visible things, which a sample may name only if a caption or a box does.

Common parts of a scene (sky, wall, hand, wheel) are not in the list: captions leave them out.
"""

from __future__ import annotations

from lora_llava.synthesis.gates.gate_nouns import words

_COCO = tuple(
    """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|
    bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|
    snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|
    cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|
    potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|cell phone|microwave|oven|toaster|sink|
    refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush""".replace("\n", "").split("|")
)
_PEOPLE = words(
    """man woman boy girl child kid baby toddler lady guy chef waiter waitress farmer fisherman soldier policeman
    nurse surfer skier snowboarder skateboarder cyclist pedestrian bride groom musician dancer rider jockey
    pitcher batter umpire catcher goalkeeper"""
)
_ANIMALS = words(
    """puppy kitten goat pig chicken duck goose swan pigeon seagull parrot owl eagle penguin rabbit hamster
    squirrel deer fox wolf lion tiger leopard monkey gorilla panda camel donkey dolphin whale shark turtle
    frog snake lizard crocodile butterfly bee spider fish lamb calf bull ox buffalo rhinoceros hippopotamus
    kangaroo"""
)
_VEHICLES = words(
    """van taxi ambulance tram trolley subway tractor helicopter jet bike scooter ship ferry yacht sailboat canoe
    kayak raft carriage wagon sled cart minivan limousine rocket submarine"""
)
_FOOD = words(
    """bread toast bagel croissant burger fries pasta spaghetti noodle rice soup salad steak sausage bacon egg
    cheese cookie pie pancake waffle cereal chocolate candy strawberry grape lemon pear peach melon
    watermelon pineapple cherry tomato potato onion pepper mushroom lettuce cucumber corn coffee tea beer
    wine milk juice"""
)
_INDOORS = words(
    """sofa table desk shelf bookshelf cabinet drawer wardrobe dresser lamp chandelier candle mirror curtain carpet
    rug pillow blanket mattress stove kettle pan pot plate tray jar mug bathtub shower towel soap computer
    monitor printer camera telephone radio guitar piano violin drum trumpet easel fireplace staircase fridge
    television newspaper magazine pencil doll"""
)
_OUTDOORS = words(
    """beach ocean sea lake river waterfall island mountain volcano desert forest jungle meadow pier harbour harbor
    bridge lighthouse castle church temple mosque skyscraper barn windmill stadium airport playground
    fountain statue flag tent campfire fence ladder snow snowman sandcastle vineyard cave canyon glacier
    iceberg railway runway cobblestone"""
)
_WORN = words(
    """hat cap helmet raincoat jacket coat suit tuxedo dress skirt apron uniform scarf glove boot sandal sunglasses
    necklace crown veil leash saddle wetsuit bikini kimono"""
)
_SPORTS = words(
    """ball bat racket racquet glove goal net basketball football baseball volleyball trophy paddle sword bow arrow
    balloon fireworks"""
)
THINGS = frozenset(
    thing.strip()
    for thing in (*_COCO, *_PEOPLE, *_ANIMALS, *_VEHICLES, *_FOOD, *_INDOORS, *_OUTDOORS, *_WORN, *_SPORTS)
) - {"person", "orange", "remote", "mouse"}
"""Names of things in the singular; words with another frequent meaning are left out."""
KINDS: dict[str, frozenset[str]] = {
    "animal": frozenset(_ANIMALS),
    "vehicle": frozenset(_VEHICLES),
    "food": frozenset(_FOOD),
    "ball": frozenset(("basketball", "football", "baseball", "volleyball", "sports ball")),
    "bike": frozenset(("bicycle", "motorcycle")),
    "beach": frozenset(("ocean", "sea", "sand", "surf", "shore", "surfboard", "surfer")),
    "ocean": frozenset(("beach", "sea", "wave", "waves", "surf", "surfboard", "shore")),
    "sea": frozenset(("beach", "ocean", "wave", "waves", "harbour", "harbor", "pier", "boat", "ship")),
    "harbour": frozenset(("harbor", "pier", "dock", "boat", "quay")),
    "pier": frozenset(("dock", "quay", "harbour", "harbor")),
    "snow": frozenset(("ski", "skis", "skier", "skiing", "snowy", "snowboard", "snowboarder", "snowboarding", "slope")),
    "mountain": frozenset(("ski", "skis", "skiing", "slope", "hill", "hills", "peak")),
    "table": frozenset(("desk", "dining table", "counter")),
    "desk": frozenset(("table", "office", "computer", "laptop")),
    "plate": frozenset(("dish", "meal", "pizza", "food")),
    "computer": frozenset(("laptop", "keyboard", "monitor", "pc")),
    "monitor": frozenset(("computer", "tv", "screen", "screens")),
    "keyboard": frozenset(("laptop", "computer")),
    "meadow": frozenset(("grass", "field", "pasture", "grassy", "lawn")),
    "cup": frozenset(("coffee", "tea", "mug")),
    "coat": frozenset(("jacket", "raincoat")),
    "jacket": frozenset(("coat",)),
    "hat": frozenset(("cap", "helmet")),
    "cap": frozenset(("hat",)),
    "leash": frozenset(("leashes",)),
    "railway": frozenset(("train", "rail", "rails", "tracks", "track", "tram")),
    "tram": frozenset(("trolley", "streetcar", "train")),
    "pillow": frozenset(("bed",)),
    "blanket": frozenset(("bed",)),
    "mattress": frozenset(("bed",)),
    "stove": frozenset(("oven", "kitchen")),
    "cart": frozenset(("carriage", "wagon")),
    "carriage": frozenset(("cart", "wagon")),
}
"""Things that a context names by implying them, and the words that imply each."""
