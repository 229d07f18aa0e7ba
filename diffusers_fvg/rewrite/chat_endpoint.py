"""An OpenAI-compatible server in place of a chat model."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any


TIMEOUT_SECONDS, MAX_ERROR_BYTES = 120, 100_000
# Greedy decoding would tend to repeat the answer that was just refused; a small model loses the thread when it is hotter.
RETRY_TEMPERATURE, RETRY_TOP_P = 0.3, 0.9


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # urllib would send the key along to wherever a redirect points.
    def redirect_request(self, *args, **kwargs):
        return None


@dataclass(frozen=True)
class ChatEndpoint:
    """An OpenAI-compatible server that answers chats.

    Args:
        url (`str`): base address, to which `/chat/completions` is added, as in `"http://127.0.0.1:8000/v1"`.
        model (`str`): the server's name of the model.
        api_key_env (`str`, *optional*): environment variable that holds the key. It is read at each call and kept nowhere.
            With one the address must be https, or this machine.

    Raises:
        `ValueError`: an address that is not http(s), or holds a secret; no model; or a key that would go over plain http.
    """

    url: str
    model: str
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The endpoint {self.url!r} must be an address that begins with http:// or https://.")
        if parts.username is not None or parts.query or parts.fragment:
            # Messages show the address, so it must hold no secret; nor does this one.
            raise ValueError(
                f"The endpoint at {parts.hostname!r} must have no user, password, query or fragment in its address; name the "
                "environment variable that holds the key in `api_key_env`."
            )
        if not self.model:
            raise ValueError(f"The endpoint {self.url!r} needs the name of a `model`.")
        if self.api_key_env is not None and parts.scheme == "http" and not _is_this_machine(parts.hostname):
            raise ValueError(
                f"The endpoint {self.url!r} would get the key of {self.api_key_env} over plain http; use https://, or a server "
                "on this machine (localhost, 127.0.0.1, [::1])."
            )

    def answer(self, messages: list[dict[str, str]], max_new_tokens: int, seed: int | None = None) -> str:
        """Asks the server; without a `seed` at temperature 0.

        Raises:
            `ValueError`: the environment variable of the key is not set.
            `OSError`: the server cannot be reached, refuses, or answers something else than a chat completion.
        """
        body = {"model": self.model, "messages": messages, "max_tokens": max_new_tokens, "seed": seed or 0}
        body |= {"temperature": 0} if seed is None else {"temperature": RETRY_TEMPERATURE, "top_p": RETRY_TOP_P}
        headers = {"Content-Type": "application/json"}
        key = None
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key or not key.isascii() or not key.isprintable():
                raise ValueError(
                    f"The endpoint {self.url} needs a key of printable ASCII characters in the environment variable "
                    f"{self.api_key_env}."
                )
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        handlers: list = [_NoRedirect]
        if _is_this_machine(urllib.parse.urlsplit(self.url).hostname):
            # `http_proxy` would see the key, and is elsewhere than this machine.
            handlers.append(urllib.request.ProxyHandler({}))
        opener = urllib.request.build_opener(*handlers)
        try:
            with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                content = json.load(response)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}: {error.read(MAX_ERROR_BYTES).decode(errors='replace')}"
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if isinstance(content, str):
                return content if key is None else content.replace(key, "***")
            problem = "the message has no text"
        # Some servers repeat the key that they refuse. Raised outside of `except`: the cause would show it too.
        problem = problem if key is None else problem.replace(key, "***")
        raise OSError(f"The rewriter's endpoint {self.url} failed ({problem[:500]}).")


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(url: Any) -> str:
    """The host alone: the rest of an address may hold a secret."""
    try:
        return urllib.parse.urlsplit(url).hostname or ""
    except (AttributeError, TypeError, ValueError):
        return ""
