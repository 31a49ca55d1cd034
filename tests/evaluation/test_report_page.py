"""The report's page shows its data, reaches no network, and no text of a run changes its structure."""

from __future__ import annotations

import base64
import io
import math
import re
import unicodedata
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_llava.pages.preview_samples import escape_hidden
from lora_llava.pages.report_page import GalleryItem, RunReport, Table, render_report
from lora_llava.pages.report_plots import Curve, describe_gaps, draw, write_number

HOSTILE = (
    "</p></style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='x",
    "]]></svg>",
    "a\u202eb\x1b[2J\x00\u2028",
    "&lt;b&gt; &#x3c;",
    "javascript:alert(1)",
    "$\\frac{1}{0}$",
    "\ud800",
)
TEXT = st.text(st.characters(), max_size=40) | st.sampled_from(HOSTILE)
VOID = {"meta", "img", "input", "br"}
LOSS = Curve("Loss", "nats", {"training": [(10, 2.0), (20, 1.0)], "validation": [(20, 1.5)]})


def is_layout(text: str) -> bool:
    """Check whether a text is a line break and indentation of the template, not content."""
    return text.isspace() and "\n" in text


class Page(HTMLParser):
    """A parsed page: tags with their attributes and texts; every tag must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and not is_layout(data):
            self.texts.append((self.open[-1], data))

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        found = [attributes for name, attributes in self.tags if name == tag]
        return [each for each in found if wanted.items() <= each.items()]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def report_of(*gallery: GalleryItem, **parts: Any) -> RunReport:
    empty: dict[str, Any] = {"title": "Run", "facts": [], "curves": [], "tables": [], "notes": []}
    return RunReport(**{**empty, **parts}, gallery=gallery)


def item(text: str = "B", right: bool = True, **fields: Any) -> GalleryItem:
    usual: dict[str, Any] = {
        "question": "What?\nOptions: (A) x (B) y",
        "reference": "B",
        "images": [],
        "categories": ["NAT"],
        "question_id": "7",
    }
    return GalleryItem(**{**usual, **fields}, text=text, right=right)


def test_the_page_reaches_no_network_and_has_no_script() -> None:
    html = render_report(report_of(item(images=[Image.new("RGB", (300, 200), "red")]), curves=[LOSS]))
    page = Page(html)
    assert page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    assert page.all("script") == page.all("link") == page.all("iframe") == page.all("form") == []
    assert len(page.all("style")) == 1
    assert "http:" not in html
    assert "https:" not in html
    assert "<!doctype" not in html[20:].lower()
    assert "<?xml" not in html
    addresses = [
        named[key] for _, named in page.tags for key in ("src", "href", "xlink:href", "action") if key in named
    ]
    assert addresses
    assert [each[:30] for each in addresses if not each.startswith(("#c0-", "data:image/jpeg;base64,"))] == []
    assert set(re.findall(r"url\(([^)]{3})", html)) == {"#c0"}
    assert "@import" not in html
    assert [key for _, named in page.tags for key in named if key.startswith("on")] == []


@settings(max_examples=30)
@given(a=TEXT, b=TEXT, c=TEXT, value=st.floats(width=16))
@example(a=HOSTILE[0], b=HOSTILE[1], c=HOSTILE[4], value=math.nan)
@example(a=HOSTILE[2], b=HOSTILE[3], c=HOSTILE[8], value=math.inf)
@example(a=HOSTILE[7] * 99, b=HOSTILE[5] * 99, c="\n\r\n", value=-0.0)
def test_no_text_changes_the_structure(a: str, b: str, c: str, value: float) -> None:
    def shape(a: str, b: str, c: str) -> Page:
        gallery = item(b, False, question=f"Q{a}", reference=f"R{c}", question_id=c, categories=[a, b])
        curve = Curve(a, f"in {b}", {"first": [(1.0, 1.0)], f"then {c}": [(2.0, value)]})
        html = render_report(
            report_of(gallery, title=a, facts=[(b, c)], curves=[curve], tables=[Table(a, [b, c], [[c, a]])], notes=[c])
        )
        html.encode("utf-8")
        assert {each for each in html if unicodedata.category(each)[0] == "C"} == {"\n"}
        return Page(html)

    page, plain = shape(a, b, c), shape("x", "x", "x")
    folding = {
        "details",
        "summary",
        "span",
        "p",
        "div",
    }  # long texts, empty texts and the question's lines differ in these
    assert [tag for tag, _ in page.tags if tag not in folding] == [tag for tag, _ in plain.tags if tag not in folding]
    assert [sorted(named) for tag, named in page.tags if tag not in folding] == [
        sorted(named) for tag, named in plain.tags if tag not in folding
    ]
    assert "".join(page.text("h1")) == escape_hidden(a)
    assert page.text("h1") == ([escape_hidden(a)] if a else [])


def test_a_hostile_text_can_be_read() -> None:
    page = Page(render_report(report_of(*[item(text, False) for text in HOSTILE])))
    shown = [text for tag, text in page.texts if tag == "p"]
    for text in HOSTILE:
        assert escape_hidden(text) in shown
    assert escape_hidden("\u202e") == "U+202E"


def test_wrong_answers_come_first_and_can_be_chosen_without_a_script() -> None:
    gallery = [item("A", True, question_id="1"), item("B", False, question_id="2"), item("C", True, question_id="3")]
    page = Page(render_report(report_of(*gallery)))
    assert [named["class"] for named in page.all("article")] == ["card wrong", "card right", "card right"]
    assert [text for tag, text in page.texts if tag == "bdi"] == ["2", "1", "3"]
    assert [named["id"] for named in page.all("input", type="radio")] == ["show-all", "show-wrong", "show-right"]
    assert [named["id"] for named in page.all("input") if "checked" in named] == ["show-all"]
    assert [named["for"] for named in page.all("label")] == ["show-all", "show-wrong", "show-right"]
    assert [text for tag, text in page.texts if tag == "span" and text.isdigit()] == ["3", "1", "2"]
    style = page.text("style")[0]
    assert "#show-wrong:checked ~ .items > .right, #show-right:checked ~ .items > .wrong { display: none; }" in style


def test_long_texts_are_folded_and_kept_in_full() -> None:
    lecture = "A lecture. " * 40 + "\r\nThe answer is B."
    page = Page(render_report(report_of(item(lecture, reference="x" * 320, question="Q" * 321))))
    assert len(page.all("details")) == 2
    assert [text for tag, text in page.texts if tag == "p"] == ["Q" * 321, "x" * 320, lecture.replace("\r", "")]
    cut = [text for tag, text in page.texts if tag == "span" and "…" in text]
    assert cut[0] == f"{'Q' * 150} … {'Q' * 90}"
    assert cut[1].endswith("\nThe answer is B.")
    assert Page(render_report(report_of(item(" ")))).text("p")[-1] == "nothing"


def test_images_are_downscaled_and_keep_their_colours() -> None:
    images = [
        Image.new("RGB", (1000, 500), "red"),
        Image.new("L", (40, 60), 9),
        Image.new("RGBA", (9, 9), (0, 0, 255, 0)),
        Image.new("CMYK", (8, 999)),
    ]
    page = Page(render_report(report_of(item(images=images, question_id="a<b"))))
    found = [named["src"].partition(";base64,") for named in page.all("img")]
    shown = [Image.open(io.BytesIO(base64.b64decode(data))) for _, _, data in found]
    assert [(kind, image.size) for (kind, _, _), image in zip(found, shown, strict=True)] == [
        ("data:image/jpeg", (224, 112)),
        ("data:image/png", (40, 60)),
        ("data:image/png", (9, 9)),
        ("data:image/png", (2, 224)),
    ]
    assert shown[0].getpixel((5, 5)) == (254, 0, 0)
    assert shown[1].getpixel((0, 0)) == (9, 9, 9)
    assert [named["alt"] for named in page.all("img")][3] == "image 4 of question a<b"
    assert images[0].size == (1000, 500)


def test_a_table_has_row_and_column_headings() -> None:
    table = Table("By category", ["category", "accuracy"], [["NAT", "95.82"], ["SOC", "99.22"]])
    page = Page(render_report(report_of(tables=[table])))
    assert page.text("th") == ["category", "accuracy", "NAT", "SOC"]
    assert [named["scope"] for named in page.all("th")] == ["col", "col", "row", "row"]
    assert page.text("td") == ["95.82", "99.22"]
    with pytest.raises(ValueError, match="table 'T' has 2 columns, a row 1 cells"):
        render_report(report_of(tables=[Table("T", ["a", "b"], [["x"]])]))


def test_empty_parts_are_left_out() -> None:
    page = Page(render_report(report_of(title="My run", facts=[("seed", "0")], notes=["2 rows dropped"])))
    assert (page.text("h1"), page.text("title")) == (["My run"], ["My run"])
    assert (page.text("dt"), page.text("dd"), page.text("li")) == (["seed"], ["0"], ["2 rows dropped"])
    assert page.all("article") == page.all("figure") == page.all("table") == page.all("input") == []


def drawn(curve: Curve, prefix: str = "c") -> str:
    """Return the drawing's SVG, "" for none."""
    drawing = draw(curve, prefix)
    return drawing.content if drawing else ""


