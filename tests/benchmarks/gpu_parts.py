"""What `benchmark.py gpu` measures, each part in a process of its own."""

from __future__ import annotations

import copy
import importlib.metadata
import shutil
import subprocess
import time
from typing import Any

import torch

from lora_llava.benchmark.benchmark_rows import DrawnImages, draw_rows, shape_config
from lora_llava.benchmark.benchmark_sides import BenchmarkSettings
from lora_llava.benchmark.comparison_run import run_or_full
from lora_llava.data.images.image_sources import Pixels
from lora_llava.data.tokens import Stop
from lora_llava.inference.generate import generate_answers
from lora_llava.inference.question import Question
from lora_llava.inference.sampling import Sampling
from lora_llava.model.adapters import add_adapters, lora_config
from lora_llava.model.families.tower_families import image_processor_of, image_tokens
from lora_llava.model.fast_path import attention
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.fast_path.liger import use_liger
from lora_llava.model.loading import default_device, resolve_dtype
from lora_llava.model.random_weights import build_random_llava
from lora_llava.model.tokenizer import load_tokenizer
from lora_llava.model.weights.parts import DEMO_FOLDER
from lora_llava.planning.memory import CUDA_CONTEXT
from lora_llava.recipe.schema import LINEARS
from lora_llava.runs.directory import machine
from lora_llava.training.kernel_check import gradients_apart, train_once
from lora_llava.training.training_progress import peak_memory_bytes

LENGTHS = (1, 7, 300, 128, 588)
"""Tokens of the samples of a row."""
OPTIONAL = ("flash_attn", "liger_kernel", "triton", "kernels")


