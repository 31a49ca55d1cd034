"""Every module and every verb's help on a Python without the modules and functions that Windows lacks."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import builtins, contextlib, importlib, io, os, pkgutil, signal, sys

MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "crypt", "curses", "readline"}
FUNCTIONS = {
    os: "fork forkpty getuid geteuid getgid getegid getpgid setsid setuid killpg mkfifo statvfs uname nice sysconf "
        "getloadavg sched_getaffinity chown fchmod wait waitid posix_fadvise O_NOFOLLOW O_DIRECTORY",
    signal: "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGQUIT SIGPIPE SIGCHLD alarm setitimer pause pthread_sigmask",
}
stock = builtins.__import__

def only_ours(name, globals=None, locals=None, fromlist=(), level=0):
    # libraries look at sys.platform, which is this machine's, before they import these
    if level == 0 and name in MODULES and (globals or {}).get("__name__", "").startswith("lora_llava"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return stock(name, globals, locals, fromlist, level)

class Ours:
    "What our modules see in place of os and signal."
    def __init__(self, module, missing):
        self.__dict__.update({key: value for key, value in vars(module).items() if key not in missing.split()})

shown = {module.__name__: Ours(module, missing) for module, missing in FUNCTIONS.items()}

def without_functions(name, globals=None, locals=None, fromlist=(), level=0):
    found = only_ours(name, globals, locals, fromlist, level)
    ours = (globals or {}).get("__name__", "").startswith("lora_llava")
    return shown.get(name, found) if ours and level == 0 else found

builtins.__import__ = without_functions
import lora_llava
for module in pkgutil.walk_packages(lora_llava.__path__, "lora_llava."):
    importlib.import_module(module.name)
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


def test_nothing_needs_what_windows_lacks() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert int(found.stdout) > 20
