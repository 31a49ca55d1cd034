"""The cache's folders and shared files: written completely or not at all, once, and checked when read."""

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
"""The disk or the user's quota is full; some libraries report it only in the exception's text, as `os error 28`."""
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
SUMS_FILE = "files.sha256"
"""The file of checksums, in the format of `sha256sum`: `sha256sum -c` checks an entry too."""
_PARTIAL = ".partial"
_NO_ROOM = 64 << 10
"""Free bytes below which a failed write is attributed to a full disk."""
_ALWAYS_HASHED = 1 << 30
"""Entries of at most this many bytes are hashed at every read, larger ones only when their files have changed."""
_THREADS = 4


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Check whether a write failed because the disk is full.

    numpy and safetensors raise errors without errno: numpy reports how much was written, safetensors quotes the system.

    Args:
        error: The exception.
        folder: The folder that was written to; it need not exist.
    """
    text = str(error)
    if getattr(error, "errno", None) in DISK_FULL or any(f"os error {code})" in text for code in DISK_FULL):
        return True
    if isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", text):
        return True
    return getattr(error, "errno", None) not in UNWRITABLE and _free(folder) < _NO_ROOM


def _free(folder: Path) -> int:
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def full_disk_reported(folder: Path, fix: str) -> Iterator[None]:
    """Report a full disk in one line.

    Args:
        folder: The folder that is written to.
        fix: How to fix it, for the message.

    Raises:
        UserError: If the disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors raises its own exceptions
        if is_disk_full(error, folder):
            raise UserError(f"the disk is full: {folder} has {_free(folder):,} bytes free; {fix}") from None
        raise


def share(path: Path) -> None:
    """Give a file, or a folder and its contents, the permissions that the umask grants to new ones.

    safetensors and `tempfile` make files and folders that only their owner can read.
    """
    mask = _umask()
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not each.is_symlink():
            with contextlib.suppress(PermissionError):  # another user's file in a folder of ours
                special = each.stat().st_mode & 0o7000  # such as setgid, by which new files inherit the folder's group
                each.chmod((0o777 if each.is_dir() else 0o666) & ~mask | special)


def _umask() -> int:
    """Return the process's umask, from /proc if possible: `os.umask` would change it for a moment for all threads."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a temporary file beside a file, and rename it to the file if its block ends without an error.

    A reader sees the old file or the new one, never a part. Nothing is synced to disk: see `sync_file` in
    runs/checkpoint.py for what must survive a power cut.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file in hex, read in chunks."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_entry(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder of the cache once; other processes that need it wait for the first.

    Incomplete folders of killed processes are removed. A damaged entry is written again, with a warning on stderr.

    Args:
        folder: `CACHE/KIND/KEY`; the key has no dot.
        write: Fills a new folder, which is then renamed to `folder`.

    Raises:
        UserError: If the disk is full.
    """
    _sweep(folder.parent)
    if folder.is_dir() and find_damage(folder) is None:
        return
    with locked(folder):
        damage = find_damage(folder) if folder.is_dir() else None
        if folder.is_dir() and damage is None:
            return
        if damage is not None:
            print(f"warning: {folder} is damaged ({damage}); writing it again", file=sys.stderr)
        temporary = folder.with_name(f"{folder.name}{_PARTIAL}")
        with full_disk_reported(folder.parent, "make room, or set LORA_LLAVA_CACHE to a folder on another disk"):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                write(temporary)
                seal(temporary)
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:  # after the rename it does not exist
                shutil.rmtree(temporary, ignore_errors=True)


def _lock_file(folder: Path) -> Path:
    return folder.parents[1] / "locks" / f"{folder.parent.name}-{folder.name}.lock"


@contextlib.contextmanager
def locked(folder: Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock of a cache entry; do nothing if the cache is not writable.

    Args:
        folder: The entry.
        busy: The error message if another process holds the lock; None waits for it.

    Raises:
        UserError: If another process holds the lock and `busy` is given.
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
    """Remove incomplete entries left by killed processes; a running process holds the lock of its entry."""
    for leftover in parent.glob("*.*") if parent.is_dir() else ():
        if not leftover.is_dir():
            continue
        lock = FileLock(_lock_file(leftover.with_name(leftover.name.partition(".")[0])))
        with contextlib.suppress(OSError, Timeout):  # Timeout: another process is writing it
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            with lock.acquire(timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write a folder's checksum file and set the permissions of its files by the umask."""
    files = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:  # SHA-256 releases the GIL
        sums = list(pool.map(file_hash, (folder / name for name in files)))
    lines = [f"{digest}  {name}\n" for digest, name in zip(sums, files, strict=True)]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")
    share(folder)


def _files(folder: Path) -> list[str]:
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != SUMS_FILE)


def find_damage(folder: Path) -> str | None:
    """Compare an entry's files with the checksums recorded when it was written.

    All files are hashed, except in an entry over a gigabyte whose files have the sizes, times and inodes with which
    they were hashed before.

    Args:
        folder: The entry.

    Returns:
        The problem in a few words, or None.
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
            sums = list(pool.map(file_hash, (folder / name for name in recorded)))
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
    """A path in a recipe: as text the path that was found, or the path as written if none exists.

    Args:
        path: The path.
        written: The path as the recipe has it.
        looked: The paths that were tried and do not exist.
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
    """Return the places where a recipe's path was not found, as a suffix for messages; else an empty text."""
    looked = path.looked if isinstance(path, FoundPath) else ()
    return f" (looked for {' and '.join(looked)})" if looked else ""


def cache_folder() -> Path:
    """Return the folder of base folders and demo data: `LORA_LLAVA_CACHE`, or `~/.cache/lora_llava`."""
    return Path(os.environ.get("LORA_LLAVA_CACHE") or Path.home() / ".cache" / "lora_llava").expanduser()
