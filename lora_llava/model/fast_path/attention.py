"""`flash_varlen`: attention over packed rows, in which each sample attends to itself only."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_llava.core.device import capability_problem
from lora_llava.core.errors import UserError
from lora_llava.model.families.language_families import attention_problem

IMPLEMENTATION = "varlen"
"""The name under which `flash_varlen` is registered: transformers looks for any name with "flash" on the Hub
(transformers/utils/generic.py, is_flash_attention_requested)."""

BY_SAMPLE = "SDPA on each sample"


def flash_varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    key_segments: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each segment of a row; without `cu_seq_lens_q`, use transformers' SDPA.

    A segment is a sample, a prefix that samples share, or the branch of one of them. A branch reads the keys of its
    prefix and its own: the causal mask is aligned at the end.

    Args:
        module: The attention layer.
        query: Shape (1, heads, tokens, head size).
        key: Shape (1, key heads, tokens, head size).
        value: As `key`.
        attention_mask: Used if `cu_seq_lens_q` is None.
        scaling: Factor of the scores; None is 1 / sqrt(head size).
        dropout: Dropout of the attention weights; 0 in every Llama we train.
        cu_seq_lens_q: Start of each segment and end of the last one, int32, shape (segments + 1,).
        cu_seq_lens_k: The same for the keys that each segment reads; None is `cu_seq_lens_q`.
        max_length_q: Tokens of the longest segment.
        max_length_k: Most keys that a segment reads.
        segment_lengths: Tokens of each segment; None if no prefix is shared.
        key_segments: The segments whose keys are read, in order; None if no prefix is shared.
        sliding_window: Tokens that a token attends to, itself included; None is all before it.
        kwargs: Other arguments of transformers, unused.

    Returns:
        The output of shape (1, tokens, heads, head size), and None for the weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None:
        raise ValueError("flash_varlen does not compute a softcap; use sdpa or eager attention")
    # Tokens first, as most families compute them. Phi-3's queries are heads first, and so would the output be, which is
    # then copied; its values are a slice of one matrix with queries and keys. Autograd would keep all of these.
    query, value = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (query, value))
    if segment_lengths is not None and key_segments is not None:
        key, value = (_read_segments(tensor, segment_lengths, key_segments) for tensor in (key, value))
    else:
        cu_seq_lens_k, max_length_k = cu_seq_lens_q, max_length_q
    assert cu_seq_lens_k is not None
    ends = (cu_seq_lens_q, cu_seq_lens_k)
    longest, most_keys = (
        int(most or torch.diff(each).max()) for most, each in zip((max_length_q, max_length_k), ends, strict=True)
    )
    window = sliding_window if sliding_window is not None and sliding_window < most_keys else None
    compute = choose_kernel(query.device).compute if query.is_cuda and query.dtype != torch.float32 else None
    if compute is None or (window is not None and not _has_windows(compute)):
        return _by_segment(query, key, value, ends, scaling, dropout, window), None
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (tokens, heads, head size)
    return compute(q, k, v, (*ends, longest, most_keys), scaling, dropout, window).unsqueeze(0), None


class Kernel(NamedTuple):
    """How a GPU computes attention.

    Attributes:
        name: The library; `SDPA on each sample` if none of them runs.
        compute: Its function of queries, keys and values, shape (tokens, heads, head size), the ends of the segments'
            queries and keys with the most of each, scaling, dropout and window; None for SDPA.
        problem: Why a faster one is not used; empty if there is no reason to name.
    """

    name: str
    compute: Callable[..., torch.Tensor] | None
    problem: str


@functools.cache
def choose_kernel(device: torch.device) -> Kernel:
    """Choose a GPU's kernel, once in a process: flash_attn, else torch's own, if it computes a tiny row here.

    A library that can be imported may still have no kernel for a GPU that is newer than itself.

    Args:
        device: The GPU.
    """
    problem = capability_problem()
    if problem is not None:
        return Kernel(BY_SAMPLE, None, f"{problem}, which FlashAttention needs")
    problems = []
    for name, compute in (("flash_attn", _flash_attn), ("torch.nn.attention.varlen", _torch_varlen)):
        try:
            _compute_tiny_row(compute, device)
        except ModuleNotFoundError:  # nothing is wrong without it
            continue
        except (ImportError, RuntimeError) as error:  # built for another torch, or no kernel for this GPU
            problems.append(f"{name} does not run here ({' '.join(str(error).split())[:120]})")
        else:
            return Kernel(name, compute, "; ".join(problems))
    return Kernel(BY_SAMPLE, None, "; ".join(problems))


def _compute_tiny_row(compute: Callable[..., torch.Tensor], device: torch.device) -> None:
    """Run a kernel forward and backward on 16 tokens, and wait for its errors."""
    ends = torch.tensor([0, 16], dtype=torch.int32, device=device)
    with torch.inference_mode(False), torch.enable_grad():
        row = torch.zeros(16, 1, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        compute(row, row, row, (ends, ends, 16, 16), None, 0.0, None).sum().backward()
    torch.cuda.synchronize(device)


def _flash_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[torch.Tensor, torch.Tensor, int, int],
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Call flash_attn, whose causal mask is aligned at the end (its README, changes of 2.1)."""
    from flash_attn import flash_attn_varlen_func

    span = {} if window is None else {"window_size": (window - 1, 0)}
    return flash_attn_varlen_func(  # type: ignore[no-any-return]
        *(q, k, v, *lengths),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **span,
    )