def marks(svg: str) -> list[int]:
    """Return the number of marked points of each series."""
    return [
        group.count("<use ")
        for group in re.findall(r'<g id="c-line2d_\d+">\n<path[^>]*series-.*?(?=<g id=)', svg, re.S)
    ]


def vertices(svg: str) -> list[str]:
    """Return the moves and lines of each series' path."""
    return [
        "".join(re.findall("[ML]", path)) for path in re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series', svg)
    ]


def test_a_drawing_has_text_and_the_colours_of_the_page() -> None:
    drawing = draw(LOSS, "c")
    assert drawing == draw(LOSS, "c")
    assert drawing
    svg = drawing.content
    assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", drawing.view_box)
    assert "svg" not in svg
    assert vertices(svg)[0] == "ML"
    assert [label for label in ("0", "0.5", "1", "1.5", "2") if f">{label}</text>" in svg] == [
        "0",
        "0.5",
        "1",
        "1.5",
        "2",
    ]
    assert set(re.findall(r"(?:stroke|fill): ([a-z#(][^;\"]*)", svg)) == {
        "none",
        "var(--soft)",
        "var(--line)",
        "var(--series-0)",
        "var(--series-1)",
    }
    assert "<style" not in svg
    assert "xmlns" not in svg
    ids, other = (set(re.findall(r' id="([^"]+)"', drawn(LOSS, prefix))) for prefix in ("c0", "c1"))
    assert ids
    assert not ids & other
    assert all(f'id="{name}"' in svg for name in re.findall(r'(?:="#|url\(#)([^")]+)', svg))


