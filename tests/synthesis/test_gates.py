"""Gates reject bad answers for the right reason and accept every good one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gate_samples import CONTEXTS, OPENING, bad_answers, box_samples, turns_of, written_samples
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.data.conversation import Turn
from lora_llava.synthesis.contexts.context import Box, Context
from lora_llava.synthesis.gates.gates import REASONS, Limits, SeenSamples, check_sample, normalise
from lora_llava.synthesis.sample import FLAVOURS, Flavour, Rejection, Turns

COCO = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_contexts" / "captions_boxes_20.jsonl"
DOGS = Context("dogs.jpg", ("Dogs on a lawn.",), tuple(Box("dog", (x, 0.5, x + 0.1, 0.6)) for x in (0.1, 0.3, 0.7)))
PLAIN = "It is a plain answer in a plain form with nothing about it that anyone could object to."


def check(context: Context, question: str, answer: str) -> Rejection | None:
    return check_sample(context, turns_of(*OPENING, question, answer), "conversation", Limits())


def test_good_samples_are_accepted() -> None:
    written, true = list(written_samples()), list(box_samples())
    assert (len(written), len(true)) == (165, 60)
    found = [(turns, check_sample(context, turns, flavour, Limits())) for context, turns, flavour in [*written, *true]]
    assert [(turns, rejection) for turns, rejection in found if rejection] == []


@pytest.mark.parametrize("reason", sorted(bad_answers()))
def test_bad_answers_are_rejected_for_the_right_reason(reason: str) -> None:
    missed = []
    for context, turns in bad_answers()[reason]:
        rejection = check_sample(context, turns, "conversation", Limits())
        if rejection is None or rejection.reason != reason:
            missed.append((turns[-2:], rejection))
    assert missed == []


def test_bad_answers_are_of_many_kinds_and_wordings() -> None:
    counts = {reason: len(found) for reason, found in bad_answers().items()}
    assert (len(counts), sum(counts.values())) == (14, 147)


@pytest.mark.parametrize(
    ("roles", "detail"),
    [
        ("aa", "turn 1 is from the assistant; expected the user"),
        ("uu", "turn 2 is from the user; expected the assistant"),
        ("uauua", "turn 4 is from the user; expected the assistant"),
        ("uau", "the last question has no answer"),
    ],
)
def test_roles_alternate(roles: str, detail: str) -> None:
    turns = tuple(Turn("user" if role == "u" else "assistant", f"Text {n}.") for n, role in enumerate(roles))
    assert check_sample(DOGS, turns, "conversation", Limits()) == Rejection("turn order", detail)


@pytest.mark.parametrize(
    ("flavour", "pairs", "detail"),
    [
        ("conversation", 1, "1; expected 2 to 12"),
        ("conversation", 13, "13; expected 2 to 12"),
        ("detail", 2, "2; expected 1"),
        ("reasoning", 2, "2; expected 1"),
    ],
)
def test_each_flavour_has_its_number_of_turns(flavour: Flavour, pairs: int, detail: str) -> None:
    turns = turns_of(*(text for n in range(pairs) for text in (f"What is number {n}?", PLAIN)))
    assert check_sample(DOGS, turns, flavour, Limits()) == Rejection("number of turns", detail)


def test_no_turns() -> None:
    assert check_sample(DOGS, (), "detail", Limits()) == Rejection("empty", "no turns")


@pytest.mark.parametrize(
    ("flavour", "fewest", "most"), [("conversation", 2, 900), ("detail", 15, 600), ("reasoning", 10, 600)]
)
def test_words_are_counted(flavour: Flavour, fewest: int, most: int) -> None:
    def check_words(words: int, limits: Limits) -> Rejection | None:
        text = " ".join(f"w{n}" for n in range(words))
        return check_sample(DOGS, turns_of("What is this?", text), flavour, limits)

    limits = Limits(min_turns=1)
    if flavour != "conversation":
        assert check_words(fewest - 1, limits) == Rejection("too short", f"{fewest - 1} words in the answers")
    assert [check_words(words, limits) for words in (fewest, most)] == [None, None]
    assert check_words(most + 1, limits) == Rejection("too long", f"{most + 1} words in the answers")
    own = Limits(min_turns=1, min_words=3, max_words=4)
    assert [check_words(words, own) for words in (3, 4)] == [None, None]
    assert check_words(2, own) == Rejection("too short", "2 words in the answers")
    assert check_words(5, own) == Rejection("too long", "5 words in the answers")


def test_words_of_a_question_are_counted() -> None:
    long = " ".join(f"w{n}" for n in range(121))
    assert check(DOGS, long, "Yes.") == Rejection("too long", "121 words in a question")
    assert check(DOGS, long.removesuffix(" w120"), "Yes.") is None
    assert check(DOGS, "Dogs?", "Yes.") == Rejection("too short", "1 words in a question")
    assert check_sample(DOGS, turns_of("Describe!", PLAIN), "detail", Limits()) is None


def test_chinese_characters_count_as_words() -> None:
    assert (
        check_sample(DOGS, turns_of("图中有什么?", "草地上有三只狗,它们在阳光下奔跑玩耍。"), "detail", Limits()) is None
    )


@pytest.mark.parametrize(
    ("captions", "question", "answer", "detail"),
    [
        ((), "How many dogs are there?", "Two.", "2 dogs but the boxes show 3"),
        ((), "How many dogs are there?", "About four.", None),
        ((), "How many dogs are there?", "At least two.", None),
        ((), "How many dogs are there?", "There are two black dogs and one white dog.", None),
        ((), "How many dogs are there?", "Two black dogs and two brown.", "2 and 2 dogs but the boxes show 3"),
        ((), "How many black dogs are there?", "Two.", None),
        ((), "How many black dogs are there?", "Four.", "4 dogs but the boxes show 3"),
        ((), "How many dogs are on the bench?", "Two.", None),
        ((), "How many dogs would fit in a van?", "Eight.", None),
        ((), "What is there?", "There are two dogs.", '"2 dogs" but the boxes show 3'),
        ((), "What is there?", "There are two dogs. Another dog hides behind a tree.", None),
        ((), "What is there?", "On the left there are two dogs.", None),
        ((), "What is there on the left?", "There are two dogs.", None),
        ((), "What is there?", "There are two dogs and they play.", None),
        ((), "What is there?", "There are two animals in this image.", '"2 animals" but the boxes show 3'),
        ((), "What is there?", "There are four animals in this image.", None),
        ((), "What is there?", "There are four puppies.", '"4 puppies" but the boxes show 3'),
        ((), "What is there?", "There are two puppies.", None),
        ((), "What is there?", "There is a single dog here.", '"1 dog" but the boxes show 3'),
        ((), "What is there?", "There is a dog here.", None),
        ((), "What do the four dogs do?", "They run.", '"4 dogs" but the boxes show 3'),
        ((), "What do the two dogs do?", "They run.", None),
        ((), "What if one more came?", "If there are four dogs, one of them has to wait.", None),
        (("Four dogs on a lawn.",), "How many dogs are there?", "Four.", None),
        (("Two dogs, seen from afar.",), "How many dogs are there?", "Two.", None),
        (("Two dogs, seen from afar.",), "What is there?", "There are two dogs.", None),
        (("A dog, seen from afar.",), "What is there?", "There is one dog.", '"1 dog" but the boxes show 3'),
        (("One dog runs, two dogs sleep, one dog barks.",), "How many dogs are there?", "Four.", None),
        (("Four huskies on a lawn.",), "How many dogs are there?", "Four.", None),
        (("A dog in a dog bed.",), "How many dogs are there?", "Two.", "2 dogs but the boxes show 3"),
    ],
)
def test_counts_are_checked_against_boxes_and_captions(
    captions: tuple[str, ...], question: str, answer: str, detail: str | None
) -> None:
    context = Context(DOGS.image, captions, DOGS.boxes)
    assert check(context, question, answer) == (Rejection("wrong count", detail) if detail else None)


def test_people_are_summed() -> None:
    context = Context("a.jpg", ("A man and his wife with two girls.",), (Box("person", (0.1, 0.1, 0.4, 0.9)),))
    assert check(context, "How many people are there?", "There are four people.") is None
    assert check(context, "How many people are there?", "There are five people.") == Rejection(
        "wrong count", "5 people but the boxes show 1"
    )


@pytest.mark.parametrize(
    ("question", "answer", "detail"),
    [
        ("Is there a dog?", "No.", '"no" to whether there is a dog but the boxes show 3'),
        ("Is there a dog on the bench?", "No.", None),
        ("Is there a brown dog?", "No.", None),
        ("Is there a dog?", "No, there are three dogs.", None),
        ("Is there a cat?", "No.", None),
        ("What is on the bench?", "There are no dogs.", None),
        ("What is on the bench?", "There are no dogs in the image.", '"no dogs" but the boxes show 3'),
        ("What is there?", "There are no cats, dogs or horses.", '"no dogs" but the boxes show 3'),
        ("What is there?", "There are no cats, dogs or horses on the road.", None),
        ("What is there?", "There are no dogs running.", None),
        ("What is there?", "There are no dog bowls.", None),
        ("What is there?", "There are no other dogs.", None),
        ("What is there?", "There is no doubt that there are dogs.", None),
    ],
)
def test_denials_are_checked_against_boxes(question: str, answer: str, detail: str | None) -> None:
    assert check(DOGS, question, answer) == (Rejection("denied object", detail) if detail else None)


@pytest.mark.parametrize(
    ("sentence", "wrong"),
    [
        ("The cat is to the left of the dog.", True),
        ("The cat is to the right of the dog.", False),
        ("The dog is sitting on the left side of the cat.", False),
        ("The dog is on the right side of the image.", True),
        ("The dog is on the left of the image.", False),
        ("The cat is not to the left of the dog.", False),
        ("The owner of the cat is to the left of the dog.", False),
        ("The bench is to the left of the dog.", False),
        ("The chair is to the left of the dog.", False),
    ],
)
def test_left_and_right(sentence: str, wrong: bool) -> None:
    boxes = [("dog", 0.1, 0.3), ("cat", 0.3, 0.6), ("bench", 0.25, 0.9), ("chair", 0.4, 0.5), ("chair", 0.6, 0.7)]
    context = Context("a.jpg", (), tuple(Box(label, (left, 0.5, right, 0.9)) for label, left, right in boxes))
    rejection = check(context, "Where is it?", sentence)
    assert (rejection.reason if rejection else None) == ("wrong place" if wrong else None)


def test_text_of_the_context_is_allowed() -> None:
    poster = CONTEXTS["poster"]
    question, answer = "What does the caption say?", "The caption says Coming Soon."
    assert check(poster, question, answer) is None
    assert check(DOGS, question, answer) == Rejection("source named", "'caption'")
    site = Context("a.jpg", ("A van with www.example.com on it.",))
    assert check(site, "What is on the van?", "It says www.example.com.") == Rejection("link or markup", "'www.e'")


def test_a_corner_of_a_box_is_a_coordinate() -> None:
    context = Context("a.jpg", (), (Box("dog", (0.25, 0.31, 0.5, 0.9)),))
    assert check(context, "Where is it?", "Its back is at 0.31 or so.") == Rejection("coordinates", "'0.31'")
    assert check(context, "How high is it?", "It is 0.31 metres high, and $0.25 buys a treat.") is None
    assert check(context, "Where is it?", "Its back is at 0.32 or so.") is None


def test_the_first_failing_gate_determines_the_reason() -> None:
    text = "<image> See https://a.example/ for [0.1, 0.2] as the caption is unclear."
    order = ["template marker", "link or markup", "coordinates", "source named", "no answer"]
    for reason, part in zip(
        order, ["<image>", "https://a.example/", "[0.1, 0.2]", "caption is unclear", ""], strict=True
    ):
        rejection = check(DOGS, "What is this?", text)
        assert rejection is not None
        assert rejection.reason == reason
        text = text.replace(part, "name is unclear" if part.startswith("caption") else "it")
    assert list(REASONS).index("template marker") < list(REASONS).index("no answer")


def test_duplicates_are_found_despite_case_punctuation_and_spaces() -> None:
    seen = SeenSamples()
    assert seen.check("a-0", turns_of("What is it?", "A dog."), "conversation") is None
    assert seen.check("a-1", turns_of("what  is it", "A DOG!"), "conversation") == Rejection("duplicate", "of a-0")
    assert seen.check("a-0", turns_of("What is it?", "A dog."), "conversation") is None
    assert seen.check("a-2", turns_of("What is it?", "A cat."), "conversation") is None
    assert seen.check("a-3", turns_of("What is", "It? A dog."), "conversation") is None
    assert (normalise("STRASSE, \uff11"), normalise("?!"), normalise(" \n")) == (normalise("straße 1"), "?!", "")


def test_descriptions_are_compared_without_their_requests() -> None:
    seen = SeenSamples()
    assert seen.check("a-0", turns_of("Describe it.", PLAIN), "detail") is None
    assert seen.check("b-0", turns_of("What is there?", PLAIN), "detail") == Rejection("duplicate", "of a-0")
    assert seen.check("c-0", turns_of("Why is it so?", PLAIN), "reasoning") is None


@given(st.text(), st.text())
def test_texts_that_differ_in_spaces_alone_are_duplicates(text: str, other: str) -> None:
    assert normalise(f"  {text}\n") == normalise(text)
    seen = SeenSamples()
    assert seen.check("a", turns_of(text, other), "reasoning") is None
    assert seen.check("b", turns_of(f" {text}", f"{other}\n"), "reasoning") == Rejection("duplicate", "of a")


SENTENCE = "There are no two three dogs people . , ? is it left of the image not how many 0.123 [ ] <"
WORDS = st.sampled_from(SENTENCE.split(" "))


@given(
    st.lists(st.one_of(st.text(max_size=40), st.lists(WORDS, max_size=25).map(" ".join)), max_size=5),
    st.sampled_from(FLAVOURS),
    st.sampled_from([DOGS, *CONTEXTS.values()]),
)
def test_no_text_breaks_the_gates(texts: list[str], flavour: Flavour, context: Context) -> None:
    rejection = check_sample(context, turns_of(*texts), flavour, Limits(min_turns=1, min_words=0))
    assert rejection is None or (rejection.reason in REASONS and rejection.detail.isprintable())


@pytest.mark.skipif(not COCO.exists(), reason="the twenty COCO contexts are not in this repository")
def test_real_contexts_support_their_own_counts() -> None:
    contexts = [json.loads(line) for line in COCO.read_text().splitlines()]
    assert len(contexts) == 20
    for row in contexts:
        boxes = tuple(Box(each["category"], tuple(each["bbox"])) for each in row["instances"])
        context = Context(row["image"], tuple(row["captions"]), boxes)
        assert _true(context) is None
        assert boxes == () or _denied(context) == "denied object"


def _true(context: Context) -> Rejection | None:
    description = " ".join(f"{caption.rstrip('.')}." for caption in context.captions)
    turns: Turns = turns_of("What is there to see?", description)
    return check_sample(context, turns, "detail", Limits())


def _denied(context: Context) -> str | None:
    rejection = check(context, f"Is there a {context.boxes[0].label}?", "No.")
    return rejection.reason if rejection else None
