"""A page to talk with a model: Gradio, served on this machine, without a request to any other."""

from __future__ import annotations

import errno
import html
import ipaddress
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from lora_llava.data.images import read_rgb
from lora_llava.errors import UserError
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import (
    MAX_IMAGE_PIXELS,
    FullError,
    Message,
    Speaker,
    stream_answer,
    text_message,
    user_message,
)

MAX_UPLOAD = "64mb"
"""Most bytes of an uploaded file; a 50-megapixel photograph as JPEG has about 25 MB."""
_LONGEST_PASTE = 100_000
"""Characters; what is pasted beyond them would become an attached file."""
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_CSS = """
footer, #chat .wrapper > .icon-button-wrapper, #chat .message-buttons-right { display: none !important }
.gradio-container > main { padding-top: 1.25rem }
#head { align-items: center }
#title { padding: 0 }
#title h1 { font-size: 1.5rem; font-weight: 650; line-height: 2rem; margin: 0; overflow-wrap: anywhere }
#chat .bubble-wrap { padding: 1rem .75rem }
#chat .user, #chat .bot { border: 0; border-radius: 12px; box-shadow: none; padding: .6rem .9rem }
#chat .user :is(.user, .message), #chat .bot .message { padding: 0 }
#chat .bot { background: var(--background-fill-secondary) }
#chat .image-container > button { justify-content: flex-start }
#chat .image-frame img { min-width: 13rem; max-height: 20rem; margin: .25rem 0 .6rem; border-radius: 8px; object-fit: contain }
#chat .image-container .icon-button-wrapper { opacity: 0 }
#chat .image-container:is(:hover, :focus-within) .icon-button-wrapper { opacity: 1 }
#message .submit-button, #message .stop-button { background: var(--color-accent); color: white; border-radius: 10px }
#settings .form { border-radius: 12px }
"""
"""Without Gradio's own bin, which does not stop the answer in hand, and its button that would send a shown picture to
huggingface.co (js/chatbot/shared/ButtonPanel.svelte of Gradio's repository). Small pictures are shown larger."""
_COLOURS = {
    "body_background_fill": "#f7f7f5", "body_background_fill_dark": "#121315",
    "background_fill_secondary": "#f1f1ee", "background_fill_secondary_dark": "#24272b",
    "block_background_fill": "#ffffff", "block_background_fill_dark": "#1a1c1f",
    "border_color_primary": "#e4e4e0", "border_color_primary_dark": "#2c2f34",
    "color_accent": "#2f6fed", "color_accent_soft": "#e9f0fe", "color_accent_soft_dark": "#1d2b48",
    "slider_color": "#2f6fed", "slider_color_dark": "#7aa7ff", "block_radius": "12px",
    "button_secondary_background_fill": "#ffffff", "button_secondary_background_fill_dark": "#1a1c1f",
    "button_secondary_background_fill_hover": "#f1f1ee", "button_secondary_background_fill_hover_dark": "#24272b",
}  # fmt: skip
"""Those of the pages that the package writes to files."""


