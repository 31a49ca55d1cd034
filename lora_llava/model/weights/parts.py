"""The parts of a LLaVA: their files and revisions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from lora_llava.core.errors import UserError
from lora_llava.core.hub_errors import hub_problem
from lora_llava.core.json_files import read_object
from lora_llava.core.storage import file_hash, looked_in
from lora_llava.model.weights.smollm2 import SMOLLM2, smollm2_folder
from lora_llava.model.weights.tensor_files import weight_files

DEMO_FOLDER = Path(__file__).resolve().parents[2] / "demo" / "base"
TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model")
NETWORK_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


@dataclass(frozen=True)
class Part:
    """A language model, a vision tower or a complete LLaVA on disk.

    Attributes:
        name: Its name in the recipe.
        folder: Folder of its files.
        revision: The commit of a Hub id; a hash of its contents for a folder.
    """

    name: str
    folder: Path
    revision: str


@dataclass(frozen=True)
class Download:
    """What downloading a Hub id would require.

    Attributes:
        name: The Hub id.
        missing_bytes: Bytes of the files that are not in the local cache.
        cached: Whether nothing is missing.
    """

    name: str
    missing_bytes: int
    cached: bool


def local_folder(name: str, field: str) -> Path | None:
    """Return the folder of a local part: a path, `demo` (its `field`, llm or vision_tower) or `smollm2` (an llm).

    Returns:
        The folder; None for a Hub id.

    Raises:
        UserError: For a folder without a model, or if smollm2 is not installed.
    """
    if name == SMOLLM2 and field == "llm":
        return smollm2_folder()
    folder = DEMO_FOLDER / field if name == "demo" else Path(name)
    if not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        raise UserError(f"model.{field}: {name} has no config.json; name a folder with a saved model")
    return folder


def load_part(name: str, revision: str | None, field: str) -> Part:
    """Find a part, and download the files of a Hub id that are not in the cache.

    Args:
        name: `demo`, a folder, or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        field: The recipe's field, for messages.

    Returns:
        The part.

    Raises:
        UserError: If it is not available.
    """
    folder = local_folder(name, field)
    if folder is not None:
        return Part(name, folder, folder_hash(folder))
    check_hub_id(name, field)
    try:
        folder = _cached_snapshot(name, revision) if constants.HF_HUB_OFFLINE else _fetch(name, revision)
    except NETWORK_ERRORS as error:
        raise not_available(name, field, error) from None
    return Part(name, folder, folder.name)


def plan_download(name: str, revision: str | None, field: str) -> Download:
    """Return what `load_part` would download, without downloading it.

    Raises:
        UserError: If the part is not available.
    """
    if local_folder(name, field) is not None:
        return Download(name, 0, True)
    check_hub_id(name, field)
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except NETWORK_ERRORS as error:
        try:
            load_part(name, revision, field)
        except UserError:
            raise not_available(name, field, error) from None
        return Download(name, 0, True)
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or []}
    wanted = weight_files(list(sizes)) + [file for file in sizes if _is_text(file)]
    missing = [file for file in wanted if not isinstance(try_to_load_from_cache(name, file, revision=info.sha), str)]
    return Download(name, sum(sizes[file] for file in missing), not missing)


def load_config(name: str, revision: str | None, field: str) -> dict[str, Any]:
    """Read a part's config.json alone; a Hub id's is fetched if need be.

    Raises:
        UserError: If it is not available or damaged.
    """
    folder = local_folder(name, field)
    if folder is None:
        check_hub_id(name, field)
        try:
            folder = Path(hf_hub_download(name, "config.json", revision=revision)).parent
        except NETWORK_ERRORS as error:
            raise not_available(name, field, error) from None
    try:
        return read_object(folder / "config.json")
    except UserError as error:
        raise UserError(f"model.{field}: {error}") from None


def check_hub_id(name: str, field: str) -> None:
    """Refuse a name that can only be a missing folder."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"model.{field}: the folder {name} is missing{looked_in(name)}")


def not_available(name: str, field: str, error: Exception) -> UserError:
    """Return the error for a Hub id whose files are neither cached nor can be downloaded."""
    looked = looked_in(name)
    if constants.HF_HUB_OFFLINE:
        return UserError(
            f"model.{field}: {name} is not in the local cache and HF_HUB_OFFLINE is set; unset it to download, "
            f"or name a folder{looked}"
        )
    return UserError(
        f"model.{field}: {name} is neither a folder{looked} nor available from the Hub: {hub_problem(error, name)}"
    )


def _is_text(file: str) -> bool:
    return Path(file).match("*.json") or file in ("tokenizer.model", "chat_template.jinja")


def _fetch(name: str, revision: str | None) -> Path:
    weights = weight_files(HfApi().list_repo_files(name, revision=revision))
    return Path(snapshot_download(name, revision=revision, allow_patterns=[*TEXT_FILES, *weights]))


def _cached_snapshot(name: str, revision: str | None) -> Path:
    """Return the snapshot in the local cache.

    huggingface_hub treats one as incomplete if it lacks a requested kind of weights, so each kind is tried alone.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*TEXT_FILES, "*.safetensors"]))
    except LocalEntryNotFoundError:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*TEXT_FILES, "pytorch_model*.bin"]))


def folder_hash(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of a folder's config, tokenizer and weight files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja") and file.is_file():
            digest.update(file.name.encode())
            digest.update(file_hash(file).encode())
    return digest.hexdigest()
