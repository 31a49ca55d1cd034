"""Dtypes and attention kernels by GPU, as torch reports it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lora_llava.core import device
from lora_llava.core.errors import UserError
from lora_llava.model.fast_path import attention
from lora_llava.model.fast_path.attention import choose_kernel, flash_varlen_attention, resolve_attention
from lora_llava.model.loading import autocast, check_dtype, describe_dtype, load_base, resolve_dtype

CPU = torch.device("cpu")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make torch report a GPU of some compute capability, whose tensors are on the CPU."""

    def report(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    choose_kernel.cache_clear()
    yield report
    choose_kernel.cache_clear()


def test_auto_is_the_fastest_dtype_that_is_not_emulated(card: Any) -> None:
    assert resolve_dtype("auto") == torch.float32
    check_dtype("bfloat16")  # slow on a CPU, but its own
    card(8, 6)
    assert resolve_dtype("auto") == torch.bfloat16
    check_dtype("bfloat16")
    card(7, 5)
    assert resolve_dtype("auto") == torch.float16
    assert resolve_dtype("bfloat16") == torch.bfloat16  # of stored weights
    why = "this GPU has compute capability 7.5, below 8.0"
    assert describe_dtype(torch.float16) == f"dtype: float16 with loss scaling, as {why}, and has no bfloat16"
    assert describe_dtype(torch.float32) is None
    for call in (lambda: check_dtype("bfloat16"), lambda: load_base("anything", dtype="bfloat16")):
        with pytest.raises(UserError, match=rf"emulated, many times slower: {why}; set model.dtype=float16, or auto$"):
            call()


def test_autocast_follows_the_dtype() -> None:
    assert not autocast("cuda", torch.float32)._enabled
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with autocast(CPU, dtype):
            assert F.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype == dtype


def library(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Install a flash_attn."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def exact(
    q: Any, k: Any, v: Any, ends: Any, key_ends: Any, *most: Any, softmax_scale: Any, **options: Any
) -> torch.Tensor:
    exact.given = options  # type: ignore[attr-defined]
    rows = (each.transpose(0, 1)[None] for each in (q, k, v))
    return attention._by_segment(*rows, (ends, key_ends), softmax_scale, 0.0)[0]


def no_kernel(*args: Any, **options: Any) -> torch.Tensor:
    no_kernel.calls += 1  # type: ignore[attr-defined]
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")


def test_flash_attn_is_used_if_it_computes_a_tiny_row(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card(9, 0)
    library(monkeypatch, exact)
    assert choose_kernel(CPU)[::2] == ("flash_attn", "")
    assert exact.given["deterministic"] is False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        ends = torch.tensor([0, 4])
        choose_kernel(CPU).compute(*[torch.ones(4, 1, 8)] * 3, (ends, ends, 4, 4), None, 0.0, None)  # type: ignore[misc]
    finally:
        torch.use_deterministic_algorithms(False)
    assert exact.given["deterministic"] is True  # type: ignore[attr-defined]


def test_flash_attn_without_a_kernel_for_the_gpu_is_tried_once_and_reported(
    card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(12, 0)
    library(monkeypatch, no_kernel)
    no_kernel.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(attention, "_torch_varlen", lambda *row: row[0])
    found = [choose_kernel(CPU) for _ in range(3)]
    assert found[0].name == "torch.nn.attention.varlen"
    assert found[0].problem.startswith(
        "flash_attn does not run here (CUDA error: no kernel image is available for execution on the device CUDA"
    )
    assert no_kernel.calls == 1  # type: ignore[attr-defined]
    assert found[1:] == found[:1] * 2


def test_without_any_kernel_each_sample_is_computed_alone(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card(12, 0)
    library(monkeypatch, no_kernel)
    no_kernel.calls = 0  # type: ignore[attr-defined]
    found = choose_kernel(CPU)  # torch's own kernel does not run on a CPU
    assert (found.name, found.compute) == ("SDPA on each sample", None)
    assert "; torch.nn.attention.varlen does not run here (" in found.problem
    card(7, 5)
    choose_kernel.cache_clear()
    reason = "this GPU has compute capability 7.5, below 8.0, which FlashAttention needs"
    line = f"flash_varlen, padding-free, by SDPA on each sample: {reason}"
    monkeypatch.setattr(torch, "device", lambda *names: CPU)
    assert resolve_attention("flash_varlen", torch.float16) == (True, line)
    assert no_kernel.calls == 1  # type: ignore[attr-defined]
    assert resolve_attention("auto", torch.float32)[1].endswith(": FlashAttention does not compute in float32")
    assert attention.is_by_sample(torch.float16)


class OnGpu(torch.Tensor):
    is_cuda = True


def test_grouped_heads_are_repeated_on_a_gpu_without_a_kernel(card: Any) -> None:
    """The output and gradients are those of a CPU's SDPA with grouped heads."""
    card(7, 5)
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    options: Any = {"cu_seq_lens_q": torch.tensor([0, 4, 10], dtype=torch.int32), "max_length_q": 6}
    found = []
    for kind in (torch.Tensor, OnGpu):
        inputs = [each.clone().requires_grad_() for each in (query, key, value)]
        output, _ = flash_varlen_attention(
            torch.nn.Identity(), *(each.as_subclass(kind) for each in inputs), None, **options
        )
        output.as_subclass(torch.Tensor).square().sum().backward()
        found.append([output.as_subclass(torch.Tensor), *(each.grad for each in inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_full_memory_is_recognised_whichever_library_reports_it(error: BaseException, full: bool) -> None:
    assert device.is_out_of_memory(error) == full


def test_a_gpu_that_torch_does_not_use_is_reported_once_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "_DRIVER_FILES", ())
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert device.unused_gpu() is None
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    version = torch.__version__.partition("+")[0]
    line = device.unused_gpu()
    assert line is not None
    assert f"pip install torch=={version}+cu130 --index-url https://download.pytorch.org/whl/cu130 " in line
    device.report_unused_gpu.cache_clear()
    device.report_unused_gpu()
    device.report_unused_gpu()
    assert capsys.readouterr().err == line + "\n"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.unused_gpu() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "cannot use it (Torch not compiled with CUDA enabled), so the CPU computes; " in str(device.unused_gpu())
    device.report_unused_gpu.cache_clear()
