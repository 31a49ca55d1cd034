"""A cache of the vision tower's image features, on disk or in memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.core.storage import file_hash, share
from lora_llava.data.images.image_id import ImageName

SHARD_IMAGES = 256
"""Images per shard: about 300 MB of CLIP ViT-L/14-336's features in bfloat16; a kill loses less than a minute."""
_INDEX = "index.json"


class FeatureStore:
    """Image features by the hash of the image file; `get` returns what `put` stored, bit-equal.

    On disk it is a folder with `index.json`, which has the key and each shard's SHA-256, and safetensors shards with a
    tensor per image, named by the SHA-256 of the image file. A shard is valid once the index lists it; both are written
    under a temporary name and renamed.

    Args:
        folder: Folder of the shards; None keeps everything in memory.
        key: What features depend on besides the image, as JSON values: tower, preprocessing, layer, dtype.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.key = json.loads(json.dumps(key))
        self._pending: dict[str, torch.Tensor] = {}  # not in a shard, or not yet
        self._shard_of: dict[str, str] = {}
        self._shards: dict[str, str] = {}
        self._open: dict[tuple[int, str], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each worker process opens the shards itself

    def __contains__(self, image: str) -> bool:
        return image in self._pending or image in self._shard_of

    def __len__(self) -> int:
        return len(self._pending) + len(self._shard_of)

    def load(self, wanted: Collection[str] | None = None) -> list[str]:
        """Load the valid shards and remove damaged ones.

        Args:
            wanted: Images that will be read; shards without any of them are not checked. None checks all.

        Returns:
            A line for each file that was removed, with the reason.
        """
        if self.folder is None:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        shards, removed = self._read_index()
        shards = {name: digest for name, digest in shards.items() if self._is_wanted(name, digest, wanted)}
        total = sum((self.folder / name).stat().st_size for name in shards if (self.folder / name).is_file())
        bar = progress_bar(desc="checking cached features", total=total, unit="B", unit_scale=True, leave=False)
        with bar:
            for name, digest in shards.items():
                if problem := self._add_shard(name, str(digest)):
                    removed.append(f"{self.folder / name} {problem}: its images are encoded again")
                else:
                    bar.update((self.folder / name).stat().st_size)
        for file in self.folder.glob("*.safetensors*"):
            if file.name not in self._shards:
                file.unlink()
        if removed:
            self._write_index()
        return removed

    def _is_wanted(self, name: str, digest: Any, wanted: Collection[str] | None) -> bool:
        """Check whether a shard has wanted images; one without stays in the index."""
        assert self.folder is not None
        if wanted is None:
            return True
        try:
            with safe_open(self.folder / name, framework="pt") as content:
                if any(image in wanted for image in content.keys()):  # noqa: SIM118 - not a dict
                    return True
        except (SafetensorError, OSError):
            return True  # reported when it is checked
        self._shards[name] = digest
        return False

    def _read_index(self) -> tuple[dict[str, Any], list[str]]:
        assert self.folder is not None
        file = self.folder / _INDEX
        if not file.is_file():
            return {}, []
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            key, shards = content["key"], dict(content["shards"])
        except (ValueError, KeyError, TypeError):
            return {}, [f"{file} is damaged: all images are encoded again"]
        if key != self.key:
            return {}, [f"{self.folder} has features of another tower or preprocessing: all images are encoded again"]
        return {name: digest for name, digest in shards.items() if re.fullmatch(r"features-\d+\.safetensors", name)}, []

    def _add_shard(self, name: str, digest: str) -> str | None:
        """Add a shard, or return its damage."""
        assert self.folder is not None
        file = self.folder / name
        if not file.is_file():
            return "is missing"
        if file_hash(file) != digest:
            return "is damaged"
        try:
            with safe_open(file, framework="pt") as content:
                self._shard_of |= dict.fromkeys(content.keys(), name)
        except (SafetensorError, OSError):
            return "is damaged"
        self._shards[name] = digest
        return None

    def put(self, image: str, features: torch.Tensor) -> None:
        """Store an image's features.

        Args:
            image: SHA-256 of the image file.
            features: Shape (image tokens, features), or (tiles, patches, features).
        """
        self._pending[image] = features.detach().to("cpu", copy=True).contiguous()
        if self.folder is not None and len(self._pending) >= SHARD_IMAGES:
            self.flush()

    def flush(self) -> None:
        """Write the features that are not yet in a shard."""
        if self.folder is None or not self._pending:
            return
        number = 1 + max((int(re.findall(r"\d+", name)[0]) for name in self._shards), default=-1)
        name = f"features-{number:05}.safetensors"
        temporary = self.folder / f"{name}.part"
        try:
            save_file(self._pending, temporary)
        except SafetensorError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"{temporary} cannot be written: {str(error).splitlines()[0]}; free some disk space and run the same "
                "command again: earlier shards are kept"
            ) from None
        share(temporary)
        _sync(temporary)
        digest = file_hash(temporary)
        temporary.rename(self.folder / name)
        self._shards[name] = digest
        self._shard_of |= dict.fromkeys(self._pending, name)
        self._pending = {}
        self._write_index()

    def _write_index(self) -> None:
        assert self.folder is not None
        temporary = self.folder / f"{_INDEX}.part"
        temporary.write_text(json.dumps({"key": self.key, "shards": self._shards}, indent=1), encoding="utf-8")
        _sync(temporary)
        temporary.replace(self.folder / _INDEX)

    def get(self, image: str) -> torch.Tensor:
        """Return an image's features, in the shape in which they were stored."""
        if image in self._pending:
            return self._pending[image]
        assert self.folder is not None
        name = self._shard_of[image]
        place = (os.getpid(), name)  # a forked worker must not share a handle
        if place not in self._open:
            self._open[place] = safe_open(self.folder / name, framework="pt")
        features: torch.Tensor = self._open[place].get_tensor(image)
        return features


class CachedFeatures:
    """A loader of image features, in place of `Pixels`, for a model without a tower.

    Args:
        store: The features; of a LLaVA-1.6, those of an image's tiles together, of shape (tiles, patches, features).
        hashes: SHA-256 of each image file by its name.
        sizes: Height and width of each image by its name, for a LLaVA-1.6; None for a LLaVA without tiles.
    """

    def __init__(
        self,
        store: FeatureStore,
        hashes: Mapping[ImageName, str],
        sizes: Mapping[ImageName, tuple[int, int]] | None = None,
    ) -> None:
        self.store = store
        self.hashes = hashes
        self.known_sizes = sizes

    def __call__(self, names: Sequence[ImageName]) -> torch.Tensor:
        """Return the features of images, of shape (images, image tokens, features), or (tiles, patches, features)."""
        found = [self.store.get(self.hashes[name]) for name in names]
        return torch.stack(found) if self.known_sizes is None else torch.cat(found)

    @property
    def sizes(self) -> Callable[[Sequence[ImageName]], torch.Tensor] | None:
        """What returns the `image_sizes` of named images; None for a LLaVA without tiles."""
        known = self.known_sizes
        return None if known is None else lambda names: torch.tensor([known[name] for name in names])


def store_folder(cache: Path, key: Mapping[str, Any]) -> Path:
    """Return the cache folder of a key's features."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache / "features" / digest[:32]


def feature_bytes(tokens: int, width: int, dtype: torch.dtype) -> int:
    """Return the bytes of one image's features."""
    return tokens * width * dtype.itemsize


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
