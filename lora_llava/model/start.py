"""Plan and prepare the base model of a recipe's model section."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import LlavaConfig

from lora_llava.core.errors import UserError
from lora_llava.core.json_files import read_object_if_any
from lora_llava.core.storage import cache_folder, find_damage, looked_in
from lora_llava.model.adapter_file import check_fits, check_saved, checked_base
from lora_llava.model.adapters import NEWLINE
from lora_llava.model.base import BaseParts, assembled_config, build_base
from lora_llava.model.families.image_counts import grid_of, limit_tiles
from lora_llava.model.families.language_families import check_text_config, read_text_config
from lora_llava.model.families.llava_kinds import TILED, build_llava_config
from lora_llava.model.families.tower_families import (
    canvases_of,
    check_tiling,
    check_vision_config,
    image_tokens,
    read_vision_config,
)
from lora_llava.model.provenance import component_hashes
from lora_llava.model.tokenizer import read_vocabulary
from lora_llava.model.weights import parts as model_parts
from lora_llava.model.weights.names import ADAPTER_FILE, NEWLINE_NAME, canonical_name
from lora_llava.model.weights.original_projector import (
    find_projector,
    is_original_config,
    plan_projector,
    read_projector,
)
from lora_llava.model.weights.parts import Download, load_config, load_part, plan_download
from lora_llava.model.weights.tensor_files import lazy_tensors, weight_files
from lora_llava.recipe.schema import ModelSection

RUN_FILE = "run.json"


@dataclass(frozen=True)
class ModelPlan:
    """What is known of a model before its weights are loaded.

    Attributes:
        config: Configuration of the LLaVA.
        tokenizer_folder: Folder of the tokenizer.
        image_folder: Folder of the preprocessor's settings.
        downloads: Files to download from the Hub.
    """

    config: LlavaConfig
    tokenizer_folder: Path
    image_folder: Path
    downloads: list[Download]


@dataclass(frozen=True)
class Base:
    """A LLaVA ready to load.

    Attributes:
        name: The base folder's path, or a complete LLaVA's folder or Hub id: the adapter's
            `base_model_name_or_path`.
        folder: Folder of its files.
        revision: Commit of a Hub id.
        parts: Parts of an assembled base.
        initial_projector: The Stage 1 projector to start from, float32 tensors by name, with `image_newline` if it has
            one; None for the base's own.
        untrained_newline: Where the projector is from, if the base's newline is random and no run has trained it.
    """

    name: str
    folder: Path
    revision: str | None
    parts: BaseParts | None
    initial_projector: dict[str, torch.Tensor] | None = None
    untrained_newline: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what an adapter records: name, revision, parts, and the hashes of the components."""
        parts = self.parts.as_dict() if self.parts else None
        return {"name": self.name, "revision": self.revision, "parts": parts, "hashes": component_hashes(self.folder)}


def plan_model(section: ModelSection) -> ModelPlan:
    """Read the configs and check what must be downloaded; load and assemble nothing.

    Args:
        section: A recipe's model section; a `stage1_recipe` counts as untrained here.

    Returns:
        The plan; a model's canvases are limited by `max_tiles`.

    Raises:
        UserError: For a part that is missing or does not fit.
    """
    plan = _plan(section)
    limit_tiles(plan.config, section.max_tiles)
    return plan


