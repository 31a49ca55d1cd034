"""The concept filter, by hand on small sets and by its laws on drawn ones; and what finds noun phrases."""

from __future__ import annotations

import errno
import importlib.util
import json
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_llava.core.errors import UserError
from lora_llava.data.concepts.concept_filter import ConceptReport, _full_disk_reported, filter_captions
from lora_llava.data.concepts.noun_phrases import SPACY_MODEL, light_noun_phrases, load_noun_phrases, spacy_noun_phrases

HAND_MADE = ["cat, tree", "cat", "cat, sea", "cat", "tree", " ", ",", "tree, tree", "sea"]


def split(captions: Sequence[str]) -> Iterable[list[str]]:
    return ([phrase.strip() for phrase in caption.split(",")] for caption in captions)


def kept_of(captions: Iterable[str], **options: Any) -> tuple[list[int], ConceptReport]:
    written: list[Mapping[str, Any]] = []
    rows = ({"id": index, "caption": caption} for index, caption in enumerate(captions))
    options = {"noun_phrases": split, "caption_of": lambda row: row["caption"]} | options
    report = filter_captions(rows, written.append, **options)
    return [row["id"] for row in written], report


def test_a_set_made_by_hand() -> None:
    kept, report = kept_of(HAND_MADE)
    assert kept == [0, 1, 2, 3, 4, 7]
    assert report.as_dict() == {
        "rows": 9,
        "kept": 6,
        "dropped": {"empty caption": 1, "no noun phrase": 1, "rare phrases only": 1},
        "phrases": 3,
        "rare_phrases": 1,
        "capped_phrases": 0,
        "most_frequent": [
            {"phrase": "cat", "before": 4, "after": 4},
            {"phrase": "tree", "before": 3, "after": 3},
            {"phrase": "sea", "before": 2, "after": 1},
        ],
    }


def test_rows_are_written_whole_and_in_their_old_order() -> None:
    rows = [{"image": f"ü{i}", "turns": [{"value": "sky\n\ud83d"}], "n": {"x": None, "y": 0.1}} for i in range(3)]
    written: list[Mapping[str, Any]] = []
    seen: list[str] = []

    def noun_phrases(captions: Sequence[str]) -> list[list[str]]:
        seen.extend(captions)
        return [["sky"] for _ in captions]

    filter_captions(rows, written.append, noun_phrases=noun_phrases, caption_of=lambda row: row["turns"][0]["value"])
    assert written == rows
    assert seen == ["sky\n?"] * 3


@pytest.mark.parametrize(("captions", "kept", "rare"), [(2, 0, 1), (3, 3, 0)])
def test_the_paper_s_minimum_is_three_captions(captions: int, kept: int, rare: int) -> None:
    ids, report = kept_of(["sky"] * captions)
    assert (len(ids), report.rare_phrases, report.phrases) == (kept, rare, 1)


@pytest.mark.parametrize(("captions", "capped"), [(100, 0), (101, 1), (250, 1)])
def test_the_paper_s_maximum_is_a_hundred_captions(captions: int, capped: int) -> None:
    ids, report = kept_of(["sky"] * captions)
    assert (len(ids), report.kept, report.capped_phrases) == (100, 100, capped)
    assert report.dropped == Counter({"beyond the cap": captions - 100} if captions > 100 else {})
    assert ids == sorted(set(ids))


def test_a_minimum_over_the_maximum_still_draws_the_maximum() -> None:
    ids, report = kept_of(["sky"] * 5 + ["sea"] * 4, minimum=5, maximum=2)
    assert len(ids) == 2
    assert max(ids) < 5
    assert report.dropped == {"beyond the cap": 3, "rare phrases only": 4}


def test_a_caption_beyond_one_phrase_s_cap_is_kept_for_another() -> None:
    captions = ["sky"] * 50 + ["sky, moon"] * 3
    for seed in range(5):
        ids, report = kept_of(captions, maximum=4, seed=seed)
        assert {50, 51, 52} <= set(ids)
        assert report.most_frequent[1].after == 3
        assert report.kept == report.most_frequent[0].after >= 4


def test_every_subset_is_as_likely() -> None:
    drawn = Counter(tuple(kept_of(["sky"] * 4, minimum=1, maximum=2, seed=seed)[0]) for seed in range(600))
    assert set(drawn) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    assert all(70 < count < 130 for count in drawn.values())  # 100 each, more than three deviations of 9.1


def test_the_seed_draws() -> None:
    first, second, third = (kept_of(["sky"] * 50, maximum=10, seed=seed)[0] for seed in (0, 0, 1))
    assert first == second != third
    assert first == [7, 8, 17, 18, 20, 21, 22, 23, 27, 37]  # the same in every version of Python


