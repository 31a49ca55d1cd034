"""The model card, made from what the run recorded: nothing is filled in that was not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

from lora_llava.evaluation.answer_metrics import text_metrics
from lora_llava.evaluation.answers import is_answer_table
from lora_llava.publishing.card.card_training import training_rows
from lora_llava.publishing.card.licences import Licence, card_licence, conflicts, licence_of
from lora_llava.publishing.card.loss_curve import draw_curve
from lora_llava.publishing.card.snippet import loading_snippet
from lora_llava.publishing.merge import BASE_FILE, IMPORTED
from lora_llava.publishing.package import CARD_FILE, CURVE_FILE, RESULTS_FOLDER, Package, public_name

_DATA_TYPES = {"demo": "lora_llava-demo"}
_DEMO_NAME = "lora_llava's demo world"


def add_card(package: Package, repo_id: str, licence: str | None = None) -> None:
    """Put card, loss curve and evaluation results into a package.

    Args:
        package: From `collect`.
        repo_id: Where it goes.
        licence: What the person says its licence is; else it is told from the parts'.
    """
    losses = package.metrics.get("train", {}).get("loss_curve", {})
    if losses.get("train"):
        package.files[CURVE_FILE] = draw_curve(losses)
    licences = licences_of(package)
    head = card_data(package, repo_id, licence or card_licence(licences), licences).to_yaml(line_break="\n")
    package.files[CARD_FILE] = f"---\n{head}\n---\n\n{card_text(package, repo_id, licences)}".encode()
    entries = eval_entries(package)
    if entries:
        text = yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        package.files[f"{RESULTS_FOLDER}/scienceqa.yaml"] = text.encode()


def licences_of(package: Package) -> list[Licence]:
    """What the model was made from, with the licences that are known."""
    found = [licence_of(name, named(role, name)) for role, name in sources(package)]
    if package.recipe:
        found += [licence_of(path, f"the data ({_named_data(path)})") for path in data_paths(package.recipe["data"])]
    stage1 = package.record.get("stage1")
    if stage1:
        name = public_name(stage1["data"], stage1["hub_ids"])
        found.append(licence_of(name, f"the data of Stage 1 ({_DEMO_NAME if name == 'demo' else name})"))
    return found


def sources(package: Package) -> list[tuple[str, str]]:
    """Role and name of the models that this one was made from."""
    parts = package.record.get("base", {}).get("parts")
    if parts:
        found = [("language model", parts["llm"]), ("vision tower", parts["vision_tower"])]
        projector = package.recipe.get("model", {}).get("start_from", {}).get("projector")
        return [*found, ("projector", projector)] if projector else found
    return [("base", package.base)] if package.base and package.base != IMPORTED else []


def named(role: str, name: str) -> str:
    """How the card names one of those models."""
    return f"the demo's {role}" if name == "demo" else f"the {role} {name}"


def data_name(package: Package) -> str:
    """How the card names the data."""
    return ", ".join(_named_data(path) for path in data_paths(package.recipe["data"]))


def _named_data(path: str) -> str:
    return _DEMO_NAME if path == "demo" else path


def data_paths(data: dict[str, Any]) -> list[str]:
    """Where a recipe's training data is from, each once."""
    return list(dict.fromkeys([data["path"]] if data.get("path") else [s["path"] for s in data["sources"]]))


