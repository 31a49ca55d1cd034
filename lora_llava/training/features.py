"""`vision_cache`: encode every image of a run once, before the language model is loaded."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock, Timeout
from rich.console import Console

from lora_llava.core.device import free_memory
from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.core.storage import cache_folder
from lora_llava.data.images.image_id import ImageName
from lora_llava.data.images.image_sources import Pixels
from lora_llava.data.images.tiling import TiledImages
from lora_llava.data.images.to_rgb import CONVERSION_RULE
from lora_llava.distributed.ranks import first_before_others
from lora_llava.evaluation.row_evaluation import choose_rows
from lora_llava.model.families.tower_families import image_tokens, tiling_of
from lora_llava.model.loading import default_device
from lora_llava.model.start import Base
from lora_llava.model.vision import load_tower, tower_features
from lora_llava.model.vision_cache import CachedFeatures, FeatureStore, feature_bytes, store_folder
from lora_llava.planning.run_plan import RunPlan

_BATCH = 8
"""Images per batch of the vision tower (untuned on a GPU)."""
_Place = tuple[str, ImageName]
"""A split and one of its images."""


def cache_features(plan: RunPlan, base: Base, console: Console) -> None:
    """Compute the missing features if the recipe has a vision cache, and let all splits read from it.

    Args:
        plan: From `plan_run`; the `load_pixels` of its splits are replaced.
        base: The base whose tower computes the features.
        console: Prints where the cache is and what is rebuilt.

    Raises:
        UserError: If the features do not fit the disk or memory, or an image cannot be read.
    """
    if plan.recipe.training.vision_cache == "off":
        return
    hashes = {name: _hash_split(plan, name) for name in plan.splits}
    key = cache_key(plan, base)
    folder = store_folder(cache_folder(), key) if plan.recipe.training.vision_cache == "disk" else None
    store = FeatureStore(folder, key)
    if folder is None:
        _fill(store, hashes, plan, base, console)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {digest for found in hashes.values() for digest in found.values()}
        with first_before_others(), _locked(folder, console):  # two runs with the same tower write to one cache
            for line in store.load(wanted):
                console.print(f"vision cache: {line}", soft_wrap=True)
            _fill(store, hashes, plan, base, console)
    images = len({digest for found in hashes.values() for digest in found.values()})
    where = "memory" if folder is None else folder
    console.print(f"vision cache: {images:,} images in {where}; the vision tower is not loaded", soft_wrap=True)
    for name, split in plan.splits.items():
        tiled = tiling_of(plan.model.config) is not None
        split.load_pixels = CachedFeatures(store, hashes[name], split.sizes if tiled else None)


@contextmanager
def _locked(folder: Path, console: Console) -> Iterator[None]:
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"vision cache: another run is using {folder}; waiting for it", soft_wrap=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def cache_key(plan: RunPlan, base: Base) -> dict[str, Any]:
    """Return everything that features depend on besides the image."""
    config = plan.model.config
    return {
        "tower": base.as_dict()["hashes"]["vision_tower"],
        "preprocessing": plan.processor.image_processor.to_dict(),
        "layer": config.vision_feature_layer,
        "strategy": config.vision_feature_select_strategy,
        "dtype": str(plan.computation.dtype),
        "background": plan.recipe.data.background,
        "conversion": CONVERSION_RULE,
    }


def split_images(plan: RunPlan, name: str) -> list[ImageName]:
    """Return the names of the images of a split, each once; of the test split, only those of evaluated rows."""
    rows = plan.splits[name].rows
    indices: Any = range(len(rows))
    if name == "test" and plan.recipe.evaluation is not None:
        evaluation, seed = plan.recipe.evaluation, plan.recipe.seed
        indices = [i for count in (evaluation.before, evaluation.after) for i in choose_rows(indices, count, seed)]
    return list(dict.fromkeys(image for i in indices for image in rows.image_files(i)))


def _hash_split(plan: RunPlan, name: str) -> dict[ImageName, str]:
    """Return the SHA-256 of each image file by its name; images that the split opened are not read again."""
    split = plan.splits[name]
    names, images, known = split_images(plan, name), split.images, split.digests

    def digest(image: ImageName) -> str:
        return known.get(image) or hashlib.sha256(images.read(image)).hexdigest()

    with ThreadPoolExecutor() as pool:
        digests = progress_bar(
            pool.map(digest, names),
            desc=f"reading images of {name}",
            total=len(names),
            unit="image",
            leave=False,
        )
        return dict(zip(names, digests, strict=True))


def _fill(
    store: FeatureStore, hashes: dict[str, dict[ImageName, str]], plan: RunPlan, base: Base, console: Console
) -> None:
    """Encode the images whose features are not in the store, and print their size before."""
    places = {digest: (split, name) for split, found in hashes.items() for name, digest in found.items()}
    missing = [place for digest, place in places.items() if digest not in store]
    if not missing:
        return
    needed = _check_room(store, len(missing), sum(_tile_counts(missing, plan)), plan)
    console.print(f"vision cache: features of {len(missing):,} images, {needed / 1e9:.2f} GB, are computed once")
    config, dtype, device = plan.model.config, plan.computation.dtype, default_device()
    tower = load_tower(base.folder, config, dtype, device)
    bar = progress_bar(desc="encoding images", total=len(missing), unit="image")
    with bar:
        try:
            for batch, pixels in _preprocessed(missing, plan):
                features = tower_features(tower, config, pixels.to(device))
                for (split, name), one in zip(batch, _by_image(features, batch, plan), strict=True):
                    store.put(hashes[split][name], one)
                bar.update(len(batch))
        finally:
            store.flush()  # Ctrl-C keeps what was computed
    del tower
    free_memory()


def _preprocessed(places: list[_Place], plan: RunPlan) -> Iterator[tuple[list[_Place], torch.Tensor]]:
    """Yield batches of images with their pixels; the next batch is preprocessed while the tower runs."""
    batches = [places[start : start + _BATCH] for start in range(0, len(places), _BATCH)]
    processor = plan.processor.image_processor

    def pixels(batch: list[_Place]) -> torch.Tensor:
        return torch.cat(
            [Pixels(plan.splits[split].images, processor, plan.splits[split].sizes)([name]) for split, name in batch]
        )

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(pixels, batches[0])
        for index, batch in enumerate(batches):
            ready = coming.result()
            if index + 1 < len(batches):
                coming = pool.submit(pixels, batches[index + 1])
            yield batch, ready


def _tile_counts(places: Sequence[_Place], plan: RunPlan) -> list[int]:
    """Return the tiles of each of these images: one for a model without tiles."""
    tiling = tiling_of(plan.model.config)
    if tiling is None:
        return [1] * len(places)
    return [TiledImages(tiling, plan.splits[split].sizes).tiles([name])[0] for split, name in places]


def _by_image(features: torch.Tensor, places: Sequence[_Place], plan: RunPlan) -> Sequence[torch.Tensor]:
    """Return the features of each image: (tokens, features), or (tiles, patches, features) for a model with tiles."""
    if tiling_of(plan.model.config) is None:
        return list(features)
    return features.split(_tile_counts(places, plan))


def _check_room(store: FeatureStore, images: int, tiles: int, plan: RunPlan) -> int:
    """Return the bytes of the features of images with so many tiles; refuse them if they do not fit."""
    config = plan.model.config
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    one = feature_bytes(image_tokens(config), width, plan.computation.dtype)
    needed = tiles * one
    if store.folder is None:
        free, what, fix = psutil.virtual_memory().available, "memory", "disk or off"
    else:
        free, what, fix = shutil.disk_usage(store.folder).free, str(store.folder), "memory or off, or LORA_LLAVA_CACHE"
    if needed > free:
        raise UserError(
            f"training.vision_cache: features of {images:,} images need {needed / 1e9:.1f} GB and {what} has "
            f"{free / 1e9:.1f} GB free; set training.vision_cache to {fix}"
            + (" to another disk" if store.folder is not None else "")
        )
    return needed
