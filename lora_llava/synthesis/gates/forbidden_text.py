"""Gates for forbidden text: markup, template markers, mentions of the source, coordinates, refusals and hedges.

Each rule is a list of patterns. Text that also occurs in the context (`caption` on a poster) is allowed, since it
describes the image.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

_MARKERS = (
    r"</?s>|<\|[^<>|]{0,40}\|?>|<<\s*/?\s*SYS\s*>>|\[/?INST\]|\[/?(?:IMG|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS)\]",
    r"(?i:<\s*/?\s*(?:image|video|im_start|im_end|im_patch|pad|unk|bos|eos|mask|sep|cls|image_placeholder)\s*/?\s*>)",
    r"#{3,}|^\s*(?:={3,}|-{3,})\s*$",
    r"\b(?:USER|ASSISTANT|SYSTEM|HUMAN|GPT)\s*:",
    r"^\s*(?:Human|Assistant|User|System|GPT|Question|Answer)\s*\d*\s*:",
)
_MARKUP = (
    r"\b(?:https?|ftp|file)\s*://|\bwww\.\w|\bmailto:\w",
    r"\b(?:java|vb)script:\S|\bdata:\s?[\w.+-]+/[\w.+-]+|\bdata:[^\s,]{0,40},\S",
    r"<\s*/?\s*[a-z!?][^<>]{0,200}>|<\s*/?\s*(?:script|iframe|img|svg|object|embed|style|link|meta|a)\b",
    r"&(?:lt|gt|quot|amp|#\d{1,7}|#x[0-9a-f]{1,6});",
    r"\bon[a-z]{4,}\s*=",
    r"!\[[^\[\]]{0,200}\]|\[[^\[\]]{1,200}\]\([^()]{0,500}\)|\[[^\[\]]{1,200}\]\[[^\[\]]{0,50}\]|```",
    r"^\s*\[[^\[\]]{1,100}\]:\s*\S",
)
_BOARD = r"(?:boards?|desk|signs?|cent(?:er|re)|booth|kiosk|panel|point)\b"
_GIVEN = r"(?:(?:the|this|that|these|your|any|all) given|provided|supplied|available|above|accompanying|input)"
_TEXTS = r"(?:descriptions?|captions?|context|annotations?|sentences|metadata|prompt|input)"
_SOURCE = (
    r"\bcaption(?:s|ed|ing)?\b",
    r"\bbounding[\s-]*box(?:es)?\b|\bbbox(?:es)?\b|\bbox coordinates\b|\bobject detect(?:ion|or)\b",
    r"\bdetected (?:objects?|items|people)\b|\bobjects? (?:was|were|is|are) detected\b",
    r"\b(?:pixel|spatial|normali[sz]ed|given|provided|their|box|object|image|location) co-?ordinates\b",
    r"\b(?:the|these|those|its) co-?ordinates\b(?! (?:with|on the))",
    rf"\b{_GIVEN} (?:{_TEXTS}|information|details|data|text)\b(?! {_BOARD})",
    r"\binformation (?:is |was |that is |you |I was )?(?:given|provided)\b(?! (?:on|by|at|for|to)\b)",
    r"\b(?:according to|based on|judging by|judging from|as per|per|going by) (?:the|this|that|its|your|these) "
    rf"(?:\w+ )?{_TEXTS}\b(?! of\b)",
    r"\b(?:in|from|by) (?:the|this|these|your) (?:\w+ )?(?:descriptions?|annotations?|metadata|prompt)\b(?! of\b)",
    rf"\b(?:according to|based on|in|from) the information\b(?! (?:on\b|{_BOARD}))",
    r"\bthe descriptions?\b(?! (?:of|on|at|next|above|below|beside|under)\b)|\b(?:object|detection) boxes\b",
    r"\bthe (?:\w+ )?(?:descriptions?|context|annotations?|metadata|prompt) (?:do(?:es)?(?: not|n't)|say|mention|state|"
    r"describe|list|specif|indicate|note|give|tell|include|provide)",
    r"\b(?:image|picture|photo|scene|textual|object) (?:descriptions?|annotations?)\b",
    r"\b(?:image|picture|photo|scene) (?:is|was) described\b|\bdescription (?:that )?you\b",
    r"\b(?:is|are|was|were)(?: not| also| only| never|n't)? mentioned\b"
    r"(?! (?:on|at|above|below|near|by|earlier|before|beside|under)\b)",
    r"\b(?:I was|I have been|I've been|you (?:gave|told)) (?:me )?(?:given|told|provided)\b",
)
_NUMBER = r"(?:0?\.\d+|1\.0+|[01])"
_UNIT = (
    r"(?!\d)(?!\s?(?:%|percent|per\b|inch|in\b|[mck]?m\b|met(?:er|re)|feet|foot|ft\b|miles?\b|yards?\b|"
    r"lit(?:er|re)|gallons?\b|k?g\b|grams?\b|kilo|ounces?\b|oz\b|pounds?\b|lbs?\b|seconds?\b|s\b|hours?\b|"
    r"degrees?\b|dollars?\b|euros?\b))"
)
_NO_MONEY = r"(?<![\w.$\u20ac\u00a3\u00a5-])(?<![$\u20ac\u00a3\u00a5] )"
_FRACTION = re.compile(rf"{_NO_MONEY}0\.\d{{2,}}{_UNIT}")
_COORDINATES = (
    rf"[\[({{]\s*(?:0?\.\d+\s*[,;]\s*{_NUMBER}|{_NUMBER}\s*[,;]\s*0?\.\d+)(?![\w.])",
    r"\[\s*-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?)+\s*\]",
    rf"{_NO_MONEY}0\.\d{{3,}}{_UNIT}",
    rf"{_NO_MONEY}0\.\d{{2,}}{_UNIT}\s*(?:,|;|and|to|-|\u2013)\s*0\.\d{{2,}}{_UNIT}",
    r"\b(?:x1|y1|y2|[xy]_?(?:min|max))\b|\b[xy]\d?\s*[=:]\s*-?\d*\.\d",
    r"\b(?:x|y)[- ](?:co-?ordinates?|axis value)\b",
)
_MODEL = (
    r"\bas an (?:AI|artificial intelligence)\b|\bas an? (?:large |helpful )?(?:language|text[- ]based|text|virtual) "
    r"(?:model|assistant|AI)\b",
    r"\bI(?:'m| am)(?: just| only| merely)? an? (?:AI|artificial|(?:large )?language model|text[- ]based|chatbot)\b",
    r"\bI (?:cannot|can't|can not|am (?:unable|not able) to|do not|don't)(?: actually| directly)? "
    r"(?:see|view|access|open|have access to|look at|process|analy[sz]e) (?:the |this |any |your )?"
    r"(?:images?|pictures?|photos?|photographs?|visual)\b",
    r"\b(?:my (?:training data|knowledge cutoff)|OpenAI|ChatGPT)\b",
    r"\bno (?:image|picture|photo) (?:was|is|has been) (?:provided|attached|uploaded)\b",
    r"\bplease (?:provide|upload|share|attach) (?:the|an?|your) (?:image|picture|photo)\b",
)
_TELL = (
    r"(?:determine|tell|say|know|ascertain|discern|be (?:certain|sure)|identify|confirm|verify|establish|infer|"
    r"conclude)"
)
_WHICH = r"(?:whether|if|what|who|whom|whose|which|why|how|where|when|from)"
_HEDGES = (
    rf"\b(?:not possible|impossible) to (?:{_TELL}|see|answer|give|describe|read|make out)\b(?! no\b)",
    rf"(?:\b(?:is|are|was|be|seems?|remains)|'s)(?: \w+ly| very| quite| rather| too)? (?:difficult|hard) to "
    rf"(?:{_TELL})\b(?! no\b| apart\b| \w+ apart\b| the (?:\w+ )?\w+ apart\b)",
    r"\b(?:can ?not|can't|could not|couldn't)(?: \w+ly)? be (?:\w+ly )?(?:determined|seen|confirmed|known|identified|"
    r"verified|told|inferred|ascertained|established|answered|discerned|made out|deduced|concluded|sure|certain|"
    r"recogni[sz]ed|said(?! (?:of|for|about)))\b",
    rf"\b(?:I|we|one|you) (?:can ?not|can't|could not|couldn't)(?: \w+ly| quite)? {_TELL}\b(?! no\b)",
    r"\b(?:I|we) (?:can ?not|can't|could not|couldn't)(?: \w+ly)? (?:see|answer|provide|help|assist|describe|give|"
    r"comply|make out)\b(?! (?:any|an?)\b)",
    rf"\b(?:unable|not able) to (?:{_TELL}|answer|provide|assist|help)\b",
    r"(?:\bnot|n't) enough (?:\w+ )?(?:information|context|evidence|details?|clues)\b",
    r"\bno (?:\w+ )?details? (?:(?:is|are) (?:given|provided|available|known)|about|regarding)\b",
    r"\b(?:insufficient|too little|without (?:more|further|additional))(?: \w+)? "
    r"(?:information|context|evidence|details?|clues)\b",
    r"\b(?:no|lack of|without any)(?: (?:more|further|additional|other|specific|visual|direct|clear|detailed|such))? "
    rf"(?:information|context(?:ual)? clues)\b(?! {_BOARD})",
    rf"\b(?:is|are|'s|was|remains?|be)(?: \w+ly| very| quite| rather| somewhat)? unclear\b|\bunclear {_WHICH}\b",
    r"(?:^|[.!?] )It(?: is|'s) not (?:entirely |quite )?clear\b",
    r"\bit (?:does not|doesn't) (?:say|specify|mention|tell)\b",
    rf"\bnot (?:\w+ly )?(?:clear|certain|sure|known|obvious|evident|apparent) {_WHICH}\b",
    r"\b(?:is|are|was|were)(?:n't| not)(?: \w+ly| further)? (?:specified|stated|provided|indicated|described|disclosed|"
    r"listed|discernible|identifiable|determinable|known|evident|apparent|determined)\b(?! (?:for|to|as|by)\b)",
    r"\bnot (?:explicitly |clearly |directly |specifically )?(?:specified|mentioned)\b",
    r"\bunspecified\b|\bindiscernible\b",
    r"\b(?:is|are|remains?|was) (?:\w+ly )?unknown\b|\buncertain (?:whether|if|what|who|which|why|how|where)\b",
    r"\b(?:I|we)(?: am| are|'m|'re)(?: \w+ly)? (?:not (?:\w+ly )?(?:sure|certain)|unsure|uncertain|unable|sorry)\b",
    r"\b(?:I|we) (?:do not|don't) (?:know|have (?:enough|any information|information|the ability|access))\b",
    r"\bsorry,? (?:but )?I\b|\bunfortunately, I\b|\bI apologi[sz]e\b",
    r"\b(?:picture|image|photo|photograph|scene|view)(?: alone| itself)? (?:does not|doesn't|do not) (?:\w+ly )?"
    r"(?:provide|indicate|specify|reveal|state|clarify|disclose|make (?:it )?clear|allow us|"
    rf"(?:tell|say)(?: us| me| exactly)* {_WHICH}|give (?:any|enough|us|further|more|details?|a clear|information)|"
    rf"(?:show|contain|include) (?:{_WHICH}|enough|sufficient))\b",
    rf"\bno (?:sure |certain |clear |real |reliable )?way (?:to (?:{_TELL})|of knowing|of telling)\b",
    r"\bno (?:clear |direct |obvious )?(?:indication|evidence|clue|hint)s? (?:of |as to |about )?"
    r"(?:whether|what|who|which|why|how|where|when)\b",
    r"\b(?:can|could) only (?:guess|speculate|be guessed|be speculated|be assumed)\b|\bwould (?:only )?be "
    r"(?:pure |mere )?(?:speculation|speculative|guesswork)\b|\bopen to interpretation\b|\banyone's guess\b",
    r"\A\W*(?:n/?a|unknown|unclear|uncertain|not (?:sure|known|visible|applicable)|no (?:idea|answer))\W*\Z",
)


def _compile(patterns: Sequence[str], flags: int = re.IGNORECASE) -> re.Pattern[str]:
    """Join patterns into one."""
    return re.compile("|".join(patterns), flags | re.MULTILINE)


_RULES = {
    "template marker": _compile(_MARKERS, 0),
    "link or markup": _compile(_MARKUP),
    "coordinates": _compile(_COORDINATES, 0),
    "source named": _compile(_SOURCE),
    "speaks as a model": _compile(_MODEL),
    "no answer": _compile(_HEDGES),
}
_UNSAFE = ("template marker", "link or markup")


def find_forbidden(rule: str, text: str, known: str = "") -> str | None:
    """Find the first text that a rule forbids.

    Args:
        rule: `template marker`, `link or markup`, `coordinates`, `source named`, `speaks as a model` or `no answer`.
        text: A question or an answer.
        known: The context's captions and labels; text that occurs in them is allowed, except markers and markup.

    Returns:
        The forbidden text as it is written, or None.
    """
    plain = text.replace("\u2019", "'")
    for match in _RULES[rule].finditer(plain):
        found = match[0].strip()
        if rule in _UNSAFE or not found or found.lower() not in known.lower():
            return found
    return None


def find_corner(text: str, corners: Collection[str]) -> str | None:
    """Find the first number in a text that is the corner of a box.

    Args:
        text: A question or an answer.
        corners: Coordinates as written in the prompt.

    Returns:
        The number, or None. Only numbers of at least two decimals without a unit or a currency are compared.
    """
    return next((match[0] for match in _FRACTION.finditer(text) if match[0] in corners), None)


def find_control(text: str) -> str | None:
    """Find the first control character.

    Args:
        text: A question or an answer.

    Returns:
        Its code point, such as `U+0000`, or None. Counted as such are control characters other than line feed and tab,
        unpaired surrogates, private-use characters, the replacement character, zero-width marks and characters that
        change the writing direction.
    """
    for character in text:
        if character in "\n\t" or " " <= character <= "~":
            continue
        if unicodedata.category(character) in ("Cc", "Cs", "Co") or character in _TURNING:
            return f"U+{ord(character):04X}"
    return None


_TURNING = frozenset("\ufffd\ufeff\u200b\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