def card_data(package: Package, repo_id: str, licence: str | None, licences: Sequence[Licence]) -> ModelCardData:
    """The card's metadata, with `model-index`."""
    bases = [name for _, name in sources(package) if name in package.hub_ids]
    if package.kind == "adapter":
        bases = [package.base]
    data = [p for p in data_paths(package.recipe["data"]) if p in package.hub_ids] if package.recipe else []
    extra: dict[str, Any] = {}
    if bases:
        extra |= {"base_model": bases, "base_model_relation": "adapter" if package.kind == "adapter" else "finetune"}
    if licence == "other":
        extra["license_name"] = "-and-".join(sorted({lic.identifier or "unknown" for lic in licences}))
        extra["license_link"] = f"https://huggingface.co/{repo_id}/blob/main/{CARD_FILE}#licences"
    results = list(index_results(package))
    if results:
        extra |= {"model_name": repo_id.split("/")[1], "eval_results": results}
    return ModelCardData(
        license=licence, library_name="peft" if package.kind == "adapter" else "transformers",
        pipeline_tag="image-text-to-text", datasets=data or None,
        tags=["llava", "lora_llava", *tags(package)], **extra,
    )  # fmt: skip


def tags(package: Package) -> list[str]:
    """Words to find the model by."""
    model = package.recipe.get("model", {})
    if not package.recipe.get("lora"):
        return []
    return ["lora", "qlora"] if model.get("quantization") == "nf4" else ["lora"]


def after_table(package: Package) -> dict[str, Any] | None:
    """ScienceQA's table after training: column to accuracy in percent, correct and count."""
    table = package.metrics.get("after")
    return None if is_answer_table(table) else table


def _reader(table: Mapping[str, Any]) -> str:
    """What read the letters of a ScienceQA table."""
    return f"the {table['parser']} parser" if "parser" in table else "LLaVA's rule"


def index_results(package: Package) -> Iterable[EvalResult]:
    """`model-index`: accuracy, in all and by column."""
    table = after_table(package)
    if table is None or not package.recipe:
        return
    data = package.recipe["data"]
    name = _DEMO_NAME if data["path"] == "demo" else "ScienceQA"
    kind = data["path"] if data["path"] in package.hub_ids else _DATA_TYPES.get(data["path"], "scienceqa")
    for column, entry in table.items():
        if column not in ("unparsed", "parser") and entry[2]:
            yield EvalResult(
                task_type="visual-question-answering", dataset_type=kind, dataset_name=name,
                dataset_split=data["splits"]["test"], dataset_revision=data.get("revision"), metric_type="accuracy",
                metric_name=f"accuracy, {column} ({entry[2]} questions)", metric_value=entry[0],
            )  # fmt: skip


def eval_entries(package: Package) -> list[EvalResultEntry]:
    """`.eval_results/`: the average over the whole test split of a data set that is on the Hub."""
    table, data = after_table(package), package.recipe.get("data", {})
    if (
        table is None
        or not data
        or data["path"] not in package.hub_ids
        or package.recipe["evaluation"]["after"] != "all"
    ):
        return []
    note = (
        f"{table['AVG'][1]} of {table['AVG'][2]} questions; prompt {data['prompt_order']}, greedy; answers read by "
        f"{_reader(table)}, {table['unparsed']} unparsed"
    )
    return [EvalResultEntry(data["path"], "default", table["AVG"][0], dataset_revision=data["revision"], notes=note)]


