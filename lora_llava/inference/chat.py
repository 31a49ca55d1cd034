"""Chat with a model in the terminal, or answer a single prompt."""

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
from lora_llava.data.files.row_files import json_text
from lora_llava.data.formats import RowError, read_row
from lora_llava.data.images.image_sources import read_rgb
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
    "/reset": ("", "start a new conversation, without attached images"),
    "/save": ("PATH", "write the conversation as a JSON file for `data.format: conversations`"),
    "/help": ("", "show this list"),
    "/exit": ("", "leave, as Ctrl-D does"),
}
_HELP = "\n".join(f"{f'{name} {argument}':13}{what}" for name, (argument, what) in COMMANDS.items()) + (
    "\nCtrl-C stops an answer. End a line with \\ to continue the message on the next line. To start a message with /, "
    "type a space before it."
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""C0 and C1 control characters except newline and tab: they start escape sequences and move the cursor."""


@dataclass
class AttachedImage:
    """An opened image with its file."""

    file: Path
    image: Image.Image


@dataclass
class Chat:
    """A conversation in the terminal.

    Attributes:
        speaker: The model that answers.
        sampling: How tokens are sampled.
        system: System prompt that replaces the template's; None keeps the template's.
        messages: The messages so far, without the system prompt.
        shown: Files of their images, in order.
        attached: Images for the next message.
    """

    speaker: Speaker
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    shown: list[Path] = field(default_factory=list)
    attached: list[AttachedImage] = field(default_factory=list)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with the system prompt first, if there is one."""
        return [text_message("system", self.system), *messages] if self.system is not None else list(messages)


def clean_text(text: str) -> str:
    """Remove control characters, so that no escape sequence from a model or a file reaches the terminal."""
    return _CONTROL.sub("", text)


def open_images(paths: Sequence[str | Path], background: Background = "white") -> list[AttachedImage]:
    """Open images.

    Args:
        paths: The image files.
        background: The colour behind transparent parts.

    Raises:
        UserError: For an image that is missing, broken or too large, or for a folder.
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
        speaker: The model that answers.
        prompt: The text of the message.
        images: The images of the message.
        sampling: How tokens are sampled.
        system: System prompt that replaces the template's.

    Raises:
        UserError: For a message that is empty or does not fit the model.
        KeyboardInterrupt: If the answer is stopped.
    """
    if not prompt.strip() and not images:
        raise UserError("--prompt is empty; write a question, or attach an image with --image")
    chat = Chat(speaker, sampling, system, attached=list(images))
    _, finish = _speak(chat, prompt)
    if finish == "stopped":
        raise KeyboardInterrupt
    if finish == "length":
        _note(_cut_off(chat))


def chat_on_terminal(chat: Chat) -> None:
    """Read messages and commands from stdin until it ends, and print answers on stdout and notes on stderr.

    Args:
        chat: The conversation, usually empty.

    Raises:
        KeyboardInterrupt: On Ctrl-C, if stdin is not a terminal; in a terminal, Ctrl-C stops an answer or leaves.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - adds line editing and history to input()
        _note(f"{chat.speaker.name}: /image PATH attaches an image, /help lists the commands")
        if chat.speaker.single_turn:
            _note("this model was trained on captions: attach one image, then press Enter")
        _note_attached(chat.attached)
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
            _note("press Ctrl-C again to leave, or Ctrl-D, or type /exit")
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
            _note(f"{error} with /reset; this message was not kept")
        except UserError as error:
            _note(str(error))
        if interactive and not line.startswith("/"):
            print()


def _read_message(interactive: bool) -> str | None:
    """Read one message; a backslash at the end of a line continues it. Return None at the end of the input."""
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
    """Run a line as a command, or answer it as a message.

    Args:
        chat: The conversation.
        line: The line that was typed.

    Raises:
        UserError: For a command or message that cannot be processed; the conversation is unchanged.
        KeyboardInterrupt: If an answer is stopped and stdin is not a terminal.
    """
    if not line.startswith("/"):
        if line.strip() or chat.attached:
            send(chat, line.strip())
        return
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command not in COMMANDS:
        raise UserError(f"{command} is not a command{nearest(command, COMMANDS)}; /help lists them")
    if command in ("/image", "/save") and not argument:
        raise UserError(f"{command} needs a path")
    if command == "/image":
        _attach(chat, argument)
    elif command == "/save":
        paths = _paths_of(argument)
        _note(save_chat(chat, paths[0] if len(paths) == 1 else Path(argument).expanduser()))
    elif command == "/reset":
        chat.messages, chat.shown, chat.attached = [], [], []
        _note("started a new conversation")
    else:
        _note(_HELP)


def _paths_of(argument: str) -> list[Path]:
    """Return the paths of an argument: one path with or without spaces, or several written as in a shell."""
    unsplit = Path(argument).expanduser()
    try:
        parts = [Path(part).expanduser() for part in shlex.split(argument)]
        if len(parts) > 1 and (unsplit.exists() or not any(part.exists() for part in parts)):
            return [unsplit]
        return [unsplit] if unsplit.exists() else parts or [unsplit]
    except (ValueError, OSError):  # an open quote, or a name that is too long
        return [unsplit]


def _attach(chat: Chat, argument: str) -> None:
    images = open_images(_paths_of(argument), chat.speaker.background)
    chat.attached += images
    _note_attached(images)


def _note_attached(images: Sequence[AttachedImage]) -> None:
    for image in images:
        _note(f"{image.file}: {image.image.width} x {image.image.height}, attached to your next message")


def send(chat: Chat, text: str) -> None:
    """Print the answer to a message on stdout, and keep both unless the answer is empty.

    Args:
        chat: The conversation; its attached images are sent with the message.
        text: The message.

    Raises:
        UserError: For a message that does not fit the model.
        KeyboardInterrupt: If the answer is stopped and stdin is not a terminal.
    """
    answer, finish = _speak(chat, text)
    if finish == "stopped":
        if not sys.stdin.isatty():
            raise KeyboardInterrupt
        _note("(stopped)")
    if not answer:
        attached = "; its images stay attached" if chat.attached else ""
        _note(f"the answer is empty, so the message was not kept{attached}")
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
    """Print the answer to a message as it is generated; Ctrl-C stops it."""
    before = [] if chat.speaker.single_turn else chat.messages
    messages = chat.with_system([*before, _question(chat, text)])
    answer = ""
    with closing(stream_answer(chat.speaker, messages, chat.sampling)) as stream:
        try:
            while True:
                piece = next(stream)
                answer += piece
                print(clean_text(piece), end="", flush=True)
        except StopIteration as end:
            finish: Finish = end.value
        except KeyboardInterrupt:
            finish = "stopped"
    print()
    return answer, finish


def _cut_off(chat: Chat) -> str:
    return (
        f"(cut off after {chat.sampling.max_new_tokens} tokens or at the model's maximum length; see --max-new-tokens)"
    )


def _note(text: str) -> None:
    print(clean_text(text), file=sys.stderr, flush=True)


def save_chat(chat: Chat, file: Path) -> str:
    """Write the conversation as one row of messages, and copy its images into an `images` folder next to it.

    Args:
        chat: The conversation.
        file: A `.json` file; an existing one is replaced only if it is a saved chat.

    Returns:
        A message on what was written.

    Raises:
        UserError: If the conversation is empty, or the file has other content or cannot be written.
    """
    if not chat.messages:
        raise UserError("the conversation is empty; there is nothing to save")
    if file.suffix.lower() != ".json":
        raise UserError(f"{file} should end in .json, as {file.with_suffix('.json').name} does")
    replaced = file.exists()
    if replaced and not _is_saved_chat(file):
        raise UserError(f"{file} exists and is not a saved chat; choose another file")
    try:
        names = [_keep_image(image, file.parent / "images") for image in chat.shown]
        row = {"messages": [_as_saved(message) for message in chat.with_system(chat.messages)], "images": names}
        read_row(row, 0, position="as_written")
        file.write_text(json_text([row], indent=2) + "\n", encoding="utf-8")
    except RowError as error:
        raise UserError(f"this conversation was not saved, because it cannot be trained on: {error}") from None
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
    """Return a message with placeholders for its images, whose names the row stores separately."""
    parts = message["content"]
    if all(part["type"] == "text" for part in parts):
        return {"role": message["role"], "content": "".join(part["text"] for part in parts)}
    content = [{"type": "image"} if part["type"] == "image" else part for part in parts]
    return {"role": message["role"], "content": content}


def _keep_image(file: Path, folder: Path) -> str:
    """Copy an image into a folder under a unique name, unless it is already there; return the name."""
    folder.mkdir(exist_ok=True)
    number, target = 1, folder / file.name
    while target.exists() and not filecmp.cmp(file, target, shallow=False):
        number += 1
        target = folder / f"{file.stem}-{number}{file.suffix}"
    if not target.exists():
        shutil.copyfile(file, target)
    return target.name