def _plan(section: ModelSection) -> ModelPlan:
    start = section.start_from
    if start.run is not None:
        base = continued_run(start.run)[1]
        return ModelPlan(_complete_config(load_config(str(base), None, "start_from.run"), str(base)), base, base, [])
    if start.llava is not None:
        downloads = [plan_download(start.llava, start.llava_revision, "start_from.llava")]
        content = load_config(start.llava, start.llava_revision, "start_from.llava")
        if is_original_config(content):
            raise UserError(
                f"model.start_from.llava: {start.llava} is a checkpoint in LLaVA's original format; convert it "
                "with `lora-llava import`, then name the result"
            )
        config = _complete_config(content, start.llava)
        if config.model_type == TILED:
            _check_newline(start.llava)
        folder = _small_files(start.llava, start.llava_revision, "start_from.llava")
        return ModelPlan(config, folder, folder, downloads)
    llm_name, tower_name = section.llm or "", section.vision_tower or ""  # the schema requires both
    downloads = [
        plan_download(llm_name, section.llm_revision, "llm"),
        plan_download(tower_name, section.vision_tower_revision, "vision_tower"),
    ]
    config = _assembled_config(section)
    if start.projector is not None:
        downloads.append(plan_projector(start.projector, start.projector_revision))
    if start.stage1_run is not None:
        read_stage1(start.stage1_run, section, config)
    return ModelPlan(
        config,
        _small_files(llm_name, section.llm_revision, "llm"),
        _small_files(tower_name, section.vision_tower_revision, "vision_tower"),
        [download for download in downloads if not download.cached],
    )


def _complete_config(content: dict[str, Any], name: str) -> LlavaConfig:
    """Return the configuration of a complete LLaVA, checked like one that is assembled."""
    field = f"model.start_from.llava: {name}"
    config = build_llava_config(content, field)
    check_text_config(config.text_config, f"{field}, text_config")
    check_vision_config(config.vision_config, f"{field}, vision_config")
    if config.model_type == TILED:
        check_tiling(config, field)
    config.image_seq_length = image_tokens(config)
    rows = config.text_config.vocab_size
    for key, value in (
        ("image_token_index", config.image_token_index),
        ("pad_token_id", config.text_config.pad_token_id),
    ):
        if value is not None and value >= rows:
            raise UserError(f"{field}: {key} is {value}, and its vocabulary has {rows} rows; restore its config.json")
    return config


def _check_newline(name: str) -> None:
    """Refuse a folder of a LLaVA-1.6 without newline; that of a Hub id is checked when its weights are loaded."""
    folder = model_parts.local_folder(name, "start_from.llava")
    if folder is None or not weight_files([file.name for file in folder.iterdir()]):
        return
    if NEWLINE_NAME not in {canonical_name(tensor.name) for tensor in lazy_tensors(folder)}:
        raise UserError(
            f"model.start_from.llava: {name} lacks image_newline, which a LLaVA-1.6 has; download or write its weights "
            "again"
        )


def _assembled_config(section: ModelSection) -> LlavaConfig:
    llm = load_config(section.llm or "", section.llm_revision, "llm")
    tower = load_config(section.vision_tower or "", section.vision_tower_revision, "vision_tower")
    read_text_config(llm, "model.llm")  # what a model is comes before its tokenizer
    vision = read_vision_config(tower, "model.vision_tower")
    folder = _small_files(section.llm or "", section.llm_revision, "llm")
    vocabulary = read_vocabulary(folder, llm, len(section.new_tokens))
    read_object_if_any(folder / "generation_config.json")  # a damaged one is refused before weights are downloaded
    high = section.high_resolution
    grid = canvases_of(high.grid, vision) if high is not None else ()
    return assembled_config(llm, tower, section.projector_type, vocabulary, grid)


def _extra_rows(section: ModelSection) -> int:
    """Return the rows of the vocabulary that new tokens need beyond those of the padding."""
    if not section.new_tokens:
        return 0
    without = _assembled_config(section.model_copy(update={"new_tokens": ()}))
    return int(_assembled_config(section).text_config.vocab_size - without.text_config.vocab_size)


def _small_files(name: str, revision: str | None, field: str) -> Path:
    """Return the folder of a part's configs and tokenizer; of a Hub id, only those are downloaded."""
    folder = model_parts.local_folder(name, field)
    if folder is not None:
        return folder
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(model_parts.TEXT_FILES)))
    except model_parts.NETWORK_ERRORS as error:
        raise model_parts.not_available(name, field, error) from None


