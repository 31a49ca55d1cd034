"""The files of an upload: an allow-list, without local paths or anything that identifies a person."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from lora_llava.core.errors import UserError
from lora_llava.inference.load import load_processor
from lora_llava.model.adapter_file import check_fits, check_saved, checked_base
from lora_llava.model.families.llava_kinds import build_llava_config
from lora_llava.model.families.tower_families import saved_image_settings
from lora_llava.model.provenance import component_hashes
from lora_llava.model.start import RUN_FILE
from lora_llava.model.weights.names import ADAPTER_FILE
from lora_llava.model.weights.parts import load_config
from lora_llava.model.weights.tensor_files import lazy_file, weight_files
from lora_llava.publishing.merge import ADAPTER_FOLDER, BASE_FILE, BASE_FOLDER, PROCESSOR_FILES, REPORT_FILE
from lora_llava.publishing.private_content import scan
from lora_llava.recipe import dump_recipe, load_recipe
from lora_llava.recipe.io import RECIPE_FILE, check_recipe
from lora_llava.runs.check_run import check_run
from lora_llava.runs.directory import METRICS_FILE, is_run, read_record

Kind = Literal["adapter", "model"]
ADAPTER_CONFIG, MODEL_CONFIG, INDEX_FILE = "adapter_config.json", "config.json", "model.safetensors.index.json"
PARTS_FILE = "parts.json"
CARD_FILE, CURVE_FILE, RESULTS_FOLDER = "README.md", "loss_curve.png", ".eval_results"
_COMMIT_LENGTH = 40
_HEADER_LIMIT = 100 * 2**20
"""Limit of a header in the safetensors format."""


@dataclass
class Package:
    """The files of an upload.

    Attributes:
        folder: The folder they come from.
        kind: An adapter, or a complete model.
        files: A file on disk or its bytes, by name in the repository.
        record: Published content of `run.json`, or empty.
        metrics: Published content of `metrics.json`, or empty.
        merge: Published content of `merge_report.json`, or empty.
        recipe: Published content of the recipe, or empty.
        base: Published name of the base: a Hub id, or `assembled`.
        hub_ids: The names that were Hub ids when the run began.
    """

    folder: Path
    kind: Kind
    files: dict[str, Path | bytes]
    record: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    hub_ids: frozenset[str] = frozenset()

    @property
    def class_name(self) -> str:
        """The stock class of the model: that of LLaVA-1.6 if its image processor cuts images into tiles."""
        tiled = "image_grid_pinpoints" in (saved_image_settings(self.folder) or {})
        return "LlavaNextForConditionalGeneration" if tiled else "LlavaForConditionalGeneration"

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def collect(folder: Path, base_repo: str | None = None, base_commit: str | None = None) -> Package:
    """Collect the files to upload from a run or a model folder.

    Args:
        folder: A run directory, a merged folder or a base folder.
        base_repo: Hub id to name as the base in an adapter's config, if its base is a local folder.
        base_commit: Commit of `base_repo`.

    Raises:
        UserError: If the folder is neither, or an adapter's base is a local folder and `base_repo` is missing.
    """
    check_run(folder, "a run or a folder with a model")
    if is_run(folder):
        kind: Kind = "adapter"
    elif (folder / MODEL_CONFIG).is_file() and weight_files([file.name for file in folder.iterdir()]):
        kind = "model"
    elif (folder / BASE_FOLDER).is_dir() and is_run(folder / ADAPTER_FOLDER):
        raise UserError(f"{folder} has a separate base and adapter; push {folder / ADAPTER_FOLDER} with --base-repo")
    else:
        raise UserError(f"{folder} is neither a finished run nor a folder with a model")
    package = Package(folder, kind, {})
    names = [*PROCESSOR_FILES, *((ADAPTER_FILE,) if kind == "adapter" else (MODEL_CONFIG, INDEX_FILE))]
    if kind == "model":
        weights = weight_files([file.name for file in folder.iterdir()])
        if not weights[0].endswith(".safetensors"):
            raise UserError(f"{folder}/{weights[0]} is a pickle; only safetensors are pushed")
        names += weights
    package.files |= {name: folder / name for name in names if (folder / name).is_file()}
    _add_record(package, base_repo, base_commit)
    if kind == "adapter":
        _add_adapter_config(package, base_repo, base_commit)
    return package


def _add_record(package: Package, base_repo: str | None, base_commit: str | None) -> None:
    """Add `run.json`, `metrics.json`, `recipe.yaml` and the merge report without local paths."""
    folder = package.folder
    package.hub_ids = _hub_ids(folder)
    if (folder / RECIPE_FILE).is_file():
        package.recipe = public_recipe(load_recipe(folder / RECIPE_FILE).model_dump(mode="json"), package.hub_ids)
        package.files[RECIPE_FILE] = dump_recipe(check_recipe(package.recipe, RECIPE_FILE)).encode()
    if (folder / PARTS_FILE).is_file():  # an assembled base, without a run
        parts = json.loads((folder / PARTS_FILE).read_text(encoding="utf-8"))
        base = {"name": "assembled", "revision": None, "parts": parts, "hashes": component_hashes(folder)}
        package.record = {"base": public_base(base, package.hub_ids)}
        package.files[BASE_FILE] = _json(package.record)
    for name in (BASE_FILE, RUN_FILE, METRICS_FILE, REPORT_FILE):
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        holder = content.get("model", content)  # metrics.json nests the base one level deeper
        if content.get("stage1"):
            content["stage1"]["data"] = public_name(content["stage1"]["data"], content["stage1"]["hub_ids"])
        if content.get("continues"):
            content["continues"] = public_continued(content["continues"])
        if "base" in holder:
            holder["base"] = public_base(holder["base"], package.hub_ids, base_repo, base_commit)
            package.base = package.base or holder["base"]["name"]
        if majority := (content.get("figures") or {}).get("majority"):
            content["figures"]["majority"] = {"table": majority["table"]}  # without the training data's questions
        setattr(
            package,
            {BASE_FILE: "record", RUN_FILE: "record", METRICS_FILE: "metrics", REPORT_FILE: "merge"}[name],
            content,
        )
        package.files[name] = _json(content)


def _add_adapter_config(package: Package, base_repo: str | None, base_commit: str | None) -> None:
    content = json.loads((package.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if base_repo is None and package.base not in package.hub_ids:
        raise UserError(
            f"{package.folder}: its base {content['base_model_name_or_path']} is a local folder, which others do not "
            "have; push a merged folder (see lora-llava merge), or push the base too with --base-repo"
        )
    content["base_model_name_or_path"] = package.base
    content["revision"] = base_commit if base_repo else content.get("revision")
    package.files[ADAPTER_CONFIG] = _json(content)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _hub_ids(folder: Path) -> frozenset[str]:
    """Return the names that were Hub ids when the run began; from another folder, they look like paths."""
    if (folder / RUN_FILE).is_file():
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        revision = record["base"].get("revision")  # a Hub id's commit
        return frozenset([*record.get("hub_ids", []), *([record["base"]["name"]] if revision else [])])
    if (folder / PARTS_FILE).is_file():
        parts = json.loads((folder / PARTS_FILE).read_text(encoding="utf-8"))
        fields = ("llm", "vision_tower")  # a commit has 40 digits, the hash of a folder 64
        return frozenset(parts[field] for field in fields if len(parts[f"{field}_revision"]) == _COMMIT_LENGTH)
    return frozenset()


def public_name(name: str, hub_ids: Container[str]) -> str:
    """Shorten a model's or data set's path to its last name; a Hub id is returned unchanged."""
    return name if name in hub_ids else PurePath(name.replace("\\", "/")).name


def public_continued(content: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a continued run, and of the run before it, without local paths."""
    name, hub_ids = public_name(content["run"], ()), content.get("hub_ids", ())
    found = content | {"run": name}
    if "rows" in content:  # lines of metrics.json
        found["rows"] = [line.replace(content["run"], name) for line in content["rows"]]
    if "data" in content:
        found["data"] = [public_name(path, hub_ids) for path in content["data"]]
    if stage1 := content.get("stage1"):
        found["stage1"] = stage1 | {"data": public_name(stage1["data"], stage1["hub_ids"])}
    if content.get("continues"):
        found["continues"] = public_continued(content["continues"])
    return found


