"""The base folder: one stock bf16 `LlavaForConditionalGeneration`, written once from its parts, tensor by tensor.

Training, merging and stock peft all load this folder. Tensor names are llava-hf's, so that every library that reads
those checkpoints can read it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from lora_llava.core.errors import UserError
from lora_llava.core.storage import make_entry
from lora_llava.model.tokenizer import copy_sentencepiece, load_tokenizer
from lora_llava.model.weights.original_projector import identity_layer, read_projector
from lora_llava.model.weights.parts import Part
from lora_llava.model.weights.tensor_files import LazyTensor, lazy_tensors, write_checkpoint

VOCABULARY_MULTIPLE = 64
"""llava-hf pads Vicuna's 32,002 tokens to 32,064, the next multiple."""
_FORMAT = 2
"""Version of the folder's format; raise it when the same parts would be written differently."""


@dataclass(frozen=True)
class BaseParts:
    """The parts of a base folder; equal parts give the same folder.

    Attributes:
        llm: Name of the language model.
        llm_revision: Its commit, or a hash of its contents.
        vision_tower: Name of the vision tower.
        vision_tower_revision: Its commit, or a hash of its contents.
        projector_type: `mlp2x_gelu` or `linear`.
        projector: SHA-256 of the published projector, or None for a fresh one.
        seed: Seed of a fresh projector.
        extra_rows: Rows of the vocabulary for a recipe's new tokens, beyond those that its padding has.
    """

    llm: str
    llm_revision: str
    vision_tower: str
    vision_tower_revision: str
    projector_type: str
    projector: str | None
    seed: int
    extra_rows: int = 0

    @property
    def key(self) -> str:
        """Name of the folder in the cache."""
        content = asdict(self) | {"format": _FORMAT}
        for name in ("llm", "vision_tower"):  # the same files under another name are the same part
            content.pop(name)
        if not self.extra_rows:  # the key of folders that were written before
            content.pop("extra_rows")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def cache_folder() -> Path:
    """Return the folder of base folders and demo data: `LORA_LLAVA_CACHE`, or `~/.cache/lora_llava`."""
    return Path(os.environ.get("LORA_LLAVA_CACHE") or Path.home() / ".cache" / "lora_llava").expanduser()


def assembled_config(
    llm: dict[str, Any], vision: dict[str, Any], projector_type: str, new_tokens: int = 0
) -> LlavaConfig:
    """Return the configuration of the LLaVA made of a language model and a vision tower.

    Args:
        llm: The language model's config.json.
        vision: The tower's config.json: CLIP's, or its vision part.
        projector_type: `mlp2x_gelu`, or `linear`: the same class without activation.
        new_tokens: Number of further tokens.

    Returns:
        A config whose vocabulary has the image and pad tokens and the new ones, and is a multiple of 64.

    Raises:
        UserError: For a language model that is not a Llama, or a tower that is not a CLIP.
    """
    if llm.get("model_type") != "llama":
        raise UserError(f"model.llm is a {llm.get('model_type')!r} model; only Llama's architecture is supported")
    vision = vision.get("vision_config", vision)
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(f"model.vision_tower is a {vision.get('model_type')!r} model; only CLIP's is supported")
    text_config = LlamaConfig(**llm)
    vision_config = CLIPVisionConfig(**vision)
    image_id = text_config.vocab_size
    text_config.vocab_size = -(-(image_id + 2 + new_tokens) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    text_config.pad_token_id = image_id + 1
    text_config.architectures = ["LlamaForCausalLM"]
    config = LlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=image_id,
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        projector_hidden_act="gelu" if projector_type == "mlp2x_gelu" else "linear",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = torch.bfloat16
    config.pad_token_id = image_id + 1
    return config


def build_base(
    parts: BaseParts,
    llm: Part,
    vision_tower: Part,
    projector_file: Path | None,
) -> Path:
    """Write the base folder unless the cache has a complete one.

    Args:
        parts: The parts, which name the folder.
        llm: Folder of the language model.
        vision_tower: Folder of the CLIP vision tower.
        projector_file: LLaVA's `mm_projector.bin`, or None for a fresh projector.

    Returns:
        The folder.

    Raises:
        UserError: If a part does not fit.
    """
    folder = cache_folder() / "bases" / parts.key
    make_entry(folder, lambda temporary: _write_base(temporary, parts, llm, vision_tower, projector_file))
    return folder


def _write_base(folder: Path, parts: BaseParts, llm: Part, vision_tower: Part, projector_file: Path | None) -> None:
    config = assembled_config(_config_of(llm), _config_of(vision_tower), parts.projector_type)
    config.text_config.vocab_size += parts.extra_rows
    tensors = _all_tensors(config, llm, vision_tower, projector_file, parts)
    write_checkpoint(tensors, folder, torch.bfloat16, "writing the base model")
    config.save_pretrained(folder)
    _generation_config(config).save_pretrained(folder)
    tokenizer = load_tokenizer(llm.folder, config)
    copy_sentencepiece(llm.folder, folder)
    build_processor(tokenizer, config, image_processor_of(vision_tower.folder, config)).save_pretrained(folder)
    (folder / "parts.json").write_text(json.dumps(asdict(parts), indent=2) + "\n")


def _config_of(part: Part) -> dict[str, Any]:
    return dict(json.loads((part.folder / "config.json").read_text()))


def _generation_config(config: LlavaConfig) -> GenerationConfig:
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )


def _all_tensors(
    config: LlavaConfig, llm: Part, vision_tower: Part, projector_file: Path | None, parts: BaseParts
) -> list[LazyTensor]:
    projector = (
        fresh_projector(config, parts.seed)
        if projector_file is None
        else read_projector(projector_file, parts.projector_type)[0]
    )
    _check_projector(projector, config, projector_file)
    return [
        *language_tensors(lazy_tensors(llm.folder), config),
        *vision_tensors(lazy_tensors(vision_tower.folder)),
        *lazy_projector(projector),
    ]


def lazy_projector(projector: dict[str, torch.Tensor]) -> list[LazyTensor]:
    """Return a projector's tensors (`linear_1.weight` and so on) under llava-hf's names."""
    return [LazyTensor(f"multi_modal_projector.{n}", tuple(t.shape), lambda t=t: t) for n, t in projector.items()]  # type: ignore[misc]


def language_tensors(tensors: Sequence[LazyTensor], config: LlavaConfig) -> Iterator[LazyTensor]:
    """Yield a Llama's tensors under llava-hf's names, with the vocabulary enlarged to that of the config."""
    vocabulary = config.text_config.vocab_size
    for tensor in tensors:
        name = tensor.name
        if name.endswith("rotary_emb.inv_freq"):  # a buffer in old checkpoints
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = _padded(tensor, vocabulary)
        yield replace(tensor, name=f"language_model.{name}")
        if config.text_config.tie_word_embeddings and name == "model.embed_tokens.weight":
            yield replace(tensor, name="language_model.lm_head.weight")


def _padded(tensor: LazyTensor, vocabulary: int) -> LazyTensor:
    return replace(
        tensor, shape=(vocabulary, *tensor.shape[1:]), load=lambda: pad_vocabulary(tensor.load(), vocabulary)
    )


def vision_tensors(tensors: Sequence[LazyTensor]) -> Iterator[LazyTensor]:
    """Yield a CLIP's tensors under llava-hf's names, without its text model."""
    for tensor in tensors:
        name = tensor.name
        if name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale")):
            continue
        if not name.endswith("position_ids"):
            yield replace(tensor, name=f"vision_tower.vision_model.{name.removeprefix('vision_model.')}")


def pad_vocabulary(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Enlarge an embedding or output matrix with rows that are the mean of the old ones.

    Args:
        matrix: Shape (old vocabulary, hidden).
        size: New vocabulary.

    Returns:
        The matrix of shape (size, hidden), with the old rows unchanged.
    """
    mean = matrix.float().mean(dim=0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(size - matrix.shape[0], -1)])


def fresh_projector(config: LlavaConfig, seed: int) -> dict[str, torch.Tensor]:
    """Return a random projector, initialized like `torch.nn.Linear`, as in LLaVA."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = config.vision_config.hidden_size, config.text_config.hidden_size

    def layer(index: int, size: int) -> dict[str, torch.Tensor]:
        bound = size**-0.5  # kaiming_uniform with a = sqrt(5) (torch/nn/modules/linear.py, reset_parameters)
        return {
            f"linear_{index}.weight": torch.empty(text, size).uniform_(-bound, bound, generator=generator),
            f"linear_{index}.bias": torch.empty(text).uniform_(-bound, bound, generator=generator),
        }

    second = identity_layer(text) if config.projector_hidden_act == "linear" else layer(2, text)
    return layer(1, vision) | second


def _check_projector(projector: dict[str, torch.Tensor], config: LlavaConfig, file: Path | None) -> None:
    expected = {name: tensor.shape for name, tensor in fresh_projector(config, 0).items()}
    for name, shape in expected.items():
        if projector[name].shape != shape:
            raise UserError(
                f"{file}: {name} has shape {tuple(projector[name].shape)}, this LLM and tower need {tuple(shape)}; "
                "use the projector that was trained for them"
            )


def image_processor_of(folder: Path, config: LlavaConfig, aspect: str = "pad") -> Any:
    """Return CLIP's image processor on PIL, as CLIP and LLaVA used it, whatever else is installed.

    Args:
        folder: The vision tower's folder, or a base folder; its preprocessor_config.json is read if there is one.
        config: The LLaVA's configuration, with the image size.
        aspect: `pad` pads images to a square with CLIP's mean colour; `crop` crops the centre.

    Returns:
        A stock image processor.
    """
    size = config.vision_config.image_size
    settings: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            saved = json.loads((folder / name).read_text())
            saved = saved.get("image_processor", saved)
            settings |= {key: saved[key] for key in ("image_mean", "image_std", "resample") if key in saved}
    if aspect == "crop":
        return CLIPImageProcessorPil(**settings)
    return LlavaImageProcessorPil(do_pad=True, **settings)


def build_processor(
    tokenizer: PreTrainedTokenizerBase, config: LlavaConfig, image_processor: Any, chat_template: str | None = None
) -> LlavaProcessor:
    """Return the stock processor, which turns messages and images into model inputs."""
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's CLS, which the strategy "default" removes
        chat_template=chat_template,
    )
