"""The gallery shows its data, reaches no network, and no text of a set changes its structure."""

from __future__ import annotations

import base64
import io
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_llava.data.conversation import Turn
from lora_llava.synthesis.contexts.context import Box, Context
from lora_llava.synthesis.gallery import REJECTIONS, ROWS, AnswerOf, Picks, render_gallery
from lora_llava.synthesis.gates.gates import REASONS
from lora_llava.synthesis.pipeline import Result
from lora_llava.synthesis.sample import FLAVOURS, Flavour, Rejection, Task

HOSTILE = (
    "</p></style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='x",
    "]]></svg>",
    "a\u202eb\x1b[2J\x00\u2028",
    "&lt;b&gt; &#x3c;",
    "javascript:alert(1)",
    "\ud800",
    "https://example.com/x.png",
)
TEXT = st.text(st.characters(), max_size=30) | st.sampled_from(HOSTILE)
VOID = {"meta", "img", "input"}
TALLY = {"tasks": 3, "rows": 1, "rejected": 1, "failed": 0, "not_asked": 0, "turns": 2, "words_per_answer": 2.5}
SUMMARY = {
    "complete": True,
    "tasks": 3,
    "rows": 1,
    "rejected": 2,
    "failed": 0,
    "not_asked": 0,
    "turns": 2,
    "images": 1,
    "flavours": {"conversation": TALLY},
    "reasons": {"no answer": {"attempts": 4, "tasks": 2, "given_up": 1}, "empty": {"attempts": 1}},
    "teacher": {"backend": "server", "model": None, "answered_as": {"owner/model": 3}},
}
DOG = Context("dog.png", ("A dog.",), (Box("dog", (0.25, 0.5, 0.75, 1.0)),))