def is_pushed_file(name: str) -> bool:
    """Check whether a push writes a file of this name."""
    fixed = {*PROCESSOR_FILES, ADAPTER_CONFIG, ADAPTER_FILE, MODEL_CONFIG, INDEX_FILE, BASE_FILE, RUN_FILE, RECIPE_FILE}
    fixed |= {METRICS_FILE, REPORT_FILE, CARD_FILE, CURVE_FILE}
    return name in fixed or bool(weight_files([name])) or name.startswith(f"{RESULTS_FOLDER}/")


def public_base(
    base: Mapping[str, Any], hub_ids: Container[str], base_repo: str | None = None, base_commit: str | None = None
) -> dict[str, Any]:
    """Return the record of an adapter's base without local paths.

    Args:
        base: `base` of `run.json`.
        hub_ids: Names to keep unchanged.
        base_repo: Repository of the base, if it is pushed too.
        base_commit: Its commit there.
    """
    found = dict(base)
    if base_repo is not None:
        found["revision"] = base_commit
    parts = found.get("parts")
    if parts:
        found["parts"] = parts | {field: public_name(parts[field], hub_ids) for field in ("llm", "vision_tower")}
    found["name"] = base_repo or (public_name(found["name"], hub_ids) if not parts else "assembled")
    return found