def describe_gpu(tiny: bool) -> dict[str, Any]:
    """Describe the machine, its free memory beside CUDA's context, its driver and the optional libraries.

    The parent process asks for nothing of it: a context of its own would take memory from the parts.
    """
    found: dict[str, Any] = {"tiny": tiny, **machine(), "optional": {}, "torch_cuda": torch.version.cuda}
    for name in OPTIONAL:
        try:
            found["optional"][name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            found["optional"][name] = None
    if not torch.cuda.is_available():
        return found
    free, total = torch.cuda.mem_get_info()
    found |= {"free_bytes": free, "total_bytes": total, "capability": list(torch.cuda.get_device_capability())}
    if smi := shutil.which("nvidia-smi"):  # a laptop's power limit explains its speed
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.memory,pcie.link.gen.max,pcie.link.width.max"
        run = subprocess.run([smi, f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
        found["nvidia_smi"] = dict(zip(query.split(","), run.stdout.strip().split("\n")[0].split(", "), strict=False))
    return found


def attention_errors(tiny: bool) -> dict[str, Any]:
    """Compare each kernel for rows of samples, and SDPA on each sample, with float64: values and gradients."""
    device, found = default_device(), []
    kernels = {"flash_attn": attention._flash_attn, "torch.nn.attention.varlen": attention._torch_varlen}
    size = 32 if tiny else 128
    for heads, keys in ((8, 8), (8, 2)) if tiny else ((32, 32), (32, 8)):
        for window in (None, 64):
            given = _random_attention(heads, keys, size, device)
            exact = _attend(None, [each.double() for each in given], window)
            for name, kernel in {"SDPA on each sample": None, **(kernels if device.type == "cuda" else {})}.items():
                one: dict[str, Any] = {"kernel": name, "heads": heads, "key_heads": keys, "window": window}
                try:
                    parts = _attend(kernel, given, window)
                    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(parts, exact, strict=True)]
                    one |= dict(zip(("output", "query", "key", "value"), errors, strict=True))
                except Exception as error:  # a library that is missing, or has no kernel for this GPU
                    one["error"] = f"{type(error).__name__}: {error}"[:300]
                found.append(one)
    return {"lengths": LENGTHS, "head_size": size, "relative_errors": found}


def _random_attention(heads: int, keys: int, size: int, device: torch.device) -> list[torch.Tensor]:
    """Draw query, key, value and the output's gradient, each of shape (1, heads, tokens, head size)."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), size) for count in (heads, keys, keys, heads)]
    return [torch.randn(s, generator=generator, device=device).to(resolve_dtype("bfloat16")) for s in shapes]


def _attend(kernel: Any, given: list[torch.Tensor], window: int | None) -> list[torch.Tensor]:
    """Return output and gradients of query, key and value; a kernel of None is SDPA on each sample."""
    query, key, value = (each.detach().clone().requires_grad_() for each in given[:3])
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=query.device)
    if kernel is None:
        output = attention._by_segment(query, key, value, (ends, ends), None, 0.0, window)
    else:
        parts = (each[0].transpose(0, 1) for each in (query, key, value))
        output = kernel(*parts, (ends, ends, max(LENGTHS), max(LENGTHS)), None, 0.0, window).unsqueeze(0)
    output.backward(given[3].transpose(1, 2))
    return [output.detach(), *(each.grad for each in (query, key, value))]  # type: ignore[list-item]


def rounding_noise(tiny: bool) -> dict[str, Any]:
    """Compare loss and gradients of two layers of true width, packed, padded and with Liger's kernels, with float32."""
    device = default_device()
    dtype = resolve_dtype("auto") if device.type == "cuda" else torch.bfloat16
    config = shape_config("tiny_body" if tiny else "7b", 1000, 999)
    config.text_config.num_hidden_layers = 2
    model = build_random_llava(config, quantization="none", dtype=dtype, device=device, with_tower=False)
    attention.use_flash_varlen(model)
    adapted = add_adapters(model, lora_config(r=16, alpha=16, targets=LINEARS))
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    exact_model = copy.deepcopy(adapted).float()
    make_lean(model.model.language_model)
    packed, padded = _two_batches(device, (60, 20) if tiny else (600, 300, 100))
    exact = train_once(exact_model, padded)
    del exact_model
    runs = {"packed": train_once(adapted, packed), "padded": train_once(adapted, padded)}
    found: dict[str, Any] = {"dtype": str(dtype)}
    try:
        use_liger(model.model.language_model)
        runs["liger"] = train_once(adapted, packed)
    except Exception as error:  # it is not installed, or Triton fails
        found["liger_error"] = f"{type(error).__name__}: {error}"[:300]
    for name, (loss, gradients) in runs.items():
        found[name] = {"loss": abs(loss - exact[0]) / exact[0], "gradients": gradients_apart(gradients, exact[1])}
    for name in runs.keys() & {"padded", "liger"}:
        found[f"{name}_and_packed"] = {
            "loss": abs(runs[name][0] - runs["packed"][0]) / runs["packed"][0],
            "gradients": gradients_apart(runs[name][1], runs["packed"][1]),
        }
    return found


def _two_batches(device: torch.device, lengths: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the same random samples packed in one row and padded to one row each."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(3, 900, (length,), generator=generator) for length in lengths]
    labels = [torch.where(torch.arange(len(sample)) < len(sample) // 2, -100, sample) for sample in samples]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    pad = torch.nn.utils.rnn.pad_sequence
    packed = {
        "input_ids": torch.cat(samples)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    padded = {
        "input_ids": pad(samples, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(sample) for sample in samples], batch_first=True),
    }
    return packed, padded


def answering_speed(tiny: bool) -> dict[str, Any]:
    """Measure answers a second with an image each, in batches and one at a time, from NF4 weights on a GPU."""
    device, cuda = default_device(), torch.cuda.is_available()
    tokenizer = load_tokenizer(DEMO_FOLDER / "llm")
    config = shape_config("tiny_body" if tiny else "7b", len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    dtype = resolve_dtype("auto")
    model = build_random_llava(config, quantization="nf4" if cuda else "none", dtype=dtype, device=device)
    pixels = Pixels(DrawnImages(), image_processor_of(DEMO_FOLDER / "none", config))
    count, tokens = (2, 4) if tiny else (16, 64)
    ids = [config.image_token_index] * image_tokens(config)
    asked = [
        Question([1, *ids, *tokenizer(row.turns[0].text).input_ids[-60:]], (row.row_id,)) for row in draw_rows(count)
    ]

    def answers(questions: list[Question], batch: int, length: int) -> float:
        start = time.perf_counter()
        sampling = Sampling(max_new_tokens=length)
        common: dict[str, Any] = {"tokenizer": tokenizer, "load_pixels": pixels, "sampling": sampling}
        list(generate_answers(model, questions, batch_size=batch, stop=Stop([]), **common))
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    answers(asked[:1], 1, 2)
    batch = min(8, count)
    return {
        "new_tokens": tokens,
        "batch_size": batch,
        "batched": count / answers(asked, batch, tokens),
        "one_at_a_time": 2 / answers(asked[:2], 1, tokens),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def training_steps(settings: BenchmarkSettings) -> dict[str, Any]:
    """Train some steps; `planned_bytes` loses CUDA's context, which torch does not count."""
    found = run_or_full(settings)
    if "planned_bytes" in found:
        context = CUDA_CONTEXT if torch.cuda.is_available() else 0
        found["planned_bytes"] -= context
        for name in ("peak_memory_bytes", "peak_reserved_bytes"):
            if found[name]:
                found[f"planned_over_{name}"] = found["planned_bytes"] / found[name]
    return found
