"""Find what was meant by a key that a recipe does not have, or by a value of the wrong kind."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

OTHER_NAMES = {
    "lora.r": "rank lora_r lora_rank lora_dim",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.rslora": "use_rslora",
    "lora.dora": "use_dora",
    "lora.targets": "target_modules lora_target lora_targets lora_target_modules target_layers",
    "lora.init": "init_lora_weights",
    "lora.modules_to_save": "additional_target",
    "lora": "peft peft_config lora_config lora_enable adapter adapters",
    "model": "models",
    "model.llm": "model_name_or_path model_name model_id base_model base language_model",
    "model.vision_tower": "vision_model vision_encoder mm_vision_tower",
    "model.projector_type": "mm_projector_type",
    "model.start_from.projector": "pretrain_mm_mlp_adapter",
    "model.dtype": "torch_dtype bf16 fp16 fp32 precision mixed_precision compute_dtype",
    "model.quantization": "load_in_4bit load_in_8bit bits quantization_bit quantize quant bnb_4bit_quant_type",
    "model.attention": "attn_implementation flash_attn flash_attention flash_attention_2 use_flash_attn",
    "model.high_resolution": "anyres high_res image_grid_pinpoints grid",
    "model.new_tokens": "add_tokens additional_special_tokens",
    "data": "dataset_config",
    "data.path": "dataset datasets data_path dataset_path train_file train_data training_data",
    "data.format": "dataset_format dataset_type data_format",
    "data.image_folder": "image_dir image_path image_root images images_dir media_dir",
    "data.template": "chat_template prompt_template conversation_template conv_version conv_template version",
    "data.system_prompt": "system default_system",
    "data.image_aspect": "image_aspect_ratio",
    "data.max_image_pixels": "image_max_pixels",
    "data.max_length": "model_max_length cutoff_len max_seq_length max_seq_len sequence_len context_length max_tokens",
    "data.max_train_rows": "max_samples max_train_samples",
    "data.validation_rows": "val_size val_rows eval_rows val_set_size validation_size validation_split",
    "data.test_rows": "test_size test_set_size",
    "data.validation_source": "eval_dataset val_dataset eval_file validation_file val_path",
    "data.test_source": "test_dataset test_file test_path",
    "training": "trainer train training_args training_arguments hyperparameters optim_args",
    "training.epochs": "epoch num_epochs num_train_epochs n_epochs",
    "training.max_steps": "steps num_steps train_steps num_train_steps",
    "training.batch_size": "per_device_train_batch_size per_device_batch_size micro_batch_size train_batch_size",
    "training.gradient_accumulation": "gradient_accumulation_steps grad_accum grad_accumulation",
    "training.learning_rate": "lr peak_lr",
    "training.projector_learning_rate": "mm_projector_lr projector_lr",
    "training.loraplus_ratio": "loraplus_lr_ratio lora_plus_ratio",
    "training.weight_decay": "wd decay",
    "training.warmup_ratio": "warmup warmup_steps",
    "training.lr_scheduler": "lr_scheduler_type scheduler schedule",
    "training.optimizer": "optim",
    "training.max_grad_norm": "gradient_clipping grad_clip gradient_clip clip_grad_norm",
    "training.gradient_checkpointing": "activation_checkpointing",
    "training.deterministic": "full_determinism",
    "training.max_tokens_per_row": "packing sample_packing",
    "training.group_by_length": "length_grouping",
    "training.eval_every": "eval_steps evaluation_strategy eval_strategy val_every validate_every val_steps",
    "training.early_stopping": "patience early_stopping_patience early_stopping_threshold min_delta",
    "training.save_every": "save_steps save_strategy checkpoint_every",
    "training.log_every": "logging_steps log_steps logging_every",
    "training.workers": "dataloader_num_workers num_workers preprocessing_num_workers",
    "training.report_to": "wandb tensorboard trackio use_wandb wandb_project logger loggers",
    "evaluation": "eval evaluate metrics",
    "evaluation.batch_size": "per_device_eval_batch_size eval_batch_size",
    "evaluation.max_new_tokens": "max_new_token generation_max_length",
    "output_dir": "output output_path out_dir out save_dir run_dir",
    "seed": "random_seed random_state",
}
"""Names in peft, transformers, TRL, LLaVA, LLaMA-Factory and axolotl, and plain words, by our key."""
_OTHER_VALUES = {
    "nf4": "4 4bit 4-bit int4 fp4 qlora true yes",
    "none": "16 16bit false no off 32 lora",
    "bfloat16": "bf16",
    "float16": "fp16 half",
    "float32": "fp32 float full",
    "flash_varlen": "flash flash_attention_2 flash_attn flash_attn_2 fa2",
    "all-linear": "all all_linear linear",
    "all": "full everything",
}
_TYPO, _ELSEWHERE = 0.85, 0.8
"""Similarity above which a key of the same section is a typing error, and a key of another one is meant; untuned."""
_YES, _NO = ("yes", "y", "on", "true"), ("no", "n", "off", "false", "none", "null", "nil", "")
_WORDS_OF_YAML = ("true", "false", "null")
_LONGEST = 200
"""Longest text for which another value is looked for."""


def suggest_key(schema: type[BaseModel], location: tuple[str, ...], value: Any) -> str:
    """Return a hint at the key that was meant.

    Args:
        schema: The recipe's schema.
        location: Sections and name of the unknown key.
        value: Its value.

    Returns:
        A text such as ` (did you mean "training.epochs"?)`; empty if no known key is similar.
    """
    *outer, name = location
    name, own = _plain(name), list(section_at(schema, outer).model_fields)
    places = list(_all_keys(schema))
    known = [key for key, names in OTHER_NAMES.items() if name in names.split() and tuple(key.split(".")) in places]
    exact = _shallowest([key for key in places if key[-1] == name])
    if near := difflib.get_close_matches(name, own, 1, _TYPO):
        found = near
    elif known:
        found = [key.partition(".")[0] if isinstance(value, Mapping) else key for key in known]
    elif exact:
        found = exact
    elif near := difflib.get_close_matches(name, own, 1):
        found = near
    else:
        close = difflib.get_close_matches(name, [key[-1] for key in places], 1, _ELSEWHERE)
        found = _shallowest([key for key in places if key[-1:] == tuple(close)])
    return f" (did you mean {' or '.join(json.dumps(key) for key in found[:3])}?)" if found else ""


def _plain(name: str) -> str:
    """Return a name as keys are written: `Learning-Rate` and `learningRate` are `learning_rate`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name.strip().lstrip("-"))
    return re.sub(r"[\s_-]+", "_", name).lower()


