"""The base folder: one stock bf16 `LlavaForConditionalGeneration`, written once from its parts, tensor by tensor.

Training, merging and stock peft all load this folder. Tensor names are llava-hf's, so that every library that reads
those checkpoints can read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_llava.core.errors import UserError
from lora_llava.core.json_files import read_object, read_object_if_any
from lora_llava.core.storage import cache_folder, make_entry
from lora_llava.model.adapters import NEWLINE
from lora_llava.model.families.language_families import read_text_config
from lora_llava.model.families.llava_kinds import llava_class
from lora_llava.model.families.tower_families import (
    FEATURE_LAYER,
    TOWERS,
    image_processor_of,
    image_tokens,
    read_vision_config,
    tiling_of,
    tower_of,
)
from lora_llava.model.tokenizer import Vocabulary, appended_to, copy_sentencepiece, load_tokenizer, read_vocabulary
from lora_llava.model.weights.names import COMPONENTS, canonical_name
from lora_llava.model.weights.original_projector import identity_layer, read_projector
from lora_llava.model.weights.parts import Part
from lora_llava.model.weights.streaming import build_empty
from lora_llava.model.weights.tensor_files import LazyTensor, lazy_tensors, write_checkpoint

_FORMAT = 2
"""Version of the folder's format; raise it when the same parts would be written differently."""
_LANGUAGE, _TOWER = COMPONENTS["llm"], COMPONENTS["vision_tower"]


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
        token_rule: From `Vocabulary`: None for the ids of every base of earlier versions.
        extra_rows: Rows of the vocabulary for a recipe's new tokens, beyond those that its padding has.
        grid: Canvases of a LLaVA-1.6, each a height and a width in pixels; empty for a LLaVA-1.5.
    """

    llm: str
    llm_revision: str
    vision_tower: str
    vision_tower_revision: str
    projector_type: str
    projector: str | None
    seed: int
    token_rule: str | None = None
    extra_rows: int = 0
    grid: Sequence[Sequence[int]] = ()

    @property
    def key(self) -> str:
        """Name of the folder in the cache."""
        content = self.as_dict() | {"format": _FORMAT}
        for name in ("llm", "vision_tower"):  # the same files under another name are the same part
            content.pop(name)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]

    def as_dict(self) -> dict[str, Any]:
        """Return the parts as they are recorded: later ones only if they are set, so that older keys stay."""
        later = ("token_rule", "extra_rows", "grid")
        return {name: value for name, value in asdict(self).items() if name not in later or value}


def assembled_config(
    llm: dict[str, Any],
    vision: dict[str, Any],
    projector_type: str,
    vocabulary: Vocabulary | None = None,
    grid: Sequence[Sequence[int]] = (),
) -> LlavaConfig:
    """Return the configuration of the LLaVA made of a language model and a vision tower.

    Args:
        llm: The language model's config.json.
        vision: The tower's config.json, or that of the model of images and text it is a part of.
        projector_type: `mlp2x_gelu`, or `linear`: the same class without activation.
        vocabulary: Ids of the image and pad tokens and the size, from `read_vocabulary`; None is that of a tokenizer
            with as many tokens as the embedding has rows, such as Vicuna's.
        grid: Canvases of a LLaVA-1.6, each a height and a width in pixels; empty for a LLaVA-1.5.

    Returns:
        A `LlavaConfig`, or a `LlavaNextConfig` if there is a grid, whose vocabulary has the image and pad tokens.

    Raises:
        UserError: For a language model or a tower that a stock LLaVA cannot hold.
    """
    text_config = read_text_config(llm, "model.llm")
    vision_config = read_vision_config(vision, "model.vision_tower")
    vocabulary = vocabulary or appended_to(text_config.vocab_size)
    text_config.vocab_size = vocabulary.size
    text_config.pad_token_id = vocabulary.pad_id
    text_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]]
    tiles = {"image_grid_pinpoints": [list(canvas) for canvas in grid]} if grid else {}
    config = (LlavaNextConfig if grid else LlavaConfig)(
        **tiles,
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=vocabulary.image_id,
        projector_hidden_act="gelu" if projector_type == "mlp2x_gelu" else "linear",
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy=TOWERS[vision_config.model_type].strategy,
    )
    config.image_seq_length = image_tokens(config)
    config.architectures = [llava_class(config).__name__]
    config.dtype = torch.bfloat16
    config.pad_token_id = vocabulary.pad_id
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
        vision_tower: Folder of the vision tower.
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
    content = _config_of(llm)
    vocabulary = read_vocabulary(llm.folder, content)
    config = assembled_config(content, _config_of(vision_tower), parts.projector_type, vocabulary, parts.grid)
    config.text_config.vocab_size += parts.extra_rows
    tensors = _all_tensors(config, llm, vision_tower, projector_file, parts)
    write_checkpoint(tensors, folder, torch.bfloat16, "writing the base model")
    config.save_pretrained(folder)
    _generation_config(config, llm.folder).save_pretrained(folder)
    tokenizer = load_tokenizer(llm.folder, config)
    copy_sentencepiece(llm.folder, folder)
    build_processor(tokenizer, config, image_processor_of(vision_tower.folder, config)).save_pretrained(folder)
    (folder / "parts.json").write_text(json.dumps(parts.as_dict(), indent=2) + "\n")


def _config_of(part: Part) -> dict[str, Any]:
    return read_object(part.folder / "config.json")


def _generation_config(config: LlavaConfig, llm: Path) -> GenerationConfig:
    """Return the token ids for generation; all ids at which the language model stops are kept, as Llama 3 has three."""
    text = config.text_config
    stops = read_object_if_any(llm / "generation_config.json").get("eos_token_id")
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id if stops is None else stops,
        pad_token_id=text.pad_token_id,
    )


def _all_tensors(
    config: LlavaConfig, llm: Part, vision_tower: Part, projector_file: Path | None, parts: BaseParts
) -> list[LazyTensor]:
    projector = fresh_projector(config, parts.seed)
    if projector_file is not None:
        published = read_projector(projector_file, parts.projector_type)[0]
        _check_projector(published, projector, projector_file)
        projector |= published  # LLaVA's own file may lack the newline
    expected = {name: tuple(p.shape) for name, p in build_empty(config).named_parameters()}
    return [
        *_fitting(language_tensors(lazy_tensors(llm.folder), config), expected, _LANGUAGE, llm.folder),
        *_fitting(vision_tensors(lazy_tensors(vision_tower.folder)), expected, _TOWER, vision_tower.folder),
        *lazy_projector(projector),
    ]


def _fitting(
    tensors: Iterable[LazyTensor], expected: Mapping[str, tuple[int, ...]], prefixes: tuple[str, ...], folder: Path
) -> list[LazyTensor]:
    """Return the tensors that a stock model has; others, such as buffers of old versions, are left out as it does.

    Raises:
        UserError: If one is missing or has another shape.
    """
    found = list(tensors)
    names = {canonical_name(tensor.name): tensor for tensor in found}
    for name, shape in expected.items():
        if not name.startswith(prefixes):
            continue
        if name not in names:
            raise UserError(f"{folder}: its weights lack {name}; its config.json belongs to another model")
        if names[name].shape != shape:
            raise UserError(
                f"{folder}: {names[name].name} has shape {names[name].shape}, its config.json requires {shape}"
            )
    kept = {*expected, "lm_head.weight"}  # a tied head is not a parameter of its own
    return [tensor for tensor in found if canonical_name(tensor.name) in kept]


def lazy_projector(projector: dict[str, torch.Tensor]) -> list[LazyTensor]:
    """Return a projector's tensors (`linear_1.weight` and so on), and a newline, under llava-hf's names."""
    names = {name: name if name == NEWLINE else f"multi_modal_projector.{name}" for name in projector}
    return [LazyTensor(names[n], tuple(t.shape), lambda t=t: t) for n, t in projector.items()]  # type: ignore[misc]


def language_tensors(tensors: Sequence[LazyTensor], config: LlavaConfig) -> Iterator[LazyTensor]:
    """Yield a language model's tensors under llava-hf's names, with the vocabulary enlarged to that of the config."""
    vocabulary, tied = config.text_config.vocab_size, config.text_config.tie_word_embeddings
    for tensor in tensors:
        name = tensor.name
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):  # a buffer in old checkpoints
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = _padded(tensor, vocabulary)
        yield replace(tensor, name=f"language_model.{name}")
        if tied and name == "model.embed_tokens.weight":
            yield replace(tensor, name="language_model.lm_head.weight")


def _padded(tensor: LazyTensor, vocabulary: int) -> LazyTensor:
    return replace(
        tensor, shape=(vocabulary, *tensor.shape[1:]), load=lambda: pad_vocabulary(tensor.load(), vocabulary)
    )


def vision_tensors(tensors: Sequence[LazyTensor]) -> Iterator[LazyTensor]:
    """Yield a tower's tensors under llava-hf's names, without the text model beside it."""
    for tensor in tensors:
        name = tensor.name
        if name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_")):
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
    """Return a random projector, initialized like `torch.nn.Linear`, and for a LLaVA-1.6 a newline, as in LLaVA."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = config.vision_config.hidden_size, config.text_config.hidden_size

    def layer(index: int, size: int) -> dict[str, torch.Tensor]:
        bound = size**-0.5  # kaiming_uniform with a = sqrt(5) (torch/nn/modules/linear.py, reset_parameters)
        return {
            f"linear_{index}.weight": torch.empty(text, size).uniform_(-bound, bound, generator=generator),
            f"linear_{index}.bias": torch.empty(text).uniform_(-bound, bound, generator=generator),
        }

    second = identity_layer(text) if config.projector_hidden_act == "linear" else layer(2, text)
    projector = layer(1, vision) | second
    if tiling_of(config) is not None:  # llava/model/llava_arch.py, initialize_vision_modules
        projector[NEWLINE] = torch.randn(text, generator=generator) * text**-0.5
    return projector


def _check_projector(projector: Mapping[str, torch.Tensor], fresh: Mapping[str, torch.Tensor], file: Path) -> None:
    """Refuse a published projector that is not of this base's kind and shape."""
    if NEWLINE in projector and NEWLINE not in fresh:
        raise UserError(f"{file} has {NEWLINE}: it is a LLaVA-1.6's; set model.high_resolution, or name a LLaVA-1.5's")
    for name, tensor in projector.items():
        if tensor.shape != fresh[name].shape:
            raise UserError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, this LLM and tower need {tuple(fresh[name].shape)}; "
                "use the projector that was trained for them"
            )


def build_processor(
    tokenizer: PreTrainedTokenizerBase, config: LlavaConfig, image_processor: Any, chat_template: str | None = None
) -> Any:
    """Return the stock processor, which turns messages and images into model inputs."""
    processor_class = LlavaProcessor if tiling_of(config) is None else LlavaNextProcessor
    return processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=tower_of(config).class_tokens,
        chat_template=chat_template,
    )
