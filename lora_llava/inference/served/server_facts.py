"""Which software serves a model, which models it has, and which ids it makes of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from lora_llava.inference.client.client import ChatServer

Kind = Literal["vLLM", "llama.cpp", "SGLang", "other"]
_OWNERS: dict[str, Kind] = {"vllm": "vLLM", "llamacpp": "llama.cpp", "sglang": "SGLang"}
"""`owned_by` in the list of models (vllm/entrypoints/openai/models/serving.py, llama.cpp: server-context.cpp,
sglang/srt/entrypoints/http_server.py)."""


@dataclass(frozen=True)
class ServerFacts:
    """A server's software and models.

    Attributes:
        kind: Its software; `other` if it cannot be recognised.
        names: Names of its models.
        parents: By name, the base of a model that is an adapter; vLLM alone reports it.
    """

    kind: Kind
    names: tuple[str, ...]
    parents: Mapping[str, str]


def read_facts(server: ChatServer) -> ServerFacts:
    """Read a server's list of models; a server that has none is of kind `other`, without names."""
    found = _get(server, f"{server.url}/models")
    listed = found.get("data") if isinstance(found, dict) else None
    models = [model for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []
    owners = {_OWNERS.get(str(model.get("owned_by"))) for model in models} - {None}
    names = tuple(str(model.get("id")) for model in models)
    parents = {str(model["id"]): str(model["parent"]) for model in models if model.get("parent") and model.get("id")}
    return ServerFacts(owners.pop() or "other" if len(owners) == 1 else "other", names, parents)


def served_ids(server: ChatServer, facts: ServerFacts, messages: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Return the ids that a server makes of chat messages.

    Args:
        server: The server, with the model's name and the request fields.
        facts: Of `read_facts`.
        messages: In OpenAI's form.

    Returns:
        The ids with one `<image>` id per image token; None if the server does not report them. llama.cpp reports none
        for messages with an image.
    """
    root = server.url.removesuffix("/v1")
    if facts.kind == "vLLM":
        body = {"model": server.model, "messages": messages, **server.fields}
        return _ids(_post(server, f"{root}/tokenize", body))
    if facts.kind == "llama.cpp" and all(isinstance(message["content"], str) for message in messages):
        written = _post(server, f"{root}/apply-template", {"messages": messages})
        if not isinstance(written, dict) or not isinstance(written.get("prompt"), str):
            return None
        body = {"content": written["prompt"], "add_special": True, "parse_special": True}
        return _ids(_post(server, f"{root}/tokenize", body))
    return None


def _ids(found: Any) -> list[int] | None:
    tokens = found.get("tokens") if isinstance(found, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        return None
    return tokens


def _get(server: ChatServer, url: str) -> Any:
    return _json(server, "GET", url, None)


def _post(server: ChatServer, url: str, body: Mapping[str, Any]) -> Any:
    return _json(server, "POST", url, body)


def _json(server: ChatServer, method: str, url: str, body: Mapping[str, Any] | None) -> Any:
    """Return the JSON of a page; None for a server that has no such page or fails at it."""
    headers = {"Authorization": f"Bearer {server.key}"}
    try:
        response = httpx.request(method, url, json=body, headers=headers, timeout=server.timeout)
        return response.json() if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError, RecursionError):
        return None
