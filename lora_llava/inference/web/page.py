"""The chat page of `lora-llava chat --web`: Gradio, served locally, without requests to other machines."""

from __future__ import annotations

import html
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from lora_llava.core.errors import UserError
from lora_llava.data.images.image_sources import read_rgb
from lora_llava.data.images.to_rgb import Background
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
from lora_llava.inference.web.web_address import check_address

MAX_UPLOAD = "64mb"
"""Size limit of an uploaded file; a 50-megapixel photograph as JPEG has about 25 MB."""
_LONGEST_PASTE = 100_000
"""Characters; Gradio turns a longer pasted text into an attached file."""
_OLDEST_GRADIO = (6, 24)
"""The first version with the setting `run_history`, which stores runs in the browser and is switched off here."""
_LEAST_HEIGHT = 320
"""Minimum height of the conversation in pixels; it fills the rest of the window and scrolls."""
_INVITATION = "Ask anything, with an image or without."
_CAPTIONS = "This model writes captions: send one image at a time, without a message."
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_STYLE = Path(__file__).with_name("web_page.css")
_COLOURS = {
    "body_background_fill": "#f7f7f5",
    "body_background_fill_dark": "#121315",
    "background_fill_secondary": "#f1f1ee",
    "background_fill_secondary_dark": "#24272b",
    "block_background_fill": "#ffffff",
    "block_background_fill_dark": "#1a1c1f",
    "border_color_primary": "#e4e4e0",
    "border_color_primary_dark": "#2c2f34",
    "color_accent": "#2f6fed",
    "color_accent_soft": "#e9f0fe",
    "color_accent_soft_dark": "#1d2b48",
    "slider_color": "#2f6fed",
    "slider_color_dark": "#7aa7ff",
    "block_radius": "12px",
    "button_border_width": "1px",
    "button_secondary_border_color": "#e4e4e0",
    "button_secondary_border_color_dark": "#2c2f34",
    "button_secondary_background_fill": "#ffffff",
    "button_secondary_background_fill_dark": "#1a1c1f",
    "button_secondary_background_fill_hover": "#f1f1ee",
    "button_secondary_background_fill_hover_dark": "#24272b",
}
"""The colours of the HTML pages that the package writes."""


