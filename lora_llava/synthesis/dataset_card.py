"""Data set card for the Hugging Face Hub, written from the summary alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import DatasetCardData

from lora_llava.pages.preview_samples import count_of, escape_hidden
from lora_llava.synthesis.gates.gates import REASONS

BY_RULES = "Written by rules, not by a language model."
"""Notice shown wherever the demo's rows are shown."""
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_LARGEST = "10M<n<100M"
"""Size categories of the Hub (huggingface/hub-docs, datasetcard.md); upper limits are exclusive."""
_LIMITS = """\
## Limitations

- The teacher saw no image. A row that goes beyond the captions and boxes may be wrong and still sound certain.
- The checks are rules. They find refusals, mentions of captions and boxes, markup and repetitions, as well as counts,
  denials and sides that the boxes contradict. They check only claims with exact wording, and not colours or actions.
- Look at `gallery.html` and read a few dozen rows before you train on them."""


def write_card(name: str, summary: Mapping[str, Any]) -> str:
    """Write the data set card.

    Args:
        name: Name of the data set, which is its folder's.
        summary: Summary as in `summary.json`.

    Returns:
        Markdown with YAML metadata that `huggingface_hub.DatasetCard` reads. It contains no path of this machine.
    """
    name = escape_hidden(" ".join(name.split()))
    # The user replaces the license `other`: it depends on the sources of the rows, which the card lists.
    head = DatasetCardData(
        language=["en"],
        license="other",
        task_categories=["visual-question-answering", "image-text-to-text"],
        tags=["llava", "synthetic", "lora_llava"],
        size_categories=[size_category(summary["rows"])],
        pretty_name=name,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "instruct.json"}]}],
    )
    sections = (
        f"# {_plain(name)}",
        *_warnings(summary),
        _introduction(summary),
        _flavours(summary),
        _rows(summary),
        _rejections(summary),
        _making(summary),
        _LIMITS,
        _training(summary),
        _licences(summary),
    )
    return f"---\n{head.to_yaml(line_break=chr(10))}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def size_category(rows: int) -> str:
    """Return the Hub's size category.

    Args:
        rows: Number of rows.

    Returns:
        A category such as `1K<n<10K`.
    """
    return next((name for limit, name in _SIZES if rows < limit), _LARGEST)


def is_by_rules(summary: Mapping[str, Any]) -> bool:
    """Check whether the demo's rules wrote the rows instead of a language model."""
    return bool(summary["teacher"]["backend"] == "demo")


def teacher_name(summary: Mapping[str, Any]) -> str:
    """Return the teacher's name as reported with the answers, else as in the recipe."""
    teacher = summary["teacher"]
    return next(iter(teacher["answered_as"]), None) or teacher["model"] or "a model that its server does not name"


def _warnings(summary: Mapping[str, Any]) -> Iterable[str]:
    if is_by_rules(summary):
        yield f"> **{BY_RULES}** The sentences are stiff; they only show what a data set looks like."
    if not summary["complete"]:
        yield (
            f"> **Incomplete:** of {count_of(summary['tasks'], 'planned sample')}, {summary['failed']:,} failed and "
            f"{summary['not_asked']:,} were not requested. Run `lora-llava generate-data` with the same recipe to "
            "resume."
        )


def _introduction(summary: Mapping[str, Any]) -> str:
    rows, images = count_of(summary["rows"], "conversation"), count_of(summary["images"], "image")
    given = "given the captions and boxes of each image as text. Made with lora_llava."
    who = "rules were" if is_by_rules(summary) else f"{_models(summary)}, which saw no image, was"
    return (
        f"{rows} about {images}, generated with LLaVA's method (Visual Instruction Tuning, arXiv 2304.08485, section "
        f"3): {who} {given}"
    )


def _flavours(summary: Mapping[str, Any]) -> str:
    head = ("", "planned", "rows", "questions", "words per answer", "rejected", "failed", "not requested")
    names = ("tasks", "rows", "turns", "words_per_answer", "rejected", "failed", "not_asked")
    lines = [[flavour, *(counts[name] for name in names)] for flavour, counts in summary["flavours"].items()]
    lines.append(["all", *(summary.get(name, "") for name in names)])
    return _table(head, lines)


