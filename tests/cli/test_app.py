import importlib.util
import os
import runpy
import socket
from pathlib import Path

import pytest

from diffusers_fvg.app import server
from diffusers_fvg.cli import main


pytest.importorskip("uvicorn")
SPACE = Path(__file__).parents[2] / "examples" / "space"


@pytest.fixture
def served(monkeypatch):
    """What `fvg app` would serve, without a model."""
    calls = []
    monkeypatch.setattr("diffusers_fvg.cli.app._check_place", lambda *_: None)
    monkeypatch.setattr(server, "check_installed", lambda page: None)
    monkeypatch.setattr(server, "serve", lambda pipe, *options, **named: calls.append((*options, named)))
    monkeypatch.setattr("diffusers_fvg.cli.pipeline.Model.load", lambda self: None)
    return calls


def test_flags_reach_the_server(served, tmp_path, capsys):
    assert main(["app"]) == 0
    host, port, auth, limits, named = served[0]
    assert (host, port, auth, named) == ("127.0.0.1", 7860, None, {"page": True})
    assert "open to everyone" not in capsys.readouterr().out
    (tmp_path / "auth").write_text("ann:a:b\n")
    flags = ["--port", "8000", "--auth", str(tmp_path / "auth"), "--max-pixels", "4096", "--max-frames", "9"]
    assert main(["app", "--host", "0.0.0.0", *flags, "--max-queue", "2", "--no-page"]) == 0
    host, port, auth, limits, named = served[1]
    assert (host, port, auth, named) == ("0.0.0.0", 8000, ("ann", "a:b"), {"page": False})
    assert (limits.pixels, limits.frames, limits.queue) == (4096, 9, 2)
    assert main(["app", "--host", "::"]) == 0
    assert "open to everyone" in capsys.readouterr().out


def test_what_is_wrong_is_one_line(served, tmp_path, capsys):
    (tmp_path / "auth").write_text("ann\n")
    assert main(["app", "--auth", str(tmp_path / "auth")]) == 2
    assert "one line NAME:PASSWORD" in capsys.readouterr().err and not served


def test_a_port_that_is_taken_is_told_of_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(server, "check_installed", lambda page: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["app", "--port", port]) == 2
    assert f"The server cannot listen on --host '127.0.0.1' --port {port} (" in capsys.readouterr().err


def test_a_missing_package_is_told_of_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else name)
    assert main(["app"]) == 2
    assert "run `pip install 'diffusers-fvg[app]'`, or use --no-page to leave out the page" in capsys.readouterr().err


def test_the_space_starts_the_app(served, monkeypatch):
    monkeypatch.delitem(os.environ, "FVG_MODEL", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SPACE / "app.py"))
    assert ended.value.code == 0 and served[0][:2] == ("0.0.0.0", 7860)
    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert "sdk: gradio" in front and "app_file: app.py" in front