def prepare_base(section: ModelSection, seed: int) -> Base:
    """Download what is missing, and write the base folder if the base is assembled.

    Args:
        section: A recipe's model section, a `stage1_recipe` already replaced by its `stage1_run`.
        seed: Seed of a fresh projector.

    Returns:
        The base.

    Raises:
        UserError: For a part that is missing or does not fit.
    """
    start = section.start_from
    if start.run is not None:
        record, place = continued_run(start.run)
        recorded = record["base"]
        known = BaseParts(**recorded["parts"]) if recorded.get("parts") else None
        name = str(recorded["name"]) if recorded.get("revision") else str(place)
        return Base(name, place, recorded.get("revision"), known)
    if start.llava is not None:
        folder = model_parts.local_folder(start.llava, "start_from.llava")
        if folder is not None:
            return Base(str(folder.resolve()), folder, None, None)
        part = load_part(start.llava, start.llava_revision, "start_from.llava")
        return Base(part.name, part.folder, part.revision, None)
    llm_name, tower_name = section.llm or "", section.vision_tower or ""  # the schema requires both
    config = _assembled_config(section)
    llm = load_part(llm_name, section.llm_revision, "llm")
    tower = load_part(tower_name, section.vision_tower_revision, "vision_tower")
    file = find_projector(start.projector, start.projector_revision) if start.projector else None
    published, digest = read_projector(file, section.projector_type) if file else (None, None)
    rule = read_vocabulary(llm.folder, load_config(llm_name, section.llm_revision, "llm")).token_rule
    parts = BaseParts(
        llm.name,
        llm.revision,
        tower.name,
        tower.revision,
        section.projector_type,
        digest,
        seed,
        token_rule=rule,
        extra_rows=_extra_rows(section),
        grid=grid_of(config),
    )
    initial = None
    if start.stage1_run is not None:
        stage1_parts, initial = read_stage1(start.stage1_run, section, config)
        for name, field in (("llm_revision", "llm"), ("vision_tower_revision", "vision_tower")):
            if getattr(stage1_parts, name) != getattr(parts, name):
                raise UserError(
                    f"model.start_from.stage1_run: {start.stage1_run} was trained on another {field} "
                    f"({getattr(stage1_parts, field)}) than model.{field} ({getattr(parts, field)}); name the same"
                )
        # A base with more rows or canvases than Stage 1's is written here; Stage 1's projector replaces its own anyway.
        grown = parts.extra_rows or parts.grid != [list(canvas) for canvas in stage1_parts.grid]
        own = None if grown else stage1_parts.projector
        parts = replace(parts, seed=stage1_parts.seed, projector=own)
        folder = cache_folder() / "bases" / parts.key
        if parts.projector is not None and (damage := find_damage(folder)) is not None:
            what = f"damaged in {folder} ({damage})" if folder.is_dir() else f"missing in {cache_folder()}"
            raise UserError(f"{start.stage1_run} needs a base that is {what}; run Stage 1 again")
    folder = build_base(parts, llm, tower, file)
    untrained = None
    if parts.grid and NEWLINE not in (initial or published or {}):
        untrained = start.stage1_run or start.projector or "a new projector"
    return Base(str(folder), folder, None, parts, initial, untrained)


def describe_newline(base: Base) -> str:
    """Return a line about a random newline that Stage 2 keeps; empty if there is none."""
    if base.untrained_newline is None:
        return ""
    return (
        f"image_newline is random and stays so, since {base.untrained_newline} has none; Stage 1 with the same "
        "model.high_resolution trains it"
    )


