"""Targets of fuzzing: readers and parsers of other people's files. Each may only end, or raise a declared error."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from PIL import Image

from lora_llava.core.errors import ReportedError
from lora_llava.core.storage import find_damage as damage_of_entry
from lora_llava.data import TEMPLATES, encode_conversation
from lora_llava.data.encoded import encode_table
from lora_llava.data.files.row_files import iterate_rows
from lora_llava.data.folder import understand_folder
from lora_llava.data.formats import Columns, read_row
from lora_llava.data.images.image_check import inspect_images
from lora_llava.data.images.image_sources import FolderImages, read_rgb
from lora_llava.data.scienceqa import load_scienceqa
from lora_llava.data.sources import open_source
from lora_llava.demo.build import build_tokenizer
from lora_llava.evaluation.answer_metrics import exact_match
from lora_llava.evaluation.judge import llava_bench
from lora_llava.evaluation.judge.review import parse_scores
from lora_llava.evaluation.scienceqa import parse_answer
from lora_llava.evaluation.score_files import score_scienceqa_file
from lora_llava.model.weights.original_checkpoint import read_config
from lora_llava.recipe import load_generate_recipe, load_recipe, shipped_generate_recipes, shipped_recipes
from lora_llava.runs.checkpoint import MANIFEST_FILE, atomic_checkpoint, find_damage, read_manifest
from lora_llava.runs.directory import read_record
from lora_llava.runs.state_files import STATE_JSON, STATE_TENSORS, load_state, save_state
from lora_llava.synthesis.contexts.reading_contexts import read_contexts
from lora_llava.synthesis.parse import parse_sample
from tests.fuzz.values import Json, edited, json_like, json_text, rows_of, said, soup

MARKS = ["Question:", "Answer:", "1.", "**", "\n", "```json", "<think>", "</think>", '{"', '": "', "[", "]", "}", ","]
YAML = [
    "a",
    ": ",
    "- ",
    "&x ",
    "*x",
    "<<: ",
    "!!int ",
    "!!set ",
    "!!timestamp ",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
    "\n",
    "? ",
    "  ",
    "| ",
    "> ",
    "%YAML 1.1\n",
    "---\n",
    "...\n",
    "stage: 2\n",
    "lora:\n  r: ",
    "1e5",
    "0o7",
    "~",
    "\t",
    "\0",
]


class Target(NamedTuple):
    """One thing to fuzz: what it is given, and what is done with it in a folder of its own."""

    values: st.SearchStrategy[Any]
    run: Callable[[Any, Path], object]


def attempt(target: Target, value: Any) -> None:
    """Run a target once; every error that is not declared is raised unchanged."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ReportedError):
        target.run(value, Path(folder))


@functools.cache
def _tokenizer() -> Any:
    tokenizer = build_tokenizer(0)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_bos_token = True
    return tokenizer


def _write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return file


def _each(*readers: Callable[[], Any]) -> None:
    for read in readers:
        with contextlib.suppress(ReportedError):
            found = read()
            if isinstance(found, Iterator):
                list(found)


def _recipe(text: str, folder: Path) -> None:
    file = _write(folder / "recipe.yaml", text)
    _each(lambda: load_recipe(file), lambda: load_generate_recipe(file))


def _override(value: tuple[str, str, list[str]], folder: Path) -> None:
    name, key, values = value
    overrides = [f"{key}={each}" for each in values]
    load = load_recipe if name in {file.name for file in shipped_recipes()} else load_generate_recipe
    load(name, overrides)


def _conversation(value: tuple[Any, str], folder: Path) -> None:
    messages, template = value
    encode_conversation(messages, tokenizer=_tokenizer(), template=template, num_image_tokens=4)


def _row(value: tuple[Any, str, str, bool], folder: Path) -> None:
    row, form, position, embedded = value
    columns = Columns()
    read_row(row, 3, form=form, columns=columns, position=position, seed=1, embedded=embedded)  # type: ignore[arg-type]


def _file(value: tuple[str | bytes, str], folder: Path) -> None:
    content, suffix = value
    file = _write(folder / f"rows{suffix}", content)
    _each(
        lambda: iterate_rows(file),
        lambda: list(open_source(str(file), form="captions").read()),
        lambda: _encoded(file),
        lambda: understand_folder(folder),
    )


def _encoded(file: Path) -> None:
    table = encode_table(open_source(str(file)), tokenizer=_tokenizer(), template="vicuna_v1")
    for row in range(len(table)):
        assert table.problem(row) or len(table.row(row)[0])


def _scienceqa(value: tuple[str | bytes, str | bytes], folder: Path) -> None:
    problems, splits = (_write(folder / name, text) for name, text in zip(_SCIENCE, value, strict=True))
    answers = _write(folder / "answers.jsonl", value[0])
    _each(
        lambda: [load_scienceqa(folder, "train").images.read(n) for n in ("a", "../a")],
        lambda: score_scienceqa_file(problems, splits, answers, "train"),
    )


_SCIENCE = ("problems.json", "pid_splits.json")


def _contexts(value: tuple[str | bytes, str, str], folder: Path) -> None:
    content, kind, suffix = value
    read_contexts(**{kind: _write(folder / f"file{suffix}", content)})  # type: ignore[arg-type]


def _answers(value: tuple[str, int], folder: Path) -> None:
    text, choices = value
    assert -1 <= parse_answer(text, choices) < choices
    assert exact_match(text, text)


def _bench(content: str | bytes, folder: Path) -> None:
    file = _write(folder / "file.jsonl", content)
    _each(
        *(
            functools.partial(read, file)
            for read in (llava_bench.read_questions, llava_bench.read_contexts, llava_bench.read_answers)
        )
    )


