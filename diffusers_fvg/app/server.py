"""Serves the page and the API."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from .limits import Limits


if TYPE_CHECKING:
    from ..pipelines.stages import FactorizedStages


def check_installed(page: bool) -> None:
    """Raises `ImportError` if a package of the server is missing; called before a model is loaded."""
    needed = ["fastapi", "uvicorn", *(["gradio"] if page else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        way = "" if page is False or missing != ["gradio"] else ", or use --no-page to leave out the page"
        raise ImportError(f"The app needs {' and '.join(missing)}: run `pip install 'diffusers-fvg[app]'`{way}.")


def serve(
    pipe: FactorizedStages,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: tuple[str, str] | None = None,
    limits: Limits | None = None,
    page: bool = True,
) -> None:
    """Serves a pipeline until it is stopped.

    Args:
        pipe ([`FactorizedStages`]): pipeline that is loaded and on its device.
        host (`str`): address to listen on; `"0.0.0.0"` for all addresses of this machine.
        port (`int`): port to listen on.
        auth (`tuple[str, str]`, *optional*): name and password that every user must enter.
        limits ([`Limits`], *optional*): limits of sizes, lengths and the queue.
        page (`bool`): whether to serve the page beside the API; needs gradio.
    """
    import uvicorn

    from .api import make_api, require_login
    from .worker import Worker

    pipe.set_progress_bar_config(disable=True)
    worker = Worker(pipe, limits)
    try:
        app = make_api(worker)
        if auth is not None:
            require_login(app, auth)
        if page:
            from .page import add_page

            app = add_page(app, worker)
        # A page that follows a run keeps its connection open: without a limit a server would stop only after the video.
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
    finally:
        worker.close()