class Page(HTMLParser):
    """A parsed page: tags with their attributes and texts; every tag must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[tuple[str, str]] = []
        html.encode("utf-8")
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes.get("class", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((".".join(self.open[-1]), data))

    def all(self, tag: str, name: str | None = None) -> list[dict[str, str]]:
        """Return the attributes of all tags of a kind and, if given, a class."""
        found = [attributes for kind, attributes in self.tags if kind == tag]
        return [each for each in found if name is None or name in each.get("class", "").split()]

    def text(self, tag: str) -> list[str]:
        """Return the texts in tags, named with their class: `p.text answer`."""
        return [text for name, text in self.texts if name == tag]


def turns_of(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))


def result(place: int = 0, flavour: Flavour = "conversation", **fields: Any) -> Result:
    usual: dict[str, Any] = {"status": "accepted", "turns": turns_of("What?", "A dog.")}
    return Result(Task(f"{place}-{flavour}-0", place, flavour, 0), **(usual | fields))


def rejected(*rejections: Rejection, place: int = 0, flavour: Flavour = "conversation") -> Result:
    return result(place, flavour, status="rejected", turns=(), rejections=rejections)


def gallery(
    *results: Result,
    contexts: Any = (DOG,),
    images: Path | None = None,
    answer_of: AnswerOf | None = None,
    **changed: Any,
) -> str:
    picks = Picks(0)
    for each in results:
        picks.add(each)
    return render_gallery("My set", SUMMARY | changed, picks, contexts, str(images) if images else None, answer_of)


def test_the_page_reaches_no_network_and_has_no_script(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "dog.png")
    html = gallery(result(), rejected(Rejection("no answer", "'unclear'")), images=tmp_path)
    page = Page(html)
    (policy,) = [each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    tags = (
        "html head meta title style body header main nav section article p h1 h2 div span bdi b i small pre "
        "dl dt dd ul li table thead tbody tr th td input label details summary figure figcaption img svg g rect text"
    )
    assert {tag for tag, _ in page.tags} == set(tags.split())
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("href", "action", "srcdoc") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in html
    assert "@import" not in html


@given(name=TEXT, texts=st.lists(TEXT, min_size=8, max_size=8))
def test_no_text_changes_the_structure(name: str, texts: list[str]) -> None:
    def page(*texts: str) -> Page:
        captions, label, image = (texts[0],), texts[1], texts[2]
        context = Context(image, captions, (Box(label, (0.1, 0.1, 0.9, 0.9)),))
        picks = Picks(0)
        picks.add(result(turns=turns_of(texts[3] or "x", texts[4] or "x")))
        picks.add(rejected(Rejection("no answer", texts[5])))
        summary = SUMMARY | {"teacher": SUMMARY["teacher"] | {"answered_as": {texts[6] or "x": 1}}}  # type: ignore[operator]
        return Page(render_gallery(texts[7], summary, picks, [context], None, lambda *_: "[" + texts[5]))

    def shape(page: Page) -> list[tuple[str, list[str], str]]:
        drawn = [each for each in page.tags if each[0] not in ("mark", "rect", "text", "g")]
        return [(tag, list(attributes), attributes.get("class", "")) for tag, attributes in drawn]

    assert shape(page(*texts[:7], name)) == shape(page(*["plain"] * 8))


def test_the_head_shows_counts() -> None:
    ledger = {"prompt_tokens": 900, "completion_tokens": 120, "usd": 1.5}
    missing = {"failed": 3, "not_asked": 1200}
    page = Page(gallery(complete=False, **missing, ledger=ledger, flavours={"conversation": TALLY | missing}))
    assert page.text("h1.") == ["My set"]
    assert dict(zip(page.text("dt."), page.text("dd."), strict=True)) == {
        "rows": "1 of 3",
        "images": "1",
        "questions": "2",
        "written by": "owner/model",
        "tokens": "1,020",
        "cost": "1.50 USD",
    }
    assert page.text("li.") == ["Not complete: 3 failed, 1,200 were not requested."]
    columns = ["flavour", "rows", "questions", "words per answer", "rejected", "failed", "not requested"]
    assert page.text("th.") == [*columns, "conversation", "no answer", "empty"]
    assert page.text("td.") == ["1 ", "2", "2.5", "1", "3", "1,200", "4", "1"]
    assert [each["style"] for each in page.all("i")] == ["width:100.0%", "width:25.0%"]
    assert page.text("p.none") == ["There is nothing to show."]


def test_rules_are_not_shown_as_a_model() -> None:
    page = Page(gallery(teacher={"backend": "demo", "model": None, "answered_as": {"rules": 3}}))
    assert page.text("li.") == ["Written by rules, not by a language model."]
    assert "lora_llava's rules" in page.text("dd.")


def test_a_sample_is_shown_with_its_context() -> None:
    page = Page(
        gallery(result(turns=turns_of("What?", "A\ndog.", "Where?", "Here."), rejections=(Rejection("empty", ""),)))
    )
    first, second = page.all("article")
    assert (first["class"], second["class"]) == ("card conversation", "card rejected")
    assert page.text("p.text question") == ["What?", "Where?"]
    assert page.text("p.text answer") == ["A\ndog.", "Here."]
    assert page.text("ul.captions") == []
    assert page.text("pre.") == ["A dog.\n\ndog: [0.25, 0.5, 0.75, 1.0]"] * 2
    assert page.text("li.b0") == ["dog", "dog"]
    assert page.text("span.") == ["2", "1", "1", "at attempt 2", "conversation, attempt 1"]
    assert page.text("span.drawn") == ["1 of 1 row, 1 of 5 rejected answers, drawn by the seed"]


def test_boxes_are_drawn_where_they_are() -> None:
    page = Page(gallery(result()))
    (overlay,) = page.all("svg")
    assert (overlay["class"], overlay["viewbox"]) == ("boxes", "0 0 360 270")
    halo, box, tag = page.all("rect")
    place = {"x": "90.0", "y": "135.0", "width": "180.0", "height": "135.0", "rx": "2"}
    assert halo == place | {"class": "halo"}
    assert box == place
    assert tag == {"x": "90.0", "y": "119.0", "width": "27.2", "height": "16.0", "rx": "2"}
    assert page.text("text.") == ["dog"]


def test_an_image_is_downscaled_and_embedded(tmp_path: Path) -> None:
    Image.effect_noise((960, 640), 40).save(tmp_path / "dog.png")
    page = Page(gallery(result(), images=tmp_path))
    (image,) = page.all("img")
    kind, _, content = image["src"].partition(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (480, 320)
    assert (image["width"], image["height"], image["alt"]) == ("960", "640", "dog.png")
    assert page.all("svg")[0]["viewbox"] == "0 0 360 240"
    assert "empty" not in page.all("div", "image")[0]["class"]


def test_a_tiny_image_keeps_its_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "dog.png")
    (image,) = Page(gallery(result(), images=tmp_path)).all("img", "few")
    assert image["src"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.png", "missing image"),
        ("broken.png", "corrupt image"),
        ("../out.png", "outside the folder"),
        ("https://example.com/x.png", "outside the folder"),
    ],
)
def test_an_image_that_cannot_be_shown_leaves_a_frame(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    html = gallery(result(), contexts=[Context(name, ("A dog.",), DOG.boxes)], images=tmp_path / "images")
    page = Page(html)
    assert page.text("figcaption.") == [f": {reason}"]
    assert page.all("div", "image") == [{"class": "image empty"}]
    assert len(page.all("rect")) == 3
    assert page.all("img") == []
    assert str(tmp_path) not in html


def test_without_a_folder_the_frame_gives_the_reason() -> None:
    assert Page(gallery(result())).text("figcaption.") == [": no image folder was named"]


ANSWER = '{"turns": [{"question": "What is it?", "answer": "I\u2019m not  sure; \\"no\\" dog, nothing."}]}'


@pytest.mark.parametrize(
    ("detail", "shown"),
    [
        ("'not sure'", 'I\u2019m [not  sure]; "no" dog, nothing.'),  # spaces differ
        ("'NOT SURE...'", 'I\u2019m [not  sure]; "no" dog, nothing.'),  # cut off, and different case
        ("turn 2: 'm not sure no dog'", 'I\u2019[m not  sure; "no" dog], nothing.'),  # found by its words alone
        ('"no" to whether there is a dog but the boxes show 1', 'I\u2019m not  sure; "[no]" dog, nothing.'),
        ("7 words in the answers", 'I\u2019m not  sure; "no" dog, nothing.'),
        ("'it is unclear'", 'I\u2019m not  sure; "no" dog, nothing.'),
        ("''", 'I\u2019m not  sure; "no" dog, nothing.'),
    ],
)
def test_the_rejected_passage_is_marked(detail: str, shown: str) -> None:
    page = Page(gallery(rejected(Rejection("no answer", detail)), answer_of=lambda *_: ANSWER))
    parts = {"p.text answer": "{}", "mark.": "[{}]"}
    assert "".join(parts[name].format(text) for name, text in page.texts if name in parts) == shown
    assert page.text("p.text") == [detail]
    assert page.text("p.text question") == ["What is it?"]


def test_markup_is_highlighted_and_shown_as_text() -> None:
    text = "The image shows <image> and \u202eturned."
    html = gallery(rejected(Rejection("template marker", "'<image>'"), flavour="detail"), answer_of=lambda *_: text)
    assert '<p class="text answer" dir="auto">The image shows <mark>&lt;image&gt;</mark> and U+202Eturned.</p>' in html
    page = Page(
        gallery(rejected(Rejection("control characters", "U+202E"), flavour="detail"), answer_of=lambda *_: text)
    )
    assert page.text("mark.") == ["U+202E"]


def test_an_answer_that_cannot_be_parsed_is_shown_as_text() -> None:
    requested = []

    def answer_of(task: Task, attempt: int) -> str:
        requested.append((task.task_id, attempt))
        return f"No.{'x' * 5000}"

    rejections = (Rejection("unreadable", "neither: 'No.xxx'"), Rejection("cut off", ""))
    page = Page(gallery(rejected(*rejections), answer_of=answer_of))
    assert sorted(requested) == [("0-conversation-0", 0), ("0-conversation-0", 1)]
    first, second = re.findall(
        r'<pre class="raw">(.*?)</pre>', gallery(rejected(*rejections), answer_of=answer_of), re.DOTALL
    )
    assert first == f"<mark>No.xxx</mark>{'x' * 3994}\n[1,003 letters more]"
    assert second == f"No.{'x' * 3997}\n[1,003 letters more]"
    assert page.text("b.") == ["unreadable", "cut off"]


def test_without_answers_only_the_reasons_are_shown() -> None:
    page = Page(gallery(rejected(Rejection("no answer", "'unclear'"))))
    assert page.text("div.why") == [f" {REASONS['no answer']}"]
    assert page.text("p.text") == ["'unclear'"]
    assert page.all("pre", "raw") == page.all("p", "answer") == []


def test_a_duplicate_shows_its_answer() -> None:
    same = result(status="rejected", rejections=(Rejection("duplicate", "of 1-conversation-0"),))
    assert Page(gallery(same)).text("p.text answer") == ["A dog."]


def names_of(picks: Picks) -> tuple[list[str], list[str]]:
    return (
        [f"{shown.task.task_id}" for shown in picks.rows()],
        [f"{shown.task.task_id} {shown.rejection.reason}" for shown in picks.rejections() if shown.rejection],
    )


@given(seed=st.integers(0, 5), count=st.integers(0, 120), order=st.randoms(use_true_random=False))
def test_the_draw_does_not_depend_on_the_order(seed: int, count: int, order: random.Random) -> None:
    reasons = sorted(REASONS)[:4]
    results = [
        result(number, FLAVOURS[number % 3], rejections=(Rejection(reasons[number % 4], ""),))
        for number in range(count)
    ]
    one, other = Picks(seed), Picks(seed)
    for each in results:
        one.add(each)
    order.shuffle(results)
    for each in results:
        other.add(each)
    assert names_of(one) == names_of(other)
    rows, rejections = names_of(one)
    assert len(rows) == len(set(rows)) == min(count, ROWS)
    assert len(rejections) == min(count, REJECTIONS)


def test_flavours_and_reasons_alternate_until_all_places_are_used() -> None:
    picks, other = Picks(0), Picks(1)
    for number in range(100):
        flavour: Flavour = "detail" if number < 3 else "reasoning"
        rejections = (Rejection("empty" if number < 95 else "too short", ""),)
        for each in (picks, other):
            each.add(result(number, flavour, rejections=rejections))
    rows, rejections = names_of(picks)
    assert [name.split("-")[1] for name in rows] == ["detail", "reasoning"] * 3 + ["reasoning"] * 24
    assert [name.split(maxsplit=1)[1] for name in rejections] == ["empty", "too short"] * 5 + ["empty"] * 5
    assert names_of(other) != (rows, rejections)
