"""The memory that a run may take, on GPUs that torch is made to see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.benchmark.benchmark_rows import shape_config
from lora_llava.core.device import unused_gpu
from lora_llava.core.errors import UserError
from lora_llava.core.quiet import has_expandable_segments
from lora_llava.planning.fit import Extremes, build_step, choose_checkpointing
from lora_llava.planning.memory import CUDA_CONTEXT, GIB, Step, gpu_share, usable
from lora_llava.planning.memory_budget import available_bytes, check_budget, limit_memory, memory_budget
from lora_llava.recipe import Recipe, load_recipe
from lora_llava.runs.directory import peak_memory

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Let torch see GPUs, given by pairs of free and total GiB; return the limits that it is asked to keep."""

    def see(*sizes: tuple[float, float]) -> list[float]:
        limits: list[float] = []
        free = [(int(left * GIB), int(total * GIB)) for left, total in sizes]
        calls: dict[str, Any] = {
            "is_available": lambda: True,
            "device_count": lambda: len(free),
            "current_device": lambda: 0,
            "get_device_name": lambda place=0: f"NVIDIA RTX {place}",
            "get_device_capability": lambda place=0: (8, 9),
            "get_device_properties": lambda place: type("Properties", (), {"total_memory": free[place][1]}),
            "mem_get_info": lambda place=0: free[place],
            "memory_reserved": lambda: 0,
            "set_per_process_memory_fraction": limits.append,
        }
        for name, call in calls.items():
            monkeypatch.setattr(torch.cuda, name, call)
        return limits

    return see


def recipe_of(memory_gb: float | None = None) -> Recipe:
    return load_recipe("scienceqa_qlora.yaml", [f"training.memory_gb={memory_gb}"] if memory_gb else [])


def test_a_budget_above_what_is_free_is_one_line(cards: Any) -> None:
    cards((10.25, 12.0))
    free = 10.25 + CUDA_CONTEXT / GIB  # the context is in the budget, and taken already
    with pytest.raises(UserError) as caught:
        check_budget(recipe_of(11.5))
    assert str(caught.value) == (
        f"training.memory_gb is 11.5, and {free:.1f} GiB are free on the GPU, NVIDIA RTX 0; set training.memory_gb="
        "10.7 or auto, or stop what uses the rest"
    )
    check_budget(recipe_of(10.7))
    check_budget(recipe_of())


def test_torch_may_take_no_more_than_the_budget(cards: Any) -> None:
    limits = cards((10.25, 12.0))
    limit_memory(recipe_of(8.0))
    limit_memory(recipe_of())
    assert limits == [pytest.approx((8.0 - CUDA_CONTEXT / GIB) / 12), pytest.approx(10.25 / 12)]
    assert memory_budget(recipe_of()) == (int(10.25 * GIB) + CUDA_CONTEXT, "free on the GPU, NVIDIA RTX 0")


def test_without_a_gpu_nothing_is_limited() -> None:
    limit_memory(recipe_of(8.0))


@pytest.fixture
def step() -> Step:
    """Plan a 7B step before torch sees a GPU, as kernels are tried on it."""
    return build_step(recipe_of(), shape_config("7b", 0, 32000), Extremes(4096, 1500, 7), cuda=True)


def test_of_two_cards_the_free_one_is_named(step: Step, cards: Any) -> None:
    cards((0.4, 24.0), (23.2, 24.0))
    with pytest.raises(UserError, match=r"0.9 GiB are available \(free on GPU 0, NVIDIA RTX 0\)") as caught:
        choose_checkpointing(recipe_of(), step)
    assert str(caught.value).endswith("; GPU 1, NVIDIA RTX 1, has 23.2 GiB free: set CUDA_VISIBLE_DEVICES=1")
    cards((0.4, 24.0), (0.3, 24.0))
    with pytest.raises(UserError) as caught:
        choose_checkpointing(recipe_of(), step)
    assert "CUDA_VISIBLE_DEVICES" not in str(caught.value)


