"""The card's table of how a model was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_llava.model.families.tower_families import describe_images, saved_image_settings
from lora_llava.planning.plan_tables import TRAINED_PARTS
from lora_llava.publishing.package import Package
from lora_llava.recipe.places import DEMO_DATA
from lora_llava.runs.directory import peak_memory

_QUANTIZATIONS = {"nf4": "NF4 with double quantisation", "none": "none"}
_SHORT = 12
"""Digits of a hash in a table; run.json has all of them."""
_PARTS = {"llm": "language model", "vision_tower": "vision tower"}
_SPLITS = {"train": "training"}
_INITS = {
    "orthogonal": "orthogonal directions",
    "eva": "the training data (EVA)",
    "loftq": "a correction of NF4 (LoftQ), and therefore fits the NF4 base alone",
}


def training_rows(package: Package) -> list[tuple[str, str]]:
    """List names and values of everything a run recorded: base, data, settings, cost and versions."""
    return [*_base_rows(package), *_data_rows(package), *_setting_rows(package), *_cost_rows(package)]


def _base_rows(package: Package) -> list[tuple[str, str]]:
    base = package.record.get("base", {})
    parts, hashes = base.get("parts"), base.get("hashes") or {}
    rows = []
    if parts:
        for field, role in (("llm", "language model"), ("vision_tower", "vision tower")):
            rows.append((role, f"{_named(parts[field])}, revision `{parts[f'{field}_revision'][:_SHORT]}`"))
        start = package.recipe["model"]["start_from"]
        named = ((key, value) for key, value in start.items() if value and "revision" not in key and key != "run")
        for key, value in named:
            origin = "random weights" if value is True else f"the {key.replace('_', ' ')} {value}"
            rows.append(("projector initialised from", f"{origin} ({parts['projector_type']})"))
    elif base:
        revision = f", revision `{base['revision'][:_SHORT]}`" if base.get("revision") else ""
        rows.append(("base", f"{base['name']}{revision}"))
    rows += [("continues", _continued(each)) for each in continued_runs(package.record)]
    if hashes:
        shown = ", ".join(f"{_PARTS.get(part, part)} `{digest[:_SHORT]}`" for part, digest in hashes.items())
        rows.append(("SHA-256 of the base's weights", shown))
    return rows


def continued_runs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the records of the runs that a run continues, the last one first."""
    found = []
    while before := record.get("continues"):
        found.append(before)
        record = before
    return found


def _continued(record: Mapping[str, Any]) -> str:
    digest = f", SHA-256 `{record['adapter_sha256'][:_SHORT]}`" if record.get("adapter_sha256") else ""
    return f"the adapter and projector of {record['run']}{digest}, trained on {', '.join(map(_named, record['data']))}"


def _named(name: str) -> str:
    return "lora_llava's demo" if name in DEMO_DATA else name


def _data_rows(package: Package) -> list[tuple[str, str]]:
    data = package.recipe["data"]
    revision = f", revision `{data['revision'][:_SHORT]}`" if data.get("revision") else ""
    paths = [data["path"]] if data.get("path") else [source["path"] for source in data["sources"]]
    named = ", ".join(map(_named, dict.fromkeys(paths)))
    rows = [("data", f"{named} ({data['format']}){revision}")]
    for split, report in package.metrics.get("data", {}).items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "none"
        used = f"{report['used']:,} of {report['rows']:,} used"
        rows.append((f"{_SPLITS.get(split, split)} rows", f"{used}; dropped: {dropped}; cut: {report['truncated']:,}"))
    return rows


