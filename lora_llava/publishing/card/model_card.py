"""The model card, written from the run's records without unmeasured values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

from lora_llava.evaluation.answer_metrics import text_metrics
from lora_llava.evaluation.answers import is_answer_table
from lora_llava.evaluation.figures.figure_lines import (
    balanced_note,
    cells,
    confusion_title,
    figure_lines,
    headings,
    line_notes,
    matrix,
    read_confusions,
)
from lora_llava.evaluation.lmms.benchmark_table import COLUMNS, benchmark_notes, benchmark_rows
from lora_llava.publishing.card.card_training import continued_runs, training_rows
from lora_llava.publishing.card.licences import Licence, card_licence, conflicts, licence_of
from lora_llava.publishing.card.loss_curve import draw_curve
from lora_llava.publishing.card.snippet import loading_snippet
from lora_llava.publishing.merge import BASE_FILE, IMPORTED
from lora_llava.publishing.package import CARD_FILE, CURVE_FILE, RESULTS_FOLDER, Package, public_name
from lora_llava.recipe.places import DEMO_DATA

_DATA_TYPES = {"demo": "lora_llava-demo"}
_DEMO_NAME = "lora_llava's demo world"


def add_card(package: Package, repo_id: str, licence: str | None = None) -> None:
    """Add card, loss curve and evaluation results to a package.

    Args:
        package: From `collect`.
        repo_id: The repository, `owner/name`.
        licence: Licence identifier set by the user; None derives it from the licences of the parts.
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
    """List the licences of the models and data that the model was made from."""
    found = [licence_of(name, named(role, name)) for role, name in sources(package)]
    if package.recipe:
        found += [licence_of(path, _data_part(path)) for path in data_paths(package.recipe["data"])]
    before = continued_runs(package.record)
    known = set(data_paths(package.recipe["data"])) if package.recipe else set()
    for path in dict.fromkeys(path for each in before for path in each["data"] if path not in known):
        found.append(licence_of(path, _data_part(path)))
    stages = [each["stage1"] for each in [package.record, *before] if each.get("stage1")]
    for name in dict.fromkeys(public_name(stage1["data"], stage1["hub_ids"]) for stage1 in stages):
        found.append(licence_of(name, _data_part(name, "Stage 1 ")))
    return found


def _data_part(name: str, stage: str = "") -> str:
    return f"the {stage}data of {_DEMO_NAME}" if name in DEMO_DATA else f"the {stage}data set {name}"


def sources(package: Package) -> list[tuple[str, str]]:
    """List role and name of the models that this one was made from."""
    parts = package.record.get("base", {}).get("parts")
    if parts:
        found = [("language model", parts["llm"]), ("vision tower", parts["vision_tower"])]
        projector = package.recipe.get("model", {}).get("start_from", {}).get("projector")
        return [*found, ("projector", projector)] if projector else found
    return [("base", package.base)] if package.base and package.base != IMPORTED else []


def named(role: str, name: str) -> str:
    """Return the name of a source model in the card."""
    return f"the demo's {role}" if name == "demo" else f"the {role} {name}"


def data_name(package: Package) -> str:
    """Return the name of the training data in the card."""
    return ", ".join(_named_data(path) for path in data_paths(package.recipe["data"]))


def _named_data(path: str) -> str:
    return _DEMO_NAME if path in DEMO_DATA else path


def data_paths(data: dict[str, Any]) -> list[str]:
    """List the paths or Hub ids of a recipe's training data, each once."""
    return list(dict.fromkeys([data["path"]] if data.get("path") else [s["path"] for s in data["sources"]]))


def card_data(package: Package, repo_id: str, licence: str | None, licences: Sequence[Licence]) -> ModelCardData:
    """Build the card's metadata, including `model-index`."""
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
        license=licence,
        library_name="peft" if package.kind == "adapter" else "transformers",
        pipeline_tag="image-text-to-text",
        datasets=data or None,
        tags=["llava", "lora_llava", *tags(package)],
        **extra,
    )


def tags(package: Package) -> list[str]:
    """List the tags of the training method."""
    model = package.recipe.get("model", {})
    if not package.recipe.get("lora"):
        return []
    return ["lora", "qlora"] if model.get("quantization") == "nf4" else ["lora"]