def test_a_phrase_s_draw_does_not_hang_on_other_phrases() -> None:
    alone, _ = kept_of(["sky"] * 50, maximum=10)
    beside, _ = kept_of(["sky"] * 50 + ["moon"] * 50, maximum=10)
    assert [index for index in beside if index < 50] == alone


def test_the_twenty_most_frequent_phrases_are_reported() -> None:
    captions = [", ".join(f"p{p:02}" for p in range(30) if p <= i or p >= 28) for i in range(28)]
    _, report = kept_of(captions, minimum=1)
    assert [entry.phrase for entry in report.most_frequent] == [
        "p00",
        "p28",
        "p29",
        *(f"p{p:02}" for p in range(1, 18)),
    ]
    assert [entry.before for entry in report.most_frequent] == [28, 28, 28, *range(27, 10, -1)]


@given(
    captions=st.lists(st.lists(st.sampled_from("abcdef"), max_size=4).map(",".join), max_size=40),
    minimum=st.integers(1, 5),
    maximum=st.integers(1, 8),
    seed=st.integers(0, 9),
    batch_size=st.integers(1, 50),
)
def test_laws(captions: list[str], minimum: int, maximum: int, seed: int, batch_size: int) -> None:
    options = {"minimum": minimum, "maximum": maximum, "seed": seed}
    ids, report = kept_of(captions, **options)
    assert kept_of(captions, **options, batch_size=batch_size) == (ids, report)
    phrases = [set(filter(None, caption.split(","))) for caption in captions]
    counts = Counter(phrase for own in phrases for phrase in own)
    after = Counter(phrase for index in ids for phrase in phrases[index])
    frequent = {phrase for phrase, count in counts.items() if count >= minimum}
    assert report.rows == len(captions) == report.kept + report.dropped.total()
    assert report.kept == len(ids)
    assert report.dropped["empty caption"] == captions.count("")
    assert report.dropped["rare phrases only"] == sum(bool(own) and not own & frequent for own in phrases)
    assert all(phrases[index] & frequent for index in ids)
    assert all(after[phrase] >= min(counts[phrase], maximum) for phrase in frequent)
    assert len(ids) <= sum(min(counts[phrase], maximum) for phrase in frequent)
    assert (report.phrases, report.rare_phrases) == (len(counts), len(counts) - len(frequent))
    assert report.capped_phrases == sum(counts[phrase] > maximum for phrase in frequent)
    assert {e.phrase: (e.before, e.after) for e in report.most_frequent} == {p: (counts[p], after[p]) for p in counts}


