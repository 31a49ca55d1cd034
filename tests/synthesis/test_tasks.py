"""Tasks: flavours follow the weights, images are drawn by seed, and ids are stable."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.core.errors import UserError
from lora_llava.synthesis.contexts.context import Box, Context
from lora_llava.synthesis.sample import FLAVOURS, WEIGHTS, Flavour, Task
from lora_llava.synthesis.tasks import Tasks, can_carry, distribute, image_stem, plan_tasks

BOX = Box("cup", (0.1, 0.1, 0.2, 0.2))
NAMES = st.text("ab1-./", min_size=1, max_size=6)
WEIGHTINGS = st.fixed_dictionaries(
    {}, optional={flavour: st.sampled_from([0, 0.5, 1, 23, 58, 77]) for flavour in FLAVOURS}
).filter(lambda weights: any(weights.values()))


def images(count: int) -> list[Context]:
    return [Context(f"{number:012}.jpg", ("A cup.",)) for number in range(count)]


def tasks_by_id(tasks: Tasks, contexts: list[Context]) -> dict[str, tuple[str, Flavour, int]]:
    found = {task.task_id: (contexts[task.place].image, task.flavour, task.number) for task in tasks}
    assert len(found) == len(tasks)
    return found


def error_of(*given: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        plan_tasks(*given, **more)
    return str(caught.value)


def shares(weights: dict[Flavour, float]) -> dict[Flavour, Fraction]:
    total = sum(map(Fraction, weights.values()))
    return {flavour: Fraction(weights[flavour]) / total for flavour in FLAVOURS if weights.get(flavour)}


def test_the_mixture_of_llava_is_distributed_exactly() -> None:
    mixture = shares(WEIGHTS)
    assert distribute(158_000, mixture) == {"conversation": 58_000, "detail": 23_000, "reasoning": 77_000}
    assert distribute(10, mixture) == {"conversation": 4, "detail": 1, "reasoning": 5}
    assert distribute(1, mixture) == {"conversation": 0, "detail": 0, "reasoning": 1}
    assert distribute(2, shares({"conversation": 1, "detail": 1, "reasoning": 1})) == {
        "conversation": 1,
        "detail": 1,
        "reasoning": 0,
    }


@given(st.integers(1, 5000), WEIGHTINGS)
def test_distributed_counts_sum_up_and_are_within_one_of_their_share(count: int, weights: dict[Flavour, float]) -> None:
    counts = distribute(count, shares(weights))
    assert sum(counts.values()) == count
    assert all(abs(counts[flavour] - count * share) < 1 for flavour, share in shares(weights).items())


PINNED_BY_SAMPLES = [
    "000000000000-reasoning-0",
    "000000000001-conversation-0",
    "000000000001-detail-0",
    "000000000002-conversation-0",
    "000000000005-reasoning-0",
]
PINNED_BY_IMAGE = [
    "000000000000-conversation-0",
    "000000000000-reasoning-0",
    "000000000001-detail-0",
    "000000000001-reasoning-0",
    "000000000002-conversation-0",
    "000000000002-detail-0",
    "000000000003-reasoning-0",
    "000000000003-reasoning-1",
    "000000000004-conversation-0",
    "000000000004-reasoning-0",
    "000000000005-conversation-0",
    "000000000005-reasoning-0",
]


def test_the_draw_is_the_same_everywhere() -> None:
    contexts = images(6)
    assert [task.task_id for task in plan_tasks(contexts, samples=5, seed=0)] == PINNED_BY_SAMPLES
    assert [task.task_id for task in plan_tasks(contexts, samples=5, seed=1)] != PINNED_BY_SAMPLES
    assert [task.task_id for task in plan_tasks(contexts, samples_per_image=2, seed=0)] == PINNED_BY_IMAGE
    assert [task.task_id for task in plan_tasks(contexts, samples_per_image=2, seed=1)] != PINNED_BY_IMAGE


def test_tasks_are_a_sequence_by_image_flavour_and_number() -> None:
    contexts = images(3)
    tasks = plan_tasks(contexts, samples=12, samples_per_image=2, weights={"reasoning": 1, "detail": 1}, seed=0)
    assert len(tasks) == 12
    assert tasks[1] == Task("000000000000-detail-1", 0, "detail", 1)
    assert tasks[-1] == Task("000000000002-reasoning-1", 2, "reasoning", 1)
    assert tasks[3:5] == [
        Task("000000000000-reasoning-1", 0, "reasoning", 1),
        Task("000000000001-detail-0", 1, "detail", 0),
    ]
    assert [task.place for task in tasks] == [0] * 4 + [1] * 4 + [2] * 4
    assert tasks.counts() == {"conversation": 0, "detail": 6, "reasoning": 6}
    assert tasks.left_out == {"detail": 0, "reasoning": 0}
    with pytest.raises(IndexError):
        tasks[12]


@given(
    names=st.lists(NAMES, min_size=1, max_size=9, unique=True),
    weights=WEIGHTINGS,
    samples=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_no_image_is_drawn_twice_before_all_were_drawn_once(
    names: list[str], weights: dict[Flavour, float], samples: int, seed: int
) -> None:
    contexts = [Context(name, ("x",)) for name in names]
    tasks = plan_tasks(contexts, weights=weights, samples=samples, samples_per_image=40, seed=seed)
    assert tasks.counts() == dict.fromkeys(FLAVOURS, 0) | distribute(samples, shares(weights))
    taken = Counter((task.place, task.flavour) for task in tasks)
    for flavour, count in tasks.counts().items():
        each = [taken[place, flavour] for place in range(len(names))]
        assert sum(each) == count
        assert max(each) - min(each) <= 1
    numbers = sorted((task.place, task.flavour, task.number) for task in tasks)
    assert numbers == sorted((*key, number) for key, count in taken.items() for number in range(count))
    assert len({task.task_id for task in tasks}) == samples


@given(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=20))
def test_stems_are_unique(names: list[str]) -> None:
    names = [spelling for name in names for spelling in (name, f"{name}.jpg", f"a/{name}.jpg", f"{name}.png")]
    assert len({image_stem(name) for name in names}) == len(set(names))


def test_stems_are_short_for_coco_names_and_contain_a_hash_for_others() -> None:
    names = [
        "000000296284.jpg",
        "COCO_train2014_000000296284.jpg",
        "a b.c.jpg",
        "1.png",
        "a/1.jpg",
        "b/1.jpg",
        "1",
        ".jpg",
    ]
    assert [image_stem(name) for name in names] == [
        "000000296284",
        "COCO_train2014_000000296284",
        "a b.c",
        "1-9461eefa",
        "1-35f4aeeb",
        "1-a066f3a4",
        "1-6b86b273",
        ".jpg-d912c70a",
    ]


@given(st.permutations(range(8)), st.integers(1, 8), st.integers(0, 3), st.sampled_from([None, 5]))
def test_other_images_do_not_change_the_task_of_an_id(
    order: list[int], count: int, seed: int, samples: int | None
) -> None:
    every = [Context(f"{number % 3}/{number // 3}.jpg", ("x",)) for number in order]
    fewer = every[:count]
    before = tasks_by_id(plan_tasks(fewer, samples_per_image=3, samples=samples, seed=seed), fewer)
    after = tasks_by_id(plan_tasks(every, samples_per_image=3, samples=samples, seed=seed), every)
    assert all(after.get(name, expected) == expected for name, expected in before.items())
    if samples is None:
        assert before.items() <= after.items()
    in_order = sorted(every, key=lambda context: context.image)
    assert tasks_by_id(plan_tasks(in_order, samples_per_image=3, samples=samples, seed=seed), in_order) == after


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 5))
def test_more_samples_keep_those_of_fewer(samples: int, more: int, most: int) -> None:
    contexts = images(20)
    weights: dict[Flavour, float] = {
        "conversation": 1,
        "detail": 1,
    }  # with two flavours, no count falls as the sum rises
    first = tasks_by_id(plan_tasks(contexts, weights=weights, samples=samples, samples_per_image=9, seed=3), contexts)
    second = tasks_by_id(
        plan_tasks(contexts, weights=weights, samples=samples + more, samples_per_image=9, seed=3), contexts
    )
    assert first.items() <= second.items()
    each = tasks_by_id(plan_tasks(contexts, samples_per_image=most, seed=3), contexts)
    assert each.items() <= tasks_by_id(plan_tasks(contexts, samples_per_image=most + 1, seed=3), contexts).items()


def test_flavours_of_many_images_are_by_weight() -> None:
    tasks = plan_tasks(images(4_000), seed=0)
    assert tasks.counts() == {"conversation": 1_432, "detail": 530, "reasoning": 2_038}  # of 1468, 582 and 1949


@given(st.integers(1, 30), st.integers(0, 50))
def test_flavours_of_one_image_are_spread_by_weight(most: int, seed: int) -> None:
    counts = plan_tasks(images(1), samples_per_image=most, seed=seed).counts()
    assert sum(counts.values()) == most
    assert all(abs(counts[flavour] - most * share) < 2 for flavour, share in shares(WEIGHTS).items())


@pytest.mark.parametrize(
    ("captions", "boxes", "carried"),
    [
        (0, 0, []),
        (1, 0, FLAVOURS),
        (5, 7, FLAVOURS),
        (0, 1, ["conversation", "reasoning"]),
        (0, 2, FLAVOURS),
        (1, 1, FLAVOURS),
    ],
)
def test_flavours_that_a_context_suffices_for(captions: int, boxes: int, carried: list[Flavour]) -> None:
    context = Context("1.jpg", ("A cup.",) * captions, (BOX,) * boxes)
    assert [flavour for flavour in FLAVOURS if can_carry(context, flavour)] == list(carried)


def test_images_with_thin_contexts_are_counted_and_get_another_flavour() -> None:
    contexts = [*images(4), Context("a.jpg", (), (BOX,)), Context("b.jpg")]
    tasks = plan_tasks(contexts, samples_per_image=9, seed=0)
    assert tasks.left_out == {"conversation": 1, "detail": 2, "reasoning": 1}
    assert Counter(task.place for task in tasks) == dict.fromkeys(range(5), 9)
    assert {task.flavour for task in tasks if task.place == 4} == {"conversation", "reasoning"}
    details = plan_tasks(contexts, weights={"detail": 1}, samples=8, samples_per_image=2, seed=0)
    assert Counter(task.place for task in details) == dict.fromkeys(range(4), 2)
    assert details.left_out == {"detail": 2}
    assert len(plan_tasks(contexts, weights={"detail": 1}, seed=0)) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 0}, "r.samples: it is 0; set it to 1 or more"),
        ({"samples_per_image": -1}, "r.samples_per_image: it is -1; set it to 1 or more"),
        (
            {"weights": {"detial": 1}},
            "r.weights: 'detial' is not a flavour (did you mean \"detail\"?); choose from conversation, detail, "
            "reasoning",
        ),
        ({"weights": {"detail": -1.0}}, "r.weights: the weight of detail is -1.0; set it to 0 or more"),
        ({"weights": {"detail": float("nan")}}, "r.weights: the weight of detail is nan; set it to 0 or more"),
        (
            {"weights": {"detail": 0}},
            "r.weights: every weight is 0; set at least one of conversation, detail, reasoning above 0",
        ),
        (
            {"samples": 20},
            "r.samples: 20 samples include 7 of conversation, but only 4 images suit it and r.samples_per_image is 1; "
            "at most 8 samples are possible with these weights: lower samples, or raise samples_per_image",
        ),
    ],
)
def test_invalid_plans_are_errors(given: dict[str, Any], message: str) -> None:
    assert error_of(images(4), seed=0, where="r", **given) == message


@given(
    captioned=st.integers(0, 6),
    boxed=st.integers(0, 6),
    weights=WEIGHTINGS,
    samples=st.integers(1, 60),
    most=st.integers(1, 3),
)
def test_the_reported_maximum_is_possible_and_exact(
    captioned: int, boxed: int, weights: dict[Flavour, float], samples: int, most: int
) -> None:
    contexts = [*images(captioned), *(Context(f"{number}.png", (), (BOX,)) for number in range(boxed))]
    room = {flavour: (captioned + boxed * (flavour != "detail")) * most for flavour in FLAVOURS}

    def fits(count: int) -> bool:
        return all(wanted <= room[flavour] for flavour, wanted in distribute(count, shares(weights)).items())

    def plan(count: int) -> Tasks:
        return plan_tasks(contexts, weights=weights, samples=count, samples_per_image=most, seed=0)

    if fits(samples):
        assert len(plan(samples)) == samples
        return
    message = error_of(contexts, weights=weights, samples=samples, samples_per_image=most, seed=0)
    possible = int(message.rpartition("at most ")[2].split()[0])
    assert possible == max((count for count in range(samples) if fits(count)), default=0)
    if possible:
        assert len(plan(possible)) == possible
