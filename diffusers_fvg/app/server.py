"""The page and the API as one server."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from .limits import Limits


if TYPE_CHECKING:
    from ..pipelines.stages import FactorizedStages


def check_installed(page: bool) -> None:
    """Raises `ImportError` where what the server is built on is missing: before a model is loaded."""
    needed = ["fastapi", "uvicorn", *(["gradio"] if page else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        way = "" if page is False or missing != ["gradio"] else ", or leave the page out with --no-page"
        raise ImportError(f"The app needs {' and '.join(missing)}: pip install 'diffusers-fvg[app]'{way}.")


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
        pipe ([`FactorizedStages`]): loaded and placed.
        host (`str`): address to listen on; `"0.0.0.0"` for all of this machine's.
        port (`int`): to listen on.
        auth (`tuple[str, str]`, *optional*): name and password that everyone has to give.
        limits ([`Limits`], *optional*): of sizes, lengths and the queue.
        page (`bool`): beside the API; needs gradio.
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