def _rows(summary: Mapping[str, Any]) -> str:
    beside = summary["image_folder"]
    images = f"are in {_code(beside)}" if beside else "are not included"
    return f"""\
## Rows

`instruct.json` is a list in LLaVA's form; `category` is conversation, detail or reasoning:

    {{"id": "000000296284-detail-0", "image": "000000296284.jpg", "category": "detail",
     "conversations": [{{"from": "human", "value": "<image>\\nDescribe ..."}}, {{"from": "gpt", "value": "..."}}]}}

The images, which `image` names, {images}. `rejected.jsonl` lists every rejected answer with its reason and every
missing sample, `summary.json` contains all counts, and `gallery.html` shows examples of both."""


def _rejections(summary: Mapping[str, Any]) -> str:
    if not summary["reasons"]:
        return ""
    lines = [
        [reason, REASONS[reason], counts["attempts"], counts["given_up"]]
        for reason, counts in summary["reasons"].items()
    ]
    return "## Rejected answers\n\n" + _table(("reason", "description", "answers", "samples given up"), lines)


def _making(summary: Mapping[str, Any]) -> str:
    teacher, known = summary["teacher"], summary["contexts"]
    lines = [
        ("teacher", "lora_llava's rules, no language model" if is_by_rules(summary) else _models(summary)),
        ("contexts", f"{known['images']:,} images, {known['captions']:,} captions, {known['boxes']:,} boxes"),
        ("source files", ", ".join(map(_code, dict.fromkeys(known["files"].values())))),
    ]
    if not is_by_rules(summary):
        names = ("temperature", "top_p", "max_tokens")
        default = "set by the server"
        values = [f"{name} {default if teacher[name] is None else teacher[name]}" for name in names]
        lines.insert(1, ("sampling", ", ".join(values)))
    ledger = summary.get("ledger", {})
    if ledger.get("prompt_tokens") or ledger.get("completion_tokens"):
        cost = "" if ledger.get("usd") is None else f", {ledger['usd']:,.2f} USD"
        usage = f"{ledger['prompt_tokens']:,} prompt, {ledger['completion_tokens']:,} completion{cost}"
        lines.append(("tokens", usage))
    hashes = {} if is_by_rules(summary) else summary.get("prompts", {})  # the rules read no prompts
    prompts = [(f"prompt, {flavour}", f"SHA-256 `{digest}`") for flavour, digest in hashes.items()]
    recipe = [("recipe", f"SHA-256 `{summary['recipe_hash']}`")] if "recipe_hash" in summary else []
    versions = ", ".join(f"{library} {number}" for library, number in summary["versions"].items())
    return "## How it was made\n\n" + _table(("", ""), [*lines, *prompts, *recipe, ("versions", versions)])


def _models(summary: Mapping[str, Any]) -> str:
    """List all models reported with the answers; a server may change its model during a run."""
    return ", ".join(map(_code, summary["teacher"]["answered_as"])) or _code(teacher_name(summary))


def _training(summary: Mapping[str, Any]) -> str:
    recipe = "demo_generated_qlora.yaml" if is_by_rules(summary) else "my_data_qlora.yaml"
    images = summary["image_folder"]
    folder = "IMAGES" if images is None else shlex.quote(images)
    command = f"lora-llava finetune {recipe} data.path=instruct.json data.image_folder={folder} output_dir=runs/mine"
    where = "Run it in this folder" + (", with the image folder in place of IMAGES" if images is None else "")
    return f"## Training\n\n    {command}\n\n{where}."


def _licences(summary: Mapping[str, Any]) -> str:
    writer = (
        "- Text: written by lora_llava's rules, Apache-2.0, except where it repeats the captions."
        if is_by_rules(summary)
        else f"- Text: written by {_code(teacher_name(summary))}. The terms of use of a model or its service may "
        "forbid training competing models on its output, or publishing it; read them."
    )
    return f"""\
## Licences

Replace `license: other` above; the licence depends on these sources:

{writer}
- Captions and boxes: COCO's are CC BY 4.0 (cocodataset.org), those of lora_llava's demo Apache-2.0; others keep their
  own licence.
- Images: COCO's are under Flickr's terms of use and their owners' licences; the demo's are Apache-2.0."""


def _table(head: Iterable[Any], lines: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _plain(text: str) -> str:
    """Escape a text so that Markdown shows it without markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", text)


def _code(text: str) -> str:
    """Format any name as inline code that is safe in a line or a table cell."""
    return f"`{escape_hidden(' '.join(text.split())).replace('`', chr(39)).replace('|', '/')}`"