def after_table(package: Package) -> dict[str, Any] | None:
    """Return ScienceQA's table after training: column to accuracy in percent, correct and count."""
    table = package.metrics.get("after")
    return None if is_answer_table(table) else table


def _reader(table: Mapping[str, Any]) -> str:
    """Return the name of the rule that read the letters of a ScienceQA table."""
    return f"the {table['parser']} parser" if "parser" in table else "LLaVA's rule"


def index_results(package: Package) -> Iterable[EvalResult]:
    """Yield the results for `model-index`: accuracy, overall and by column."""
    table = after_table(package)
    if table is None or not package.recipe:
        return
    data = package.recipe["data"]
    name = _DEMO_NAME if data["path"] == "demo" else "ScienceQA"
    kind = data["path"] if data["path"] in package.hub_ids else _DATA_TYPES.get(data["path"], "scienceqa")
    for column, entry in table.items():
        if column not in ("unparsed", "parser") and entry[2]:
            yield EvalResult(
                task_type="visual-question-answering",
                dataset_type=kind,
                dataset_name=name,
                dataset_split=data["splits"]["test"],
                dataset_revision=data.get("revision"),
                metric_type="accuracy",
                metric_name=f"accuracy, {column} ({entry[2]} questions)",
                metric_value=entry[0],
            )


def eval_entries(package: Package) -> list[EvalResultEntry]:
    """Return the result for `.eval_results/`: the average over the complete test split of a data set on the Hub."""
    table, data = after_table(package), package.recipe.get("data", {})
    if (
        table is None
        or not data
        or data["path"] not in package.hub_ids
        or package.recipe["evaluation"]["after"] != "all"
    ):
        return []
    note = (
        f"{table['AVG'][1]} of {table['AVG'][2]} questions correct; prompt {data['prompt_order']}, greedy decoding; "
        f"answers read by {_reader(table)}, {table['unparsed']} unparsed"
    )
    return [EvalResultEntry(data["path"], "default", table["AVG"][0], dataset_revision=data["revision"], notes=note)]


