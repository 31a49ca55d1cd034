"""Questions of `init` to the person at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from lora_llava.data.folder_kinds.folder_kind import Asker, SilentAsker


class TerminalAsker:
    """Asks at the terminal; Enter takes the default.

    Args:
        console: Prints the questions.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def choose(self, question: str, choices: Sequence[str], default: str | None) -> str | None:
        self._console.print(question, soft_wrap=True)
        for number, choice in enumerate(choices, 1):
            self._console.print(f"  {number}  {choice}{'  (default)' if choice == default else ''}", soft_wrap=True)
        while True:
            given = self._read(f"1 to {len(choices)}: ")
            if given is None or (not given and default is not None):
                return default
            if given in choices:
                return given
            if given.isdecimal() and 1 <= int(given) <= len(choices):
                return choices[int(given) - 1]
            self._console.print(f"{given or 'nothing'} is none of them; type a number from 1 to {len(choices)}")

    def text(self, question: str, default: str) -> str:
        self._console.print(f"{question}; Enter for: {default}", soft_wrap=True)
        return self._read("> ") or default

    def _read(self, prompt: str) -> str | None:
        """Return what the person typed, None at the end of the input."""
        try:
            return self._console.input(prompt).strip()
        except EOFError:
            return None


def asker_for(console: Console, yes: bool = False) -> Asker:
    """Return an asker: the terminal's if a person is there.

    Args:
        console: Prints the questions.
        yes: Whether to take all defaults.
    """
    is_there = sys.stdin is not None and sys.stdin.isatty() and console.is_terminal and not yes
    return TerminalAsker(console) if is_there else SilentAsker()