def public_recipe(content: dict[str, Any], hub_ids: Container[str]) -> dict[str, Any]:
    """Return a recipe's content with local paths shortened to their last name and Hub ids unchanged."""

    def shorten(section: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
        return section | {name: public_name(section[name], hub_ids) for name in fields if section.get(name)}

    start = shorten(content["model"]["start_from"], ("run", "stage1_run", "stage1_recipe", "projector", "llava"))
    model = shorten(content["model"], ("llm", "vision_tower")) | {"start_from": start}
    places = ("path", "image_folder")
    data = shorten(content["data"], places)
    for name in ("validation_source", "test_source"):
        data |= {name: shorten(data[name], places)} if data.get(name) else {}
    if data.get("sources"):
        data["sources"] = [shorten(source, places) for source in data["sources"]]
    return shorten(content, ("output_dir",)) | {"model": model, "data": data}


def check_complete(package: Package) -> None:
    """Check that weights are complete, that an adapter fits its base and that the processor loads.

    Raises:
        UserError: Naming the damaged file.
    """
    for name, content in package.files.items():
        if name.endswith(".safetensors") and isinstance(content, Path):
            lazy_file(content)
    if package.kind == "adapter":
        _check_adapter(package.folder)
    if "processor_config.json" in package.files:
        load_processor(package.folder)


def _check_adapter(folder: Path) -> None:
    """Check an adapter against its base; for a base on the Hub, only config.json is downloaded."""
    record = read_record(folder)
    base = record["base"]
    if not base.get("revision"):
        checked_base(record, folder)
        return
    check_saved(folder, record)
    config = build_llava_config(load_config(base["name"], base["revision"], "start_from.llava"), str(base["name"]))
    check_fits(folder, config, str(base["name"]))


def check_secrets(package: Package) -> None:
    """Check that a package has no token and no path into a home folder.

    Raises:
        UserError: Naming file, line and kind of every finding, without its text.
    """
    found = [
        finding
        for name, content in package.files.items()
        for finding in scan(name, _scanned(name, content), written_by_us=isinstance(content, bytes))
    ]
    if found:
        lines = [f"{package.folder}: {f.file}, line {f.line}: {f.what}; remove it, then push again" for f in found]
        raise UserError("\n".join(lines))


def _scanned(name: str, content: Path | bytes) -> bytes:
    """Return the content to scan; for weights this is the header, the only text in them."""
    if isinstance(content, bytes):
        return content
    if not name.endswith(".safetensors"):
        return content.read_bytes()
    with content.open("rb") as stream:
        return stream.read(min(int.from_bytes(stream.read(8), "little"), _HEADER_LIMIT))
