"""Which type each tensor gets, and the conversion of its values: by llama.cpp's own code, not ours."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lora_llava.core.errors import UserError

Quant = Literal["f16", "q8_0", "q4_k_m"]
_FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_k_m": 15}
"""llama.cpp, include/llama.h, `llama_ftype`."""
_KEPT = ("v.position_embd.weight", "v.class_embd", "rope_freqs.weight")


def file_type(quant: Quant) -> int:
    """Return llama.cpp's number of a file's type."""
    return _FILE_TYPES[quant]


def tensor_type(name: str, shape: tuple[int, ...], quant: Quant, layers: int, tied: bool) -> Any:
    """Return the type of a tensor in a file, as `llama-quantize` chooses it.

    Args:
        name: Its name in llama.cpp.
        shape: Its shape, as in torch.
        quant: The file's type.
        layers: Number of layers of the language model.
        tied: Whether the embedding is the head as well.

    Returns:
        A `gguf.GGMLQuantizationType`.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    types = GGMLQuantizationType
    if len(shape) < 2 or name in _KEPT:
        return types.F32
    if quant == "f16" or len(shape) > 2 or name.startswith(("v.", "mm.")):
        return types.F16
    wanted = types.Q8_0 if quant == "q8_0" else _q4_k_m(name, layers, tied)
    is_head = name == "output.weight" or (tied and name == "token_embd.weight")
    if quant == "q4_k_m" and is_head and shape[-1] % 256:
        wanted = types.Q8_0
    if shape[-1] % GGML_QUANT_SIZES[wanted][0]:
        wanted = {types.Q4_K: types.Q5_0, types.Q6_K: types.Q8_0}.get(wanted, types.F16)
    return types.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _q4_k_m(name: str, layers: int, tied: bool) -> Any:
    """Return a matrix's type in Q4_K_M (llama.cpp, src/llama-quant.cpp, `llama_tensor_get_type_impl`)."""
    from gguf import GGMLQuantizationType as Types

    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return Types.Q6_K
    if name.endswith((".attn_v.weight", ".ffn_down.weight")):
        layer = int(name.split(".")[1])
        eighth = layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return Types.Q6_K
    return Types.Q4_K


def stored_bytes(shape: tuple[int, ...], kind: Any) -> int:
    """Return the bytes of a tensor of a `gguf.GGMLQuantizationType`."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def encode_tensor(name: str, tensor: torch.Tensor, kind: Any) -> np.ndarray[Any, Any]:
    """Convert a tensor's values to a type.

    Args:
        name: Its name, for messages.
        tensor: Any float dtype.
        kind: A `gguf.GGMLQuantizationType`.

    Returns:
        float32 or float16 of the tensor's shape, or bytes.

    Raises:
        UserError: If a value is not finite, or too large for float16.
    """
    from gguf import GGMLQuantizationType, quants

    values = tensor.detach().to(torch.float32).contiguous().numpy()
    largest = float(np.abs(values).max(initial=0))
    if not np.isfinite(largest):
        raise UserError(
            f"--format gguf: {name} has values that are not finite; the run diverged, use an earlier checkpoint"
        )
    if kind == GGMLQuantizationType.F32:
        return values
    if kind == GGMLQuantizationType.F16:
        if largest > float(np.finfo(np.float16).max):
            raise UserError(
                f"--format gguf: {name} has a value of {largest:g}, beyond float16's 65504; use --quant q8_0"
            )
        return values.astype(np.float16)
    if kind == GGMLQuantizationType.Q8_0:
        return quants.quantize(values, kind)
    return _quantize_by_library(values, kind)


def _quantize_by_library(values: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    rows, columns = int(np.prod(values.shape[:-1])), values.shape[-1]
    result = np.empty(stored_bytes(values.shape, kind), dtype=np.uint8)
    written = _quantizer()(int(kind), values.ctypes.data, result.ctypes.data, 0, rows, columns, None)
    if written != result.nbytes:
        raise RuntimeError(f"llama.cpp's library wrote {written} bytes of {result.nbytes}")
    return result


def check_quantizer(quant: Quant, output: Path) -> None:
    """Check that a type can be written here.

    Raises:
        UserError: If llama.cpp's library is needed and not installed.
    """
    if quant != "q4_k_m":
        return
    if _library() is None:
        raise UserError(
            "--quant q4_k_m needs llama.cpp's library: pip install 'lora_llava[gguf]'; or export --quant f16 and run "
            f"llama-quantize {output}/model-f16.gguf {output}/model-q4_k_m.gguf q4_k_m"
        )
    _quantizer()


@functools.cache
def _library() -> Path | None:
    """Return the file of llama.cpp's library in an installed package."""
    for package, pattern in (("xllamacpp", "xllamacpp*"), ("llama_cpp", "lib/*ggml-base.*")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(folder).glob(pattern)):
                if file.suffix in (".so", ".pyd", ".dylib", ".dll"):
                    return file
    return None


@functools.cache
def _quantizer() -> Any:
    """Return `ggml_quantize_chunk` of llama.cpp's library (ggml/include/ggml.h)."""
    file = _library()
    try:
        function = ctypes.CDLL(str(file)).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise UserError(
            f"--quant q4_k_m: {file} has no ggml_quantize_chunk ({error}); update it: pip install -U xllamacpp"
        ) from None
    function.restype = ctypes.c_size_t
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    return function