def import_gradio() -> Any:
    """Import Gradio with its telemetry and version check switched off.

    Raises:
        UserError: If it is not installed, or too old.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio/analytics.py reads it before every request
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise UserError(f"--web needs {error.name}; pip install 'lora_llava[web]'") from None
    if tuple(int(part) for part in gradio.__version__.split(".")[:2]) < _OLDEST_GRADIO:
        raise UserError(f"--web needs a newer gradio than {gradio.__version__}; pip install -U 'lora_llava[web]'")
    return gradio


def serve(
    speaker: Speaker,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    sampling: Sampling | None = None,
    system: str | None = None,
    console: Console | None = None,
) -> None:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP, then remove uploaded images.

    Args:
        speaker: The model that answers, one request at a time.
        host: Address to serve the page on, without a password.
        port: The port, or 0 for any free one.
        sampling: Initial sampling settings of the page.
        system: System prompt that replaces the template's.
        console: Prints the page's address.

    Raises:
        UserError: If Gradio is missing or the address is in use.
    """
    console = console or Console()
    gradio = import_gradio()
    port = check_address(host, port)
    in_hand: dict[str, Answering] = {}
    _end_as_by_ctrl_c("SIGTERM", "SIGHUP")
    with tempfile.TemporaryDirectory(prefix="lora_llava_chat_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_page(speaker, sampling or Sampling(), system, in_hand)
        try:
            _launch(gradio, page, f"[{host}]" if ":" in host and not host.startswith("[") else host, port)
            console.print(f"{speaker.name} is at {page.local_url}, press Ctrl-C to stop", markup=False, soft_wrap=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        except OSError as error:  # in use since the check
            raise UserError(f"--port {port} cannot be used ({error}); choose another") from None
        finally:
            for answering in list(in_hand.values()):
                answering.stop.set()
            page.close(verbose=False)


def _end_as_by_ctrl_c(*names: str) -> None:
    """Handle signals like Ctrl-C, unless they already have a handler or are ignored, as SIGHUP is under nohup."""
    for name in names:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _launch(gradio: Any, page: Any, host: str, port: int) -> None:
    """Serve in the background, without a share link, history in the browser or requests for fonts."""
    fonts = ["system-ui", "sans-serif"]
    page.queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        css=_STYLE.read_text(encoding="utf-8"),
        theme=gradio.themes.Default(primary_hue="blue", font=fonts, font_mono=["monospace"]).set(**_COLOURS),
        app_kwargs={"middleware": [(_SameOrigin, (), {})]},
    )


class _SameOrigin:
    """Middleware with a content security policy that stops the browser from fetching from other machines."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


@dataclass
class Answering:
    """An answer in progress.

    Attributes:
        stop: Event that ends it.
        forget: Whether to clear the conversation when it ends.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    forget: bool = False


def build_page(
    speaker: Speaker, sampling: Sampling, system: str | None = None, in_hand: dict[str, Answering] | None = None
) -> Any:
    """Build the page.

    Args:
        speaker: The model that answers.
        sampling: Initial sampling settings.
        system: System prompt that replaces the template's.
        in_hand: Filled with the answers in progress, by Gradio's session hash.

    Returns:
        The `gradio.Blocks`; its API endpoint is `/chat`, whose texts are HTML.
    """
    gr = import_gradio()
    answer, stop, forget = _handlers(gr, speaker, sampling, system, {} if in_hand is None else in_hand)
    title = Path(speaker.name).resolve().name if Path(speaker.name).is_dir() else speaker.name
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as page:
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>{html.escape(title)}</h1>", elem_id="title", padding=False)
            clear = gr.Button("New conversation", elem_id="clear", size="sm", scale=0, min_width=160)
        chatbot = gr.Chatbot(
            show_label=False,
            scale=1,
            height=_LEAST_HEIGHT,
            render_markdown=False,
            latex_delimiters=[],
            buttons=[],
            allow_tags=False,
            allow_file_downloads=False,
            feedback_options=None,
            elem_id="chat",
            placeholder=_CAPTIONS if speaker.single_turn else _INVITATION,
        )
        box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Your message",
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            max_plain_text_length=_LONGEST_PASTE,
            autofocus=True,
            elem_id="message",
        )
        settings = _settings(gr, sampling, speaker.model.config.text_config.max_position_embeddings)
        outputs = [chatbot, box]
        box.submit(answer, [box, chatbot, *settings], outputs, api_name="chat", show_progress_on=chatbot)
        private = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        box.stop(stop, None, None, **private)
        clear.click(forget, None, outputs, **private)  # the message box keeps its text
    return page


def _handlers(
    gr: Any, speaker: Speaker, sampling: Sampling, system: str | None, in_hand: dict[str, Answering]
) -> tuple[Any, Any, Any]:
    """Return the handlers that answer a message, stop the answer, and start a new conversation.

    Only the handler of the answer updates the page while it runs; the others set flags for it. Gradio's `cancels` would
    also end it, but pieces in transit would then arrive after the canceller's update, and the page may show "Error".
    """

    def answer(
        message: dict[str, Any],
        history: list[Message],
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        request: Any,
    ) -> Iterator[tuple[Any, Any]]:
        chosen = replace(sampling, temperature=temperature, top_p=top_p, max_new_tokens=int(max_new_tokens))
        answering = in_hand[request.session_hash] = Answering()
        try:
            for state in _answer(gr, speaker, message, history, chosen, system, answering.stop):
                yield _nothing(gr) if answering.forget else state
            if answering.forget:
                yield _nothing(gr)
        finally:
            in_hand.pop(request.session_hash, None)

    def stop(request: Any) -> None:
        if request.session_hash in in_hand:
            in_hand[request.session_hash].stop.set()

    def forget(request: Any) -> tuple[Any, Any]:
        answering = in_hand.get(request.session_hash)
        if answering is None:
            return _nothing(gr)
        answering.forget = True
        answering.stop.set()
        return gr.skip(), gr.skip()

    for handler in (answer, stop, forget):
        handler.__annotations__["request"] = gr.Request  # Gradio passes the request by this annotation
    return answer, stop, forget


