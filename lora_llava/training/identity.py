"""What a run is, by content: worked out once, kept with every checkpoint, compared in one place when a run goes on.

Nothing in it is a path: a base or data that were moved are the same base and data.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaConfig

from lora_llava.errors import UserError
from lora_llava.model.loading import resolve_dtype
from lora_llava.model.provenance import component_hashes
from lora_llava.model.start import Base
from lora_llava.training.data import Split
from lora_llava.training.plan import RunPlan, is_padding_free
from lora_llava.training.planner import resolve_optimizer
from lora_llava.training.run_directory import versions

IDENTITY_FILE = "identity.json"
_FORMAT = 1
_MARK, _MOST_MARKS = 8, 20_000
"""Hex digits kept of each image's hash, so that one that changed can be named, and the most images they are kept of."""
_NOT_COMPARED = ("format", "run", "versions")
_OF_THE_LIBRARY = ("config", "image_processor")
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
    stage1 = {"stage1_projector": _tensor_hash(base.initial_projector)} if base.initial_projector else {}
    content = {
        "format": _FORMAT,
        "run": uuid.uuid4().hex,
        "base": component_hashes(base.folder) | stage1,
        "config": _model_settings(base.folder),
        "tokenizer": tokenizer_hash(plan.tokenizer),
        "special_tokens": _special_tokens(plan.tokenizer),
        "chat_template": _hash(plan.processor.chat_template or ""),
        "image_processor": plan.processor.image_processor.to_dict(),
        "computation": {
            "dtype": str(resolve_dtype(recipe.model.dtype)).removeprefix("torch."),
            "padding_free": is_padding_free(recipe)[0],
            "optimizer": resolve_optimizer(recipe, cuda=torch.cuda.is_available()),
        },
        "data": {name: _split_identity(split) for name, split in plan.splits.items()},
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


def _split_identity(split: Split) -> dict[str, Any]:
    names = image_names(split)
    digests = [split.digests.get(name, "") for name in names]
    found = {
        "count": len(split.rows), "rows": split.fingerprint(), "tokens": _encoded_hash(split),
        "images": _hash("\n".join(digests)),
    }  # fmt: skip
    if len(names) <= _MOST_MARKS:
        found["image_marks"] = "".join(digest[:_MARK].ljust(_MARK, "-") for digest in digests)
    return found


def image_names(split: Split) -> list[str]:
    """Names of a split's images, each once, in the order of its rows."""
    rows = split.rows
    return list(dict.fromkeys(name for index in range(len(rows)) for name in rows.image_files(index)))


def _encoded_hash(split: Split) -> str:
    """A hash over the rows' tokens and which of them are trained, before images take their places and ends are cut."""
    digest = hashlib.sha256()
    for index in range(len(split.rows)):
        table, row = split.rows.table_row(index)
        ids, trained = table.row(row)
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(ids).data)
        digest.update(np.ascontiguousarray(trained).data)
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


def check_identity(
    checkpoint: Path, now: Mapping[str, Any], images: Mapping[str, Sequence[str]]
) -> tuple[str, list[str]]:  # fmt: skip
    """Refuse to go on from a checkpoint of something else than what stands there now.

    A checkpoint without identity, which versions before this one wrote, is refused too: what it was trained on cannot
    be told. Libraries of other versions are reported and not refused.

    Args:
        checkpoint: Where the run is to go on.
        now: From `run_identity`.
        images: Names of each split's images, from `image_names`, to name those that changed.

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
    found = differences(before, now, images)
    if found:
        raise UserError("\n".join(f"--resume: {each}, or run with --overwrite" for each in found))
    return str(before["run"]), _other_versions(before["versions"], now["versions"])


def _other_versions(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if not changed:
        return []
    told = ", ".join(f"{name} {before.get(name, 'unknown')} is now {now.get(name, 'unknown')}" for name in changed)
    return [f"the run began with other versions: {told}; results may differ in the last digits"]


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], images: Mapping[str, Sequence[str]]
) -> list[str]:  # fmt: skip
    """What is not the same in two identities: a line for each, with what was, what is, and the fix.

    A split that only one of them has is left to the recipe, which says so by its keys. What follows from another
    difference is not told twice: other rows have other tokens and images, another tokenizer gives other tokens.

    Args:
        before: A checkpoint's.
        now: The run's as it stands.
        images: As `check_identity`.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    same_library = before["versions"].get("transformers") == now["versions"].get("transformers")
    found = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key) or key[-1] == "image_marks":
            continue
        one_sided = (key in old) != (key in new)
        if one_sided and (key[0] == "data" or (key[0] in _OF_THE_LIBRARY and not same_library)):
            continue
        if key[0] != "data" or not _follows(key, old, new):
            found.append(_line(key, old, new, images))
    return found


def _leaves(content: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in content.items():
        if not place and name in _NOT_COMPARED:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, (*place, name))
        else:
            yield (*place, name), value


def _follows(key: tuple[str, ...], old: Mapping[Any, Any], new: Mapping[Any, Any]) -> bool:
    """Whether a split's difference follows from one that is told."""
    _, split, what = key
    rows = ("data", split, "rows")
    if what == "rows":
        return False
    if old[rows] != new[rows]:
        return True
    text = [each for each in old.keys() | new.keys() if each[0] in _TEXT]
    return what == "tokens" and any(old.get(each) != new.get(each) for each in text)


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
    "special_tokens": ("the tokenizer", "put back the tokenizer that it began with"),
    "image_processor": ("the image processor", "put back its preprocessor_config.json"),
    "computation": ("this machine", "go on where it began"),
}


def _line(
    key: tuple[str, ...], old: Mapping[Any, Any], new: Mapping[Any, Any], images: Mapping[str, Sequence[str]]
) -> str:  # fmt: skip
    was, is_now = old.get(key), new.get(key)
    if key[0] == "data":
        return _data_line(key, old, new, images.get(key[1], ()))
    if key in _PARTS:
        what, fix = _PARTS[key]
        hashes = f"SHA-256 {str(was)[:12]} then, {str(is_now)[:12]} now"
        return f"{what} changed since the run began ({hashes}); {fix}"
    what, fix = _SETTINGS[key[0]]
    name = ".".join(key[1:])
    return f"{what} changed since the run began: {name} was {was!r} and is {is_now!r}; {fix}"


def _data_line(
    key: tuple[str, ...], old: Mapping[Any, Any], new: Mapping[Any, Any], names: Sequence[str]
) -> str:  # fmt: skip
    _, split, what = key
    counts = (old[("data", split, "count")], new[("data", split, "count")])
    if what == "images":
        before, now = (str(found.get(("data", split, "image_marks"), "")) for found in (old, new))
        changed = list(_other_marks(before, now, names))
        told = f": {len(changed):,} of {len(names):,}, the first is {_SOURCE.sub('', changed[0])}" if changed else ""
        return f"images of the {split} rows changed since the run began{told}; put them back"
    if what == "tokens":
        return f"the {split} rows become other tokens than when the run began; go on with the version that began it"
    told = f" ({counts[0]:,} then, {counts[1]:,} now)" if counts[0] != counts[1] else ""
    return (
        f"the {split} rows are not those that the run began with{told}; put back the data and the recipe's data section"
    )


def _other_marks(before: str, now: str, names: Iterable[str]) -> Iterator[str]:
    if len(before) == len(now):
        for place, name in enumerate(names):
            at = slice(place * _MARK, (place + 1) * _MARK)
            if before[at] != now[at]:
                yield name
