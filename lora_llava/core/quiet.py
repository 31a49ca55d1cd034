"""Settings made before the libraries are imported: quiet logging, and the CUDA allocator."""

from __future__ import annotations

import logging
import os
import warnings


def quieten() -> None:
    """Silence the libraries' progress bars and warnings, so that only our own lines are printed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # read by tqdm when it is imported; only the first rank shows bars
    os.environ.setdefault(
        "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    )  # rows differ in length: less fragmentation
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|trl")
    for name in ("bitsandbytes", "transformers", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
