"""A vision tower's features of images, kept: computed once, and the tower is not needed again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from lora_llava.core.errors import UserError
from lora_llava.core.storage import share
from lora_llava.model.weights.parts import file_hash

SHARD_IMAGES = 256
"""About 300 MB of CLIP ViT-L/14-336's features in bfloat16: a kill loses less than a minute's work."""
_INDEX = "index.json"


class FeatureStore:
    """Features by image content: `put` keeps them, `get` gives them back bit-equal.

    On disk: a folder with `index.json`, which holds the key and each shard's SHA-256, and safetensors shards with one
    tensor an image under the SHA-256 of the image's file. A shard counts once the index names it; both are written
    under another name and renamed.

    Args:
        folder: Where shards are; None keeps everything in memory.
        key: What the features depend on besides the image, as plain JSON: tower, preprocessing, layer, dtype.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.key = json.loads(json.dumps(key))
        self._held: dict[str, torch.Tensor] = {}  # in memory, or not yet in a shard
        self._shard_of: dict[str, str] = {}
        self._shards: dict[str, str] = {}
        self._open: dict[tuple[int, str], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker process opens shards of its own

    def __contains__(self, image: str) -> bool:
        return image in self._held or image in self._shard_of

    def __len__(self) -> int:
        return len(self._held) + len(self._shard_of)

    def load(self, wanted: Collection[str] | None = None) -> list[str]:
        """Take in the shards that are whole, and remove what is not.

        Args:
            wanted: Images that will be asked for; shards with none of them are left unread. None wants all.

        Returns:
            What was removed and why, a line each; nothing where all is well.
        """
        if self.folder is None:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        shards, told = self._read_index()
        shards = {name: digest for name, digest in shards.items() if self._is_wanted(name, digest, wanted)}
        total = sum((self.folder / name).stat().st_size for name in shards if (self.folder / name).is_file())
        bar = tqdm(
            desc="checking cached features", total=total, unit="B", unit_scale=True, leave=False, dynamic_ncols=True
        )
        with bar:
            for name, digest in shards.items():
                if problem := self._take_shard(name, str(digest)):
                    told.append(f"{self.folder / name} {problem}: its images are encoded again")
                else:
                    bar.update((self.folder / name).stat().st_size)
        for file in self.folder.glob("*.safetensors*"):
            if file.name not in self._shards:
                file.unlink()
        if told:
            self._write_index()
        return told

    def _is_wanted(self, name: str, digest: Any, wanted: Collection[str] | None) -> bool:
        """Whether a shard is to be read; one that is not stays as it is."""
        assert self.folder is not None
        if wanted is None:
            return True
        try:
            with safe_open(self.folder / name, framework="pt") as content:
                if any(image in wanted for image in content.keys()):  # noqa: SIM118 - not a dict
                    return True
        except (SafetensorError, OSError):
            return True  # to be told
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
            return {}, [f"{self.folder} holds another tower's or another preprocessing's features: encoded again"]
        return {name: digest for name, digest in shards.items() if re.fullmatch(r"features-\d+\.safetensors", name)}, []

    def _take_shard(self, name: str, digest: str) -> str | None:
        """Take in a shard, or say what is wrong with it."""
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
        """Keep an image's features.

        Args:
            image: SHA-256 of the image's file.
            features: Shape (image tokens, features).
        """
        self._held[image] = features.detach().to("cpu", copy=True).contiguous()
        if self.folder is not None and len(self._held) >= SHARD_IMAGES:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet in a shard."""
        if self.folder is None or not self._held:
            return
        number = 1 + max((int(re.findall(r"\d+", name)[0]) for name in self._shards), default=-1)
        name = f"features-{number:05}.safetensors"
        temporary = self.folder / f"{name}.part"
        try:
            save_file(self._held, temporary)
        except SafetensorError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"{temporary} cannot be written: {str(error).splitlines()[0]}; free some of the disk and run the same "
                "command again: what was written before is kept"
            ) from None
        share(temporary)
        _sync(temporary)
        digest = file_hash(temporary)
        temporary.rename(self.folder / name)
        self._shards[name] = digest
        self._shard_of |= dict.fromkeys(self._held, name)
        self._held = {}
        self._write_index()

    def _write_index(self) -> None:
        assert self.folder is not None
        temporary = self.folder / f"{_INDEX}.part"
        temporary.write_text(json.dumps({"key": self.key, "shards": self._shards}, indent=1), encoding="utf-8")
        _sync(temporary)
        temporary.replace(self.folder / _INDEX)

    def get(self, image: str) -> torch.Tensor:
        """An image's features, shape (image tokens, features)."""
        if image in self._held:
            return self._held[image]
        assert self.folder is not None
        name = self._shard_of[image]
        place = (os.getpid(), name)  # a forked worker must not share a handle
        if place not in self._open:
            self._open[place] = safe_open(self.folder / name, framework="pt")
        features: torch.Tensor = self._open[place].get_tensor(image)
        return features


class CachedFeatures:
    """Images as their features: what `Pixels` is to a model with a tower, for one that takes features.

    Args:
        store: Holds them.
        hashes: SHA-256 of each image's file by its name.
    """

    def __init__(self, store: FeatureStore, hashes: Mapping[str, str]) -> None:
        self.store = store
        self.hashes = hashes

    def __call__(self, names: Sequence[str]) -> torch.Tensor:
        """Features of these images, of shape (images, image tokens, features)."""
        return torch.stack([self.store.get(self.hashes[name]) for name in names])


def store_folder(cache: Path, key: Mapping[str, Any]) -> Path:
    """The folder of one key's features."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache / "features" / digest[:32]


def feature_bytes(tokens: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of one image's features."""
    return tokens * width * dtype.itemsize


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
