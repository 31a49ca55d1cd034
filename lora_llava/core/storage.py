"""Files that others can rely on: whole or absent, readable as their siblings, written once, checked when read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from lora_llava.core.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""No room, or none for this user; some libraries say so only in their exceptions' texts, as `os error 28`."""
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
SUMS_FILE = "files.sha256"
"""In the format of `sha256sum`, so that `sha256sum -c` checks an entry too."""
_PARTIAL = ".partial"
_NOTHING = 64 << 10
"""Bytes left below which whatever fails in writing fails for want of room."""
_ALWAYS_HASHED = 1 << 30
"""An entry of at most this many bytes is hashed at every read, a larger one when its files changed."""
_THREADS = 4


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an error in writing is one of a full disk.

    numpy and safetensors raise errors without errno: numpy says how much was written, safetensors quotes the system.

    Args:
        error: What was raised.
        folder: Where it was written, or a folder to come.
    """
    text = str(error)
    if getattr(error, "errno", None) in DISK_FULL or any(f"os error {code})" in text for code in DISK_FULL):
        return True
    if isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", text):
        return True
    return getattr(error, "errno", None) not in UNWRITABLE and _free(folder) < _NOTHING


def _free(folder: Path) -> int:
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def full_disk_reported(folder: Path, fix: str) -> Iterator[None]:
    """Turn a full disk into one line.

    Args:
        folder: Where is written.
        fix: What to do about it.

    Raises:
        UserError: Where the disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors has exceptions of its own
        if is_disk_full(error, folder):
            raise UserError(f"the disk is full: {folder} has {_free(folder):,} bytes free; {fix}") from None
        raise


def share(path: Path) -> None:
    """Give a file, or a folder and all that is in it, the permissions that the umask gives to new ones.

    safetensors and `tempfile` make files and folders that only their owner can read.
    """
    mask = _umask()
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not each.is_symlink():
            with contextlib.suppress(PermissionError):  # another user's file in a folder of ours
                special = each.stat().st_mode & 0o7000  # such as a folder's group, which new files in it take
                each.chmod((0o777 if each.is_dir() else 0o666) & ~mask | special)


def _umask() -> int:
    """The process's umask; asking the system for it sets it for a moment, which other threads would see."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def file_sum(file: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_entry(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder of the cache once: processes that need it at the same time wait for the first.

    Half-written folders of killed processes are removed. An entry that is not as it was written is written again, which
    is said on stderr.

    Args:
        folder: `CACHE/KIND/KEY`; the key has no dot.
        write: Fills a new folder, which then gets the name.

    Raises:
        UserError: Where the disk is full.
    """
    _sweep(folder.parent)
    if folder.is_dir() and find_damage(folder) is None:
        return
    with locked(folder):
        damage = find_damage(folder) if folder.is_dir() else None
        if folder.is_dir() and damage is None:
            return
        if damage is not None:
            print(f"{folder} is not as it was written ({damage}); it is written again", file=sys.stderr)
        temporary = folder.with_name(f"{folder.name}{_PARTIAL}")
        with full_disk_reported(folder.parent, "make room, or set LORA_LLAVA_CACHE to a folder on another disk"):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                write(temporary)
                seal(temporary)
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:  # after the rename there is nothing of that name
                shutil.rmtree(temporary, ignore_errors=True)


def _lock_file(folder: Path) -> Path:
    return folder.parents[1] / "locks" / f"{folder.parent.name}-{folder.name}.lock"


@contextlib.contextmanager
def locked(folder: Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock of a cache's entry; where nothing can be written there is none to hold.

    Args:
        folder: The entry.
        busy: What to say where another process holds it; None waits for it.

    Raises:
        UserError: Where another process holds it and `busy` says what that means.
    """
    lock = FileLock(_lock_file(folder))
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if busy is not None:
                raise UserError(busy) from None
            print(f"another run is writing {folder}; waiting for it", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
    try:
        yield
    finally:
        lock.release()


def _sweep(parent: Path) -> None:
    """Remove what killed processes left half-written, whatever its key; a live one holds its lock."""
    for leftover in parent.glob("*.*") if parent.is_dir() else ():
        if not leftover.is_dir():
            continue
        lock = FileLock(_lock_file(leftover.with_name(leftover.name.partition(".")[0])))
        with contextlib.suppress(OSError, Timeout):  # Timeout: it is being written
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            with lock.acquire(timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)


def seal(folder: Path) -> None:
    """Record the SHA-256 of every file of a folder in it, and make all readable by the umask."""
    files = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:  # SHA-256 releases the GIL
        sums = list(pool.map(file_sum, (folder / name for name in files)))
    lines = [f"{digest}  {name}\n" for digest, name in zip(sums, files, strict=True)]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")
    share(folder)


def _files(folder: Path) -> list[str]:
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != SUMS_FILE)


def find_damage(folder: Path) -> str | None:
    """Compare an entry's files with the hashes recorded when it was written.

    All are hashed, unless the entry is larger than a gigabyte and its files are those that were hashed before, by size,
    time of change, time of the last write and place.

    Args:
        folder: The entry.

    Returns:
        What is wrong in a few words, or None.
    """
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        recorded = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        states = {name: (folder / name).stat() for name in recorded}
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError) as error:
        return f"{SUMS_FILE} cannot be read: {error}"
    large = sum(state.st_size for state in states.values()) > _ALWAYS_HASHED
    content = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in states.items()]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), lines, content]).encode()).hexdigest()[:32]
    seen = folder.parents[1] / "hashes" / f"{key}.seen"
    if large and seen.is_file():
        return None
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            sums = list(pool.map(file_sum, (folder / name for name in recorded)))
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    changed = [name for (name, digest), found in zip(recorded.items(), sums, strict=True) if found != digest]
    if changed:
        return f"{changed[0]} has changed"
    if large:
        with contextlib.suppress(OSError):
            seen.parent.mkdir(parents=True, exist_ok=True)
            seen.touch()
    return None


class FoundPath(str):
    """A path of a recipe: the text is where it was found, or what was written where it was found nowhere.

    Args:
        path: The path.
        written: What the recipe says.
        looked: The places at which it was looked for in vain.
    """

    written: str
    looked: tuple[str, ...]

    def __new__(cls, path: str, written: str, looked: tuple[str, ...] = ()) -> FoundPath:
        found = super().__new__(cls, path)
        found.written, found.looked = written, looked
        return found

    def __getnewargs__(self) -> tuple[str, str, tuple[str, ...]]:  # type: ignore[override]
        return str(self), self.written, self.looked


def looked_in(path: object) -> str:
    """Where a recipe's path was looked for in vain, to stand behind it in a message; else nothing."""
    looked = path.looked if isinstance(path, FoundPath) else ()
    return f" (looked for {' and '.join(looked)})" if looked else ""
