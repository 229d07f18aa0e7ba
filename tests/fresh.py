"""Runs code in new processes, forked from a server that has imported torch and scipy.

These imports take most of the import time of diffusers and transformers. The server imports no package of Hugging Face and nothing of
this project, so that each process imports those itself, in its own environment.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


# Packages that diffusers, transformers and peft import.
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "scipy.optimize",
    "scipy.stats",
    "jinja2",
    "PIL.Image",
]


class FreshProcesses:
    """Client of the server, which it starts with the first code to run and stops in `close`."""

    def __init__(self):
        self._server: subprocess.Popen | None = None

    def run(self, code: str, environment: dict[str, str]) -> tuple[int, str, str]:
        """Runs code in a process with this environment, `PYTHONPATH` included; returns exit status, stdout and stderr."""
        with tempfile.TemporaryDirectory() as folder:
            if self._server is None:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                self._server = subprocess.Popen([sys.executable, __file__], **pipes)
            request = {"code": code, "environment": environment, "folder": folder, "current": os.getcwd()}
            print(json.dumps(request), file=self._server.stdin, flush=True)
            status = self._server.stdout.readline()
            assert status, "the server of fresh processes has ended"
            return int(status), *((Path(folder) / name).read_text() for name in ("stdout", "stderr"))

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()


def serve() -> None:
    """Forks a process for each line of stdin, and answers with its exit status."""
    # Modules of this folder have names of installed packages.
    sys.path.pop(0)
    # As in conftest.py: by default the search for garbage takes a third of an import's time.
    gc.disable()
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(code: str, environment: dict[str, str], folder: str, current: str) -> None:
    for number, name in ((0, os.devnull), (1, f"{folder}/stdout"), (2, f"{folder}/stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    signal.alarm(300)
    status = 1
    try:
        os.chdir(current)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = ["", *environment["PYTHONPATH"].split(os.pathsep)]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
