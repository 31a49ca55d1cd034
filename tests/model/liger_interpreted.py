"""Liger's kernels in Triton's CPU interpreter beside the lean path; prints one JSON with the differences.

    TRITON_INTERPRET=1 python -m tests.model.liger_interpreted FOLDER

FOLDER gets tiny models of every family. Three faults of the interpreter are patched: it passes floats to kernels as
they are, on which `.to` fails; libdevice's `rsqrt` has no body there; and it truncates to bfloat16, with whose bits it
computes as integers.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from torch import nn
from transformers import AutoModelForCausalLM
from triton.runtime import interpreter

from lora_llava.model.fast_path import liger as fast_liger
from lora_llava.model.fast_path.lean import make_lean
from lora_llava.model.fast_path.liger import NORMS, LigerFunctions, load_liger, use_liger
from lora_llava.model.start import prepare_base
from lora_llava.training.kernel_check import check_kernels
from tests.model.small_families import ALL, make_llm, make_tower, section
from tests.model.test_families import adapted, rows
from tests.model.test_lean import language_model


def patch_interpreter() -> None:
    """Wrap floats as other numbers are, give `rsqrt` a body, and compute in bfloat16 as a GPU does."""
    convert, convert_float = interpreter._implicit_cvt, interpreter._convert_float
    binary = interpreter.InterpreterBuilder.binary_op

    def with_floats(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return convert(value)

    def rounding(data: Any, given: Any, wanted: Any, mode: Any) -> Any:
        return (
            to_bits(data) if (given, wanted) == (tl.float32, tl.bfloat16) else convert_float(data, given, wanted, mode)
        )

    def in_float32(builder: Any, left: Any, right: Any, operation: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary(builder, left, right, operation)
        found = operation(*(from_bits(each.data) for each in (left, right)))
        return interpreter.TensorHandle(to_bits(found), tl.bfloat16)

    interpreter._implicit_cvt = with_floats
    interpreter._convert_float = rounding
    interpreter.InterpreterBuilder.binary_op = in_float32
    rms_norm.rsqrt = lambda number: tl.rsqrt(number)  # looked up late: the interpreter replaces it in a launch


def from_bits(bits: Any) -> Any:
    """Return the float32 values of bfloat16 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values: Any) -> Any:
    """Round float32 values to the nearest bfloat16 numbers."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()


def errors(stock: Any, liger: Any, inputs: list[torch.Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Run both ways, and stock operators in float64; return the largest relative errors of values and gradients."""
    runs = {}
    for name, function, kind in (("exact", stock, torch.float64), ("stock", stock, dtype), ("liger", liger, dtype)):
        given = [tensor.to(dtype).to(kind).clone().requires_grad_() for tensor in inputs]
        found = function(*(tensor.clone() for tensor in given))  # a copy, as the rotation is in place
        outputs = found if isinstance(found, tuple) else (found,)
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(out.shape, generator=generator).to(dtype).to(kind) for out in outputs]
        torch.autograd.backward(outputs, weights)
        runs[name] = [tensor.detach().double() for tensor in (*outputs, *(tensor.grad for tensor in given))]

    def worst(name: str) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(runs[name], runs["exact"], strict=True))

    return {"stock": worst("stock"), "liger": worst("liger")}


def norm_of(name: str, size: int, dtype: torch.dtype) -> Any:
    """A frozen norm of a class of transformers, with weights that are not 1."""
    family = name.removesuffix("RMSNorm").lower()
    module = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(size)
    generator = torch.Generator().manual_seed(2)
    module.weight.data.add_(0.3 * torch.randn(size, generator=generator))
    return module.to(dtype).requires_grad_(False)


def kernels() -> dict[str, Any]:
    """The errors of each kernel, by kernel, shape and dtype."""
    liger, found = load_liger(), {}
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for dtype in (torch.float32, torch.bfloat16):
        for name in ("LlamaRMSNorm", "Gemma3RMSNorm"):
            formula = NORMS[name]
            stock = norm_of(name, 100, dtype)
            epsilon = getattr(stock, formula.epsilon)

            def run(x: Any, stock: Any = stock, e: float = epsilon, f: Any = formula) -> Any:
                if x.dtype != torch.float64:  # the stock norm would compute in float32
                    return stock(x)
                return x * (x.square().mean(-1, keepdim=True) + e).rsqrt() * (f.offset + stock.weight.double())

            def own(x: Any, w: Any = stock.weight, e: float = epsilon, f: Any = formula) -> Any:
                return liger.norm(x, w, e, f.offset, f.casting, False)

            found[f"{name} {dtype}"] = errors(run, own, [draw(2, 4, 100)], dtype)
        swiglu: Callable[..., Any] = lambda gate, up: nn.functional.silu(gate) * up  # noqa: E731
        found[f"swiglu {dtype}"] = errors(swiglu, liger.swiglu, [draw(2, 4, 100), draw(2, 4, 100)], dtype)
        found |= {f"rope {heads} {dtype}": value for heads, value in rotations(liger.rope, draw, dtype).items()}
    return found


