"""The identity of a run: hashes of its base, settings and data, saved with every checkpoint and checked on resume.

It contains no paths: a base or data that were moved are the same base and data.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash
from lora_llava.data.images.image_id import ImageName, own_name
from lora_llava.model.families.llava_kinds import build_llava_config
from lora_llava.model.provenance import component_hashes
from lora_llava.model.start import Base
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.planning.run_plan import RunPlan
from lora_llava.runs.directory import versions
from lora_llava.splits.split_rows import Split, asked_split

IDENTITY_FILE = "identity.json"
_FORMAT = 1
_MARK, _MOST_MARKS = 8, 20_000
"""Hex digits kept of each row's and image's hash to name those that changed, and the most hashes that are kept."""
_NOT_COMPARED = ("format", "run", "versions", "data")
"""Entries that are not compared value by value."""
_LIBRARY_SETTINGS = ("config", "generation_config", "image_processor")
"""Settings that a library fills in: another version may have more or fewer."""
_NOT_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
_TEXT = ("tokenizer", "special_tokens", "chat_template")


def run_identity(plan: RunPlan, base: Base) -> dict[str, Any]:
    """Compute the identity of a run.

    Args:
        plan: The run's plan, with opened images.
        base: The base it trains.

    Returns:
        Plain JSON: hashes of the base's components, of a Stage 1 projector and of an adapter that is continued
        (`base`), the model's settings (`config`), the tokenizer, its special tokens and the chat template, the image
        processor's settings, what `auto` resolved to on this machine (`computation`), the number of rows that share
        images (`order`), and for every split (`data`) its rows, their tokens and the contents of their images.
        `versions` are only reported. `run` is drawn when a run begins, and distinguishes its checkpoints from those of
        another run that is otherwise the same.

    Raises:
        UserError: If the base's weights are missing or damaged.
    """
    recipe = plan.recipe
    evaluated = asked_split(plan.splits) if recipe.evaluation is not None else None
    stage1 = {"stage1_projector": _tensor_hash(base.initial_projector)} if base.initial_projector else {}
    run = recipe.model.start_from.run
    continued = {"continued_adapter": file_hash(Path(run) / ADAPTER_FILE)} if run is not None else {}
    content = {
        "format": _FORMAT,
        "run": uuid.uuid4().hex,
        "base": component_hashes(base.folder) | stage1 | continued,
        "config": _model_settings(base.folder),
        "generation_config": _generation_settings(base.folder),
        "tokenizer": tokenizer_hash(plan.tokenizer),
        "special_tokens": _special_tokens(plan.tokenizer),
        "chat_template": _hash(plan.processor.chat_template or ""),
        "image_processor": plan.processor.image_processor.to_dict(),
        "computation": {
            "dtype": str(plan.computation.dtype).removeprefix("torch."),
            "padding_free": plan.computation.padding_free,
            "optimizer": plan.computation.optimizer,
        },
        "order": {} if plan.order.shared is None else {"rows_with_shared_images": plan.order.shared.rows()},
        "data": {name: _split_identity(split, name == evaluated) for name, split in plan.splits.items()},
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
    """Return a model's loaded configuration without its name and library versions."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _without(build_llava_config(content, str(folder)).to_dict(), _NOT_SETTINGS)


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
    """Hash a tokenizer's vocabulary, merges, normaliser and pre-tokenizer, regardless of its files."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    else:
        content = json.loads(backend.to_str())
        for name in ("padding", "truncation"):  # set by the last call
            content.pop(name, None)
    return _hash(json.dumps(content, sort_keys=True))


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: [getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")] for name in names}
    return tokens | {"add_bos_token": bool(getattr(tokenizer, "add_bos_token", False))}


def _split_identity(split: Split, evaluated: bool) -> dict[str, Any]:
    """Hash a split by its rows' tokens and its images' contents, regardless of the file format."""
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
    return found | ({"asked": _evaluation_hash(split)} if evaluated else {})


def _marks(digests: Sequence[str]) -> str:
    """Join the first digits of each hash; empty if there are too many."""
    return "".join(digest[:_MARK].ljust(_MARK, "-") for digest in digests) if len(digests) <= _MOST_MARKS else ""


def image_names(split: Split) -> list[ImageName]:
    """Return the names of a split's images, each once, in the order of its rows."""
    rows = split.rows
    return list(dict.fromkeys(name for index in range(len(rows)) for name in rows.image_files(index)))


def _row_hash(split: Split, index: int) -> str:
    """Hash a row's tokens and which are trained, before image tokens are inserted and the end is cut."""
    table, row = split.rows.table_row(index)
    ids, trained = table.row(row)
    digest = hashlib.sha256(np.ascontiguousarray(ids).data)
    digest.update(np.ascontiguousarray(trained).data)
    return digest.hexdigest()


