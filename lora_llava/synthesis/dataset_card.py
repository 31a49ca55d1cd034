"""The set's own README: a data set's card for the Hugging Face Hub, from the summary alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import DatasetCardData

from lora_llava.pages.preview_samples import count_of, escape_hidden
from lora_llava.synthesis.gates.gates import REASONS

BY_RULES = "Written by rules, not by a language model."
"""What is said of the demo's rows wherever they are shown."""
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_LARGEST = "10M<n<100M"
"""Size categories of the Hub (huggingface/hub-docs, datasetcard.md); a thousand is not under a thousand."""
_LIMITS = """\
## Before you trust it

- The teacher saw no image. Where a row says more than captions and boxes hold, it may be wrong and sound sure.
- The checks are rules. They find refusals, talk of captions and boxes, markup, repeats, and numbers, denials and sides
  that the boxes contradict; they weigh a claim only where its words are exact, and know nothing of colours or actions.
- Look at `gallery.html`, and read a few dozen rows, before you train on them."""


def write_card(name: str, summary: Mapping[str, Any]) -> str:
    """Write the card.

    Args:
        name: Of the set; its folder's.
        summary: As `summary.json` holds it.

    Returns:
        Markdown behind YAML that `huggingface_hub.DatasetCard` reads. It holds no path of this machine.
    """
    name = escape_hidden(" ".join(name.split()))
    # `other` has to be replaced by the person: what the rows were made from decides, and the notes below tell it.
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
    """The Hub's name of a size.

    Args:
        rows: How many.

    Returns:
        Such as `1K<n<10K`.
    """
    return next((name for limit, name in _SIZES if rows < limit), _LARGEST)


def is_by_rules(summary: Mapping[str, Any]) -> bool:
    """Whether the demo's rules wrote the rows, and no language model."""
    return bool(summary["teacher"]["backend"] == "demo")


def teacher_name(summary: Mapping[str, Any]) -> str:
    """Who wrote: the name that the answers came under, else the recipe's."""
    teacher = summary["teacher"]
    return next(iter(teacher["answered_as"]), None) or teacher["model"] or "a model that its server does not name"


def _warnings(summary: Mapping[str, Any]) -> Iterable[str]:
    if is_by_rules(summary):
        yield f"> **{BY_RULES}** Stiff sentences from captions and boxes: they show what a set looks like."
    if not summary["complete"]:
        yield (
            f"> **Not complete:** of {count_of(summary['tasks'], 'sample')} that were to be made, "
            f"{summary['failed']:,} had no answer and {summary['not_asked']:,} were not asked for. "
            "`lora-llava generate-data` with the same recipe goes on."
        )


def _introduction(summary: Mapping[str, Any]) -> str:
    rows, images = count_of(summary["rows"], "conversation"), count_of(summary["images"], "image")
    given = "given each image's captions and boxes in words, and wrote as one who sees it. Made with lora_llava."
    who = "rules were" if is_by_rules(summary) else f"{_models(summary)}, which saw no image, was"
    return (
        f"{rows} about {images}, made as LLaVA's own were (Visual Instruction Tuning, arXiv 2304.08485, section 3): "
        f"{who} {given}"
    )


def _flavours(summary: Mapping[str, Any]) -> str:
    head = ("", "to be made", "rows", "questions", "words an answer", "rejected", "no answer", "not asked for")
    names = ("tasks", "rows", "turns", "words_per_answer", "rejected", "failed", "not_asked")
    lines = [[flavour, *(counts[name] for name in names)] for flavour, counts in summary["flavours"].items()]
    lines.append(["all", *(summary.get(name, "") for name in names)])
    return _table(head, lines)


def _rows(summary: Mapping[str, Any]) -> str:
    beside = summary["image_folder"]
    images = f"are in {_code(beside)}" if beside else "are not part of it"
    return f"""\
## Rows

`instruct.json` is a list in LLaVA's form; `category` is one of conversation, detail and reasoning:

    {{"id": "000000296284-detail-0", "image": "000000296284.jpg", "category": "detail",
     "conversations": [{{"from": "human", "value": "<image>\\nDescribe ..."}}, {{"from": "gpt", "value": "..."}}]}}

The images, which `image` names, {images}. `rejected.jsonl` holds every answer that was not taken, with its reason,
and every sample that is missing; `summary.json` all counts; `gallery.html` some of both to look at."""


