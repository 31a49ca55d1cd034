"""What a run is, by content: worked out once, kept with every checkpoint, compared in one place when a run goes on.

Nothing in it is a path: a base or data that were moved are the same base and data.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.model.loading import resolve_dtype
from lora_llava.model.provenance import component_hashes
from lora_llava.model.start import Base
from lora_llava.planning.fit import resolve_optimizer
from lora_llava.planning.run_plan import RunPlan, is_padding_free
from lora_llava.runs.directory import versions
from lora_llava.splits.split_rows import Split, asked_split

IDENTITY_FILE = "identity.json"
_FORMAT = 1
_MARK, _MOST_MARKS = 8, 20_000
"""Hex digits kept of each row's and image's hash, so that one that changed can be named, and the most they are kept
of."""
_NOT_SO = ("format", "run", "versions", "data")
"""Not compared value by value."""
_OF_THE_LIBRARY = ("config", "generation_config", "image_processor")
"""Settings that a library fills in: another version of it may have more of them, or fewer."""
_NOT_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
_SOURCE = re.compile(r"^\d+\|")
"""The place of an image's source before its name, where a run has several."""
_TEXT = ("tokenizer", "special_tokens", "chat_template")


def run_identity(plan: RunPlan, base: Base) -> dict[str, Any]:
    """Work out what a run is, by content.

    Args:
        plan: The run's, its images opened.
        base: What it trains on.

    Returns:
        Plain JSON: hashes of the base's components and of a Stage 1 projector (`base`), the model's settings
        (`config`), the tokenizer, its special tokens and the chat template, the image processor's settings, what
        `auto` came to on this machine (`computation`), and of every split (`data`) its rows, their tokens and the
        contents of their images. `versions` are there to be reported. `run` is drawn when a run begins, and tells its
        checkpoints from those of another run that is otherwise the same.

    Raises:
        UserError: Where the base's weights are missing or damaged.
    """
    recipe = plan.recipe
    asked = asked_split(plan.splits) if recipe.evaluation is not None else None
    stage1 = {"stage1_projector": _tensor_hash(base.initial_projector)} if base.initial_projector else {}
    content = {
        "format": _FORMAT,
        "run": uuid.uuid4().hex,
        "base": component_hashes(base.folder) | stage1,
        "config": _model_settings(base.folder),
        "generation_config": _generation_settings(base.folder),
        "tokenizer": tokenizer_hash(plan.tokenizer),
        "special_tokens": _special_tokens(plan.tokenizer),
        "chat_template": _hash(plan.processor.chat_template or ""),
        "image_processor": plan.processor.image_processor.to_dict(),
        "computation": {
            "dtype": str(resolve_dtype(recipe.model.dtype)).removeprefix("torch."),
            "padding_free": is_padding_free(recipe)[0],
            "optimizer": resolve_optimizer(recipe, cuda=torch.cuda.is_available()),
        },
        "data": {name: _split_identity(split, name == asked) for name, split in plan.splits.items()},
        "versions": versions(),
    }
    return dict(json.loads(json.dumps(content, default=str)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _tensor_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _model_settings(folder: Path) -> dict[str, Any]:
    """A model's configuration as it is loaded, without what says where it is from or which library wrote it."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _without(LlavaConfig(**content).to_dict(), _NOT_SETTINGS)


def _generation_settings(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    return _without(json.loads(file.read_text(encoding="utf-8")), _NOT_SETTINGS) if file.is_file() else {}


def _without(content: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {
        key: _without(value, names) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in names
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash over a tokenizer's vocabulary, merges, normaliser and pre-tokenizer, however it is kept on disk."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    else:
        content = json.loads(backend.to_str())
        for name in ("padding", "truncation"):  # of the last call
            content.pop(name, None)
    return _hash(json.dumps(content, sort_keys=True))


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: [getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")] for name in names}
    return tokens | {"add_bos_token": bool(getattr(tokenizer, "add_bos_token", False))}


def _split_identity(split: Split, asked: bool) -> dict[str, Any]:
    """A split by its rows' tokens and its images' contents: files that say the same in another way are the same."""
    rows, names = split.rows, image_names(split)
    uses = [split.digests.get(name, "") for index in range(len(rows)) for name in rows.image_files(index)]
    tokens = [_row_hash(split, index) for index in range(len(rows))]
    found = {
        "source": split.fingerprint(),
        "tokens": _hash("".join(tokens)),
        "images": _hash("\n".join(uses)),
        "row_marks": _marks(tokens),
        "image_marks": _marks([split.digests.get(name, "") for name in names]),
    }
    return found | ({"asked": _asked_hash(split)} if asked else {})


def _marks(digests: Sequence[str]) -> str:
    """A few digits of each hash, end to end; nothing where there are too many."""
    return "".join(digest[:_MARK].ljust(_MARK, "-") for digest in digests) if len(digests) <= _MOST_MARKS else ""


def image_names(split: Split) -> list[str]:
    """Names of a split's images, each once, in the order of its rows."""
    rows = split.rows
    return list(dict.fromkeys(name for index in range(len(rows)) for name in rows.image_files(index)))


def _row_hash(split: Split, index: int) -> str:
    """A hash over a row's tokens and which of them are trained, before images take their places and its end is cut."""
    table, row = split.rows.table_row(index)
    ids, trained = table.row(row)
    digest = hashlib.sha256(np.ascontiguousarray(ids).data)
    digest.update(np.ascontiguousarray(trained).data)
    return digest.hexdigest()


def _asked_hash(split: Split) -> str:
    """A hash over all that asking a split's rows and marking the answers depend on, beside their images."""
    digest = hashlib.sha256()
    for row in split.read(range(len(split.rows))):
        extra = {name: value for name, value in row.extra.items() if name != "source"}  # its file's name
        digest.update(repr((row.row_id, row.turns, sorted(extra.items()))).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read_identity(checkpoint: Path) -> dict[str, Any] | None:
    """The identity that a checkpoint was written with; None where it has none.

    Raises:
        UserError: Where it cannot be read, or a later version wrote it.
    """
    file = checkpoint / IDENTITY_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        written_by = content["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} cannot be read; restore it, or run with --overwrite") from None
    if written_by != _FORMAT:
        raise UserError(
            f"{file} has format {written_by}, and this version of lora_llava reads {_FORMAT}; finish the run with the "
            "version that began it, or run with --overwrite"
        )
    return dict(content)


def is_of_run(checkpoint: Path, run: str) -> bool:
    """Whether a checkpoint was written by the run of this name, which is drawn when a run begins."""
    identity = read_identity(checkpoint)
    return identity is not None and identity["run"] == run


def check_identity(checkpoint: Path, now: Mapping[str, Any], splits: Mapping[str, Split]) -> tuple[str, list[str]]:
    """Refuse to go on from a checkpoint of something else than what stands there now.

    A checkpoint without identity, which versions before this one wrote, is refused too: what it was trained on cannot
    be told. Libraries of other versions are reported and not refused.

    Args:
        checkpoint: Where the run is to go on.
        now: From `run_identity`.
        splits: The run's, to name the rows and images that changed.

    Returns:
        The run's own name, drawn when it began; and lines for the person.

    Raises:
        UserError: With a line for everything that is not what it was.
    """
    before = read_identity(checkpoint)
    if before is None:
        raise UserError(
            f"--resume: {checkpoint} has no {IDENTITY_FILE}: an earlier version of lora_llava wrote it, and whether "
            "model, data and images are the same cannot be checked; finish it with that version, or run with "
            "--overwrite"
        )
    found = differences(before, now, splits)
    if found:
        raise UserError("\n".join(f"--resume: {each}, or run with --overwrite" for each in found))
    return str(before["run"]), _other_versions(before["versions"], now["versions"])


def _other_versions(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if not changed:
        return []
    told = ", ".join(f"{name} {before.get(name, 'unknown')} is now {now.get(name, 'unknown')}" for name in changed)
    return [f"the run began with other versions: {told}; results may differ in the last digits"]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], splits: Mapping[str, Split]) -> list[str]:
    """What is not the same in two identities: a line for each, with what was, what is, and the fix.

    A split that only one of them has is left to the recipe, which says so by its keys. What follows from another
    difference is not told twice: other rows have other images, another tokenizer gives other tokens.

    Args:
        before: A checkpoint's.
        now: The run's as it stands.
        splits: The run's as they stand, to name the rows and images that changed.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    same_library = before["versions"].get("transformers") == now["versions"].get("transformers")
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    found = []
    for key in changed:
        one_sided = (key in old) != (key in new)
        if not (one_sided and key[0] in _OF_THE_LIBRARY and not same_library):
            found.append(_line(key, old.get(key), new.get(key)))
    same_text = not any(key[0] in _TEXT for key in changed)
    for name in now["data"]:
        if name in before["data"]:
            found += _split_differences(name, before["data"][name], now["data"][name], splits[name], same_text)
    return found


def _leaves(content: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in content.items():
        if not place and name in _NOT_SO:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, (*place, name))
        else:
            yield (*place, name), value


def _split_differences(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], split: Split, same_text: bool
) -> Iterator[str]:
    """What is not the same in a split: its rows, else their tokens; and where the rows are the same, their images."""
    name = "training" if name == "train" else name
    other_tokens, asked = old["tokens"] != new["tokens"], ("asked" in old and "asked" in new)
    if other_tokens:
        told = _told(old["row_marks"], new["row_marks"], lambda place: f"row {split.rows[place]['row_id']}")
        if old["source"] != new["source"]:
            yield f"the {name} rows are not those that the run began with{told}; put them back"
            return
        if same_text:
            yield f"the {name} rows give other tokens than when the run began{told}; use the version that began it"
    elif asked and old["asked"] != new["asked"]:
        yield f"the {name} rows are asked or marked otherwise than when the run began; put their fields back"
    if old["images"] != new["images"]:
        told = _told(old["image_marks"], new["image_marks"], lambda place: _SOURCE.sub("", image_names(split)[place]))
        yield f"images of the {name} rows changed since the run began{told}; put them back"


def _told(before: str, now: str, name_of: Callable[[int], str]) -> str:
    """How many of the things behind these marks are others than before, and the first; nothing where it is unknown."""
    if len(before) != len(now):
        return f" ({len(before) // _MARK:,} then, {len(now) // _MARK:,} now)" if before and now else ""
    changed = [at // _MARK for at in range(0, len(now), _MARK) if before[at : at + _MARK] != now[at : at + _MARK]]
    return f": {len(changed):,} of {len(now) // _MARK:,}, the first is {name_of(changed[0])}" if changed else ""


_PARTS = {
    ("base", "llm"): ("the language model's weights", "put back the weights that it began with"),
    ("base", "vision_tower"): ("the vision tower's weights", "put back the weights that it began with"),
    ("base", "projector"): ("the base's projector", "put back the projector that it began with"),
    ("base", "stage1_projector"): ("the Stage 1 projector", "name the Stage 1 run that it began with"),
    ("tokenizer",): ("the tokenizer", "put back the tokenizer that it began with"),
    ("chat_template",): ("the chat template", "go on with the version of lora_llava that began it"),
}
_SETTINGS = {
    "config": ("the model's config.json", "put back the one that it began with"),
    "generation_config": ("the model's generation_config.json", "put back the one that it began with"),
    "special_tokens": ("the tokenizer", "put back the tokenizer that it began with"),
    "image_processor": ("the image processor", "put back its preprocessor_config.json"),
    "computation": ("this machine", "go on where it began"),
}


def _line(key: tuple[str, ...], was: Any, is_now: Any) -> str:
    if key in _PARTS:
        what, fix = _PARTS[key]
        hashes = f"SHA-256 {str(was)[:12]} then, {str(is_now)[:12]} now"
        return f"{what} changed since the run began ({hashes}); {fix}"
    what, fix = _SETTINGS[key[0]]
    name = ".".join(key[1:])
    return f"{what} changed since the run began: {name} was {was!r} and is {is_now!r}; {fix}"