def _shallowest(keys: list[tuple[str, ...]]) -> list[str]:
    depth = min(map(len, keys), default=0)
    return [".".join(key) for key in keys if len(key) == depth]


def _all_keys(schema: type[BaseModel], outer: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the keys of a schema with their sections; those of lists of sections are left out."""
    for name, field in schema.model_fields.items():
        yield (*outer, name)
        for section in sections_in(field.annotation, lists=False):
            yield from _all_keys(section, (*outer, name))


def section_at(schema: type[BaseModel], location: list[str] | tuple[str, ...]) -> type[BaseModel]:
    """Return the section at a place; numbers, which name an item of a list, are passed over."""
    for name in location:
        if not name.isdigit():
            schema = next(sections_in(schema.model_fields[name].annotation))
    return schema


def sections_in(annotation: Any, lists: bool = True) -> Iterator[type[BaseModel]]:
    """Yield the sections in a type: itself, or inside a union, an annotation or, if `lists`, a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation) if lists or get_origin(annotation) not in (tuple, list, dict) else ():
        yield from sections_in(inner, lists)


def suggest_value(schema: type[BaseModel], content: Mapping[str, Any], place: tuple[int | str, ...]) -> str:
    """Return a hint at the value that was meant.

    Args:
        schema: The recipe's schema.
        content: The recipe's content.
        place: Of the wrong value, as pydantic gives it: it also names branches of unions.

    Returns:
        A text such as ` (did you mean [wandb]?)`; empty if no similar value is valid.
    """
    path, value = _follow(content, place)
    if isinstance(value, str) and len(value) > _LONGEST:
        return ""
    wrong = _errors_at(schema, content, path)
    names = [str(part) for part in path]
    try:
        field = section_at(schema, names[:-1]).model_fields[names[-1]]
    except (KeyError, StopIteration, IndexError):
        return ""
    for other in _candidates(value, field.annotation):
        if wrong and not _errors_at(schema, _replaced(content, path, other), path):
            return f" (did you mean {write_value(other)}?)"
    return ""


