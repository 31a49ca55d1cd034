"""Gates against what a small language model writes as a teacher: copies, circles, statements, and invented things."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest
from gate_samples import CONTEXTS, OPENING, turns_of, written_samples

from lora_llava.synthesis.contexts.context import Box, Context
from lora_llava.synthesis.gates.example_copies import ExampleRuns
from lora_llava.synthesis.gates.gates import REASONS, Limits, check_sample
from lora_llava.synthesis.gates.grounding import find_things
from lora_llava.synthesis.gates.retry_texts import RETRY_TEXTS
from lora_llava.synthesis.parse import parse_sample
from lora_llava.synthesis.prompts import Prompt, load_prompts
from lora_llava.synthesis.sample import Flavour, Rejection

LABELS = ("dog", "cat", "bus", "car", "truck", "boat", "horse", "pizza", "laptop", "person")
PLACES = ("in a park", "by a river", "near a house", "at a market", "on a road")


def made_contexts() -> list[Context]:
    """Return 20 contexts, among them some of the examples' own subjects (dogs, boats, a pizza, a laptop)."""
    found = []
    for number in range(20):
        label, place = LABELS[number % 10], PLACES[number % 5]
        captions = (f"A {label} {place} with some trees.", f"The {label} seen from the side on a sunny day.")
        boxes = tuple(Box(label, (0.1 * n, 0.2, 0.1 * n + 0.1, 0.6)) for n in range(1 + number % 3))
        found.append(Context(f"{number}.jpg", captions, boxes))
    return found


def runs_of(prompt: Prompt) -> ExampleRuns:
    return ExampleRuns((each.context, each.answer) for each in prompt.examples)


def copies(contexts: list[Context]) -> Counter[str]:
    """Return the verdicts on every example of the shipped prompts, put to other contexts."""
    verdicts: Counter[str] = Counter()
    for flavour, prompt in load_prompts().items():
        for example in prompt.examples:
            turns = parse_sample(example.answer, flavour, "Describe it.")
            assert not isinstance(turns, Rejection)
            for context in contexts:
                found = check_sample(context, turns, flavour, Limits(), runs_of(prompt))
                verdicts[found.reason if found else "accepted"] += 1
    return verdicts


def test_examples_of_the_prompts_put_to_other_contexts_are_refused() -> None:
    assert copies(made_contexts()) == {"copied example": 140}
    assert copies(list(CONTEXTS.values())) == {"copied example": 7 * len(CONTEXTS)}


def test_good_samples_share_no_run_with_the_examples() -> None:
    prompts = load_prompts()
    runs = {flavour: runs_of(prompt) for flavour, prompt in prompts.items()}
    for context, turns, flavour in written_samples():
        assert check_sample(context, turns, flavour, Limits(), runs[flavour]) is None


EXAMPLE = (
    '{"turns": [{"question": "What is it?", "answer": "A red kite flies high above the old stone bridge today."}]}'
)
RUNS = ExampleRuns([("A kite over a bridge with a long tail of ribbons.\n\nkite: [0.1, 0.2, 0.3, 0.4]", EXAMPLE)])


@pytest.mark.parametrize(
    ("captions", "answer", "copied"),
    [
        (
            (),
            "It is true that a red kite flies high above the old stone bridge.",
            "a red kite flies high above the old stone bridge",
        ),
        ((), "A RED kite -- flies high, above the old 'stone'!", "a red kite flies high above the old stone"),
        ((), "A red kite flies high above an old stone bridge today.", None),
        ((), "A kite over a bridge with a long tail.", "a kite over a bridge with a long tail"),
        (
            ("A red kite flies high above the old stone bridge today.",),
            "A red kite flies high above the old stone bridge today.",
            None,
        ),
        (
            ("a red kite flies high above the old stone bridge",),
            "A red kite flies high above the old stone bridge today.",
            "flies high above the old stone bridge today",
        ),
    ],
)
def test_eight_words_of_an_example_are_a_copy(captions: tuple[str, ...], answer: str, copied: str | None) -> None:
    assert RUNS.find_copy(answer, Context("a.jpg", captions)) == copied


def test_a_common_question_is_no_copy() -> None:
    context = Context("a.jpg", ("A dog and a sheep.",))
    runs = runs_of(load_prompts()["conversation"])
    assert runs.find_copy("Is the sheep to the left or to the right of the dog?", context) is None
    assert runs.find_copy("Is the pizza to the left or to the right of the man?", context) is not None


def test_retry_texts_are_kept_and_complete() -> None:
    """The texts are part of the ledger's keys: these of earlier versions stay as they are."""
    assert list(RETRY_TEXTS)[20:] == ["copied example", "not a question", "answer is a question", "ungrounded"]
    earlier = json.dumps(list(RETRY_TEXTS.items())[:20])
    assert (
        hashlib.sha256(earlier.encode()).hexdigest()
        == "092f03fb162c6f7dd7604c588839ec3730b7d942989e0156a72cdb17da052177"
    )
    assert set(RETRY_TEXTS) == set(REASONS)