def test_a_card_without_room_for_cuda_is_named(cards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cards((0.0, 24.0), (23.2, 24.0))

    def info(place: int = 0) -> tuple[int, int]:
        if place == 0:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
        return int(23.2 * GIB), 24 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    with pytest.raises(UserError) as caught:
        memory_budget(recipe_of())
    assert str(caught.value) == (
        "GPU 0, NVIDIA RTX 0 cannot be used (CUDA error: out of memory); GPU 1, NVIDIA RTX 1, has 23.2 GiB free: set "
        "CUDA_VISIBLE_DEVICES=1"
    )


def test_a_card_of_4_gb_is_refused_in_one_line(step: Step, cards: Any) -> None:
    cards((3.4, 4.0))
    with pytest.raises(UserError, match=r"a step needs \d\.\d GiB or more, and 3\.9 GiB are available") as caught:
        choose_checkpointing(recipe_of(), step)
    assert "\n" not in str(caught.value)
    assert "no setting of this recipe fits: use a smaller language model" in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "used"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_a_container_may_have_less_memory_than_its_machine(tmp_path: Path, limit: str, used: str) -> None:
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("5000\n")
    (tmp_path / used).write_text("3000\n")
    (tmp_path / limit).with_name("memory.stat").write_text("anon 1500\ninactive_file 700\nactive_file 50\n")
    assert available_bytes(tmp_path) == 2750
    (tmp_path / limit).write_text("max\n")
    assert available_bytes(tmp_path) > 2**20


def test_a_driver_that_is_too_old_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(TOO_OLD)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert unused_gpu() == (
        f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it (The NVIDIA driver on your "
        "system is too old (found version 11040)), so the CPU computes; the driver runs CUDA up to 11.4, and this "
        "torch is for CUDA 13.0: update the driver (nvidia.com/drivers), or install a torch for CUDA 11.4 or older "
        "(pytorch.org)"
    )


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}, False),  # torch reads one
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,backend:cudaMallocAsync"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,backend:native"}, True),
        ({}, False),
    ],
)
def test_the_share_follows_the_allocator(
    variables: dict[str, str], found: bool, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert has_expandable_segments() is found
    assert gpu_share() == (0.97 if found else 0.90)
    assert usable(step, 1000) == (970 if found else 900)


def test_windows_has_no_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(sys, "platform", "win32")
    assert gpu_share() == 0.90


def test_reserved_memory_is_reported_beside_allocated() -> None:
    train = {"peak_memory_bytes": 6 * GIB, "peak_reserved_bytes": int(6.25 * GIB)}
    assert peak_memory(train) == "6.00 GiB, 6.25 GiB with the allocator's free blocks"
    assert peak_memory({"peak_memory_bytes": 6 * GIB, "peak_reserved_bytes": None}) == "6.00 GiB"
    assert peak_memory({"peak_memory_bytes": 6 * GIB}) == "6.00 GiB"  # of an earlier version


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_large_blocks_return_to_the_system(tmp_path: Path) -> None:
    """Free blocks of 16 MiB below one that stays: in the heap they would stay resident."""
    script = """
import ctypes, sys
from lora_llava.core.heap import return_large_blocks
libc = ctypes.CDLL(None)
if not hasattr(libc, "gnu_get_libc_version"):
    sys.exit(3)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "ours":
    assert return_large_blocks()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
libc.free(libc.malloc(31 << 20))  # from now on glibc takes blocks up to this size from the heap
before, blocks, small = resident(), [], []
for _ in range(16):
    blocks.append(libc.malloc(16 << 20))
    ctypes.memset(blocks[-1], 1, 16 << 20)
    small.append(libc.malloc(1 << 16))
for block in blocks:
    libc.free(block)
print((resident() - before) >> 20)
"""
    found = {}
    for way in ("stock", "ours"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", script, way], capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode == 3:
            pytest.skip("not glibc")
        assert done.returncode == 0, done.stderr
        found[way] = int(done.stdout)
    assert found["stock"] >= 240
    assert found["ours"] <= 16
