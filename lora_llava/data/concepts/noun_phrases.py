"""Find noun phrases of English captions with spaCy, as LLaVA did, or with word lists if spaCy is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from lora_llava.core.errors import UserError, nearest

TaggerName = Literal["auto", "spacy", "light"]
TAGGERS = ("auto", "spacy", "light")
SPACY_MODEL = "en_core_web_sm"
SPACY_FIX = f"run `pip install spacy` and `python -m spacy download {SPACY_MODEL}`, or use the tagger light"


@dataclass(frozen=True)
class NounPhrases:
    """A finder of noun phrases.

    Attributes:
        name: `spacy` or `light`.
        find: Returns a list of lower-case phrases per caption, in the captions' order; a phrase may occur twice.
    """

    name: str
    find: Callable[[Sequence[str]], Iterable[list[str]]]

    def __call__(self, captions: Sequence[str]) -> Iterable[list[str]]:
        return self.find(captions)


def load_noun_phrases(tagger: TaggerName = "auto") -> NounPhrases:
    """Load a finder of noun phrases.

    Args:
        tagger: `spacy` is LLaVA's own choice (arXiv 2304.08485, appendix "Data", names spaCy and no model; here
            `en_core_web_sm`): its noun chunks, lower case, without determiners and pronouns in front. `light` needs
            no installation; see `light_noun_phrases` for its limits. `auto` is spaCy if its model is installed, else
            light.

    Returns:
        The finder.

    Raises:
        UserError: If the tagger is unknown, or spaCy or its model is missing or does not load.
    """
    if tagger not in TAGGERS:
        raise UserError(f'tagger "{tagger}" is unknown{nearest(tagger, TAGGERS)}; use one of {", ".join(TAGGERS)}')
    if tagger == "light" or (tagger == "auto" and not _spacy_is_installed()):
        return NounPhrases("light", lambda captions: map(light_noun_phrases, captions))
    model = _load_spacy()
    return NounPhrases("spacy", lambda captions: (spacy_noun_phrases(document) for document in model.pipe(captions)))


def _spacy_is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("spacy", SPACY_MODEL))


def _load_spacy() -> Any:
    try:
        spacy = importlib.import_module("spacy")
    except ImportError as error:
        raise UserError(f"tagger spacy: {error}; {SPACY_FIX}") from None
    try:
        # Noun chunks need the parser and the parts of speech; excluding the others is faster.
        return spacy.load(SPACY_MODEL, exclude=["ner", "lemmatizer"])
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"tagger spacy: {reason}; {SPACY_FIX}") from None


def spacy_noun_phrases(document: Any) -> list[str]:
    """Return the noun chunks of a parsed caption in lower case, without leading determiners and pronouns.

    Args:
        document: A `spacy.tokens.Doc` with dependencies and parts of speech.

    Returns:
        The phrases; a chunk of only determiners and pronouns has none.
    """
    phrases = []
    for chunk in document.noun_chunks:
        start = next((i for i, token in enumerate(chunk) if token.pos_ not in {"DET", "PRON", "PUNCT", "SPACE"}), None)
        if start is not None:
            phrases.append(" ".join(chunk[start:].text.lower().split()))
    return phrases


def light_noun_phrases(caption: str) -> list[str]:
    """Cut a caption into phrases of the form ADJ* NOUN+ by word lists and endings.

    This is not a part-of-speech tagger, and it is not trained. Every word that is not in a list of function
    words, verbs or adjectives, and has no verb's, adverb's or adjective's ending, counts as a noun. So it keeps
    adjectives and verbs that the lists lack, cuts compounds that end as a verb does ("ski jump"), leaves out numbers
    ("two dogs" is "dogs"), ends phrases at a possessive ("man's hat" is "man" and "hat"), and does not join plural and
    singular. It is for short English captions, whose frequent phrases are simple.

    Args:
        caption: English text.

    Returns:
        The phrases in lower case, in the caption's order.
    """
    tokens = _TOKEN.findall(caption.lower())
    phrases: list[str] = []
    words: list[str] = []
    nouns = 0
    for word, kind in zip(tokens, _kinds(tokens), strict=True):
        if nouns and kind != "noun":
            phrases.append(" ".join(words))
        if kind == "stop" or (nouns and kind == "adjective"):
            words, nouns = [], 0
        if kind != "stop":
            words.append(word)
            nouns += kind == "noun"
    return [*phrases, " ".join(words)] if nouns else phrases


def _kinds(tokens: list[str]) -> Iterator[Literal["noun", "adjective", "stop"]]:
    open_slot = False  # a determiner or adjective precedes, so that a noun must follow
    for word, following in pairwise([*tokens, ""]):
        leads_on = _is_content(following)
        if _is_adverb(word):
            yield "stop"  # the slot stays open: "a brightly colored bird"
        elif not _is_content(word):
            yield "stop"
            open_slot = word in DETERMINERS or word in {"'s", "’s"} or word[0].isdigit()
        elif _is_adjective(word) or (_is_participle(word) and leads_on and (open_slot or word.endswith("ed"))):
            yield "adjective"
            open_slot = True
        elif not open_slot and (word in VERBS or _is_participle(word)):
            yield "stop"
        else:
            yield "noun"
            open_slot = False


def _is_content(word: str) -> bool:
    return len(word) > 1 and word[0].isalpha() and word not in FUNCTION_WORDS and not _is_adverb(word)


def _is_adjective(word: str) -> bool:
    return word in ADJECTIVES or word.endswith(("ous", "ful", "less"))


def _is_adverb(word: str) -> bool:
    return len(word) > 4 and word.endswith("ly") and word not in NOT_ADVERBS


def _is_participle(word: str) -> bool:
    return len(word) > 4 and word.endswith(("ing", "ed")) and word not in NOT_PARTICIPLES


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _verb_forms(bases: str) -> set[str]:
    forms = set()
    for base in bases.split():
        forms |= {base, f"{base[:-1]}ies" if base[-1] == "y" and base[-2] not in "aeou" else f"{base}s"}
        forms |= {f"{base}es"} if base.endswith(("s", "x", "ch", "sh", "o")) else set()
    return forms


def _degrees(adjectives: str) -> set[str]:
    forms = set()
    for word in adjectives.split():
        stem = word.removesuffix("e") if word[-1] != "y" else f"{word[:-1]}i"
        forms |= {word, f"{stem}er", f"{stem}est"}
        forms |= {f"{stem}{stem[-1]}er", f"{stem}{stem[-1]}est"} if len(word) <= 4 else set()
    return forms


_TOKEN = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*|\d[\w.,:-]*|['’]\w+|\S")

DETERMINERS = _words(
    """a an the this that these those some any no every each either neither another other others such all both half
    many much more most few fewer several various certain enough my your his her its our their whose one two three four
    five six seven eight nine ten eleven twelve dozen dozens hundred hundreds thousand thousands million first second
    third next last same own"""
)

FUNCTION_WORDS = DETERMINERS | _words(
    """about above across after against ahead along alongside amid amidst among amongst around as at atop away back
    before behind below beneath beside besides between beyond by despite down during except for forward from in inside
    into like near nearby next of off on onto opposite out outside over past per plus round since than through
    throughout till to together toward towards under underneath until unto up upon via with within without and or but
    nor so yet if because while although though unless when where whereas whether who whom which what why how i me you
    he him she it we us they them mine yours hers ours theirs himself herself itself themselves myself yourself someone
    somebody something anyone anything everyone everything nobody nothing there here am is are was were be been being
    do does did doing done have has had having can could may might must shall should will would don doesn didn isn aren
    wasn weren won couldn wouldn shouldn hasn haven hadn let lets not also too very just only even still already almost
    quite rather again ever never always often sometimes now then once soon today tonight tomorrow yesterday perhaps
    maybe apart aside else however instead well upside lot lots bunch couple kind sort type pair etc"""
)

ADJECTIVES = _degrees(
    """red blue green yellow black white brown pink purple grey gray golden beige tan dark light bright pale colorful
    colourful big small large little tiny huge giant long short tall high low wide narrow thick thin deep flat round
    square old young new modern ancient antique vintage retro hot cold warm cool wet dry clean dirty empty full open
    closed heavy soft hard loose tight sharp blunt smooth rough fresh raw ripe rotten sweet sour bitter salty spicy
    happy sad angry cute pretty beautiful handsome lovely ugly nice good great best better bad worst perfect busy quiet
    calm lonely alone asleep awake ready able unable close far left right upper lower top-down middle-aged main entire
    whole single double different similar unique special typical traditional classic famous popular common rare real
    fake wooden metallic plastic-like furry fluffy hairy bald blonde blond curly shiny sunny cloudy rainy snowy foggy
    windy stormy sandy rocky grassy muddy dusty rusty icy leafy bushy fancy funny silly messy tasty healthy crispy
    crunchy juicy creamy cheesy rural urban tropical electric electronic digital professional royal public private
    foreign domestic wild male female human asian african american european chinese japanese indian french italian
    british english german spanish mexican portable available visible friendly elderly early late fast slow quick
    broken hidden frozen woven worn torn drawn hand-drawn sunken fallen unknown simple elegant adult grown native
    abstract seamless stylish strange odd separate extra additional"""
)

NOT_ADVERBS = _words(
    """ally anomaly assembly belly billy bully butterfly curly daily doily dragonfly early elderly emily family
    friendly hilly holy italy jelly july kelly lily lolly lonely lovely molly monopoly potbelly reply sally silly
    supply ugly"""
)

NOT_PARTICIPLES = _words(
    """advertising anything awning bedding being bling bobsled bowling boxing breed building camping ceiling clothing
    coating cooking covering crossbreed crossing cutting cycling darling decking dining drawing dressing duckling
    dumpling earring engineering evening filling fishing flatbed flooring frosting greed herring housing hunting icing
    indeed jogging king landing landscaping lighting lightning living marketing meeting molding moped morning moulding
    newlywed offspring opening outing painting paneling parking plumbing pudding purebred racing railing rigging
    rolling sailing scaffolding seasoning seating seaweed serving shopping sibling siding skateboarding skating skiing
    sling snowboarding something speed spring steed sterling stocking string stuffing surfing swimming swing thing
    toolshed topping tubing tweed vending viking washing watershed wedding wing wiring wrestling"""
)

VERBS = _verb_forms(
    """appear arrive ask attach attend await bathe become begin belong bite blow break breathe bring browse build burn
    buy carry carve celebrate chase chat cheer chew choose clap climb come compete consist contain cook cover cry
    cuddle cut dance decorate demonstrate depict dig dine dive do drag draw drift drive drop eat emerge enjoy enter
    explore fall feature feed feel fetch fight fill find fix fly follow gather gaze get give glance glide go grab graze
    greet grow hang happen have hide hit hold hop hover hug illustrate include jog join juggle jump keep kick kiss
    kneel know lay lead lean leap learn leave let lick lie listen look love make meet move need observe occupy open
    overlook paddle pass pedal peek peer perch perform pick play point pose pour prepare present pretend pull push put
    reach read receive recline relax remain remove replace rest ride rise roam run say see sell send serve shake share
    show sing sip sit sleep smile sniff soar speak spend spread squat stand stare stay stop stretch stroll surf
    surround swim take talk teach tell think throw toss touch travel try turn use visit wade wait wake walk wander want
    wash wear win work wrap write"""
) | _words(
    """ate began begun bent bit blew blown bought broke brought built came caught chose cut did done drank drew drove
    eaten fed fell felt flew flown fought found gave given gone got grew hanged held hid hit hung kept knelt knew laid
    lain leapt led left lit lost made met paid put ran rode rose said sang sat saw seen sent set shown slept sold spent
    spoke spun stood strewn stuck swam swept swum taken taught thought threw thrown told took went woke won wore worn
    wrapped written wrote"""
)
