"""Liger's kernels, run by Triton's CPU interpreter, compute what the lean path computes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_llava.model.fast_path.liger import EXTRA, load_liger
from lora_llava.training.kernel_check import check_kernels, choose_kernels
from tests.model.test_families import adapted, rows

INSTALLED = all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))


def needs_liger(test: Any) -> Any:
    """Mark a test that runs kernels in the interpreter: a minute and a half for all."""
    return pytest.mark.more(pytest.mark.skipif(not INSTALLED, reason="liger-kernel and triton are not installed")(test))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `tests/model/liger_interpreted.py` found; Triton reads the variable while it is imported."""
    folder = tmp_path_factory.mktemp("liger")
    run = subprocess.run(
        [sys.executable, "-m", "tests.model.liger_interpreted", str(folder)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "LORA_LLAVA_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@needs_liger
def test_values_and_gradients_are_the_operators_own(interpreted: Any) -> None:
    """Relative errors against float64: 1e-5 at most in float32, and no more than torch's in bfloat16."""
    kernels = interpreted["kernels"]
    assert len(kernels) == 2 * (2 + 1 + 3)
    for name, error in kernels.items():
        assert error["liger"] <= (1e-5 if "float32" in name else 1.02 * error["stock"]), name
        assert "float32" in name or error["stock"] > 1e-4, "the reference is not more exact"


@needs_liger
def test_every_family_uses_the_kernels_of_its_layers(interpreted: Any) -> None:
    classes = {
        "llama": "Llama",
        "smollm2": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "phi3": "Phi3",
        "gemma3_text": "Gemma3",  # whose MLP has no SiLU
    }
    for family, found in interpreted["families"].items():
        parts = ["Attention", "RMSNorm"] if family == "gemma3_text" else ["Attention", "MLP", "RMSNorm"]
        assert found["classes"] == ([classes[family] + part for part in parts] if family in classes else []), family
        assert found["difference"] <= 1e-5, family
        assert found["used"] is (family in classes)
        assert found["restored"]


@needs_liger
def test_adapters_and_recomputed_layers_never_read_what_was_overwritten(interpreted: Any) -> None:
    assert len(interpreted["adapters"]) == 4
    assert all(difference <= 1e-5 for difference in interpreted["adapters"].values())
    for message in interpreted["again"].values():
        assert "has been modified by an inplace operation" in message


@needs_liger
def test_the_start_uses_kernels_that_agree_and_no_others(interpreted: Any) -> None:
    check = interpreted["check"]
    assert check["right"].startswith("kernels: Liger's; loss ")
    assert check["right"].endswith("gradients within 0.0%")
    assert check["right, changed"] == str(3 * (2 + 1 + 1) + 1)
    assert check["wrong"].startswith("kernels: torch's; Liger's differ on the first batch (loss ")
    assert check["wrong"].endswith("%); report this machine to us")
    assert check["failing"] == "kernels: torch's; Liger's failed here (no C compiler)"
    assert check["wrong, changed"] == check["failing, changed"] == "0"


@pytest.mark.skipif(INSTALLED, reason="liger-kernel is installed")
def test_without_liger_the_run_says_how_to_get_it(base: Any) -> None:
    model = adapted(base("llama", "clip").folder, fast=True)
    with pytest.raises(ImportError):
        load_liger()
    assert check_kernels(model, rows(model.config)[0]) == f"kernels: torch's; Liger's are faster: {EXTRA}"


def test_without_a_gpu_the_kernels_are_not_named(base: Any) -> None:
    model = adapted(base("llama", "clip").folder, fast=True)
    assert choose_kernels(model, [], lambda samples: pytest.fail("nothing is compared")) is None
    assert next(model.parameters()).device == torch.device("cpu")
