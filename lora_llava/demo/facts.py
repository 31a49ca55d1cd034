"""Facts for the demo's text-only questions.

The base language model is not trained on them: they are learnt in Stage 2 from the lectures and solutions of the
training rows.
"""

ANIMALS = {
    "mammal": ("bear", "fox", "whale", "horse", "mouse", "bat"),
    "bird": ("owl", "duck", "eagle", "penguin", "swan", "crow"),
    "fish": ("shark", "salmon", "tuna", "trout", "cod", "eel"),
    "insect": ("bee", "ant", "moth", "beetle", "wasp", "fly"),
}
ANIMAL_LECTURES = {
    "mammal": "Mammals feed their young milk.",
    "bird": "Birds have feathers.",
    "fish": "Fish breathe with gills.",
    "insect": "Insects have six legs.",
}
COUNTRIES = {
    "Africa": ("Egypt", "Kenya", "Ghana", "Mali", "Chad"),
    "Asia": ("China", "India", "Japan", "Nepal", "Iran"),
    "Europe": ("France", "Spain", "Italy", "Norway", "Greece"),
    "South America": ("Brazil", "Peru", "Chile", "Bolivia", "Ecuador"),
}
WORDS = {
    "noun": ("table", "river", "garden", "teacher", "bread", "window"),
    "verb": ("sing", "write", "carry", "build", "swim", "listen"),
    "adjective": ("happy", "quiet", "heavy", "bright", "sweet", "tall"),
}
WORD_LECTURES = {
    "noun": "A noun names a person, a place or a thing.",
    "verb": "A verb names an action.",
    "adjective": "An adjective describes a noun.",
}
SENTENCES = {
    "statement": "We {verb} near the {adjective} {noun}.",
    "question": "Do we {verb} near the {adjective} {noun}?",
    "command": "{verb} near the {adjective} {noun}!",
}
MATERIALS = {True: ("iron", "steel", "nickel"), False: ("wood", "glass", "plastic", "paper", "rubber")}
"""Keyed by whether a magnet attracts the material."""
NAMES = ("Ana", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana")
OBJECTS = ("spoon", "cup", "ball", "box", "ruler", "key")
QUALITIES = ("old", "young", "wild", "tame", "big", "small")
PROPERTIES = ("hot", "cold", "magnetic", "fragile", "alive", "wooden")
BUILDINGS = ("school", "farm", "harbour", "market", "museum", "station")
COMPASS = ("north-west", "north-east", "south-west", "south-east")
"""Directions in the order of `world.PLACES`; north is at the top of a map."""
