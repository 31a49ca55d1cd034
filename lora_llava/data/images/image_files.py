"""The file of an image, for links to it."""

from __future__ import annotations

from pathlib import Path

from lora_llava.data.images.image_id import ImageId, ImageName
from lora_llava.data.images.image_sources import BadImageError, FolderImages, JoinedImages, SplitImages


def image_file(images: SplitImages, name: ImageName) -> Path | None:
    """Return the file of an image.

    Args:
        images: The images of a split.
        name: The image's name in it.

    Returns:
        The file; None for an image inside a table, a missing one, and one outside the image folder.
    """
    if isinstance(images, JoinedImages) and isinstance(name, ImageId):
        return image_file(images.sources[name.source], name.name)
    if not isinstance(images, FolderImages) or not isinstance(name, str):
        return None
    try:
        file = images.find(name)
        return file if file.is_file() else None
    except (BadImageError, OSError, ValueError):
        return None