def _torch_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[torch.Tensor, torch.Tensor, int, int],
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Call torch's kernel, which is flash_attn's, without dropout; its backward pass follows torch's determinism."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"is_causal": True}
    if _has_windows(_torch_varlen):
        options = {"window_size": (-1 if window is None else window - 1, 0)}
    if k.shape[1] != q.shape[1]:
        options["enable_gqa"] = True
    output: Any = varlen_attn(q, k, v, *lengths, scale=scaling, **options)
    return output  # type: ignore[no-any-return]


@functools.cache
def _has_windows(compute: Callable[..., torch.Tensor]) -> bool:
    """Check whether a kernel has sliding windows; torch's first one has none."""
    if compute is not _torch_varlen:
        return True
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


def _by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: tuple[torch.Tensor, torch.Tensor],
    scaling: float | None,
    dropout: float,
    window: int | None = None,
) -> torch.Tensor:
    """Run SDPA on each segment: exact, and far cheaper than a dense mask over the row.

    `split`, as its backward pass joins the gradients once; that of a slice fills a tensor of the whole row with zeros.
    """
    if query.is_cuda:  # the kernel for these GPUs has no grouped heads, and the one that has them keeps every score
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    grouped = key.shape[1] != query.shape[1]
    queries, keys = (torch.diff(ends).tolist() for ends in cu_seq_lens)
    parts = []
    for q, k, v in zip(query.split(queries, 2), key.split(keys, 2), value.split(keys, 2), strict=True):
        mask = _band(q.shape[2], k.shape[2], window, query.device)
        part = F.scaled_dot_product_attention(
            *(q, k, v),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask of a segment, bool of shape (queries, keys); None if it is the square causal one.

    The last query reads the last key: SDPA's `is_causal` aligns queries and keys at the start.
    """
    if queries == keys and (window is None or keys <= window):
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries + 1 - window)


def _read_segments(tensor: torch.Tensor, lengths: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    """Return segments of keys or values, of shape (1, heads, tokens, head size), in the order in which they are read.

    `split` and `cat`, as their backward pass adds the gradients of a prefix in a fixed order; an index would add them
    in any order on a GPU.
    """
    segments = tensor.split(list(lengths), dim=2)
    return torch.cat([segments[i] for i in order], dim=2)


def register_flash_varlen() -> None:
    """Register `flash_varlen` with transformers, with SDPA's masks for inputs without `cu_seq_lens_q`."""
    AttentionInterface.register(IMPLEMENTATION, flash_varlen_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def use_flash_varlen(model: Any) -> None:
    """Switch the language model to `flash_varlen`; the tower keeps SDPA.

    Args:
        model: A `LlavaForConditionalGeneration`.
    """
    register_flash_varlen()
    language_model = model.model.language_model
    language_model.set_attn_implementation(IMPLEMENTATION)
    language_model.register_forward_pre_hook(_no_dense_mask, with_kwargs=True)


def _no_dense_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Keep transformers from making an unused mask of tokens x tokens.

    A mask with four dimensions is used as it is (transformers/masking_utils.py, _preprocess_mask_arguments).
    """
    if kwargs.get("cu_seq_lens_q") is not None and kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = kwargs["cu_seq_lens_q"].new_zeros(1, 1, 1, 1)
    return args, kwargs


def resolve_attention(requested: str, dtype: torch.dtype, text: PreTrainedConfig | None = None) -> tuple[bool, str]:
    """Return whether rows are trained without padding on this machine, and a description of the attention.

    Args:
        requested: `auto`, `flash_varlen` or `sdpa`.
        dtype: Compute dtype of the language model.
        text: Configuration of the language model; None is a Llama's.

    Raises:
        UserError: If `flash_varlen` is requested, and the language model cannot run it.
    """
    if requested == "sdpa":
        return False, "sdpa, padded"
    if text is not None and (limit := attention_problem(text)) is not None:
        if requested == "flash_varlen":
            raise UserError(f"model.attention is flash_varlen, but {limit}; set model.attention=sdpa")
        return False, f"sdpa, padded: {limit}"
    kernel = _kernel_here(dtype)
    return True, f"flash_varlen, padding-free, by {kernel.name}" + (f": {kernel.problem}" if kernel.problem else "")


def is_by_sample(dtype: torch.dtype) -> bool:
    """Check whether rows without padding are computed by SDPA on each sample on this machine.

    Args:
        dtype: Compute dtype of the language model.
    """
    return _kernel_here(dtype).compute is None


def _kernel_here(dtype: torch.dtype) -> Kernel:
    if not torch.cuda.is_available():
        return Kernel(BY_SAMPLE, None, "")
    if dtype == torch.float32:
        return Kernel(BY_SAMPLE, None, "FlashAttention does not compute in float32")
    return choose_kernel(torch.device("cuda", torch.cuda.current_device()))