def rotations(rope: Any, draw: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The errors of the rotation: as many key heads, fewer, and heads of which a part rotates."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as whole
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as part

    found = {}
    for queries, keys, size, rotated in ((4, 4, 16, 16), (6, 2, 12, 12), (4, 2, 16, 8)):
        angles = torch.arange(9.0)[None, :, None] * torch.logspace(0, -3, rotated // 2)
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        stock = whole if rotated == size else part

        def run(q: Any, k: Any, cos: Any = cos, sin: Any = sin, stock: Any = stock) -> Any:
            return stock(q, k, cos.to(q.dtype), sin.to(q.dtype))

        inputs = [draw(1, 9, heads, size).transpose(1, 2) for heads in (queries, keys)]
        found[f"{queries}/{keys} of {size}"] = errors(run, lambda q, k, c=cos, s=sin: rope(q, k, c, s), inputs, dtype)
    return found


def gradients(model: Any, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of a forward and backward pass; dropout draws the same numbers every time."""
    torch.manual_seed(1)
    inputs = states.clone().requires_grad_()
    output = model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))  # the norms fix the mean square
    (output * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert inputs.grad is not None
    return found | {"output": output.detach(), "inputs": inputs.grad}


def largest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    scale = max(float(tensor.norm()) for name, tensor in expected.items() if name != "output")
    return max(
        float((found[name] - tensor).norm() / (max(float(tensor.norm()), 1e-3 * scale) or 1))
        for name, tensor in expected.items()
    )


def families(folder: Path) -> dict[str, Any]:
    """Changed modules and the largest difference of every family, and both after the kernels are taken out again."""
    found = {}
    for family in [*ALL, "olmo2"]:
        path = make_llm(folder / family, family)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False).model
        make_lean(model)
        states = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
        stock = gradients(model, states)
        modules = use_liger(model)
        kinds = sorted({type(module).__name__ for module, _ in modules.before})
        different = gradients(model, states)
        modules.restore()
        again = gradients(model, states)
        found[family] = {
            "classes": kinds,
            "difference": largest(different, stock),
            "used": any(not torch.equal(different[name], stock[name]) for name in stock),
            "restored": all(torch.equal(again[name], stock[name]) for name in stock),
        }
    return found


def adapters() -> dict[str, float]:
    """The largest difference of a Llama with adapters, whose layers are recomputed or not."""
    found = {}
    for name, lora in {"dropout": {"lora_dropout": 0.3}, "dora": {"use_dora": True}}.items():
        for recomputed in (False, True):
            model = language_model(dtype=torch.float32, **lora)
            make_lean(model)
            if recomputed:
                model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            states = torch.randn(1, 11, 128, generator=torch.Generator().manual_seed(0))
            expected = gradients(model, states)
            assert any("lora_A" in key for key in expected)
            use_liger(model)
            found[f"{name}, {'recomputed' if recomputed else 'kept'}"] = largest(gradients(model, states), expected)
    return found


def at_the_start(folder: Path) -> dict[str, str]:
    """The lines of the check at the start: as it is, with a wrong kernel, and with one that fails."""
    found = {}
    liger = load_liger()

    def wrong(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return 1.1 * liger.swiglu(gate, up)

    def failing(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C compiler\nat all")

    base = prepare_base(section(folder / "llama", make_tower(folder / "clip", "clip")), 0)
    for name, swiglu in {"right": liger.swiglu, "wrong": wrong, "failing": failing}.items():
        load_liger.cache_clear()
        fast_liger.load_liger = lambda swiglu=swiglu: LigerFunctions(liger.norm, swiglu, liger.rope)
        model = adapted(base.folder, fast=True)
        before = [module.forward for module in model.modules()]
        found[name] = check_kernels(model, rows(model.config)[0])
        changed = sum(module.forward != old for module, old in zip(model.modules(), before, strict=True))
        assert all(parameter.grad is None for parameter in model.parameters())
        found[f"{name}, changed"] = str(changed)
    return found


def needed_again() -> dict[str, str]:
    """What autograd says if a backward pass needs a tensor that a kernel has written into."""
    liger = load_liger()
    first, second = (torch.randn(1, 2, 4, 8, requires_grad=True) * 1 for _ in range(2))
    squares = first.square().sum()  # its backward pass comes last
    cos = sin = torch.ones(1, 4, 8)
    activated = liger.swiglu(first, second)
    found = {"swiglu": said((squares + activated.sum()).backward)}
    first, second = (torch.randn(1, 2, 4, 8, requires_grad=True) * 1 for _ in range(2))
    squares = first.square().sum()
    rotated, _ = liger.rope(first, second, cos, sin)
    return found | {"rope": said((squares + rotated.sum()).backward)}


def said(backward: Callable[[], None]) -> str:
    try:
        backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def main() -> None:
    patch_interpreter()
    folder = Path(sys.argv[1])
    result: dict[str, Any] = {
        "kernels": kernels(),
        "again": needed_again(),
        "adapters": adapters(),
        "families": families(folder),
    }
    result["check"] = at_the_start(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