def _rejections(summary: Mapping[str, Any]) -> str:
    if not summary["reasons"]:
        return ""
    lines = [
        [reason, REASONS[reason], counts["attempts"], counts["given_up"]]
        for reason, counts in summary["reasons"].items()
    ]
    return "## What was not taken\n\n" + _table(("reason", "the answer", "answers", "samples given up"), lines)


def _making(summary: Mapping[str, Any]) -> str:
    teacher, known = summary["teacher"], summary["contexts"]
    lines = [
        ("teacher", "lora_llava's rules, no language model" if is_by_rules(summary) else _models(summary)),
        ("contexts", f"{known['images']:,} images, {known['captions']:,} captions, {known['boxes']:,} boxes"),
        ("read from", ", ".join(map(_code, dict.fromkeys(known["files"].values())))),
    ]
    if not is_by_rules(summary):
        drawn = ("temperature", "top_p", "max_tokens")
        left = "left to the server"
        values = [f"{name} {left if teacher[name] is None else teacher[name]}" for name in drawn]
        lines.insert(1, ("sampling", ", ".join(values)))
    ledger = summary.get("ledger", {})
    if ledger.get("prompt_tokens") or ledger.get("completion_tokens"):
        cost = "" if ledger.get("usd") is None else f", {ledger['usd']:,.2f} USD"
        told = f"{ledger['prompt_tokens']:,} to the teacher, {ledger['completion_tokens']:,} from it{cost}"
        lines.append(("tokens", told))
    asked = {} if is_by_rules(summary) else summary.get("prompts", {})  # the rules read none
    prompts = [(f"prompt, {flavour}", f"SHA-256 `{digest}`") for flavour, digest in asked.items()]
    recipe = [("recipe", f"SHA-256 `{summary['recipe_hash']}`")] if "recipe_hash" in summary else []
    versions = ", ".join(f"{library} {number}" for library, number in summary["versions"].items())
    return "## How it was made\n\n" + _table(("", ""), [*lines, *prompts, *recipe, ("versions", versions)])


def _models(summary: Mapping[str, Any]) -> str:
    """All names that answers came under; a server may change its model on the way."""
    return ", ".join(map(_code, summary["teacher"]["answered_as"])) or _code(teacher_name(summary))


def _training(summary: Mapping[str, Any]) -> str:
    recipe = "demo_generated_qlora.yaml" if is_by_rules(summary) else "my_data_qlora.yaml"
    images = summary["image_folder"]
    folder = "IMAGES" if images is None else shlex.quote(images)
    command = f"lora-llava finetune {recipe} data.path=instruct.json data.image_folder={folder} output_dir=runs/mine"
    where = "in this folder" + (", with the images' own in place of IMAGES" if images is None else "")
    return f"## Train on it\n\n    {command}\n\n{where}."


def _licences(summary: Mapping[str, Any]) -> str:
    writer = (
        "- The text: from lora_llava's rules, Apache-2.0, as far as it does not repeat the captions."
        if is_by_rules(summary)
        else f"- The text: by {_code(teacher_name(summary))}. The terms of use of a model or its service may forbid to "
        "train others that compete with it, or to publish what it wrote; read them."
    )
    return f"""\
## Licences

`license: other` above is for you to fill in; these decide it:

{writer}
- Captions and boxes: COCO's are CC BY 4.0 (cocodataset.org), the demo's of lora_llava Apache-2.0, others as they came.
- Images: COCO's are under Flickr's terms of use, and each under its owner's; the demo's Apache-2.0."""


def _table(head: Iterable[Any], lines: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _plain(text: str) -> str:
    """A line of whatever content as Markdown shows it, without markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", text)


def _code(text: str) -> str:
    """A name of whatever content as code in a line or a table's cell."""
    return f"`{escape_hidden(' '.join(text.split())).replace('`', chr(39)).replace('|', '/')}`"
