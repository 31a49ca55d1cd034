"""`lora-llava chat` in the terminal: commands, history, saving, and how it ends."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from lora_llava.commands.main import main
from lora_llava.core.errors import UserError
from lora_llava.data.sources import open_source
from lora_llava.inference.chat import Chat, clean_text, run_line
from lora_llava.inference.open_model import open_speaker
from lora_llava.inference.sampling import Sampling
from lora_llava.inference.speak import Speaker, stream_answer, text_message, user_message
from tests.forked import start_process
from tests.inference.small_runs import draw_image, write_base

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def base(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(parts, tmp_path_factory.mktemp("base") / "llava")


@pytest.fixture(scope="module")
def speaker(base: str) -> Speaker:
    return open_speaker(base, template="vicuna_v1")


@pytest.fixture
def chat(speaker: Speaker) -> Chat:
    return Chat(speaker, SHORT)


def answer(chat: Chat, *messages: object) -> str:
    return "".join(stream_answer(chat.speaker, list(messages), chat.sampling))  # type: ignore[arg-type]


def error_of(chat: Chat, line: str) -> str:
    with pytest.raises(UserError) as caught:
        run_line(chat, line)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the conversation ----------------------------------------------------------------------------------------------


def test_turns_and_images_are_kept_and_sent_along(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.system = "Be brief."
    red = draw_image(tmp_path / "red.png")
    blue = draw_image(tmp_path / "blue.png", (30, 60, 220))
    for line in (f"/image {red}", f"/image {blue}", "Which is blue?"):
        run_line(chat, line)
    system = text_message("system", "Be brief.")
    question = user_message("Which is blue?", [Image.open(red), Image.open(blue)])
    first = answer(chat, system, question)
    assert len(first) > 3
    assert capsys.readouterr().out == clean_text(first) + "\n"
    assert chat.attached == []
    run_line(chat, "Sure?")
    second = answer(chat, system, question, text_message("assistant", first), user_message("Sure?"))
    assert second != answer(chat, system, user_message("Sure?"))
    assert capsys.readouterr().out == clean_text(second) + "\n"
    run_line(chat, "/reset")
    run_line(chat, "Sure?")
    assert capsys.readouterr().out == clean_text(answer(chat, system, user_message("Sure?"))) + "\n"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("my red image.png", "my red image.png"),
        ('"my red image.png"', "my red image.png"),
        ("my\\ red\\ image.png", "my red image.png"),
        ("~/it's.png", "it's.png"),
        ("plain.png", "plain.png"),
    ],
)
def test_paths_may_be_quoted_or_contain_spaces(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, name: str
) -> None:
    draw_image(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    run_line(chat, f"/image {written}")
    assert [image.file.name for image in chat.attached] == [name]
    assert chat.attached[0].image.size == (40, 24)


def test_several_images_may_be_named_at_once(chat: Chat, tmp_path: Path) -> None:
    one, two = draw_image(tmp_path / "1.png"), draw_image(tmp_path / "2 b.png")
    run_line(chat, f"/image {one} '{two}'")
    assert [image.file for image in chat.attached] == [one, two]
    assert error_of(chat, f"/image {one} 3.png") == "image 3.png is missing"


def test_a_bad_image_or_command_is_one_line_and_changes_nothing(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    for line, expected in (
        (f"/image {tmp_path}/broken.png", "broken.png cannot be read: it is not an image, or of an unknown format"),
        ("/image nowhere.png", "image nowhere.png is missing"),
        ("/image my own image.png", "image my own image.png is missing"),
        (f"/image {tmp_path}", f"{tmp_path} is a folder; name an image"),
        ("/image", "/image needs a path"),
        ("/imgae x", '/imgae is not a command (did you mean "/image"?); /help lists them'),
    ):
        assert error_of(chat, line).endswith(expected)
    assert (chat.messages, chat.attached) == ([], [])


def test_a_message_that_does_not_fit_leaves_the_conversation_unchanged(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    run_line(chat, "Hello")
    before = list(chat.messages)
    assert "the model only 512 positions; shorten the message or start a new conversation" in error_of(
        chat, "word " * 600
    )
    assert chat.messages == before
    run_line(chat, "  ")
    assert chat.messages == before


def test_a_caption_model_accepts_one_image_at_a_time(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = Chat(open_speaker(base, template="plain"), SHORT)
    image = draw_image(tmp_path / "a.png")
    assert error_of(captions, "What is it?").endswith("(template plain); send one image and no text")
    for _ in range(2):
        run_line(captions, f"/image {image}")
        run_line(captions, "")
    assert [message["role"] for message in captions.messages] == ["user", "assistant"]
    assert captions.shown == [image]
    one, two = capsys.readouterr().out.splitlines()
    assert one == two != ""


# --- saving --------------------------------------------------------------------------------------------------------


def test_a_saved_chat_can_be_read_as_training_data(chat: Chat, tmp_path: Path) -> None:
    one, two = draw_image(tmp_path / "a" / "x.png"), draw_image(tmp_path / "b" / "x.png", (30, 60, 220))
    chat.system = "Be brief."
    for line in (f"/image {one}", "First?", f"/image {two}", f"/image {one}", "Second?", f"/save {tmp_path}/talk.json"):
        run_line(chat, line)
    source = open_source(tmp_path / "talk.json", form="conversations", position="as_written")
    (row,) = source.read()
    texts = [message["content"][-1]["text"] for message in chat.messages]
    assert [(turn.role, turn.text) for turn in row.turns] == [
        ("system", "Be brief."),
        ("user", "<image>\nFirst?"),
        ("assistant", texts[1]),
        ("user", "<image>\n<image>\nSecond?"),
        ("assistant", texts[3]),
    ]
    assert row.images == ("x.png", "x-2.png", "x.png")
    assert [source.images.open(name).getpixel((0, 0)) for name in row.images] == [
        (220, 30, 30),
        (30, 60, 220),
        (220, 30, 30),
    ]


@pytest.mark.parametrize("written", ["my talk.json", '"my talk.json"', "my\\ talk.json", "~/my talk.json"])
def test_the_path_of_a_saved_chat_may_be_quoted_or_contain_spaces(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "talk.json").write_text("another's")
    run_line(chat, "Hello")
    for _ in range(2):
        run_line(chat, f"/save {written}")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["my talk.json", "talk.json"]
    assert (tmp_path / "talk.json").read_text() == "another's"


def test_saving_replaces_a_saved_chat_and_nothing_else(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(chat, f"/save {tmp_path}/t.json") == "the conversation is empty; there is nothing to save"
    run_line(chat, "Hello")
    run_line(chat, f"/save {tmp_path}/t.json")
    run_line(chat, "Again")
    run_line(chat, f"/save {tmp_path}/t.json")
    assert f"replaced: {tmp_path}/t.json" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "t.json").read_text())[0]["messages"]) == 4
    rows = [{"messages": [], "images": []}, {"messages": [], "images": []}]
    for content in ("{}", "my notes", json.dumps(rows), '[{"messages": [], "images": [], "id": 1}]'):
        (tmp_path / "mine.json").write_text(content)
        assert (
            error_of(chat, f"/save {tmp_path}/mine.json")
            == f"{tmp_path}/mine.json exists and is not a saved chat; choose another file"
        )
        assert (tmp_path / "mine.json").read_text() == content
    assert error_of(chat, f"/save {tmp_path}/t.txt") == f"{tmp_path}/t.txt should end in .json, as t.json does"
    assert (
        error_of(chat, f"/save {tmp_path}/no/t.json")
        == f"{tmp_path}/no/t.json cannot be read or written: No such file or directory"
    )


# --- the verb ------------------------------------------------------------------------------------------------------


def options(base: str, *more: str) -> list[str]:
    return ["chat", base, "--template", "vicuna_v1", "--max-new-tokens", "8", *more]


def test_one_question_prints_its_answer_alone(
    base: str, speaker: Speaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red, blue = draw_image(tmp_path / "red.png"), draw_image(tmp_path / "blue.png", (30, 60, 220))
    given = ["--image", str(red), "--image", str(blue), "--prompt", "Which?", "--system", "", "--seed", "3"]
    assert main(None, options(base, *given, "--temperature", "1.5", "--top-p", "0.9")) == 0
    question = [text_message("system", ""), user_message("Which?", [Image.open(red), Image.open(blue)])]
    expected = "".join(stream_answer(speaker, question, Sampling(1.5, 0.9, 8, 3)))
    assert capsys.readouterr().out == clean_text(expected) + "\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--prompt", " "], "error: --prompt is empty; write a question, or attach an image with --image"),
        (["--prompt", "x", "--image", "no.png"], "error: image no.png is missing"),
        (["--prompt", "x", "--web"], "error: --prompt and --image have no effect with --web; leave them out"),
        (["--port", "1"], "error: --host and --port have no effect without --web"),
        (["--prompt", "x", "--top-p", "0"], "error: top_p is 0.0; set it to a number above 0 and at most 1"),
    ],
)
def test_a_mistake_is_one_line(base: str, capsys: pytest.CaptureFixture[str], given: list[str], expected: str) -> None:
    capsys.readouterr()
    assert main(None, options(base, *given)) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(expected)
    assert captured.out == ""


def test_piped_lines_are_answered_one_by_one(
    base: str, speaker: Speaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "Hello \\\nthere\n/nothing\n /slash\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(None, options(base)) == 0
    first = "".join(stream_answer(speaker, [user_message("Hello \nthere")], SHORT))
    turns = [user_message("Hello \nthere"), text_message("assistant", first), user_message("/slash")]
    captured = capsys.readouterr()
    assert captured.out == "".join(
        clean_text(text) + "\n" for text in (first, "".join(stream_answer(speaker, turns, SHORT)))
    )
    assert "/nothing is not a command; /help lists them" in captured.err.splitlines()


def test_control_characters_never_reach_the_terminal() -> None:
    dangerous = "a\x1b[31mb\x9b2Jc\rd\x07e\nf\tg\x00\x7f\u202eé[/INST]"
    assert clean_text(dangerous) == "a[31mb2Jcde\nf\tg\u202eé[/INST]"


def in_terminal(name: str, arguments: list[str]) -> None:
    """Run the command in a terminal of its own; it stops by Ctrl-C, also where a shell started the tests without it."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for number in range(3):
        os.dup2(terminal, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(None, arguments))


