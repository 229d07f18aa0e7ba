"""`fvg app`: a page for the three stages, and an HTTP API beside it."""

from __future__ import annotations

import argparse
import ipaddress
import socket
from pathlib import Path

from ..flags import FRAMES, Whole
from .options import add_composer, add_light_decoder, add_lora, add_model, add_quantize, add_rewriter
from .pipeline import look


def add_app(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("app", help="a page in the browser for the three stages, and an HTTP API beside it")
    add_model(parser)
    add_rewriter(parser)
    add_composer(parser)
    add_lora(parser)
    add_quantize(parser)
    add_light_decoder(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, which only this machine reaches)",
    )
    parser.add_argument(
        "--port", type=Whole(1, 65535), metavar="NUMBER", default=7860, help="port (default: %(default)s)"
    )
    parser.add_argument(
        "--auth",
        type=Path,
        metavar="FILE",
        help="file with one line NAME:PASSWORD, which every user must enter; a flag with the password itself would be visible to "
        "all processes",
    )
    parser.add_argument(
        "--max-pixels",
        type=Whole(64, 2**28),
        metavar="NUMBER",
        help="maximum pixels of a frame (default: 4 times the model's own)",
    )
    parser.add_argument(
        "--max-frames",
        type=FRAMES,
        metavar="NUMBER",
        help="maximum frames of a video (default: 4 times the model's own)",
    )
    parser.add_argument(
        "--max-queue",
        type=Whole(1, 10_000),
        metavar="NUMBER",
        default=32,
        help="maximum number of waiting jobs (default: %(default)s)",
    )
    parser.add_argument("--no-page", action="store_true", help="serve only the HTTP API, which does not need gradio")
    parser.set_defaults(run=_app)


def _app(arguments: argparse.Namespace) -> None:
    from ..app.limits import Limits
    from ..app.server import check_installed, serve

    check_installed(page=not arguments.no_page)
    _check_place(arguments.host, arguments.port)
    auth = None if arguments.auth is None else _read_auth(arguments.auth)
    model = look(arguments)
    limits = Limits(pixels=arguments.max_pixels, frames=arguments.max_frames, queue=arguments.max_queue)
    pipe = model.load()
    place = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    if auth is None and not _is_local(arguments.host):
        print(f"open to everyone:   anyone who reaches {arguments.host} can use the app; --auth FILE sets a password")
    if not arguments.no_page:
        print(f"page:               http://{place}:{arguments.port}/")
    print(f"API:                http://{place}:{arguments.port}/docs", flush=True)
    serve(pipe, arguments.host, arguments.port, auth, limits, page=not arguments.no_page)


def _read_auth(path: Path) -> tuple[str, str]:
    name, colon, password = path.read_text(encoding="utf-8").strip().partition(":")
    if not (name and colon and password) or "\n" in password:
        raise ValueError(f"--auth {path} must hold one line NAME:PASSWORD.")
    return name, password


def _check_place(host: str, port: int) -> None:
    """Raises `ValueError` for an address that cannot be listened on, before a model is loaded."""
    try:
        if not host.strip():
            raise OSError("the host is empty")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The server cannot listen on --host {host!r} --port {port} ({error}); choose others."
        ) from error


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
