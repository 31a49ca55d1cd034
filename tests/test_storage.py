"""What is kept: written once whoever asks at the same time, whole or made again, readable by the umask."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_llava.core.errors import UserError
from lora_llava.core.storage import (
    SUMS_FILE,
    atomic_file,
    find_damage,
    full_disk_reported,
    is_disk_full,
    locked,
    make_entry,
    share,
)
from lora_llava.demo.dataset import build_demo_captions


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def write(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "a.txt").write_text("content")
    save_file({"a": np.zeros(3)}, folder / "b.safetensors")


def modes(folder: Path) -> set[tuple[str, int]]:
    return {(file.name, stat.S_IMODE(file.stat().st_mode)) for file in (folder, *folder.rglob("*"))}


def test_an_entry_is_written_once_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "kind" / "key"
    written: list[Path] = []

    def counted(temporary: Path) -> None:
        written.append(temporary)
        write(temporary)

    for _ in range(2):
        make_entry(folder, counted)
    assert len(written) == 1
    assert capsys.readouterr().err == ""
    for name, damage in {"inner/a.txt": "inner/a.txt has changed", "b.safetensors": "b.safetensors is missing"}.items():
        if "missing" in damage:
            (folder / name).unlink()
        else:
            state = (folder / name).stat()
            (folder / name).write_text("cOntent")
            os.utime(folder / name, ns=(state.st_atime_ns, state.st_mtime_ns))  # as if a bit flipped on the disk
        assert find_damage(folder) == damage
        make_entry(folder, counted)
        assert capsys.readouterr().err == f"warning: {folder} is damaged ({damage}); writing it again\n"
        assert find_damage(folder) is None
    assert len(written) == 3
    assert [each.name for each in folder.parent.iterdir()] == ["key"]


def test_a_large_entry_is_hashed_when_its_files_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_llava.core.storage._ALWAYS_HASHED", 0)
    folder = tmp_path / "kind" / "key"
    make_entry(folder, write)
    assert find_damage(folder) is None
    hashed: list[Path] = []
    monkeypatch.setattr("lora_llava.core.storage.file_hash", lambda file: hashed.append(file) or "")
    assert find_damage(folder) is None
    assert hashed == []
    (folder / "inner" / "a.txt").write_text("cOntent")
    assert find_damage(folder) is not None
    assert len(hashed) == 2


SECOND = """
import sys, time
from pathlib import Path
from lora_llava.core.storage import make_entry
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
def write(temporary):
    (temporary / "a.txt").write_text("one")
    with log.open("a") as stream:
        stream.write("written\\n")
    time.sleep(1)
make_entry(folder, write)
print((folder / "a.txt").read_text())
"""


def start(folder: Path, log: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SECOND, str(folder), str(log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_at_once_the_second_takes_what_the_first_wrote(tmp_path: Path) -> None:
    folder, log = tmp_path / "kind" / "key", tmp_path / "log"
    both = [start(folder, log) for _ in range(2)]
    reported = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [out for out, _ in reported] == ["one\n", "one\n"]
    assert log.read_text() == "written\n"
    assert sorted(err for _, err in reported) == ["", f"another run is writing {folder}; waiting for it\n"]


def test_what_a_killed_process_left_is_removed_and_a_live_one_s_is_not(tmp_path: Path) -> None:
    folder, log = tmp_path / "kind" / "key", tmp_path / "log"
    process = start(folder, log)
    while not log.exists():
        time.sleep(0.02)
    make_entry(tmp_path / "kind" / "other", write)
    assert (tmp_path / "kind" / "key.partial").is_dir()  # it is at work
    process.kill()
    process.communicate()
    assert (tmp_path / "kind" / "key.partial").is_dir()
    (tmp_path / "kind" / "older.x7_q2").mkdir()  # as older versions called theirs
    make_entry(tmp_path / "kind" / "other", write)
    assert [each.name for each in (tmp_path / "kind").iterdir()] == ["other"]


def test_a_busy_folder_can_be_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "kind" / "key"), pytest.raises(UserError, match=r"^wait$"):
        with locked(tmp_path / "kind" / "key", "wait"):
            pass


def test_a_full_disk_is_seen_without_errno(tmp_path: Path) -> None:
    reported = OSError("12800 requested and 0 written")  # numpy's tofile
    assert is_disk_full(reported, tmp_path)
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path)
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"), tmp_path)
    assert not is_disk_full(OSError("gone"), tmp_path / "not" / "there")
    with pytest.raises(UserError, match=r"^the disk is full: .* bytes free; make room$"):
        with full_disk_reported(tmp_path, "make room"):
            raise reported


def test_all_of_an_entry_is_readable_by_the_umask(tmp_path: Path, umask: None) -> None:
    folder = tmp_path / "kind" / "key"
    make_entry(folder, write)
    files = {("a.txt", 0o644), ("b.safetensors", 0o644), (SUMS_FILE, 0o644)}
    assert modes(folder) == {("key", 0o755), ("inner", 0o755), *files}
    os.umask(0o007)
    share(folder)
    assert {mode for _, mode in modes(folder)} == {0o770, 0o660}


def test_a_demo_image_that_changed_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = build_demo_captions(tmp_path, 4)
    image = file.parent / "images" / "00002.png"
    content = image.read_bytes()
    image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert build_demo_captions(tmp_path, 4) == file
    assert image.read_bytes() == content
    assert "(images/00002.png has changed); writing it again" in capsys.readouterr().err


def test_an_atomic_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with atomic_file(file) as temporary:
        temporary.write_text("one")
        assert not file.exists()
    writing = atomic_file(file)
    writing.__enter__().write_text("tw")
    assert not writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.json", "one")]