def _setting_rows(package: Package) -> list[tuple[str, str]]:
    recipe, data, training = package.recipe, package.recipe["data"], package.recipe["training"]
    step = package.metrics.get("step", {})
    projector_rate = training["projector_learning_rate"] or training["learning_rate"]
    rates = [f"projector {projector_rate:g}"]
    if vision := (recipe["lora"] or {}).get("vision"):
        rates.append(f"vision tower {vision['learning_rate'] or training['learning_rate']:g}")
    if ratio := training.get("loraplus_ratio"):
        rates.append(f"LoRA+: {ratio:g} times for matrices B")
    rate = f"{training['learning_rate']:g} ({', '.join(rates)})"
    rows = [("LoRA", _lora(recipe["lora"]))] if recipe["lora"] else []
    if in_full := (recipe["lora"] or {}).get("modules_to_save"):
        rows.append(("trained in full", ", ".join(in_full)))
    if tokens := recipe["model"].get("new_tokens"):
        rows.append(("new tokens", ", ".join(f"`{token}`" for token in tokens)))
    rows += [
        ("quantisation during training", _QUANTIZATIONS[recipe["model"]["quantization"]]),
        ("conversation template", "the model's own" if data["template"] == "auto" else data["template"]),
        ("images", f"position {data['image_position']}, aspect {_aspect(package)}"),
        ("learning rate", f"{rate}, {training['lr_scheduler']} schedule, warm-up ratio {training['warmup_ratio']:g}"),
        ("batch", _batch(training)),
        ("optimizer", f"{step.get('optimizer', training['optimizer'])}, weight decay {training['weight_decay']:g}"),
        ("seed", str(recipe["seed"])),
    ]
    if package.record.get("recipe_hash"):
        digest = package.record["recipe_hash"][:_SHORT]
        rows.append(("recipe", f"`recipe.yaml`; SHA-256 before local paths were shortened: `{digest}`"))
    return rows


def _aspect(package: Package) -> str:
    aspect = str(package.recipe["data"]["image_aspect"])
    saved = saved_image_settings(package.folder) if aspect == "auto" else None
    return aspect if saved is None else f"{describe_images(saved)} (auto)"


def _batch(training: dict[str, Any]) -> str:
    if training.get("max_tokens_per_row"):
        rows, tokens = training["gradient_accumulation"], training["max_tokens_per_row"]
        return f"{rows} row{'s' * (rows != 1)} of up to {tokens:,} tokens, each packed with complete samples"
    steps = training["gradient_accumulation"]
    return f"{training['batch_size']} samples x {steps} accumulation step{'s' * (steps != 1)}"


def _lora(lora: dict[str, Any]) -> str:
    kinds = [name for name, on in (("rsLoRA", lora["rslora"]), ("DoRA", lora["dora"])) if on]
    targets = lora["targets"]
    on = "all linear layers of the language model" if isinstance(targets, str) else ", ".join(targets)
    settings = f"r {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, on {on}"
    if lora.get("init", "default") != "default":  # recipes of earlier versions lack the key
        kinds.append(f"started from {_INITS[lora['init']]}")
    settings += f" ({', '.join(kinds)})" if kinds else ""
    if vision := lora.get("vision"):
        alpha = vision["alpha"] or vision["r"]
        settings += f"; vision tower: r {vision['r']}, alpha {alpha:g}, on {', '.join(vision['targets'])}"
    return settings


def _cost_rows(package: Package) -> list[tuple[str, str]]:
    train = package.metrics.get("train")
    rows: list[tuple[str, str]] = []
    if train:
        trained = package.metrics["model"]["trained_parameters"]
        rows += [
            ("trained parameters", ", ".join(f"{TRAINED_PARTS.get(p, p)} {n:,}" for p, n in trained.items() if n)),
            ("steps", f"{train['steps']:,}"),
            ("tokens", f"{train['tokens']:,}, of which {train['supervised_tokens']:,} count towards the loss"),
            ("training time", f"{train['seconds'] / 60:,.1f} min on {_machine(package.metrics.get('machine'))}"),
            ("peak memory", peak_memory(train)),
        ]
        if train["best_validation_loss"] is not None:
            rows.append(("validation loss", f"{train['best_validation_loss']:.4f} (best checkpoint, published here)"))
    versions = package.record.get("versions", {})
    if versions:
        rows.append(("software versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def _machine(machine: dict[str, Any] | None) -> str:
    if not machine:
        return "an unrecorded machine"
    if machine["gpu"]:
        return f"{machine['gpus']} x {machine['gpu']}"
    return f"{machine['cores']} cores of {machine['processor']}"
