"""Hostile repositories, each loaded under watch: none runs code, reads a variable, or reaches an address but the Hub's."""

import os
import sys
import traceback

import pytest
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from hostile import VARIABLE, Site, traps
from quick import embedded_at

from diffusers_fvg import load_embedded


TRAPS = list(traps())
# What starts a program, or runs what a pickle names.
RUNNING = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class"}


class Watch:
    """What happens in this process while it is on, of what no repository may cause. Its hook stays, as Python has it."""

    def __init__(self):
        self.site: Site | None = None
        self.seen: list[str] = []
        self.allowed: set[tuple[str, int]] = set()
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.site is None:
            return
        if event in RUNNING:
            self.seen.append(f"{event} {arguments}")
        elif event == "exec" and self._is_of_repository(arguments[0].co_filename):
            self.seen.append(f"code of {arguments[0].co_filename}")
        elif event == "open" and isinstance(arguments[0], str) and self._is_secret(arguments[0]):
            self.seen.append(f"opened {arguments[0]}")
        elif event == "socket.connect" and tuple(arguments[1][:2]) not in self.allowed:
            self.seen.append(f"connected to {arguments[1]}")
        elif event == "socket.getaddrinfo" and (arguments[0], arguments[1]) not in self.allowed:
            self.seen.append(f"asked for {arguments[0]}")

    def _is_of_repository(self, name: str) -> bool:
        return str(self.site.folder) in name or "huggingface/modules" in name

    def _is_secret(self, name: str) -> bool:
        return name.startswith((str(self.site.outside / "secret"), "/proc/self/environ", "/etc/passwd"))


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module")
def sound(quick_folder):
    """The embedded model's repository, on the file system of the tests' folders."""
    return quick_folder


@pytest.fixture(scope="module")
def parts(quick_folder):
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with embedded_at(quick_folder):
        parts = load_embedded().components
    yield parts
    if shown:
        logging.enable_progress_bar()


@pytest.fixture
def watched(watch, monkeypatch, hub):
    """`watched(site)`: from now on. Variables are read through this class alone."""
    read = os._Environ.__getitem__

    def reading(self, name):
        if watch.site is not None and name == VARIABLE:
            callers = [frame.name for frame in traceback.extract_stack()]
            # Whatever asks the Hub goes through all variables for proxies.
            if "getproxies_environment" not in callers:
                watch.seen.append(f"read {name} in {callers[-3:]}")
        return read(self, name)

    def asked(text=""):
        raise AssertionError(f"asked: {text}")

    monkeypatch.setenv(VARIABLE, "a value")
    monkeypatch.setattr(os._Environ, "__getitem__", reading)
    monkeypatch.setattr("builtins.input", asked)
    port = int(hub.endpoint.rpartition(":")[2])
    watch.allowed = {(host, port) for host in ("127.0.0.1", "localhost", "::1")}
    watch.seen.clear()
    yield lambda site: setattr(watch, "site", site)
    watch.site = None


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: ascii(trap.name))
def test_a_hostile_repository_is_refused_or_has_no_effect(trap, sound, parts, watch, watched, tmp_path):
    site = Site.make(sound, tmp_path, "http://127.0.0.1:9/evil")
    trap.spoil(site)
    others = {name: part for name, part in parts.items() if name != trap.part}
    watched(site)
    try:
        if trap.told is None:
            loaded = DiffusionPipeline.from_pretrained(site.folder, **others)
            assert getattr(loaded, trap.part) is not None
        else:
            # Of bad input, and where a trap names no pattern, with the path.
            with pytest.raises((ValueError, OSError), match=trap.told) as told:
                DiffusionPipeline.from_pretrained(site.folder, **others)
            assert str(tmp_path) in str(told.value) or trap.told
    finally:
        watch.site = None
    assert watch.seen == [] and not site.sprung.exists()


def test_there_are_many_and_each_is_another():
    assert len(TRAPS) >= 100 and len({trap.name for trap in TRAPS}) == len(TRAPS)


def test_the_watch_sees_what_it_is_for(watch, watched, sound, tmp_path):
    """Each thing that no repository may do, done by hand."""
    import pickle
    import socket

    site = Site.make(sound, tmp_path, "")
    site.write("evil.py", "")
    site.write_bomb("evil.pkl")
    watched(site)
    os.environ.get(VARIABLE)
    (site.outside / "secret.txt").read_text()
    exec(compile("1", site.folder / "evil.py", "exec"))
    pickle.loads((site.folder / "evil.pkl").read_bytes())
    with socket.socket() as client:
        client.connect_ex(("127.0.0.1", 9))
    watch.site = None
    kinds = [text.split()[0] for text in watch.seen]
    assert kinds == ["read", "opened", "code", "pickle.find_class", "os.system", "connected"] and site.sprung.exists()