def test_rows_are_read_once_and_written_after_that() -> None:
    reported: list[str] = []

    class Pipe:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            reported.append("opened")
            yield from ({"caption": "sky"} for _ in range(3))
            reported.append("ended")

    def progress(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for row in rows:
            reported.append("read")
            yield row

    filter_captions(
        Pipe(),
        lambda row: reported.append("written"),
        noun_phrases=split,
        caption_of=lambda row: row["caption"],
        batch_size=2,
        progress=progress,
    )
    assert reported == ["opened", *["read"] * 3, "ended", *["written"] * 3]


def test_no_rows_are_no_error() -> None:
    assert kept_of([]) == ([], ConceptReport())


@pytest.mark.parametrize("name", ["minimum", "maximum", "batch_size"])
def test_numbers_below_one_are_named(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} is 0; it should be 1 or more$"):
        kept_of([], **{name: 0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": None}, "row 2: its caption is None; it should be text"),
        ({"caption": "x", "image": b""}, "row 2: it is not JSON (Object of type bytes is not JSON serializable); "),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], message: str) -> None:
    rows = [{"caption": "sky"}, row]
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        filter_captions(rows, print, noun_phrases=split, caption_of=lambda row: row["caption"])


def test_phrases_belong_to_captions() -> None:
    with pytest.raises(ValueError, match="zip"):
        kept_of(["sky", "sea"], noun_phrases=lambda captions: [["sky"]])


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("place", ["read", "write"])
def test_temporary_files_are_gone_after_an_exception(
    end: type[BaseException], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def rows() -> Iterator[dict[str, Any]]:
        for _ in range(5):
            yield {"caption": "sky"}
        if place == "read":
            raise end

    def write(row: Mapping[str, Any]) -> None:
        raise end

    with pytest.raises(end):
        filter_captions(rows(), write, noun_phrases=split, caption_of=lambda row: row["caption"], batch_size=2)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal
from lora_llava.data.concepts.concept_filter import filter_captions
def rows():
    for number in range(10_000):
        yield {"caption": f"{number} " * 200}
    files = [os.readlink(entry) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry)]
    print(sum(file.startswith(os.environ["TMPDIR"]) for file in files), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
filter_captions(rows(), print, noun_phrases=lambda texts: ([text] for text in texts), caption_of=lambda r: r["caption"])
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to find the open files by")
def test_temporary_files_are_gone_even_where_the_process_is_killed(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED], env={"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"2\n")  # rows, and occurrences
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported() -> None:
    base = sqlite3.connect("")
    base.execute("CREATE TABLE t (x BLOB)")
    base.execute("PRAGMA max_page_count = 2")
    with pytest.raises(OSError, match="No space left on device") as raised, _full_disk_reported():
        base.execute("INSERT INTO t VALUES (zeroblob(100000))")
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(sqlite3.OperationalError, match="syntax"), _full_disk_reported():
        base.execute("nonsense")
    base.close()


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A small brown dog sleeps on the wooden floor.", ["small brown dog", "wooden floor"]),
        ("Two men are riding horses along a sandy beach", ["men", "horses", "sandy beach"]),
        ("the dog's bed, a DOG bed", ["dog", "bed", "dog bed"]),
        ("a brightly colored kite in the sky", ["colored kite", "sky"]),
        ("a flying kite and boys flying kites", ["flying kite", "boys", "kites"]),
        ("a person takes a walk near parked cars", ["person", "walk", "parked cars"]),
        ("a plate topped with 3 slices of cake", ["plate", "slices", "cake"]),
        ("fruit flavored donuts and vitamin c tablets", ["fruit", "flavored donuts", "vitamin", "tablets"]),
        ("a flying black kite, the recording", ["flying black kite", "recording"]),
        ("2 works of art", ["works", "art"]),
        ("they don't stand there", []),
        ("the sky is blue", ["sky"]),
        ("a t-shirt and one café table", ["t-shirt", "café table"]),
        ("", []),
        ("?! 12 # _", []),
    ],
)
def test_light_noun_phrases(caption: str, phrases: list[str]) -> None:
    assert light_noun_phrases(caption) == phrases
    assert list(load_noun_phrases("light")([caption, caption])) == [phrases, phrases]


@given(caption=st.text())
def test_light_noun_phrases_are_the_caption_s_words(caption: str) -> None:
    for phrase in light_noun_phrases(caption):
        assert phrase == phrase.lower().strip() != ""
        assert all(word in caption.lower() for word in phrase.split(" "))


INSTALLED = all(importlib.util.find_spec(name) for name in ("spacy", SPACY_MODEL))


def test_auto_reports_its_choice() -> None:
    assert load_noun_phrases("auto").name == ("spacy" if INSTALLED else "light")
    assert load_noun_phrases("light").name == "light"


def test_an_unknown_tagger_is_named() -> None:
    message = 'tagger "spcy" is unknown (did you mean "spacy"?); use one of auto, spacy, light'
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_noun_phrases("spcy")  # type: ignore[arg-type]


@pytest.mark.skipif(INSTALLED, reason="spaCy and its model are installed here")
def test_a_missing_spacy_is_reported_with_the_commands() -> None:
    fix = f"run `pip install spacy` and `python -m spacy download {SPACY_MODEL}`, or use the tagger light"
    with pytest.raises(UserError, match=f"^tagger spacy: .+; {re.escape(fix)}$") as raised:
        load_noun_phrases("spacy")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not INSTALLED, reason=f"spaCy or {SPACY_MODEL} is not installed")
def test_spacy_s_model_finds_noun_phrases() -> None:
    found = load_noun_phrases("spacy")(["A small dog sleeps on the floor.", "They saw a red car."])
    assert list(found) == [["small dog", "floor"], ["red car"]]


def test_spacy_s_chunks_without_what_only_points() -> None:
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    document = spacy.tokens.Doc(
        spacy.blank("en").vocab,
        words=["The", "Old", "Dog", "bites", "him"],
        pos=["DET", "ADJ", "NOUN", "VERB", "PRON"],
        heads=[2, 2, 3, 3, 3],
        deps=["det", "amod", "nsubj", "ROOT", "dobj"],
    )
    assert spacy_noun_phrases(document) == ["old dog"]


def test_the_filter_with_the_light_tagger() -> None:
    captions = [json.loads(text) for text in ['"A red bus."', '"the red bus stops"', '"One red bus!"', '"He waits"']]
    ids, report = kept_of(captions, noun_phrases=load_noun_phrases("light"))
    assert ids == [0, 1, 2]
    assert report.dropped == {"no noun phrase": 1}