def contexts_of(captions: tuple[str, ...] = (), **counts: int) -> Context:
    boxes = (Box(label, (0.1, 0.1, 0.2, 0.2)) for label, count in counts.items() for _ in range(count))
    return Context("a.jpg", captions, tuple(boxes))


def verdict(context: Context, question: str, answer: str) -> str | None:
    found = check_sample(context, turns_of(*OPENING, question, answer), "conversation", Limits(min_words=0))
    return found.reason if found else None


STATEMENTS = (
    "The man is riding a horse.",
    "There is a dog on the lawn",
    "A dog on a lawn.",
    "In the image, there is a dog.",
)
REQUESTS = (
    "Describe the dog.",
    "In one sentence, describe the dog.",
    "I wonder what the dog is doing.",
    "Can you describe the dog",
    "Look at the dog. What is it doing?",
    "The dog is brown?",
    "With the weather in mind, what should the owner bring",
    "You see a dog on the lawn; name its breed.",
    "Beschreibe den Hund.",
    "Describe la imagen con detalle.",
    "\u56fe\u4e2d\u6709\u4ec0\u4e48",
)


def test_statements_are_no_questions() -> None:
    dog = contexts_of(dog=1)
    assert [verdict(dog, text, "It is brown.") for text in STATEMENTS] == ["not a question"] * len(STATEMENTS)
    assert [text for text in REQUESTS if verdict(dog, text, "It is brown.")] == []


@pytest.mark.parametrize(
    ("answer", "is_refused"),
    [
        ("What is the dog doing?", True),
        ("what is the DOG doing", True),
        ("What colour is it?", True),
        ("A dog?", True),
        ("Is it a dog? What does it do?", True),
        ("What is the dog doing? It is running.", False),
        ('The sign above it says "Where next?"', False),
        ("The sign reads: Where next?", False),
        ("It is running in the sun, isn't it?", False),
    ],
)
def test_answers_do_not_ask(answer: str, is_refused: bool) -> None:
    found = verdict(contexts_of(dog=1), "What is the dog doing?", answer)
    assert found == ("answer is a question" if is_refused else None)


@pytest.mark.parametrize(
    ("answer", "is_refused"),
    [
        ("The man is on the beach, and the man is on the beach, and the man is on the beach.", True),
        ("It is a dog and a dog and a dog and a dog and a dog.", True),
        ("It is an apple that we ate, which is an odd thing, and an apple that we eat, which is an odd thing.", True),
        ("It is very, very, very big.", False),
        ("The blue circle is at the top left, the purple square is at the top right.", False),
        ("On and on it runs, over the lawn and round the tree, over and over again until it stops.", False),
        ("The cup is on the left, the plate is on the right, and the fork is on the left of the plate.", False),
    ],
)
def test_circling_phrases_are_repetition(answer: str, is_refused: bool) -> None:
    assert verdict(contexts_of(dog=1), "What is there?", answer) == ("repetition" if is_refused else None)


@pytest.mark.parametrize(("shared", "reason"), [(9, None), (10, "repetition")])
def test_two_answers_that_share_ten_words_are_repetition(shared: int, reason: str | None) -> None:
    words = "is a human being with human body parts like the"  # SmolLM2-135M's, about a moustache and a toothbrush
    run = " ".join(words.split()[:shared])
    turns = turns_of("What is on the left?", f"The dog {run} dog.", "What is on the right?", f"That {run} thing.")
    found = check_sample(contexts_of(dog=1), turns, "conversation", Limits())
    assert (found.reason if found else None) == reason


WHAT, MANY = "What is there?", "How many dogs are there?"


@pytest.mark.parametrize(
    ("counts", "question", "answer"),
    [
        ({"car": 3, "truck": 1}, WHAT, "There are two cars and one truck, so three vehicles."),
        ({"car": 2, "truck": 1}, WHAT, "There are two cars and one truck, so four vehicles."),
        (
            {"car": 2, "truck": 1},
            "How many vehicles are there?",
            "2 cars and 1 truck, which makes 4 vehicles in total.",
        ),
        ({"car": 2, "truck": 1}, WHAT, "There are four vehicles: two cars and one truck."),
        ({"dog": 3}, WHAT, "There is a pair of dogs."),
        ({"dog": 1}, WHAT, "There is a pair of dogs."),
        ({"dog": 1}, WHAT, "A couple of dogs are running."),
        ({"dog": 1}, WHAT, "Both dogs are running."),
        ({"dog": 1}, WHAT, "Both of the dogs are running."),
        ({"dog": 1}, WHAT, "There are several dogs in the image."),
        ({"dog": 1}, WHAT, "The image shows a group of dogs."),
        ({"dog": 1}, WHAT, "There are two to three dogs."),
        ({"dog": 1}, WHAT, "There are 2-3 dogs."),
        ({"dog": 1}, WHAT, "There are 2\u20133 dogs."),
        ({"dog": 3}, WHAT, "There are between four and six dogs."),
        ({"dog": 3}, WHAT, "There are one or two dogs."),
        ({"dog": 3}, WHAT, "There are at least four dogs."),
        ({"dog": 3}, WHAT, "There are more than three dogs."),
        ({"dog": 3}, WHAT, "There are half a dozen dogs."),
        ({"dog": 3}, WHAT, "There are twenty-one dogs."),
        ({"dog": 3}, WHAT, "There are four (4) dogs."),
        ({"dog": 3}, WHAT, "There is a lone dog."),
        ({"dog": 3}, WHAT, "The number of dogs in the image is four."),
        ({"dog": 3}, MANY, "A pair."),
        ({"dog": 3}, MANY, "Both."),
        ({"dog": 1}, MANY, "Several."),
        ({"dog": 3}, MANY, "Four or five."),
    ],
)
def test_amounts_that_boxes_contradict(counts: dict[str, int], question: str, answer: str) -> None:
    assert verdict(contexts_of(**counts), question, answer) == "wrong count"


