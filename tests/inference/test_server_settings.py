"""Where requests are sent: URLs, keys, models and images."""

from __future__ import annotations

import base64
import io
import time

import pytest
from inference.chat_server import ChatLog
from inference.test_server import KEY, error_of, quick, request
from PIL import Image

from lora_llava.core.errors import UserError
from lora_llava.inference.client.client import ChatAnswer, ChatRequest, ChatServer, ask, find_model, image_part


def test_the_only_model_is_found_and_several_are_listed(log: ChatLog) -> None:
    assert find_model(quick(log)).model == "judge"
    log.models = ["small", "large"]
    assert error_of(quick(log)) == f"{log.url} has 2 models; name one: small, large"
    log.models = []
    assert error_of(quick(log)) == f"{log.url} has no model; load one there"


def test_a_server_that_still_loads_its_model_is_not_ready(log: ChatLog) -> None:
    log.gone_until = time.monotonic() + 60
    assert error_of(quick(log)) == f"{log.url} is not ready (HTTP 503); wait until its model is loaded, or see its log"


def test_an_unknown_model_is_reported_with_the_known_ones(log: ChatLog) -> None:
    log.models = ["small", "large"]
    message = error_of(quick(log, model="lagre"))
    assert message == f"{log.url} does not know the model 'lagre' (HTTP 404); it has: small, large"
    assert error_of(ChatServer(log.url + "/elsewhere")) == (
        f"{log.url}/elsewhere does not list its models (HTTP 404); name the model, or fix the URL"
    )


def test_the_key_comes_from_the_environment_and_is_not_printed(log: ChatLog, monkeypatch: pytest.MonkeyPatch) -> None:
    list(ask(quick(log), [request("a")]))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = quick(log)
    list(ask(server, [request("a")]))
    list(ask(quick(log, api_key="another"), [request("a")]))
    assert log.keys == {"Bearer no-key", f"Bearer {KEY}", "Bearer another"}
    assert KEY not in repr(server)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9")
    with pytest.raises(UserError, match="characters that are invalid in a key"):
        quick(log)


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://api.example.com/v1/", "https://api.example.com/v1"),
        ("http://localhost:1/openai/v1/chat/completions", "http://localhost:1/openai/v1"),
    ],
)
def test_urls(value: str, url: str) -> None:
    assert ChatServer(value).url == url


@pytest.mark.parametrize(
    "url", ["localhost:8000", "", "ftp://a", "http://", "http://a:b", "http://[", "http://a:99999"]
)
def test_invalid_urls(url: str) -> None:
    with pytest.raises(UserError, match="give one such as http://localhost:8000/v1"):
        ChatServer(url)


def test_invalid_settings() -> None:
    for settings in ({"concurrency": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}):
        with pytest.raises(UserError, match=f"{next(iter(settings))} is "):
            ChatServer("http://a", **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="password") as error:
        ChatServer("http://me:secret@a")
    assert "secret" not in str(error.value)


def test_images_are_sent_lossless_unless_large(log: ChatLog) -> None:
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    part = image_part(image)
    head, _, content = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as sent:
        assert sent.tobytes() == image.tobytes()
    url = image_part(Image.new("L", (1025, 1024)))["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as sent:
        assert (sent.format, sent.size, sent.mode) == ("JPEG", (1025, 1024), "RGB")
    parts = [part, {"type": "text", "text": "What is it?"}]
    assert isinstance(dict(ask(quick(log), [ChatRequest([{"role": "user", "content": parts}], 5)]))[0], ChatAnswer)
    assert log.requests[0]["messages"][0]["content"] == parts
