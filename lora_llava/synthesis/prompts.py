"""What the teacher is asked: a system message, examples, and the captions and boxes of the image."""

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
    """One example.

    Attributes:
        context: Captions and boxes, as `write_context` writes them.
        answer: JSON in the flavour's form.
    """

    context: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """What a flavour is asked for with.

    Attributes:
        flavour: Which.
        system: The system message.
        examples: In order.
        requests: Of `detail`, what the description will answer in the row; the teacher does not see it.
    """

    flavour: Flavour
    system: str
    examples: tuple[Example, ...]
    requests: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all of it, in hex."""
        parts = [self.flavour, self.system, [[each.context, each.answer] for each in self.examples], self.requests]
        return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()


def load_prompts(folder: Path | None = None) -> dict[Flavour, Prompt]:
    """Read the prompts.

    Args:
        folder: Holds a folder for each flavour that is to be asked otherwise; a flavour without one keeps the shipped
            prompt. In it are `system.txt`, examples as pairs of `example_1.context.txt` and `example_1.answer.json`
            (none are needed), and for `detail` a `requests.txt`, a request a line. None takes the shipped ones.

    Returns:
        Of all flavours.

    Raises:
        UserError: For a folder without any flavour, a file that is missing, unknown, empty or not UTF-8, or an example
            whose answer cannot be read.
    """
    shipped = resources.files("lora_llava.synthesis").joinpath("prompts")
    if folder is None:
        return {flavour: _load_flavour(shipped / flavour, flavour) for flavour in FLAVOURS}
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    unknown = [name for name in names if name not in FLAVOURS and not name.startswith((".", "_"))]
    if unknown or not any(name in FLAVOURS for name in names):
        told = f'a folder "{unknown[0]}"{nearest(unknown[0], FLAVOURS)}' if unknown else "none of the folders"
        raise UserError(f"prompts: {folder} has {told}; take {', '.join(FLAVOURS)}, one or more, as in {shipped}")
    return {
        flavour: _load_flavour((folder if flavour in names else shipped) / flavour, flavour) for flavour in FLAVOURS
    }


def prompt_hashes(prompts: dict[Flavour, Prompt]) -> dict[Flavour, str]:
    """SHA-256 of each prompt, in hex."""
    return {flavour: prompt.hash for flavour, prompt in prompts.items()}


def choose_request(prompt: Prompt, task_id: str) -> str | None:
    """What a description will answer: the same for a task in every run.

    Args:
        prompt: Of the flavour.
        task_id: Draws one.

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
        prompt: Of the flavour.
        context: Of the image.

    Returns:
        The system message, each example as a user's and an assistant's, and last the context alone, word for word.
    """
    messages = [{"role": "system", "content": prompt.system}]
    for example in prompt.examples:
        messages.append({"role": "user", "content": example.context})
        messages.append({"role": "assistant", "content": example.answer})
    return [*messages, {"role": "user", "content": write_context(context)}]


def _load_flavour(folder: Traversable, flavour: Flavour) -> Prompt:
    texts: dict[tuple[int, str], str] = {}
    known = {"system.txt", *(["requests.txt"] if flavour == "detail" else [])}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        match = _EXAMPLE.fullmatch(file.name)
        if match:
            texts[int(match[1]), match[2]] = _read(file)
        elif file.name not in known and file.name.endswith((".txt", ".json")):
            raise UserError(f"prompts: {file} is none of {', '.join(sorted(known))} and example_N.*; rename it")
    examples = []
    for number in sorted({number for number, _ in texts}):
        for part in ("context.txt", "answer.json"):
            if (number, part) not in texts:
                raise UserError(f"prompts: {folder}/example_{number}.{part} is missing; an example has both files")
        examples.append(Example(texts[number, "context.txt"], texts[number, "answer.json"]))
        read = parse_sample(examples[-1].answer, flavour, "-")
        if isinstance(read, Rejection):
            told = f"{folder}/example_{number}.answer.json is {read.reason} ({read.detail})"
            raise UserError(f"prompts: {told}; write it as the shipped examples are")
    requests = _read(folder / "requests.txt").splitlines() if flavour == "detail" else []
    requests = [line.strip() for line in requests if line.strip()]
    return Prompt(flavour, _read(folder / "system.txt"), tuple(examples), tuple(requests))


def _read(file: Traversable) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise UserError(f"prompts: {file} is missing; copy the shipped one and change it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {file} cannot be read: {error}") from None
    if not text:
        raise UserError(f"prompts: {file} is empty; write it, or take the folder away")
    return text


def _object(**properties: Any) -> dict[str, Any]:
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
"""What a server is given as `response_format` (platform.openai.com, Structured Outputs: strict, all keys required)."""