def test_a_nan_is_a_gap_and_is_reported() -> None:
    points = [(float(n), math.nan if n == 20 else math.inf if n == 30 else 1.0 + n) for n in range(40)]
    curve = Curve("Loss", "", {"train": points, "fine": [(0, 1.0)]})
    assert describe_gaps(curve) == ["train: 2 values are gaps, the first NaN at step 20"]
    assert vertices(drawn(curve))[0].count("M") == 3
    page = Page(render_report(report_of(curves=[curve])))
    assert "train: 2 values are gaps, the first NaN at step 20" in page.text("p")
    log = Curve("Loss", "", {"train": [(1, 0.0), (2, 1.0)]}, log_scale=True)
    assert describe_gaps(log) == ["train: 1 value is a gap, the first 0 at step 1"]
    assert describe_gaps(Curve("", "", {"train": [(math.nan, 1.0)]})) == [
        "train: 1 value is a gap, the first 1 at step nan"
    ]


def test_isolated_points_are_drawn() -> None:
    many = [(float(n), 1.0) for n in range(40)]
    many[19] = many[21] = (19.0, math.nan)  # 20 has no neighbours
    assert marks(drawn(Curve("", "", {"one": [(5, 1.0)]}))) == [1]
    assert marks(drawn(Curve("", "", {"many": many}))) == [1]
    assert marks(drawn(Curve("", "", {"few": many[:16]}))) == [16]


@pytest.mark.parametrize("points", [[], [(1, math.nan)], [(math.inf, 1.0)]])
def test_a_curve_without_values_has_no_drawing(points: list[tuple[float, float]]) -> None:
    curve = Curve("Accuracy", "%", {"validation": points})
    assert draw(curve, "c") is None
    page = Page(render_report(report_of(curves=[curve])))
    assert "no values" in page.text("p")
    assert page.all("svg") == []
    assert [text.strip() for text in page.text("li")] == ["no value"]


@settings(max_examples=30)
@given(
    points=st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats()), max_size=5),
    log_scale=st.booleans(),
)
def test_any_numbers_can_be_drawn(points: list[tuple[float, float]], log_scale: bool) -> None:
    svg = drawn(Curve("", "", {"a": points}, log_scale))
    drawable = [value for _, value in points if abs(value) < 1e100 and (value > 1e-100 or not log_scale)]
    assert bool(svg) == bool(drawable)
    assert "nan" not in svg


def test_the_legend_shows_the_last_value() -> None:
    html = render_report(report_of(curves=[LOSS, Curve("Speed", "tokens/s", {"a": [(1500, 7854.6)]})]))
    page = Page(html)
    assert page.text("b") == ["1", "1.5", "7,855"]
    assert [text.strip() for text in page.text("li") if text.strip()] == ["at step 20", "at step 20", "at step 1,500"]
    assert [named["aria-label"] for named in page.all("svg")] == ["Loss by step", "Speed by step"]
    assert page.text("small") == ["nats", "tokens/s"]


def test_numbers() -> None:
    assert [write_number(value) for value in (0.0, 0.30000000000000004, 2e-5, 999.95, 1000.4, -4241.0, 3e9)] == [
        "0",
        "0.3",
        "2e-5",
        "1,000",
        "1,000",
        "-4,241",
        "3e+9",
    ]


def test_forty_answers_with_photographs_and_long_curves_stay_under_two_megabytes() -> None:
    # Noise in every pixel compresses worse than a photograph of this size.
    photo = Image.merge("YCbCr", [Image.effect_noise((640, 480), sigma) for sigma in (20, 8, 8)]).convert("RGB")
    gallery = [item("An answer. " * 30, n % 2 == 0, images=[photo.rotate(n)], question_id=str(n)) for n in range(40)]
    noisy = [(float(n), 1.0 + (n * 7919 % 1000) / 1000) for n in range(5_000)]
    html = render_report(report_of(*gallery, curves=[Curve("Loss", "", {"train": noisy})] * 5))
    assert len(html.encode()) < 2_000_000
