"""Every test runs offline, with one thread and a Hub cache that is empty at the start of the session."""

import atexit
import contextlib
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path


# huggingface_hub reads these when it is imported, so they are set before anything imports it.
SESSION_HOME = tempfile.mkdtemp(prefix="fvg-tests-")
atexit.register(shutil.rmtree, SESSION_HOME, ignore_errors=True)
for name in [
    name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_"))
]:
    del os.environ[name]
os.environ.update(HF_HOME=SESSION_HOME, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
# The models are too small for several threads, which wait for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
from fresh import FreshProcesses  # noqa: E402
from hub_server import HubServer  # noqa: E402


TESTS = Path(__file__).parent
# Some tests import modules from other test folders, which pytest adds to the path only with a test of that folder.
sys.path += [str(folder) for folder in sorted(TESTS.iterdir()) if folder.is_dir() and folder.name != "__pycache__"]


# Imports and the collection of tests leave hardly any garbage, and a search for it takes up to a quarter of a second.
gc.disable()


def _keep_what_stays(phase: str, info: dict[str, int]) -> None:
    """Excludes what a search of all objects has found in use from the later ones; each took a tenth of a second otherwise."""
    if phase == "stop" and info["generation"] == 2:
        gc.freeze()


gc.callbacks.append(_keep_what_stays)


def pytest_collection_finish(session):
    """Excludes the imported objects from garbage collection, and later what tests have imported."""
    gc.collect()
    # By default after 700 new objects, of which a tiny pipeline has thousands: that took a fifth of the tests' time.
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
    # `torch.manual_seed` notes the call stack for each kind of device that is not there: a millisecond for every seed.
    if torch := sys.modules.get("torch"):
        for devices in (torch.cuda, torch.xpu, torch.mtia):
            if not devices.is_available():
                devices.manual_seed_all = lambda seed: None


@atexit.register
def _collect_all() -> None:
    """Python's clean-up leaves what is excluded; pytest's own five searches before it have looked at new objects only."""
    gc.callbacks.remove(_keep_what_stays)
    gc.unfreeze()
    gc.collect()


# Servers of processes, each of which takes seconds to import torch, and what the files with their tests hold. The last words
# are those of the longest test, which is the only one of its file: by itself it would come last, with one worker idle.
SERVERS = {"fresh processes": ("run_python", "TRITON_INTERPRET"), "forked processes": ("from forked import",)}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, gives the files whose tests need the same server to one worker, which alone starts it."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "loadfile":
        return None

    @functools.cache
    def group(name: str) -> str:
        text = (TESTS.parent / name).read_text(encoding="utf-8")
        return next((server for server, words in SERVERS.items() if any(word in text for word in words)), name)

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(super()._split_scope(nodeid))

    return ByServer(config, log)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running [`HubServer`]: the Hub of this process (with an empty cache) and, by `HF_ENDPOINT`, of subprocesses."""
    from huggingface_hub import constants, hf_api

    with HubServer(tmp_path / "hub_server") as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        home = tmp_path / "hf_home"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        for name, value in {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def hasty_client(monkeypatch):
    """The Hub's client does not wait between its tries, and half a second for an answer."""
    from huggingface_hub import constants

    slept = time.sleep
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: slept(min(seconds, 0.01)))
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "DEFAULT_DOWNLOAD_TIMEOUT", "DEFAULT_ETAG_TIMEOUT"):
        if hasattr(constants, name):
            monkeypatch.setattr(constants, name, 0.5)


@pytest.fixture(scope="session")
def fresh_processes() -> FreshProcesses:
    with contextlib.closing(FreshProcesses()) as processes:
        yield processes


@pytest.fixture
def run_python(fresh_processes) -> Callable[..., str]:
    """`run_python(code, **env)` runs code in a process of its own, which sees the tests' modules, and returns its stdout.

    It inherits this process's environment, `hub`'s with it. A failure shows what the process printed. The process is forked
    from one that has imported torch (see [`FreshProcesses`]); with `new_interpreter=True` it has imported nothing.
    """

    def run(code: str, new_interpreter: bool = False, **env: str) -> str:
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, **env}
        code = textwrap.dedent(code)
        if new_interpreter or sys.platform != "linux":
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            status, out, errors = done.returncode, done.stdout, done.stderr
        else:
            status, out, errors = fresh_processes.run(code, environment)
        assert status == 0, f"exit status {status}\n{out}\n{errors}"
        return out

    return run


@pytest.fixture(scope="session")
def quick_folder(tmp_path_factory) -> Path:
    """What [`write_quick`] writes."""
    from quick import write_quick

    folder = tmp_path_factory.mktemp("quick") / "weights"
    write_quick(folder)
    return folder


@pytest.fixture
def quick_embedded(quick_folder) -> Path:
    """A test that asks for the embedded model gets [`quick_folder`]'s."""
    from quick import embedded_at

    with embedded_at(quick_folder):
        yield quick_folder