def _follow(content: Any, place: tuple[int | str, ...]) -> tuple[list[int | str], Any]:
    """Return the keys and numbers of a place that the content has, and the value there."""
    path: list[int | str] = []
    for part in place:
        is_item = isinstance(content, list | tuple) and isinstance(part, int) and part < len(content)
        if is_item or (isinstance(content, Mapping) and part in content):
            path.append(part)
            content = content[part]  # type: ignore[index]
    return path, content


def _replaced(content: Any, path: list[int | str], value: Any) -> Any:
    if not path:
        return value
    copy: Any = dict(content) if isinstance(content, Mapping) else list(content)
    copy[path[0]] = _replaced(content[path[0]], path[1:], value)
    return copy


def _errors_at(schema: type[BaseModel], content: Mapping[str, Any], path: list[int | str]) -> bool:
    """Check whether validation finds an error at a place or below it."""
    try:
        schema.model_validate(content)
    except ValidationError as error:
        return any(list(each["loc"][: len(path)]) == path for each in error.errors(include_url=False))
    return False


def _candidates(value: Any, annotation: Any) -> Iterator[Any]:
    """Yield values of other kinds that a person may have meant, the likeliest first."""
    if isinstance(value, str):
        yield from _from_text(value.strip(), [each for each in _choices(annotation) if isinstance(each, str)])
    elif value is False or value is None:
        yield from (False, None, 0, "off", "none", [])
    elif value is True:
        yield from ("auto", "all", {}, "nf4")
    elif isinstance(value, int | float):
        yield from _from_number(value)
    elif isinstance(value, list) and len(value) == 1:
        yield value[0]
    elif isinstance(value, list):
        yield ",".join(map(str, value))
    if not isinstance(value, Mapping | list):
        for section in sections_in(annotation, lists=False):
            required = [name for name, field in section.model_fields.items() if field.is_required()]
            yield from ([{required[0]: value}] if len(required) == 1 else [])
        if value not in (None, False, ""):
            yield [value]


def _from_number(value: float) -> Iterator[Any]:
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if value <= 0:
        yield from (None, "none")
    yield from (word for word, others in _OTHER_VALUES.items() if str(value) in others.split())
    yield str(value)


def _from_text(text: str, choices: list[str]) -> Iterator[Any]:
    lower = text.lower()
    if lower in _YES:
        yield from (True, "auto", "all", {})
    if lower in _NO:
        yield from (False, None, 0, "off", "none", [])
    for read in _NUMBERS:
        try:
            number = read(lower)
        except (ValueError, OverflowError):
            continue
        yield from (int(number), number) if number.is_integer() else (number,)
    if minutes := re.fullmatch(r"(\d+(?:\.\d+)?) ?(m|mins|minutes?|h|hours?)", lower):
        yield f"{float(minutes[1]) * (60 if minutes[2].startswith('h') else 1):g} min"
    yield from (choice for choice in choices if choice.lower() == lower)
    yield from (word for word, others in _OTHER_VALUES.items() if lower in others.split())
    yield from (choice for choice in choices if lower and choice.startswith(lower))
    yield from difflib.get_close_matches(lower, choices, 1)
    parts = [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
    yield parts
    yield from [None] if lower in ("all", "unlimited", "default") else []
    yield [close[0] if (close := difflib.get_close_matches(part.lower(), choices, 1)) else part for part in parts]


def _percent(text: str) -> float:
    if not text.endswith("%"):
        raise ValueError
    return float(text[:-1]) / 100


_NUMBERS: tuple[Callable[[str], float], ...] = (lambda text: float(text.replace(",", "")), _percent)


def _choices(annotation: Any) -> Iterator[Any]:
    """Yield the values of all literals in a type."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for inner in get_args(annotation):
            yield from _choices(inner)


def write_value(value: Any) -> str:
    """Write a value as it is typed in a recipe or an override."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(write_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {write_value(each)}" for key, each in value.items()) + "}"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value not in _WORDS_OF_YAML
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