def import_gradio() -> Any:
    """Import Gradio with its telemetry and its question for newer versions off.

    Raises:
        UserError: Where it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio/analytics.py reads it before every request
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise UserError(f"--web needs {error.name}; pip install 'lora_llava[web]'") from None
    return gradio


def check_address(host: str, port: int) -> int:
    """Hold that a page can be served at an address.

    Args:
        host: A name or address of this machine.
        port: 0 for any that is free.

    Returns:
        The port.

    Raises:
        UserError: Where it is taken, or not to be had.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port {port} is no port; give a number from 1024 to 65535, or 0 for any free one")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: one just closed is free
            probe.bind(found[4])
            return int(probe.getsockname()[1])
    except socket.gaierror:
        raise UserError(f"--host {host} is not known; give an address of this machine, such as 127.0.0.1") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} is taken; name another, or 0 for any free one") from None
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port} is the system's; name one from 1024 on") from None
        raise UserError(f"--host {host} cannot be served on ({error.strerror}); leave it out") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    speaker: Speaker, *, host: str = "127.0.0.1", port: int = 7860, sampling: Sampling | None = None,
    system: str | None = None, console: Console | None = None,
) -> None:  # fmt: skip
    """Serve the page until Ctrl-C. Pictures that were uploaded are removed with it.

    Args:
        speaker: Who answers, one person at a time.
        host: Where the page is served; there is no password.
        port: 0 for any that is free.
        sampling: What the page starts with.
        system: System text in place of the template's own.
        console: Told the page's address.

    Raises:
        UserError: Where Gradio is missing or the address is taken.
    """
    console = console or Console()
    gradio = import_gradio()
    port = check_address(host, port)
    leaving = threading.Event()
    with tempfile.TemporaryDirectory(prefix="lora_llava_chat_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_page(speaker, sampling or Sampling(), system, leaving)
        try:
            _launch(gradio, page, f"[{host}]" if ":" in host and not host.startswith("[") else host, port)
            console.print(f"{speaker.name} is at {page.local_url}, Ctrl-C ends it", soft_wrap=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        except OSError as error:  # taken since it was looked at
            raise UserError(f"--port {port} cannot be served on ({error}); name another") from None
        finally:
            leaving.set()
            page.close(verbose=False)


def _launch(gradio: Any, page: Any, host: str, port: int) -> None:
    """Serve in the background: no share link, no history kept in the browser, no request for fonts."""
    fonts = ["system-ui", "sans-serif"]
    page.queue(default_concurrency_limit=1).launch(
        server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, show_error=True,
        max_file_size=MAX_UPLOAD, ssr_mode=False, mcp_server=False, pwa=False, run_history=False,
        enable_monitoring=False, footer_links=[], css=_CSS,
        theme=gradio.themes.Default(primary_hue="blue", font=fonts, font_mono=["monospace"]).set(**_COLOURS),
        app_kwargs={"middleware": [(_SameOrigin, (), {})]},
    )  # fmt: skip


class _SameOrigin:
    """Tells the browser, with every response, to fetch nothing from another machine, whatever the page asks for."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def build_page(
    speaker: Speaker, sampling: Sampling, system: str | None = None, leaving: threading.Event | None = None
) -> Any:
    """Lay the page out.

    Args:
        speaker: Who answers.
        sampling: What the settings start with.
        system: System text in place of the template's own.
        leaving: Once set, it stops the answer in hand.

    Returns:
        The `gradio.Blocks`; its endpoint for programs is `/chat`, whose texts are HTML.
    """
    gr = import_gradio()
    positions = speaker.model.config.text_config.max_position_embeddings

    def answer(
        message: dict[str, Any], history: list[Message], temperature: float, top_p: float, max_new_tokens: float
    ) -> Iterator[tuple[Any, Any]]:
        chosen = replace(sampling, temperature=temperature, top_p=top_p, max_new_tokens=int(max_new_tokens))
        yield from _answer(gr, speaker, message, history, chosen, system, leaving)

    with gr.Blocks(title=speaker.name, analytics_enabled=False, fill_height=True) as page:
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>{html.escape(speaker.name)}</h1>", elem_id="title", padding=False)
            clear = gr.Button("New conversation", elem_id="clear", size="sm", scale=0, min_width=160)
        chatbot = gr.Chatbot(
            show_label=False, scale=1, height="auto", render_markdown=False, latex_delimiters=[], buttons=[],
            allow_tags=False, allow_file_downloads=False, feedback_options=None, elem_id="chat",
            placeholder="Attach a picture, or none, and ask.",
        )  # fmt: skip
        box = gr.MultimodalTextbox(
            show_label=False, placeholder="Your message", sources=["upload"], file_types=["image"], file_count="multiple",
            max_plain_text_length=_LONGEST_PASTE, autofocus=True, elem_id="message",
        )  # fmt: skip
        with gr.Row(elem_id="settings"):
            temperature = gr.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature", info="0 takes the likeliest token")
            top_p = gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="Top p", info="draws among the likeliest")
            most = min(sampling.max_new_tokens, positions)
            limit = gr.Slider(1, positions, most, step=1, label="Longest answer", info="in tokens")
        settings = [temperature, top_p, limit]
        outputs = [chatbot, box]
        asking = box.submit(answer, [box, chatbot, *settings], outputs, api_name="chat", show_progress_on=chatbot)
        private = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "cancels": [asking]}
        box.stop(lambda history: _stopped(gr, history), [chatbot], outputs, **private)
        clear.click(lambda: ([], _waiting(gr, {"text": "", "files": []})), None, outputs, **private)
    return page


def _waiting(gr: Any, value: dict[str, Any] | None = None) -> Any:
    """The message box ready for a message: as it stands, or with this text and these files in it."""
    kept = {} if value is None else {"value": value}
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False, interactive=True, **kept)


def _stopped(gr: Any, history: list[Message]) -> tuple[Any, Any]:
    """What a stopped answer leaves: what was said of it, or the message back in its box."""
    if not history or history[-1]["role"] != "user":
        return gr.skip(), _waiting(gr)
    texts, files = _parts_of(history[-1])
    return history[:-1], _waiting(gr, {"text": "\n".join(texts), "files": files})


def _answer(
    gr: Any, speaker: Speaker, message: dict[str, Any], history: list[Message], sampling: Sampling,
    system: str | None, leaving: threading.Event | None,
) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """The conversation as it grows, and the message box; a message that cannot be answered goes back there."""
    text, files = (message.get("text") or "").strip(), message.get("files") or []
    if not text and not files:
        yield gr.skip(), _waiting(gr)
        return
    shown = [*history, {"role": "user", "content": [*({"path": file} for file in files), *_as_html(text)]}]
    yield shown, gr.MultimodalTextbox(value="", submit_btn=False, stop_btn=True)
    said = problem = ""
    try:
        before = [] if speaker.single_turn else [_as_message(turn) for turn in history]
        opening = [text_message("system", system)] if system is not None else []
        messages = [*opening, *before, user_message(text, _opened(files))]
        with closing(stream_answer(speaker, messages, sampling, leaving)) as stream:
            while True:
                said += next(stream)
                yield [*shown, {"role": "assistant", "content": _as_html(said)}], gr.skip()
    except StopIteration as end:
        if end.value == "length":
            gr.Info("The answer is cut off: at the most tokens, or at the model's last position.")
        problem = "" if said else "The model said nothing."
    except UserError as error:
        problem = f"{error}: “New conversation”" if isinstance(error, FullError) else str(error)
    if problem:
        gr.Warning(html.escape(problem), title="Not answered")
    if said:
        yield [*shown, {"role": "assistant", "content": _as_html(said)}], _waiting(gr)
    else:
        yield history, _waiting(gr, {"text": text, "files": files})


def _as_html(text: str) -> list[str]:
    """A text as the page's history holds it: Gradio shows HTML without markdown too (MarkdownCode, render_markdown)."""
    return [html.escape(text, quote=False)] if text else []


def _parts_of(turn: Message) -> tuple[list[str], list[str]]:
    """Texts and files of a turn of the page's history."""
    parts: Sequence[dict[str, Any]] = turn["content"]
    texts = [html.unescape(part["text"]) for part in parts if part["type"] == "text"]
    return texts, [part["file"]["path"] for part in parts if part["type"] == "file"]


def _as_message(turn: Message) -> Message:
    texts, files = _parts_of(turn)
    if turn["role"] == "user":
        return user_message("\n".join(texts), _opened(files))
    return text_message(turn["role"], "".join(texts))


def _opened(files: Sequence[str]) -> list[Image.Image]:
    return [read_rgb(Path(file), Path(file).name, MAX_IMAGE_PIXELS) for file in files]