def continued_run(name: str) -> tuple[dict[str, Any], Path]:
    """Read the record of a run to continue, check its adapter, and find its base.

    Args:
        name: The run directory.

    Returns:
        Its `run.json`, and the base's folder.

    Raises:
        UserError: If it is not a finished Stage 2 run, its adapter is damaged, or its base is missing or has changed.
    """
    field, run = "model.start_from.run", Path(name)
    if not run.is_dir():
        raise UserError(f"{field}: the folder {run} does not exist{looked_in(name)}; name a run directory")
    if not (run / RUN_FILE).is_file() or not (run / ADAPTER_FILE).is_file():
        raise UserError(f"{field}: {run} {_not_a_run(run)}")
    try:
        record = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
        stage, _ = record.get("stage"), record["base"]["name"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{field}: {run / RUN_FILE} is damaged; restore it") from None
    if stage == 1:
        raise UserError(f"{field}: {run} is a run of Stage 1; set model.start_from.stage1_run to it")
    try:
        return record, checked_base(record, run)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def _not_a_run(folder: Path) -> str:
    """Return what a folder is that is not a finished run, with the fix."""
    if any((folder / "checkpoints").glob("checkpoint-*")):
        return (
            f"is not finished; finish it with lora-llava finetune {folder / 'recipe.yaml'} --resume, then continue it"
        )
    if (folder / "config.json").is_file():
        return "is a complete model, not a run; set model.start_from.llava to it, for a new adapter on it"
    return f"is not a finished run; it has no {RUN_FILE} with {ADAPTER_FILE}; name a run directory"


def read_stage1(name: str, section: ModelSection, config: LlavaConfig) -> tuple[BaseParts, dict[str, torch.Tensor]]:
    """Read the base's parts and the trained projector of a Stage 1 run.

    Args:
        name: The run directory.
        section: The model section that starts from it.
        config: Configuration of the LLaVA made of the section's parts.

    Returns:
        The parts of its base, and the tensors of projector and newline in float32.

    Raises:
        UserError: If it is not a finished Stage 1 run, has another projector type or other canvases, or a damaged
            adapter.
    """
    field, run, looked = "model.start_from.stage1_run", Path(name), looked_in(name)
    if not (run / RUN_FILE).is_file() or not (run / ADAPTER_FILE).is_file():
        raise UserError(f"{field}: {run} is not a finished run{looked}; train Stage 1 first, or name its recipe")
    content = json.loads((run / RUN_FILE).read_text())
    parts = content["base"]["parts"]
    if content["stage"] != 1 or parts is None:
        raise UserError(f"{field}: {run} is a run of Stage {content['stage']}; name one of Stage 1")
    if parts["projector_type"] != section.projector_type:
        raise UserError(
            f"{field}: {run} trained a {parts['projector_type']} projector, model.projector_type is "
            f"{section.projector_type}; name the same"
        )
    _check_canvases(run, [list(canvas) for canvas in parts.get("grid", ())], config)
    try:
        check_saved(run, content)
        check_fits(run, config, f"of model.llm {section.llm} and model.vision_tower {section.vision_tower}")
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    return BaseParts(**parts), read_run_projector(run)


def _check_canvases(run: Path, trained: list[list[int]], config: LlavaConfig) -> None:
    """Refuse Stage 1 of a LLaVA-1.6 for a LLaVA-1.5, and of other canvases.

    A LLaVA-1.6 may start from the projector of a LLaVA-1.5, as LLaVA's own did; its newline is then the base's.
    """
    own, field = grid_of(config), f"model.start_from.stage1_run: {run}"
    if not trained or trained == own:
        return
    if not own:
        raise UserError(
            f"{field} was trained with model.high_resolution; set model.high_resolution={{grid: {trained}}}"
        )
    raise UserError(
        f"{field} was trained with the canvases {trained}, and model.high_resolution has {own}; name the same grid"
    )


def read_run_projector(run: Path) -> dict[str, torch.Tensor]:
    """Return projector and newline in a run's adapter file, by `linear_1.weight` and so on, in float32."""
    tensors = {}
    with safe_open(run / ADAPTER_FILE, framework="pt") as content:
        for name in content.keys():  # noqa: SIM118 - not a dict
            if "multi_modal_projector." in name:
                tensors[name.split("multi_modal_projector.")[1]] = content.get_tensor(name).float()
            elif name.endswith(f".{NEWLINE}"):
                tensors[NEWLINE] = content.get_tensor(name).float()
    return tensors
