"""Settings made before the libraries are imported: quiet logging, the CUDA allocator and the heap."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

from lora_llava.core.heap import return_large_blocks

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Settings of torch's CUDA allocator. torch reads the first one that is set (c10/cuda/CUDAAllocatorConfig.h)."""


def quieten() -> None:
    """Silence the libraries' progress bars and warnings, so that only our own lines are printed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # read by tqdm when it is imported; only the first rank shows bars
    if sys.platform != "win32" and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"  # rows differ in length: less fragmentation
    return_large_blocks()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|trl")
    for name in ("bitsandbytes", "transformers", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()


def has_expandable_segments() -> bool:
    """Check whether torch's CUDA allocator has expandable segments, which Windows does not support."""
    settings = next((os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ), "").replace(" ", "")
    values = re.findall(r"(?:^|,)expandable_segments:(\w+)", settings)
    native = not re.search(r"(?:^|,)backend:(?!native)", settings)
    return sys.platform != "win32" and native and values[-1:] == ["True"]