def _nothing(gr: Any) -> tuple[Any, Any]:
    """Return an empty conversation, and the message box with its text unchanged."""
    return [], _waiting(gr)


def _settings(gr: Any, sampling: Sampling, positions: int) -> list[Any]:
    """Build the sliders for temperature, top p and the longest answer."""
    temperature, top_p, longest = sampling.temperature, sampling.top_p, min(sampling.max_new_tokens, positions)
    highest, least = max(2, temperature), min(0.05, top_p)  # Gradio rejects values outside a slider's range
    with gr.Row(elem_id="settings"):
        return [
            gr.Slider(0, highest, temperature, step=0.05, label="Temperature", info="0 is greedy"),
            gr.Slider(least, 1, top_p, step=0.05, label="Top p", info="share of probability to sample from"),
            gr.Slider(1, positions, longest, step=1, label="Longest answer", info="in tokens"),
        ]


def _waiting(gr: Any, value: dict[str, Any] | None = None) -> Any:
    """Return the message box ready for input, unchanged or with this text and these files."""
    kept = {} if value is None else {"value": value}
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False, interactive=True, **kept)


def _answer(
    gr: Any,
    speaker: Speaker,
    message: dict[str, Any],
    history: list[Message],
    sampling: Sampling,
    system: str | None,
    stop: threading.Event,
) -> Iterator[tuple[Any, Any]]:
    """Yield the growing conversation and the message box; an unanswered message is put back into the box."""
    text, files = (message.get("text") or "").strip(), message.get("files") or []
    if not text and not files:
        yield gr.skip(), _waiting(gr)
        return
    shown = [*history, {"role": "user", "content": [*({"path": file} for file in files), *_as_html(text)]}]
    yield shown, gr.MultimodalTextbox(value="", submit_btn=False, stop_btn=True)
    answer = problem = ""
    try:
        before = [] if speaker.single_turn else [_as_message(turn, speaker.background) for turn in history]
        opening = [text_message("system", system)] if system is not None else []
        messages = [*opening, *before, user_message(text, _opened(files, speaker.background))]
        with closing(stream_answer(speaker, messages, sampling, stop)) as stream:
            while True:
                answer += next(stream)
                yield [*shown, {"role": "assistant", "content": _as_html(answer)}], gr.skip()
    except StopIteration as end:
        if end.value == "length":
            gr.Info("The answer is cut off at “Longest answer” or at the model's maximum length.")
        problem = "" if answer or end.value == "stopped" else "The answer is empty."
    except UserError as error:
        problem = f"{error} with “New conversation”" if isinstance(error, FullError) else str(error)
    except Exception as error:  # keep the page running
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
    if problem:
        gr.Warning(html.escape(problem), title="Not answered")
    if answer:
        yield [*shown, {"role": "assistant", "content": _as_html(answer)}], _waiting(gr)
    else:
        yield history, _waiting(gr, {"text": text, "files": files})


def _as_html(text: str) -> list[str]:
    """Escape a text for the page's history: Gradio renders HTML even without Markdown (MarkdownCode)."""
    return [html.escape(text, quote=False)] if text else []


def _parts_of(turn: Message) -> tuple[list[str], list[str]]:
    """Return texts and files of a turn in the page's history."""
    parts: Sequence[dict[str, Any]] = turn["content"]
    texts = [html.unescape(part["text"]) for part in parts if part["type"] == "text"]
    return texts, [part["file"]["path"] for part in parts if part["type"] == "file"]


def _as_message(turn: Message, background: Background) -> Message:
    texts, files = _parts_of(turn)
    if turn["role"] == "user":
        return user_message("\n".join(texts), _opened(files, background))
    return text_message(turn["role"], "".join(texts))


def _opened(files: Sequence[str], background: Background) -> list[Image.Image]:
    return [read_rgb(Path(file), Path(file).name, MAX_IMAGE_PIXELS, background) for file in files]
