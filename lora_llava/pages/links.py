"""Links from a page to files of this machine."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote


def link_to(file: Path | None, folder: Path | None) -> str | None:
    """Return the address of a file for a page.

    Args:
        file: The file; None has no address.
        folder: The folder of the page; None for a page that links to no file.

    Returns:
        An address relative to the page, so that it holds when page and images are moved together; a `file:` address
        where only the root of the file system is shared. Every character but letters, digits, `/` and `_.-~` is
        escaped, so that no name can be read as another scheme.
    """
    if file is None or folder is None:
        return None
    file, folder = Path(os.path.abspath(file)), Path(os.path.abspath(folder))
    try:
        common = Path(os.path.commonpath([file, folder]))
    except ValueError:  # two drives of Windows
        return file.as_uri()
    if common == Path(common.anchor):
        return file.as_uri()
    return quote(Path(os.path.relpath(file, folder)).as_posix(), safe="/", errors="surrogateescape")
