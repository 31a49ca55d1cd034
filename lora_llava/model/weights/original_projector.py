"""Read projectors in LLaVA's original format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

from lora_llava.core.errors import UserError
from lora_llava.core.storage import file_hash, looked_in
from lora_llava.model.adapters import NEWLINE
from lora_llava.model.weights.parts import NETWORK_ERRORS, Download, check_hub_id, not_available
from lora_llava.model.weights.tensor_files import load_bin

PROJECTOR_FILE = "mm_projector.bin"
_FIELD = "start_from.projector"
_NAMES = {
    "linear": {"weight": "linear_1.weight", "bias": "linear_1.bias"},
    "mlp2x_gelu": {
        "0.weight": "linear_1.weight",
        "0.bias": "linear_1.bias",
        "2.weight": "linear_2.weight",
        "2.bias": "linear_2.bias",
    },
}
"""From LLaVA's names (llava/model/multimodal_projector/builder.py) to transformers'."""


def find_projector(name: str, revision: str | None) -> Path:
    """Return the file of a published projector, downloaded if it is a Hub id.

    Args:
        name: `mm_projector.bin`, its folder, or a Hub id that has one.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        UserError: If it is not available.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        return path / PROJECTOR_FILE
    if name.endswith(".bin"):
        raise UserError(f"model.{_FIELD}: {name} is missing{looked_in(name)}")
    check_hub_id(name, _FIELD)
    try:
        return Path(hf_hub_download(name, PROJECTOR_FILE, revision=revision))
    except NETWORK_ERRORS as error:
        raise not_available(name, _FIELD, error) from None


def plan_projector(name: str, revision: str | None) -> Download:
    """Return what `find_projector` would download, without downloading it.

    Raises:
        UserError: If it is not available.
    """
    if Path(name).exists() or name.endswith(".bin"):
        file = find_projector(name, revision)
        load_bin(file)
        return Download(name, 0, True)
    check_hub_id(name, _FIELD)
    if isinstance(try_to_load_from_cache(name, PROJECTOR_FILE, revision=revision), str):
        return Download(name, 0, True)
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except NETWORK_ERRORS as error:
        raise not_available(name, _FIELD, error) from None
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or []}
    if PROJECTOR_FILE not in sizes:
        raise UserError(f"model.{_FIELD}: {name} has no {PROJECTOR_FILE}; name a file, or a Hub id that has one")
    return Download(name, sizes[PROJECTOR_FILE], False)


def read_projector(file: Path, projector_type: str) -> tuple[dict[str, torch.Tensor], str]:
    """Read LLaVA's `mm_projector.bin`.

    Args:
        file: The file; its names may carry prefixes such as `model.mm_projector.`.
        projector_type: `linear` or `mlp2x_gelu`.

    Returns:
        Tensors under transformers' names, with the identity as the second layer of a linear projector, and with
        `image_newline` if the file has it; and the file's SHA-256.

    Raises:
        UserError: If its tensors are not those of the projector type.
    """
    names = _NAMES[projector_type]
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_bin(file).items():
        short = name.split("mm_projector.")[-1]
        if short.rpartition(".")[2] == NEWLINE:
            found[NEWLINE] = tensor
            continue
        if short not in names:
            kind = next((key for key, table in _NAMES.items() if short in table), None)
            fix = f"; it looks like {kind}: set model.projector_type" if kind else ""
            raise UserError(f"{file}: the tensor {name} is not one of a {projector_type} projector{fix}")
        found[names[short]] = tensor
    missing = set(names.values()) - set(found)
    if missing:
        raise UserError(f"{file}: no {sorted(missing)[0]}; it is not a complete {projector_type} projector")
    if projector_type == "linear":
        found |= identity_layer(found["linear_1.weight"].shape[0])
    return found, file_hash(file)


def is_original_config(content: Mapping[str, Any]) -> bool:
    """Check whether a config.json is in LLaVA's original format, by its keys."""
    return "mm_vision_tower" in content and "vision_config" not in content


def projector_names(projector_type: str) -> dict[str, str]:
    """Return transformers' names of a projector's tensors by LLaVA's names after `mm_projector.`."""
    return _NAMES[projector_type]


def identity_layer(size: int) -> dict[str, torch.Tensor]:
    """Return the identity as second layer, with which the stock projector equals LLaVA's linear one exactly."""
    return {"linear_2.weight": torch.eye(size), "linear_2.bias": torch.zeros(size)}