def _evaluation_hash(split: Split) -> str:
    """Hash everything that the evaluation of a split's rows depends on, besides the images."""
    digest = hashlib.sha256()
    for row in split.read(range(len(split.rows))):
        extra = {name: value for name, value in row.extra.items() if name != "source"}  # the name of its file
        digest.update(repr((row.row_id, row.turns, sorted(extra.items()))).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read_identity(checkpoint: Path) -> dict[str, Any] | None:
    """Read the identity in a checkpoint; None if it has none.

    Raises:
        UserError: If it cannot be read, or another version wrote it.
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
    """Check whether a checkpoint was written by the run of this name, which is drawn when a run begins."""
    identity = read_identity(checkpoint)
    return identity is not None and identity["run"] == run


def check_identity(checkpoint: Path, now: Mapping[str, Any], splits: Mapping[str, Split]) -> tuple[str, list[str]]:
    """Refuse to resume from a checkpoint whose identity differs from the present one.

    A checkpoint without identity, written by an early version, is refused too, as it cannot be checked. Other versions
    of libraries are only reported.

    Args:
        checkpoint: The checkpoint to resume from.
        now: The present identity, from `run_identity`.
        splits: The run's splits, to name the rows and images that changed.

    Returns:
        The run's name, drawn when it began, and lines to print.

    Raises:
        UserError: With one line per difference.
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
    changes = ", ".join(f"{name} {before.get(name, 'unknown')} is now {now.get(name, 'unknown')}" for name in changed)
    return [f"the run began with other versions: {changes}; results may differ in the last digits"]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], splits: Mapping[str, Split]) -> list[str]:
    """Compare two identities and return one line per difference, with the old value, the new value and the fix.

    A split that only one of them has is a change of the recipe, which is checked elsewhere. Consequences of another
    difference are not listed: other rows have other images, and another tokenizer makes other tokens.

    Args:
        before: The identity of a checkpoint.
        now: The present identity.
        splits: The present splits, to name the rows and images that changed.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    same_library = before["versions"].get("transformers") == now["versions"].get("transformers")
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    found = []
    for key in (key for key in changed if key[0] != "order"):
        one_sided = (key in old) != (key in new)
        if not (one_sided and key[0] in _LIBRARY_SETTINGS and not same_library):
            found.append(_line(key, old.get(key), new.get(key)))
    same_text = not any(key[0] in _TEXT for key in changed)
    for name in now["data"]:
        if name in before["data"]:
            found += _split_differences(name, before["data"][name], now["data"][name], splits[name], same_text)
    return found or [_line(key, old.get(key), new.get(key)) for key in changed if key[0] == "order"]


def _leaves(content: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in content.items():
        if not place and name in _NOT_COMPARED:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, (*place, name))
        else:
            yield (*place, name), value


def _split_differences(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], split: Split, same_text: bool
) -> Iterator[str]:
    """List the differences of a split: its rows, else their tokens, and the images if the rows are the same."""
    name = "training" if name == "train" else name
    other_tokens, evaluated = old["tokens"] != new["tokens"], ("asked" in old and "asked" in new)
    if other_tokens:
        which = _describe_changes(
            old["row_marks"], new["row_marks"], lambda place: f"row {split.rows[place]['row_id']}"
        )
        if old["source"] != new["source"]:
            yield f"the {name} rows are not those that the run began with{which}; restore them"
            return
        if same_text:
            yield f"the {name} rows have other tokens than when the run began{which}; use the version that began it"
    elif evaluated and old["asked"] != new["asked"]:
        yield f"the {name} rows are evaluated in another way than when the run began; restore their fields"
    if old["images"] != new["images"]:
        names = image_names(split)
        which = _describe_changes(old["image_marks"], new["image_marks"], lambda place: own_name(names[place]))
        yield f"images of the {name} rows changed since the run began{which}; restore them"


def _describe_changes(before: str, now: str, name_of: Callable[[int], str]) -> str:
    """Return how many of the hashes changed, and the name of the first; empty if unknown."""
    if len(before) != len(now):
        return f" ({len(before) // _MARK:,} then, {len(now) // _MARK:,} now)" if before and now else ""
    changed = [at // _MARK for at in range(0, len(now), _MARK) if before[at : at + _MARK] != now[at : at + _MARK]]
    return f": {len(changed):,} of {len(now) // _MARK:,}, the first is {name_of(changed[0])}" if changed else ""


_PARTS = {
    ("base", "llm"): ("the language model's weights", "restore the weights that it began with"),
    ("base", "vision_tower"): ("the vision tower's weights", "restore the weights that it began with"),
    ("base", "projector"): ("the base's projector", "restore the projector that it began with"),
    ("base", "stage1_projector"): ("the Stage 1 projector", "name the Stage 1 run that it began with"),
    ("base", "continued_adapter"): ("the adapter that it continues", "name the run that it began with"),
    ("tokenizer",): ("the tokenizer", "restore the tokenizer that it began with"),
    ("chat_template",): ("the chat template", "resume with the version of lora_llava that began it"),
}
_SETTINGS = {
    "config": ("the model's config.json", "restore the one that it began with"),
    "generation_config": ("the model's generation_config.json", "restore the one that it began with"),
    "special_tokens": ("the tokenizer", "restore the tokenizer that it began with"),
    "image_processor": ("the image processor", "restore its preprocessor_config.json"),
    "computation": ("this machine", "resume it on the machine where it began"),
    "order": ("the order of the rows", "set training.share_images to what it was, which is off in early versions"),
}


def _line(key: tuple[str, ...], was: Any, is_now: Any) -> str:
    if key in _PARTS:
        what, fix = _PARTS[key]
        hashes = f"SHA-256 {str(was)[:12]} then, {str(is_now)[:12]} now"
        return f"{what} changed since the run began ({hashes}); {fix}"
    what, fix = _SETTINGS[key[0]]
    name = ".".join(key[1:])
    return f"{what} changed since the run began: {name} was {was!r} and is {is_now!r}; {fix}"
