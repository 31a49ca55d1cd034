"""Take a screenshot for the README in a headless Chromium: of `lora-llava chat MODEL --web`, or of an HTML file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from browser import Browser, find_chromium

from lora_llava.core.quiet import quieten

BOX = "document.querySelector('#message textarea')"
IMAGE = "[...document.querySelectorAll('#chat img')].some(e => e.naturalWidth && e.complete)"
ANSWER = "[...document.querySelectorAll('#chat [data-testid=bot]')].map(e => e.textContent).join(' ')"
BUSY = "!!document.querySelector('#message .stop-button')"


def main() -> None:
    """Take one screenshot, by the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    chat = verbs.add_parser("chat", help="the page of `lora-llava chat --web`, with one question asked")
    chat.add_argument("model", help="run, folder with a complete LLaVA, or Hub id")
    chat.add_argument("--image", type=Path, help="an image instead of the demo's")
    chat.add_argument("--question", help="a question about it")
    page = verbs.add_parser("page", help="a self-contained HTML file")
    page.add_argument("file", type=Path)
    page.add_argument("--full", action="store_true", help="the complete page instead of its first screen")
    page.add_argument("--from", dest="start", metavar="SELECTOR", help="scroll to the first match of this CSS selector")
    for verb, height in ((chat, 760), (page, 900)):
        verb.add_argument("out", type=Path, help="the PNG")
        verb.add_argument("--width", type=int, default=1200)
        verb.add_argument("--height", type=int, default=height)
    args = parser.parse_args()
    if args.verb == "chat" and (args.image is None) != (args.question is None):
        parser.error("--image and --question go together")
    needed = args.image if args.verb == "chat" else args.file
    if needed is not None and not needed.is_file():
        parser.error(f"{needed} is missing")
    if not args.out.parent.is_dir():
        parser.error(f"{args.out.parent} is not a folder")
    with _browser(args.width, args.height) as browser:
        content = _chat(browser, args) if args.verb == "chat" else _page(browser, args)
    args.out.write_bytes(content)
    print(f"{args.out}: {len(content) / 1000:.0f} kB")


@contextmanager
def _browser(width: int, height: int) -> Iterator[Browser]:
    """Start Chromium with a light page of exactly this size."""
    executable = find_chromium()
    if executable is None:
        sys.exit("no Chromium was found; install chromium or Google Chrome")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        with closing(Browser(executable, Path(profile), width, height)) as browser:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            browser.call("Emulation.setDeviceMetricsOverride", **size)
            light = [{"name": "prefers-color-scheme", "value": "light"}]
            browser.call("Emulation.setEmulatedMedia", features=light)
            browser.call("Emulation.setScrollbarsHidden", hidden=True)
            yield browser


def _page(browser: Browser, args: argparse.Namespace) -> bytes:
    browser.open(args.file.resolve().as_uri())
    browser.wait_for("document.readyState == 'complete' && document.fonts.status == 'loaded'")
    if args.start:
        browser.wait_for(f"!!document.querySelector({json.dumps(args.start)})")
        browser.evaluate(f"document.querySelector({json.dumps(args.start)}).scrollIntoView()")
    return browser.screenshot(full=args.full)


def _chat(browser: Browser, args: argparse.Namespace) -> bytes:
    """Ask one question in the browser, wait for the complete answer, and take the screenshot."""
    image, question = (args.image, args.question) if args.image else demo_question()
    with _served(args.model) as url:
        browser.open(url)
        browser.wait_for(f"!!{BOX}", 60)
        browser.choose_files("#message input[type=file]", [image.resolve()])
        browser.wait_for("!!document.querySelector('#message .thumbnail-item img')")
        browser.evaluate(f"{BOX}.focus()")
        browser.type(question)
        browser.wait_for(f"{BOX}.value == {json.dumps(question)}")
        browser.press_enter()
        browser.wait_for(f"{ANSWER} != '' && !{BUSY} && {IMAGE}", 600)
        browser.wait_for("!document.getAnimations().length")
        print(f"{question}\n-> {browser.evaluate(ANSWER)}")
        return browser.screenshot()


@contextmanager
def _served(model: str) -> Iterator[str]:
    """Run the command on a free port, and yield the address that it prints."""
    command = [sys.executable, "-m", "lora_llava.commands.main", "chat", model, "--web", "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if " is at " not in line:
                sys.exit(f"{model} is not served")  # the reason is on stderr
            yield line.split(" is at ")[1].split(",")[0]
        finally:
            server.terminate()


def demo_question() -> tuple[Path, str]:
    """Return the demo's first test question with a hint about an image of three shapes, which is not trained on."""
    quieten()  # before the imports that it silences
    from lora_llava.core.storage import cache_folder
    from lora_llava.data.scienceqa import format_problem, read_problems
    from lora_llava.demo.dataset import build_demo_scienceqa

    folder = build_demo_scienceqa(cache_folder())
    scenes: dict[str, str] = json.loads((folder / "scenes.json").read_text())
    problems: dict[str, Any] = read_problems(folder / "problems.json", folder / "pid_splits.json", "test")
    hinted = (number for number, problem in problems.items() if problem["hint"])
    number = next(number for number in hinted if scenes.get(number, "").count(";") == 2)
    return folder / "images" / "test" / number / "image.png", format_problem(problems[number])[0]


if __name__ == "__main__":
    main()