def card_text(package: Package, repo_id: str, licences: Sequence[Licence]) -> str:
    """Write the card's body."""
    sections = [
        f"# {repo_id.split('/')[1]}\n\n{_summary(package)}",
        _results(package),
        _benchmarks(package),
        f"## How to use\n\n{loading_snippet(package, repo_id)}" if "chat_template.jinja" in package.files else "",
        _training(package),
        _licence_section(licences),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(package: Package) -> str:
    what = {
        "adapter": f"A LoRA adapter for LLaVA (`{package.class_name}`), including the trained projector.",
        "model": f"A complete LLaVA (`{package.class_name}`), ready for stock transformers.",
    }[package.kind]
    made = _joined([named(role, name) for role, name in sources(package)])
    imported = package.record.get("imported")
    if imported and package.kind == "model":
        return f"{what} It was converted by lora_llava from {imported}, a checkpoint in the original LLaVA format."
    if BASE_FILE in package.files:
        projector = ", with the projector of a training run" if "projector_of_recipe" in package.record else ""
        return f"A LLaVA that serves as the base of an adapter. It was assembled by lora_llava from {made}{projector}."
    if not package.recipe:
        if imported:
            what += f" It was converted by lora_llava from {imported}, a LoRA folder in the original LLaVA format."
        return what + (f" It is based on {made}." if made else "")
    trained = "Its projector was trained" if package.recipe["stage"] == 1 else "LoRA and the projector were trained"
    merged = ", and LoRA was merged into the weights" if package.kind == "model" and package.recipe.get("lora") else ""
    before = dict.fromkeys(path for each in continued_runs(package.record) for path in each["data"])
    after = f", after {_joined([_named_data(path) for path in before])}," if before else ""
    return f"{what} {trained} on {data_name(package)}{after} with lora_llava{merged}. The model is based on {made}."


def _joined(parts: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


_ROWS = {"before": "before training", "after": "after training"}


def _answers(package: Package, tables: dict[str, Any]) -> str:
    """Write the scores of free-form answers, by group, with the figures beside them."""
    metrics, figures = text_metrics(), package.metrics.get("figures")
    lines = [
        f"## Results\n\nScores on rows of {data_name(package)} that were held out from training, with all rows of an "
        "image kept together. Answers are compared with the reference answers by "
        f"{', '.join(metric.definition or metric.title for metric in metrics)}. The interval is Wilson's, of exact "
        f"match. {_measured(package)}\n",
        table_row(["group", "answers", *headings(metrics), "questions"]),
        table_row(["---"] * (4 + len(metrics))),
    ]
    for line in figure_lines(tables, figures):
        title = _ROWS.get(line.title, line.title)
        lines.append(table_row([markdown_text(line.group), title, *cells(line, metrics), line.scores["questions"]]))
    return "\n".join(lines) + "\n" + _figures(figures or {})


def _figures(figures: Mapping[str, Any]) -> str:
    """Write what the scores show, and the confusion tables of questions with few answers."""
    sentences = [*line_notes(figures), *figures.get("sentences", [])]
    parts = ["\n".join(f"- {markdown_text(sentence)}" for sentence in sentences)]
    for confusion in read_confusions(figures):
        columns, rows = matrix(confusion)
        escaped = [[markdown_text(cell) for cell in row] for row in (columns, *rows)]
        lines = [table_row(escaped[0]), table_row(["---"] * len(columns)), *map(table_row, escaped[1:])]
        title = f"### {markdown_text(confusion_title(confusion))}"
        parts.append("\n\n".join([title, balanced_note(confusion, figures), "\n".join(lines)]))
    return "".join(f"\n{part}\n" for part in parts if part)


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
        f"## Results\n\nAccuracy in % on the {data['splits']['test']} split of {data_name(package)}, with prompt "
        f"{data['prompt_order']} and greedy decoding. Answer letters were read by {reader}; an answer that cannot be "
        f"parsed counts as wrong. {_measured(package)}\n",
        table_row(["", *columns, "unparsed"]),
        table_row(["---"] * (len(columns) + 2)),
    ]
    for name, table in tables.items():
        shares = (f"{table[column][0]:.2f}" if table[column][2] else "–" for column in columns)
        lines.append(table_row([_ROWS[name], *shares, table["unparsed"]]))
    last = next(reversed(tables.values()))
    lines.append(table_row(["questions", *(last[column][2] for column in columns), ""]))
    return "\n".join(lines)


def _benchmarks(package: Package) -> str:
    """Write the scores on public benchmarks, if there are any."""
    found = package.metrics.get("benchmarks")
    if not found:
        return ""
    lines = [table_row(COLUMNS), table_row(["---"] * len(COLUMNS))]
    lines += [table_row(map(markdown_text, row)) for row in benchmark_rows(found)]
    return "## Public benchmarks\n\n" + "\n".join([*lines, "", *map(markdown_text, benchmark_notes(found))])


def _measured(package: Package) -> str:
    """Describe the model that was measured, and how close this model is to it."""
    base = {"nf4": "NF4", "none": "unquantised"}[package.recipe["model"]["quantization"]]
    measured = f"All values were measured during the training run, with the adapter on the {base} base."
    if not package.merge:
        return measured
    delta = package.merge[package.merge["checked_against"]]
    return (
        f"{measured}\n\nThis model is that adapter merged into the {package.merge['merged_into'].upper()} base. On "
        f"{delta['prompts']} test prompts, its logits differ from those of base and adapter by at most "
        f"{delta['max_logit_difference']:.3g} (tolerance {package.merge['tolerance']:.3g}), and "
        f"{delta['greedy_equal']} of {delta['prompts']} greedy answers are equal; see `merge_report.json`."
    )


def table_row(cells: Iterable[Any]) -> str:
    """Write one line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def markdown_text(text: Any) -> str:
    """Return a text of the data on one line, with the characters escaped that have a meaning in Markdown."""
    return re.sub(r"([\\`|<*_~\[\]#])", r"\\\1", " ".join(str(text).split()))


def _training(package: Package) -> str:
    if not package.recipe:
        return ""
    rows = [table_row(["Setting", "Value"]), table_row(["---", "---"]), *map(table_row, training_rows(package))]
    curve = f"\n\n![Loss over steps]({CURVE_FILE})" if CURVE_FILE in package.files else ""
    return "## Training\n\n" + "\n".join(rows) + curve


def _licence_section(licences: Sequence[Licence]) -> str:
    if not licences:
        return ""
    lines = [
        f"- {lic.part[0].upper()}{lic.part[1:]}: {lic.name}" + (f" ({lic.note})" if lic.note else "")
        for lic in licences
    ]
    return "\n\n".join(["## Licences", "\n".join(lines), *conflicts(licences)])