class Terminal:
    """The controlling end of a pseudo-terminal."""

    def __init__(self, ours: int) -> None:
        self.ours, self.shown = ours, ""

    def wait_for(self, wanted: str, seconds: float = 60) -> None:
        """Read until the terminal shows a text, and discard everything up to its end."""
        end = time.monotonic() + seconds
        while wanted not in self.shown:
            ready, _, _ = select.select([self.ours], [], [], end - time.monotonic())
            assert ready, self.shown
            self.shown += os.read(self.ours, 4096).decode(errors="replace")
        self.shown = self.shown[self.shown.index(wanted) + len(wanted) :]

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


def wait_until_it_sleeps(pid: int) -> None:
    """Wait until a visible prompt also reads: Python's readline delays an earlier signal to the next line."""
    asleep = 0
    while asleep < 5:
        asleep = asleep + 1 if psutil.Process(pid).status() == psutil.STATUS_SLEEPING else 0
        time.sleep(0.02)


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_chat(base: str, speaker: Speaker, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = start_process(in_terminal, os.ttyname(theirs), [*options(base), "--max-new-tokens", "400"])
    assert process.pid is not None
    terminal = Terminal(ours)
    try:
        terminal.wait_for("you> ")
        terminal.type("Hello\n")
        terminal.wait_for("Hello\r\n")
        terminal.wait_for("e")  # the answer has begun
        os.kill(process.pid, signal.SIGINT)
        terminal.wait_for("(stopped)\r\n")
        terminal.wait_for("you> ")
        terminal.type(f"/save {tmp_path}/t.json\n")
        terminal.wait_for("saved: ")
        terminal.wait_for("you> ")
        wait_until_it_sleeps(process.pid)
        os.kill(process.pid, signal.SIGINT)
        terminal.wait_for("press Ctrl-C again to leave, or Ctrl-D, or type /exit")
        terminal.wait_for("you> ")
        terminal.type("/help\n")
        terminal.wait_for("/reset       start a new conversation, without attached images\r\n")
        terminal.wait_for("you> ")
        terminal.type("\x04")
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        os.close(theirs)
        os.close(ours)
    (row,) = json.loads((tmp_path / "t.json").read_text())
    stopped = row["messages"][1]["content"]
    complete = "".join(stream_answer(speaker, [user_message("Hello")], Sampling(max_new_tokens=400)))
    assert stopped != complete
    assert complete.startswith(stopped)
