"""Writes the rows of a converted folder, and unpacks images from its archives."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lora_llava.core.errors import UserError
from lora_llava.core.progress import progress_bar
from lora_llava.core.storage import atomic_file
from lora_llava.data.files.row_files import json_text
from lora_llava.data.folder_data import FolderData
from lora_llava.data.folder_kinds.folder_kind import SPLITS, Packed, number_of


def write_rows(found: FolderData, console: Console) -> None:
    """Write the rows of a folder that is not a table as JSONL, one file for each split, after unpacking its images.

    Files of an earlier `init` are replaced; a split that is gone loses its file.

    Args:
        found: The folder; nothing is written for a table.
        console: Prints what was written.

    Raises:
        UserError: If the disk has too little space, or an archive changed meanwhile.
    """
    if found.converted is None:
        return
    folder = found.file.parent
    folder.mkdir(exist_ok=True)
    if found.converted.packed:
        _unpack(found.converted.packed, folder / "images")
        console.print(f"unpacked {len(found.converted.packed):,} images to {folder / 'images'}", soft_wrap=True)
    for split in SPLITS:
        target = folder / f"{split}.jsonl"
        rows = found.converted.splits.get(split, [])
        if not rows:
            target.unlink(missing_ok=True)
            continue
        with atomic_file(target) as temporary, temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(json_text(row) + "\n" for row in rows)
        console.print(f"wrote {target}: {number_of(len(rows), 'row')}", soft_wrap=True)


def _unpack(packed: Sequence[Packed], root: Path) -> None:
    """Unpack images; those that are there with their size are kept, so that an interrupted call goes on."""
    waiting = [each for each in packed if not _is_there(each, root)]
    needed, free = sum(each.size for each in waiting), shutil.disk_usage(root.parent).free
    if needed > free:
        raise UserError(f"{root}: unpacking takes {needed:,} bytes, and {free:,} are free; free some space")
    by_archive: dict[Path, list[Packed]] = {}
    for each in waiting:
        by_archive.setdefault(each.archive, []).append(each)
    with progress_bar(total=len(waiting), desc="images", unit="image", leave=False) as bar:
        for archive, members in by_archive.items():
            wanted = {each.member: each for each in members}
            try:
                with tarfile.open(archive) as tar:
                    for member in tar:
                        packed_file = wanted.pop(member.name, None)
                        if packed_file is not None and member.isfile():
                            _unpack_one(tar, member, root / packed_file.target)
                            bar.update()
                        if not wanted:
                            break
            except (tarfile.TarError, EOFError, OSError) as error:
                raise UserError(f"{archive}: it cannot be unpacked ({error}); copy or download it again") from None
            if wanted:
                raise UserError(f"{archive}: {next(iter(wanted))} cannot be unpacked; copy or download it again")


def _is_there(packed: Packed, root: Path) -> bool:
    target = root / packed.target
    return target.is_file() and target.stat().st_size == packed.size


def _unpack_one(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write a member's content to a new file; the archive's own name and rights for it are not used."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stream = tar.extractfile(member)
    assert stream is not None  # it is a file
    with atomic_file(target) as temporary, temporary.open("wb") as out:
        shutil.copyfileobj(stream, out)