def card_text(package: Package, repo_id: str, licences: Sequence[Licence]) -> str:
    """The card's body."""
    sections = [
        f"# {repo_id.split('/')[1]}\n\n{_summary(package)}",
        _results(package),
        f"## Use\n\n{loading_snippet(package, repo_id)}" if "chat_template.jinja" in package.files else "",
        _training(package),
        _licence_section(licences),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(package: Package) -> str:
    what = {
        "adapter": "A LoRA adapter for LLaVA (`LlavaForConditionalGeneration`), with the trained projector in it.",
        "model": "A whole LLaVA (`LlavaForConditionalGeneration`) that stock transformers loads.",
    }[package.kind]
    made = " and ".join(named(role, name) for role, name in sources(package))
    imported = package.record.get("imported")
    if imported and package.kind == "model":
        return f"{what} Converted from {imported}, a checkpoint in LLaVA's own format, by lora_llava."
    if BASE_FILE in package.files:
        projector = " and the projector of a run" if "projector_of_recipe" in package.record else ""
        return f"The base that an adapter stands on: a LLaVA made of {made}{projector}, by lora_llava."
    if not package.recipe:
        origin = f" Converted from {imported}, a LoRA folder in LLaVA's own format," if imported else " Made"
        return what + (f"{origin} on {made}, by lora_llava." if made else "")
    trained = "Its projector was trained" if package.recipe["stage"] == 1 else "LoRA and the projector were trained"
    return f"{what} {trained} on {data_name(package)}, from {made}, by lora_llava."


def _answers(package: Package, tables: dict[str, Any]) -> str:
    """Scores of free answers, by source."""
    metrics = text_metrics()
    lines = [
        f"## Results\n\nAnswers to rows of {data_name(package)} that were held back from training, by the seed and by "
        f"image, against the data's own: {', '.join(metric.definition or metric.title for metric in metrics)}. "
        f"{_measured(package)}\n",
        table_row(["", "group", *(metric.heading for metric in metrics), "questions"]),
        table_row(["---"] * (3 + len(metrics))),
    ]
    for name, table in tables.items():
        for group, scores in table.items():
            cells = (metric.cell(scores) for metric in metrics)
            lines.append(table_row([name, group, *cells, scores["questions"]]))
    return "\n".join(lines) + "\n"


def _results(package: Package) -> str:
    rows = {name: package.metrics.get(name) for name in ("before", "after")}
    tables = {name: table for name, table in rows.items() if table}
    if not tables or not package.recipe:
        return ""
    if is_answer_table(next(iter(tables.values()))):
        return _answers(package, tables)
    columns = [column for column in next(iter(tables.values())) if column not in ("unparsed", "parser")]
    data, reader = package.recipe["data"], _reader(next(iter(tables.values())))
    lines = [
        f"## Results\n\nAccuracy in % on the {data['splits']['test']} split of {data_name(package)}; prompt "
        f"{data['prompt_order']}, greedy answers, read by {reader}; one that cannot be read counts as wrong. "
        f"{_measured(package)}\n",
        table_row(["", *columns, "unparsed"]),
        table_row(["---"] * (len(columns) + 2)),
    ]
    for name, table in tables.items():
        lines.append(table_row([name, *(f"{table[column][0]:.2f}" for column in columns), table["unparsed"]]))
    last = next(reversed(tables.values()))
    lines.append(table_row(["questions", *(last[column][2] for column in columns), ""]))
    return "\n".join(lines)


def _measured(package: Package) -> str:
    """What the table was measured on, and how near this model is to that."""
    base = {"nf4": "NF4", "none": "unquantised"}[package.recipe["model"]["quantization"]]
    told = f"Measured in the training run, with the adapter on the {base} base."
    if not package.merge:
        return told
    delta = package.merge[package.merge["checked_against"]]
    return (
        f"{told} This model was merged from it into the base in {package.merge['merged_into'].upper()}: logits on "
        f"{delta['prompts']} prompts within {delta['max_logit_difference']:.3g} of adapter and base, tolerance "
        f"{package.merge['tolerance']:.3g}, {delta['greedy_equal']} greedy answers of {delta['prompts']} equal "
        "(`merge_report.json`)."
    )


def table_row(cells: Iterable[Any]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _training(package: Package) -> str:
    if not package.recipe:
        return ""
    rows = [table_row(["", ""]), table_row(["---", "---"]), *map(table_row, training_rows(package))]
    curve = f"\n\n![Loss over steps]({CURVE_FILE})" if CURVE_FILE in package.files else ""
    return "## Training\n\n" + "\n".join(rows) + curve


def _licence_section(licences: Sequence[Licence]) -> str:
    if not licences:
        return ""
    lines = [f"- {lic.part}: {lic.name}" + (f" ({lic.note})" if lic.note else "") for lic in licences]
    told = conflicts(licences)
    return "## Licences\n\n" + "\n".join(lines) + ("\n\n" + "\n".join(told) if told else "")
