"""Talking with a model on the terminal, or asking it one thing."""

from __future__ import annotations

import contextlib
import filecmp
import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lora_llava.core.errors import UserError, nearest
from lora_llava.data.files.reading import json_text
from lora_llava.data.formats import RowError, read_row
from lora_llava.data.images.reading import read_rgb
from lora_llava.data.images.to_rgb import Background
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import (
    MAX_IMAGE_PIXELS,
    Finish,
    FullError,
    Message,
    Speaker,
    stream_answer,
    text_message,
    user_message,
)

COMMANDS = {
    "/image": ("PATH", "attach an image to the next message; several may be attached"),
    "/reset": ("", "forget the conversation and attached images"),
    "/save": ("PATH", "write the conversation as a JSON file that `data.format: conversations` reads"),
    "/help": ("", "show this"),
    "/exit": ("", "leave; Ctrl-D does too"),
}
_HELP = "\n".join(f"{f'{name} {argument}':13}{what}" for name, (argument, what) in COMMANDS.items()) + (
    "\nCtrl-C stops an answer. A message goes on where its line ends with \\, and may start with / after a space."
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""C0 and C1 but newline and tab: what starts an escape sequence, and what moves the cursor."""


@dataclass
class AttachedImage:
    """An image that is shown to the model, and its file."""

    file: Path
    image: Image.Image


@dataclass
class Chat:
    """A conversation on the terminal.

    Attributes:
        speaker: Who answers.
        sampling: How.
        system: System text in place of the template's own; None keeps that.
        messages: What was said, without the system text.
        shown: Files of the images in it, in order.
        attached: Images of the next message.
    """

    speaker: Speaker
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    shown: list[Path] = field(default_factory=list)
    attached: list[AttachedImage] = field(default_factory=list)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [text_message("system", self.system), *messages] if self.system is not None else list(messages)


def clean_text(text: str) -> str:
    """Text without control characters, so that no escape sequence of a model's or a file's reaches the terminal."""
    return _CONTROL.sub("", text)


def open_images(paths: Sequence[str | Path], background: Background = "white") -> list[AttachedImage]:
    """Open images.

    Args:
        paths: Files.
        background: What transparent parts are composited on.

    Raises:
        UserError: For one that is missing, broken or too large, or a folder.
    """
    files = [Path(path).expanduser() for path in paths]
    folder = next((file for file in files if file.is_dir()), None)
    if folder is not None:
        raise UserError(f"{folder} is a folder; name an image")
    return [AttachedImage(file, read_rgb(file, str(file), MAX_IMAGE_PIXELS, background)) for file in files]


def answer_once(
    speaker: Speaker,
    prompt: str,
    *,
    images: Sequence[AttachedImage] = (),
    sampling: Sampling,
    system: str | None = None,
) -> None:
    """Print the answer to one message, and nothing else, on stdout.

    Args:
        speaker: Who answers.
        prompt: The message's text.
        images: What it shows.
        sampling: How tokens are drawn.
        system: System text in place of the template's own.

    Raises:
        UserError: For a message that is empty or does not fit the model.
        KeyboardInterrupt: Where it is stopped.
    """
    if not prompt.strip() and not images:
        raise UserError("--prompt is empty; give a question, or an image with --image")
    chat = Chat(speaker, sampling, system, attached=list(images))
    _, finish = _speak(chat, prompt)
    if finish == "stopped":
        raise KeyboardInterrupt
    if finish == "length":
        _note(_cut_off(chat))


def chat_on_terminal(chat: Chat) -> None:
    """Read messages and commands from stdin and answer them on stdout until it ends; everything else goes to stderr.

    Args:
        chat: The conversation, with nothing said as a rule.

    Raises:
        KeyboardInterrupt: Where stdin is no terminal; on one, Ctrl-C stops an answer, or leaves.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - gives input() its editing and history
        _note(f"{chat.speaker.name}: /image PATH attaches an image, /help lists the commands")
        if chat.speaker.single_turn:
            _note("it was trained on captions: attach one image, then press Enter")
        _tell_attached(chat.attached)
    warned = False
    while True:
        try:
            line = _read_message(interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            if warned:
                return
            _note("Ctrl-D or /exit leaves, and so does Ctrl-C again")
            warned = True
            continue
        warned = False
        if line is None or line.partition(" ")[0] == "/exit":
            if interactive and line is None:
                print()
            return
        try:
            run_line(chat, line)
        except FullError as error:
            _note(f"{error} with /reset; this message is not kept")
        except UserError as error:
            _note(str(error))
        if interactive and not line.startswith("/"):
            print()


def _read_message(interactive: bool) -> str | None:
    """One message; a line that ends with a backslash goes on in the next. None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            line = input(("...> " if lines else "you> ") if interactive else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def run_line(chat: Chat, line: str) -> None:
    """Do what a line asks for: run a command, or answer it.

    Args:
        chat: The conversation.
        line: What was typed.

    Raises:
        UserError: For a command or message that cannot be followed; the conversation stays as it was.
        KeyboardInterrupt: Where an answer is stopped and stdin is no terminal.
    """
    if not line.startswith("/"):
        if line.strip() or chat.attached:
            ask(chat, line.strip())
        return
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command not in COMMANDS:
        raise UserError(f"there is no command {command}{nearest(command, COMMANDS)}; /help lists them")
    if command in ("/image", "/save") and not argument:
        raise UserError(f"{command} needs a path")
    if command == "/image":
        _attach(chat, argument)
    elif command == "/save":
        paths = _paths_of(argument)
        _note(save_chat(chat, paths[0] if len(paths) == 1 else Path(argument).expanduser()))
    elif command == "/reset":
        chat.messages, chat.shown, chat.attached = [], [], []
        _note("a new conversation")
    else:
        _note(_HELP)


def _paths_of(argument: str) -> list[Path]:
    """The paths that an argument means: one as it stands, or one or more that are written as in a shell."""
    whole = Path(argument).expanduser()
    try:
        parts = [Path(part).expanduser() for part in shlex.split(argument)]
        if len(parts) > 1 and (whole.exists() or not any(part.exists() for part in parts)):
            return [whole]
        return [whole] if whole.exists() else parts or [whole]
    except (ValueError, OSError):  # an open quote; a name too long
        return [whole]


def _attach(chat: Chat, argument: str) -> None:
    images = open_images(_paths_of(argument), chat.speaker.background)
    chat.attached += images
    _tell_attached(images)


def _tell_attached(images: Sequence[AttachedImage]) -> None:
    for image in images:
        _note(f"{image.file}: {image.image.width} x {image.image.height}, goes with your next message")


def ask(chat: Chat, text: str) -> None:
    """Answer a message on stdout and keep both, unless nothing was answered.

    Args:
        chat: The conversation; attached images go with the message.
        text: The message.

    Raises:
        UserError: For a message that the model cannot take.
        KeyboardInterrupt: Where the answer is stopped and stdin is no terminal.
    """
    answer, finish = _speak(chat, text)
    if finish == "stopped":
        if not sys.stdin.isatty():
            raise KeyboardInterrupt
        _note("(stopped)")
    if not answer:
        attached = "; its images stay attached" if chat.attached else ""
        _note(f"there is no answer, and the message is not kept{attached}")
        return
    if finish == "length":
        _note(_cut_off(chat))
    if chat.speaker.single_turn:
        chat.messages, chat.shown = [], []
    chat.messages += [_question(chat, text), text_message("assistant", answer)]
    chat.shown += [image.file for image in chat.attached]
    chat.attached = []


def _question(chat: Chat, text: str) -> Message:
    return user_message(text, [image.image for image in chat.attached])


def _speak(chat: Chat, text: str) -> tuple[str, Finish]:
    """Print the answer to a message as it comes; Ctrl-C stops it."""
    before = [] if chat.speaker.single_turn else chat.messages
    messages = chat.with_system([*before, _question(chat, text)])
    said = ""
    with closing(stream_answer(chat.speaker, messages, chat.sampling)) as stream:
        try:
            while True:
                piece = next(stream)
                said += piece
                print(clean_text(piece), end="", flush=True)
        except StopIteration as end:
            finish: Finish = end.value
        except KeyboardInterrupt:
            finish = "stopped"
    print()
    return said, finish


def _cut_off(chat: Chat) -> str:
    return f"(cut off at {chat.sampling.max_new_tokens} tokens, or at the model's last position; see --max-new-tokens)"


def _note(text: str) -> None:
    print(clean_text(text), file=sys.stderr, flush=True)


def save_chat(chat: Chat, file: Path) -> str:
    """Write the conversation as one row of messages, its images copied into `images` beside it, where a recipe looks.

    Args:
        chat: The conversation.
        file: A `.json` file; only a chat that was saved there before is replaced.

    Returns:
        What was written.

    Raises:
        UserError: Where nothing was said, the file holds something else, or cannot be written.
    """
    if not chat.messages:
        raise UserError("nothing has been said yet; there is nothing to save")
    if file.suffix.lower() != ".json":
        raise UserError(f"{file} should be called .json, such as {file.with_suffix('.json').name}")
    replaced = file.exists()
    if replaced and not _is_saved_chat(file):
        raise UserError(f"{file} is there and is no saved chat; name another file")
    try:
        names = [_keep_image(image, file.parent / "images") for image in chat.shown]
        row = {"messages": [_as_saved(message) for message in chat.with_system(chat.messages)], "images": names}
        read_row(row, 0, position="as_written")
        file.write_text(json_text([row], indent=2) + "\n", encoding="utf-8")
    except RowError as error:
        raise UserError(f"this conversation cannot be trained on, and is not saved: {error}") from None
    except OSError as error:
        raise UserError(f"{error.filename or file} cannot be read or written: {error.strerror}") from None
    images = f", its images in {file.parent / 'images'}" if names else ""
    return f"{'replaced' if replaced else 'saved'}: {file}{images}"


def _is_saved_chat(file: Path) -> bool:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return len(rows) == 1 and set(rows[0]) == {"messages", "images"}
    except (OSError, ValueError, TypeError):
        return False


def _as_saved(message: Message) -> Message:
    """A message whose images are named beside it."""
    parts = message["content"]
    if all(part["type"] == "text" for part in parts):
        return {"role": message["role"], "content": "".join(part["text"] for part in parts)}
    content = [{"type": "image"} if part["type"] == "image" else part for part in parts]
    return {"role": message["role"], "content": content}


def _keep_image(file: Path, folder: Path) -> str:
    """Copy an image into a folder unless it is there, under a name that no other image has."""
    folder.mkdir(exist_ok=True)
    number, target = 1, folder / file.name
    while target.exists() and not filecmp.cmp(file, target, shallow=False):
        number += 1
        target = folder / f"{file.stem}-{number}{file.suffix}"
    if not target.exists():
        shutil.copyfile(file, target)
    return target.name
