"""Every module and every verb's help on a Python without the modules and functions that Windows lacks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_llava

MODULES = "resource fcntl pwd grp termios tty pty syslog posix crypt curses readline"
FUNCTIONS = {
    "os": "fork forkpty getuid geteuid getgid getegid getpgid setsid setuid killpg mkfifo statvfs uname nice sysconf "
    "getloadavg sched_getaffinity chown fchmod wait waitid posix_fadvise O_NOFOLLOW O_DIRECTORY",
    "signal": "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGQUIT SIGPIPE SIGCHLD alarm setitimer pause",
}
WORDS = re.compile(rf"\b({'|'.join(' '.join((MODULES, *FUNCTIONS.values())).split())})\b")

SCRIPT = """
import builtins, contextlib, importlib, io, pkgutil, sys
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader

MODULES, FUNCTIONS = sys.argv[1].split(), {"os": sys.argv[2], "signal": sys.argv[3]}

class Cut:
    "A module without the functions that Windows lacks."
    def __init__(self, module, missing):
        self.__dict__.update({key: value for key, value in vars(module).items() if key not in missing.split()})

shown = {name: Cut(importlib.import_module(name), missing) for name, missing in FUNCTIONS.items()}

def import_(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and name in MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    found = builtins.__import__(name, globals, locals, fromlist, level)
    return shown.get(name, found) if level == 0 else found

class Loader(SourceFileLoader):
    "Load our modules so; libraries look at sys.platform, which is this machine's, before they import these."
    def exec_module(self, module):
        if module.__name__.startswith("lora_llava"):
            module.__builtins__ = vars(builtins) | {"__import__": import_}
        super().exec_module(module)

sys.path_hooks.insert(0, FileFinder.path_hook((ExtensionFileLoader, EXTENSION_SUFFIXES), (Loader, SOURCE_SUFFIXES)))
sys.path_importer_cache.clear()
import lora_llava
for module in pkgutil.walk_packages(lora_llava.__path__, "lora_llava."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name != "lmms_eval":  # of the extra `bench`; the others are imported where they are used
            raise
from lora_llava.commands.main import VERBS, main
for verb in VERBS:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as output:
        main(verb, ["--help"])
    assert f"usage: lora-llava {verb}" in output.getvalue(), verb
import psutil
from lora_llava.training.training_progress import peak_memory_bytes
assert 1e8 < peak_memory_bytes() <= psutil.virtual_memory().total
from lora_llava.training.callbacks import StopOnSignal
with StopOnSignal().listening():
    pass
print(len(VERBS))
"""


def missing_on_windows(node: ast.AST) -> list[str]:
    """List what a piece of code uses that Windows lacks, outside `try` and `suppress`."""
    if isinstance(node, ast.Try) or (isinstance(node, ast.With) and "suppress" in ast.unparse(node.items[0])):
        return []
    found: list[str] = []
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names if alias.name in MODULES.split()]
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
        known = FUNCTIONS.get(node.module, "").split()
        found = [node.module] if node.module in MODULES.split() else []
        found += [alias.name for alias in node.names if alias.name in known]
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        known = FUNCTIONS.get(node.value.id, "").split()
        found = [f"{node.value.id}.{node.attr}"] if node.attr in known else []
    return found + [name for child in ast.iter_child_nodes(node) for name in missing_on_windows(child)]


def test_no_line_needs_what_windows_lacks() -> None:
    files = sorted(Path(lora_llava.__file__).parent.rglob("*.py"))
    assert len(files) > 300
    suspect = [file for file in files if WORDS.search(file.read_text())]
    assert {file.name: found for file in suspect if (found := missing_on_windows(ast.parse(file.read_text())))} == {}
    assert missing_on_windows(ast.parse("import fcntl\nfrom os import fork\nos.getuid(); signal.SIGTERM")) == [
        "fcntl",
        "fork",
        "os.getuid",
    ]


@pytest.mark.more
def test_every_module_is_imported_and_every_help_shown_without_it() -> None:
    command = [sys.executable, "-c", SCRIPT, MODULES, *FUNCTIONS.values()]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert int(found.stdout) > 20
