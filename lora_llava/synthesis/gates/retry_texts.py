"""Text that tells the teacher why its previous answer to a request was rejected.

The requests of further attempts contain these texts, and the ledger keys answers by the text of their request. A change
here makes a resumed set query the teacher again, so the texts stay as they are. Reports use `gates.REASONS` instead.
"""

RETRY_TEXTS: dict[str, str] = {
    "unreadable": "neither the JSON that was asked for nor a form that is understood in its place",
    "cut off": "the text ends in the middle",
    "turn order": "questions and answers do not take turns",
    "empty": "a question or an answer without a word",
    "number of turns": "more or fewer questions than the flavour has",
    "too long": "more words than the limits allow",
    "control characters": "characters that are no text",
    "template marker": "an image placeholder or a marker of a chat template",
    "link or markup": "a link, a script, HTML or Markdown's links and pictures",
    "coordinates": "numbers of a box",
    "speaks as a model": "speaks as a program that was shown no picture",
    "source named": "speaks of captions, boxes or a description in place of the picture",
    "no answer": "refuses, or says that it cannot be told",
    "repeated question": "the same question twice in a conversation",
    "repetition": "goes round in circles",
    "too short": "fewer words than the limits ask for",
    "wrong count": "a number that neither boxes nor captions bear out",
    "denied object": "says that something is not there of which there is a box",
    "wrong place": "left for right, by the boxes",
    "duplicate": "the same as an earlier sample, but for case, punctuation and spaces",
    "copied example": "copies words of an example instead of writing about this image",
    "not a question": "a statement where a question belongs",
    "answer is a question": "the answer repeats its question or is itself a question",
    "ungrounded": "names things that neither the sentences nor the objects of this image contain",
}
