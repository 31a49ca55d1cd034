"""The model to export: a merged folder, or a run, which is merged while it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.core.json_files import read_object
from lora_llava.model.families.language_families import build_config
from lora_llava.model.families.llava_kinds import TILED
from lora_llava.model.families.tower_families import saved_image_settings
from lora_llava.model.weights.names import canonical_name
from lora_llava.model.weights.tensor_files import LazyTensor, lazy_tensors, weight_files
from lora_llava.publishing.merge_source import check_complete, read_source
from lora_llava.publishing.merged_weights import merged_tensors

SENTENCEPIECE = "tokenizer.model"


@dataclass(frozen=True)
class GgufSource:
    """A complete LLaVA to be written as GGUF.

    Attributes:
        folder: The folder with tokenizer, processor and chat template.
        sentencepiece: Its `tokenizer.model`; None if it has none.
        config: Its config.
        tensors: Its weights by their names in transformers 5.
    """

    folder: Path
    sentencepiece: Path | None
    config: LlavaConfig
    tensors: dict[str, LazyTensor]


def read_gguf_source(folder: Path) -> GgufSource:
    """Read a merged folder, a complete stock LLaVA, or a run.

    A run's weights are merged in float32 while they are read, as `merge --dtype float32` would.

    Raises:
        UserError: If the folder is none of them, or the run cannot be merged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a run directory or the output of lora-llava merge")
    if (folder / "adapter_config.json").is_file():
        return _from_run(folder)
    if (folder / "base" / "config.json").is_file() and (folder / "adapter").is_dir():
        raise UserError(f"{folder} has base and adapter apart; merge the run without --projector-only, or name the run")
    if not (folder / "config.json").is_file() or not weight_files([file.name for file in folder.iterdir()]):
        raise UserError(f"{folder} has no adapter and no model; name a run directory or the output of lora-llava merge")
    content = read_object(folder / "config.json")
    _refuse_tiles(folder, str(content.get("model_type")))
    config: LlavaConfig = build_config(LlavaConfig, content, f"{folder}/config.json")
    model, tensors = folder / SENTENCEPIECE, lazy_tensors(folder)
    check_complete(folder, config, tensors)
    by_name = {canonical_name(tensor.name): tensor for tensor in tensors}
    return GgufSource(folder, model if model.is_file() else None, config, by_name)


def _from_run(run: Path) -> GgufSource:
    source = read_source(run)
    _refuse_tiles(run, source.config.model_type)
    if source.record.get("needs_base") == "nf4":
        raise UserError(f"{run} started with lora.init loftq; merge it first with --base nf4, and export that folder")
    tensors = merged_tensors(source.tensors, source.adapter, dtype=torch.float32, nf4_from=source.dtype)
    found = next((folder / SENTENCEPIECE for folder in (run, source.base) if (folder / SENTENCEPIECE).is_file()), None)
    return GgufSource(run, found, source.config, {canonical_name(tensor.name): tensor for tensor in tensors})


def _refuse_tiles(folder: Path, kind: str) -> None:
    """Refuse a model of another kind, among them LLaVA-1.6.

    llama.cpp (tools/mtmd, build 11549) loads `v.image_newline` for an MLP projector but does not use it, keeps the
    padding, and gives an image within the size of a tile no tiles.
    """
    if kind == TILED:
        raise UserError(
            f"{folder} is a LLaVA-1.6 ({kind}), of which llama.cpp computes other answers: it reads tile after tile, "
            "without image_newline and with the padding; serve the merged folder with vLLM (serving/serve.sh)"
        )
    if kind != "llava":
        raise UserError(f"{folder} is a {kind!r} model; export writes LLaVA models (model_type llava)")


def image_settings(folder: Path) -> dict[str, object]:
    """Return the settings of a folder's image processor.

    Raises:
        UserError: If it has none.
    """
    found = saved_image_settings(folder)
    if found is None:
        raise UserError(f"{folder} has no processor_config.json with an image_processor; restore it")
    return found
