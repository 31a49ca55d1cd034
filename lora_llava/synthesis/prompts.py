"""Prompts for the teacher: a system message, examples, and the captions and boxes of an image."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from lora_llava.core.errors import UserError, nearest
from lora_llava.synthesis.contexts.context import Context, write_context
from lora_llava.synthesis.parse import parse_sample
from lora_llava.synthesis.sample import FLAVOURS, Flavour, Rejection

_EXAMPLE = re.compile(r"example_(\d+)\.(context\.txt|answer\.json)")


@dataclass(frozen=True)
class Example:
    """One example of a prompt.

    Attributes:
        context: Captions and boxes as `write_context` writes them.
        answer: The answer as JSON in the flavour's form.
    """

    context: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """The prompt of a flavour.

    Attributes:
        flavour: The flavour.
        system: The system message.
        examples: Examples in order.
        requests: For `detail`, the questions that rows pair with descriptions; the teacher does not see them.
    """

    flavour: Flavour
    system: str
    examples: tuple[Example, ...]
    requests: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the complete prompt, in hex."""
        parts = [self.flavour, self.system, [[each.context, each.answer] for each in self.examples], self.requests]
        return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()


def load_prompts(folder: Path | None = None) -> dict[Flavour, Prompt]:
    """Load the prompts of all flavours.

    Args:
        folder: Folder with a subfolder for each flavour whose prompt is replaced; other flavours keep the shipped
            prompt. A subfolder contains `system.txt`, optional examples as pairs of `example_1.context.txt` and
            `example_1.answer.json`, and for `detail` a `requests.txt` with one request per line. None loads the shipped
            prompts.

    Returns:
        Prompts by flavour.

    Raises:
        UserError: If the folder has no subfolder of a flavour, a file is missing, unknown, empty or not UTF-8, or the
            answer of an example cannot be parsed.
    """
    shipped = resources.files("lora_llava.synthesis").joinpath("prompts")
    if folder is None:
        return {flavour: _load_flavour(shipped / flavour, flavour) for flavour in FLAVOURS}
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    unknown = [name for name in names if name not in FLAVOURS and not name.startswith((".", "_"))]
    if unknown or not any(name in FLAVOURS for name in names):
        problem = (
            f'contains an unknown folder "{unknown[0]}"{nearest(unknown[0], FLAVOURS)}'
            if unknown
            else "contains no folder of a flavour"
        )
        raise UserError(
            f"prompts: {folder} {problem}; name folders {', '.join(FLAVOURS)}, one or more, as in {shipped}"
        )
    return {
        flavour: _load_flavour((folder if flavour in names else shipped) / flavour, flavour) for flavour in FLAVOURS
    }


def prompt_hashes(prompts: dict[Flavour, Prompt]) -> dict[Flavour, str]:
    """Return the SHA-256 of each prompt, in hex."""
    return {flavour: prompt.hash for flavour, prompt in prompts.items()}


def choose_request(prompt: Prompt, task_id: str) -> str | None:
    """Choose the request that a description answers in its row, the same in every run.

    Args:
        prompt: Prompt of the flavour.
        task_id: Task id, which seeds the choice.

    Returns:
        One of the prompt's requests; None for a flavour whose questions the teacher writes.
    """
    if not prompt.requests:
        return None
    drawn = int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:8], "big")
    return prompt.requests[drawn % len(prompt.requests)]


def write_messages(prompt: Prompt, context: Context) -> list[dict[str, str]]:
    """Write what the teacher is sent (arXiv 2304.08485, section 3 and its appendix on data: examples come as earlier
    turns).

    Args:
        prompt: Prompt of the flavour.
        context: Context of the image.

    Returns:
        Messages with `role` and `content`: the system message, a user and an assistant message for each example, and
        the context verbatim as the last user message.
    """
    messages = [{"role": "system", "content": prompt.system}]
    for example in prompt.examples:
        messages.append({"role": "user", "content": example.context})
        messages.append({"role": "assistant", "content": example.answer})
    return [*messages, {"role": "user", "content": write_context(context)}]


def _load_flavour(folder: Traversable, flavour: Flavour) -> Prompt:
    """Load the prompt of one flavour and check that its examples can be parsed."""
    texts: dict[tuple[int, str], str] = {}
    known = {"system.txt", *(["requests.txt"] if flavour == "detail" else [])}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        match = _EXAMPLE.fullmatch(file.name)
        if match:
            texts[int(match[1]), match[2]] = _read(file)
        elif file.name not in known and file.name.endswith((".txt", ".json")):
            expected = f"{', '.join(sorted(known))}, example_N.context.txt and example_N.answer.json"
            raise UserError(f"prompts: {file} is not a prompt file; rename it to one of {expected}, or remove it")
    examples = []
    for number in sorted({number for number, _ in texts}):
        for part in ("context.txt", "answer.json"):
            if (number, part) not in texts:
                raise UserError(
                    f"prompts: {folder}/example_{number}.{part} is missing; add it: an example needs both files"
                )
        examples.append(Example(texts[number, "context.txt"], texts[number, "answer.json"]))
        read = parse_sample(examples[-1].answer, flavour, "-")
        if isinstance(read, Rejection):
            problem = f"{folder}/example_{number}.answer.json cannot be used: {read.reason} ({read.detail})"
            raise UserError(f"prompts: {problem}; write it like the shipped examples")
    requests = _read(folder / "requests.txt").splitlines() if flavour == "detail" else []
    requests = [line.strip() for line in requests if line.strip()]
    return Prompt(flavour, _read(folder / "system.txt"), tuple(examples), tuple(requests))


def _read(file: Traversable) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise UserError(f"prompts: {file} is missing; copy the shipped file and edit it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {file} cannot be read: {error}") from None
    if not text:
        raise UserError(f"prompts: {file} is empty; write it, or remove the folder to use the shipped prompt")
    return text


def _object(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _format(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


_TEXT = {"type": "string"}
RESPONSE_SCHEMAS: dict[Flavour, dict[str, Any]] = {
    "conversation": _format(
        "conversation", _object(turns={"type": "array", "items": _object(question=_TEXT, answer=_TEXT)})
    ),
    "detail": _format("detail", _object(description=_TEXT)),
    "reasoning": _format("reasoning", _object(question=_TEXT, answer=_TEXT)),
}
"""Schemas sent as `response_format` (platform.openai.com, Structured Outputs: strict, with all keys required)."""