def _image(content: bytes, folder: Path) -> None:
    _write(folder / "a.png", content)
    inspect_images(FolderImages(folder, 10_000), ["a.png"], folder / "cache.json")
    read_rgb(io.BytesIO(content), "a", 10_000)


@functools.cache
def _kept() -> Path:
    """A table's folder, a checkpoint and a state as they are written."""
    folder = Path(tempfile.mkdtemp())
    rows = [{"id": "a", "question": "What?", "answer": "A dog."}, {"id": "b"}]
    file = _write(folder / "rows.json", json.dumps(rows))
    encode_table(open_source(str(file)), tokenizer=_tokenizer(), template="vicuna_v1", cache=folder / "cache")
    next((folder / "cache" / "encoded").iterdir()).rename(folder / "table")
    with atomic_checkpoint(folder / "checkpoint-1", {"step": 1, "recipe_hash": "x"}) as staging:
        _write(staging / "state.json", "{}")
    (folder / "state").mkdir()
    save_state(folder / "state", {"a": [1, (2.5, None)], "t": _tokenizer()("a", return_tensors="pt")["input_ids"]})
    return folder


def _changed(value: tuple[str, list[tuple[int, int, bytes]]], folder: Path) -> None:
    name, edits = value
    own = Path(shutil.copytree(_kept() / name.split("/")[0], folder / "own"))
    file = own / name.split("/")[1]
    file.write_bytes(edited(file.read_bytes(), edits))
    _each(lambda: damage_of_entry(own), lambda: read_manifest(own), lambda: find_damage(own), lambda: load_state(own))


def _records(content: str | bytes, folder: Path) -> None:
    for name in ("config.json", "run.json"):
        _write(folder / name, content)
    _write(folder / "adapter_model.safetensors", b"")
    image = FolderImages(folder, 100)
    _write(folder / "cache.json", content)
    _each(lambda: read_config(folder), lambda: read_record(folder))
    inspect_images(image, ["none.png"], folder / "cache.json")


_CHANGED = [f"table/{name}" for name in ("table.json", "ids.npy", "starts.npy", "row_ids.npy", "trained.npy")]
_CHANGED += [f"checkpoint-1/{MANIFEST_FILE}", f"state/{STATE_JSON}", f"state/{STATE_TENSORS}"]
_EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=4)


def _images() -> st.SearchStrategy[bytes]:
    found = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"):
        stream = io.BytesIO()
        Image.effect_noise((9, 7), 60).convert("RGB").save(stream, kind)
        found.append(stream.getvalue())
    return st.builds(edited, st.sampled_from(found), _EDITS) | st.binary(max_size=60)


def _shipped() -> list[str]:
    return [file.read_text() for file in [*shipped_recipes(), *shipped_generate_recipes()]]


_NAMES = ["demo_scienceqa_qlora.yaml", "my_data_qlora.yaml", "demo_generate.yaml"]
_KEYS = [
    "stage",
    "lora.r",
    "lora",
    "data.path",
    "data.sources",
    "data.sources.0",
    "data.columns",
    "data.splits",
    "model",
    "model.start_from",
    "training.save_every",
    "training.eval_every",
    "evaluation",
    "teacher.url",
    "contexts",
    "",
    "output_dir",
    "data.columns.image",
    "a.b",
    ".",
    "gates.min_words",
    "flavours",
]
_SAID_ROLES = st.sampled_from(["human", "gpt", "user", "assistant", "system", "x", 3, None])
_FORMS, _POSITIONS = st.sampled_from(["conversations", "captions"]), st.sampled_from(["first", "last", "random"])
_FLAVOURS = st.sampled_from(["conversation", "detail", "reasoning"])

_YAML_EDITS = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 40), soup(YAML)), min_size=1, max_size=4)
_SUFFIX = st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet"])
_MESSAGES = st.lists(said(_SAID_ROLES) | Json) | Json
_ANSWER = soup(["The answer is ", "A", "B", ".", " ", "\n", "a", "the"])
TARGETS: dict[str, Target] = {
    "recipe": Target(soup(YAML) | st.builds(edited, st.sampled_from(_shipped()), _YAML_EDITS), _recipe),
    "overrides": Target(
        st.tuples(st.sampled_from(_NAMES), st.sampled_from(_KEYS), st.lists(soup(YAML) | json_text(), max_size=2)),
        _override,
    ),
    "conversation": Target(st.tuples(_MESSAGES, st.sampled_from(list(TEMPLATES))), _conversation),
    "row": Target(st.tuples(json_like() | Json, _FORMS, _POSITIONS, st.booleans()), _row),
    "file": Target(st.tuples(rows_of(json_like()), _SUFFIX), _file),
    "scienceqa": Target(st.tuples(rows_of(Json, science=True), rows_of(Json, splits=True)), _scienceqa),
    "contexts": Target(
        st.tuples(
            rows_of(json_like()),
            st.sampled_from(["captions", "instances", "boxes", "contexts"]),
            st.sampled_from([".json", ".jsonl", ".csv"]),
        ),
        _contexts,
    ),
    "answers": Target(st.tuples(_ANSWER, st.integers(2, 5)), _answers),
    "judge": Target(
        soup(["8", "9.5", "-1", " ", "\n", "10", "Assistant 1:", "Assistant 2:", "/10", "**", ",", "#"]),
        lambda text, _: parse_scores(text),
    ),
    "bench": Target(rows_of(json_like()), _bench),
    "sample": Target(st.tuples(soup(MARKS) | json_text(), _FLAVOURS), lambda value, _: parse_sample(*value)),
    "images": Target(_images(), _image),
    "kept": Target(st.tuples(st.sampled_from(_CHANGED), _EDITS), _changed),
    "records": Target(rows_of(json_like()), _records),
}
"""By name, as `long.py --target` knows them."""