@pytest.mark.parametrize(
    ("context", "question", "answer"),
    [
        (contexts_of(dog=2), WHAT, "Both dogs are running."),
        (contexts_of(dog=2), WHAT, "There is a pair of dogs."),
        (contexts_of(dog=3), WHAT, "There are several dogs."),
        (contexts_of(dog=3), WHAT, "There are two or three dogs."),
        (contexts_of(dog=3), WHAT, "There are at least two dogs."),
        (contexts_of(car=2, truck=1), WHAT, "There are two cars and one truck, so three vehicles."),
        (contexts_of(dog=1), WHAT, "Both the dog and its owner are running."),
        (contexts_of(("Dogs on a lawn.",), dog=1), WHAT, "There are several dogs."),
        (contexts_of(("A flock with its dog.",), dog=1), WHAT, "There are several dogs."),
        (contexts_of(dog=1), "Why do dogs drink?", "Several dogs can share a bowl, two or three at a time."),
        (contexts_of(person=3), "Where will they sleep?", "There are two adults and one child, so one room will do."),
        (contexts_of(dog=3), WHAT, "There are two dogs on the left and one dog on the right, so three dogs in total."),
        (contexts_of(dog=1), "Are there several dogs here?", "No, only one."),
        (contexts_of(dog=1), WHAT, "If there were several dogs, it would be loud."),
        (contexts_of(dog=1), WHAT, "There are not many dogs."),
        (contexts_of(person=12), WHAT, "There are more than a dozen people."),
        (contexts_of(scissors=1), WHAT, "There is a pair of scissors."),
    ],
)
def test_amounts_that_boxes_allow(context: Context, question: str, answer: str) -> None:
    assert verdict(context, question, answer) is None


DENIALS = (
    "The image lacks dogs.",
    "There is no sign of any dogs.",
    "Dogs are absent from the image.",
    "Dogs are nowhere to be seen.",
    "Not a single dog is visible.",
    "There are neither dogs nor cats.",
)
NO_DENIALS = (
    "The dogs are not wet.",
    "Dogs are not visible from behind.",
    "There are no signs of rain.",
    "A dog is missing a collar.",
)


def test_further_denials() -> None:
    dogs = contexts_of(dog=3)
    assert [verdict(dogs, WHAT, text) for text in DENIALS] == ["denied object"] * len(DENIALS)
    assert verdict(dogs, "Are there any dogs?", "There are none.") == "denied object"
    assert verdict(dogs, "Are there any dogs?", "I don't see any.") == "denied object"
    assert [text for text in NO_DENIALS if verdict(dogs, WHAT, text)] == []


KITCHEN = contexts_of(("Maria Lopez, a baker, bakes bread in PARIS.",), pizza=1)


@pytest.mark.parametrize(
    ("answer", "total", "missing"),
    [
        ("A woman puts the pizza on a table.", 3, ("table",)),
        ("The baker, maria lopez, is in Paris with a Maria.", 2, ()),
        ("The baker is called John Smith and his dog is Rex.", 3, ("dog", "John Smith", "Rex")),
        ("There is no dog. If a cat came, it would sleep.", 0, ()),
        ("The pizza is on the left of the bread.", 2, ()),
        ("Ein Hund und Maria stehen mit John in der Stadt.", 0, ()),
        ("This Is All In Title Case With The Names John And Rex Of The Dog", 1, ("dog",)),
        ("It was made on a Monday in March in Europe.", 0, ()),
    ],
)
def test_things_and_names_are_looked_up(answer: str, total: int, missing: tuple[str, ...]) -> None:
    found = find_things(KITCHEN, turns_of("What is it?", answer))
    assert (found.total, set(found.missing)) == (total, set(missing))


def test_mostly_invented_samples_are_refused() -> None:
    answer = "A dog, a horse and a boat are near the pizza. A bus is at the pier."
    assert check_sample(KITCHEN, turns_of(*OPENING, WHAT, answer), "conversation", Limits()) == Rejection(
        "ungrounded", "5 of 6: dog, horse, boat, bus, pier"
    )
    assert verdict(KITCHEN, WHAT, answer.replace("a boat", "the bread").replace("pier", "pizza")) is None
    generous: Flavour = "conversation"
    assert check_sample(KITCHEN, turns_of(*OPENING, WHAT, answer), generous, Limits(max_ungrounded=0.9)) is None
