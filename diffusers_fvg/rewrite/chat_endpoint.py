"""Client of an OpenAI-compatible server, used in place of a local chat model."""

from __future__ import annotations

import base64
import functools
import http.client
import io
import ipaddress
import json
import math
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
from diffusers.utils import logging

from ..checks import check_at_least_one, check_number


logger = logging.get_logger(__name__)

MAX_ERROR_BYTES = 100_000
# Shorter header values are not masked: they are no secrets, and may be words of an answer.
SECRET_CHARACTERS = 8
# Status codes of a server that is busy, restarts or still loads its model.
BUSY_STATUSES, BUSY_RETRIES = frozenset((429, 500, 502, 503, 504, 529)), 3
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
# Newer models of OpenAI require the second name.
RENAMED = {"max_tokens": "max_completion_tokens"}
# Parameters that are left out once a server refuses them.
OPTIONAL_PARAMETERS = ("max_tokens", "temperature", "top_p", "seed", "response_format", "top_logprobs", "logprobs")
# A retry is sampled: greedy decoding tends to repeat the refused answer. At a higher temperature small models lose the topic.
RETRY_TEMPERATURE, RETRY_TOP_P = 0.3, 0.9
# Maximum of OpenAI's API.
TOP_LOGPROBS = 20


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # urllib would send the key to the target of a redirect.
    def redirect_request(self, *args, **kwargs):
        return None


@dataclass(frozen=True)
class ChatEndpoint:
    """OpenAI-compatible server that answers chats.

    If the server refuses a parameter by name, this and all later requests rename it or leave it out. If the server is busy,
    the request is repeated up to 3 times, after the time that the server names.

    Args:
        url (`str`): address with or without `/chat/completions` at its end, as in `"http://127.0.0.1:8000/v1"`.
        model (`str`): name of the model on the server.
        api_key_env (`str`, *optional*): name of the environment variable that holds the key. It is read at each request and
            never stored. With a key, the address must be https or on this machine.
        timeout (`float`): seconds to wait for an answer.
        headers (`Mapping[str, str]`, *optional*): HTTP headers of every request.
        extra_body (`Mapping[str, Any]`, *optional*): further fields of every request; they replace fields of the same name.
        max_concurrent (`int`): most requests at a time, if there are several prompts.

    Raises:
        `ValueError`: `url` is not http(s) or holds a secret, `model` is empty, a key or headers would be sent over plain http
            to another machine, `timeout` is not a positive number, or `max_concurrent` is below 1.
    """

    url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 120.0
    headers: Mapping[str, str] | None = field(default=None, repr=False, hash=False)
    extra_body: Mapping[str, Any] | None = field(default=None, repr=False, hash=False)
    max_concurrent: int = 4
    # Parameters that the server has refused.
    _refused: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The endpoint {self.url!r} must be an address that begins with http:// or https://.")
        if parts.username is not None or parts.query or parts.fragment:
            # Error messages show the address, so it must hold no secret. This message shows the host only.
            raise ValueError(
                f"The endpoint at {parts.hostname!r} must have no user, password, query or fragment in its address; name the "
                "environment variable that holds the key in `api_key_env`."
            )
        if not self.model:
            raise ValueError(f"The endpoint {self.url!r} needs the name of a `model`.")
        secret = (
            f"the key of {self.api_key_env}" if self.api_key_env is not None else "headers" if self.headers else None
        )
        if secret is not None and parts.scheme == "http" and not _is_this_machine(parts.hostname):
            raise ValueError(
                f"The endpoint {self.url!r} would get {secret} over plain http; use https://, or a server on this machine "
                "(localhost, 127.0.0.1, [::1])."
            )
        check_number("timeout", self.timeout)
        if self.timeout is None or self.timeout <= 0:
            raise ValueError(f"`timeout={self.timeout}` must be a positive number of seconds.")
        check_at_least_one("max_concurrent", self.max_concurrent)

    def answer(
        self,
        messages: list[dict[str, str]],
        max_new_tokens: int,
        seed: int | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> str:
        """Asks the server and returns its answer, `""` for one without text.

        Args:
            messages (`list[dict[str, str]]`): turns with a `role` and a `content`.
            max_new_tokens (`int`): most tokens of the answer.
            seed (`int`, *optional*): seed to sample with; left out, the temperature is 0.
            schema (`Mapping`, *optional*): JSON schema of the answer, for servers that support it.

        Raises:
            `ValueError`: the environment variable of the key is not set.
            `OSError`: the server cannot be reached, refuses, stays busy, or returns no chat completion.
        """
        body = {"model": self.model, "messages": messages, "max_tokens": max_new_tokens, "seed": seed or 0}
        body |= {"temperature": 0} if seed is None else {"temperature": RETRY_TEMPERATURE, "top_p": RETRY_TOP_P}
        if schema is not None:
            form = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return self._ask(body, _text_of)

    def probability_of_yes(self, image: PIL.Image.Image, question: str) -> float:
        """Asks a vision-language model about an image and returns the probability that it answers yes and not no.

        The probability is that of the first token. If the server returns no token probabilities (`logprobs`), the result is 1
        for an answer that begins with yes, else 0, with a warning if the answer does not begin with no.

        Args:
            image (`PIL.Image.Image`): image, sent as PNG.
            question (`str`): question to be answered with yes or no.

        Returns:
            `float`: probability from 0 to 1.

        Raises:
            `ValueError`, `OSError`: as in [`answer`].
        """
        file = io.BytesIO()
        image.save(file, format="PNG")
        address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "max_tokens": 1, "seed": 0, "temperature": 0}
        found = self._ask(body | {"logprobs": True, "top_logprobs": TOP_LOGPROBS}, _probability_of_yes)
        if isinstance(found, str):
            _warn_of_answer(self.url, self.model, found)
            return 0.0
        return found

    def _ask(self, body: dict[str, Any], read: Callable[[Mapping[str, Any]], Any]) -> Any:
        """Posts a request and returns what `read` makes of the first choice in the server's reply."""
        key = self._key()
        waits = 0
        while True:
            sent = self._accepted(body)
            status, reply, wait = self._post(sent, key, read)
            if status is None:
                # Some servers repeat the key in error messages, and even in answers.
                return self._without_secrets(reply, key) if isinstance(reply, str) else reply
            if status in BUSY_STATUSES and waits < BUSY_RETRIES:
                time.sleep(FIRST_WAIT_SECONDS * 2**waits if wait is None else min(wait, LONGEST_WAIT_SECONDS))
                waits += 1
            # A parallel request may have recorded the refused parameter meanwhile.
            elif status not in (400, 422) or (self._accepted(body) == sent and not self._refuse(reply, sent)):
                break
        # Raised outside of `except`: a chained exception would show the key.
        raise OSError(f"The endpoint {self.url} failed ({self._without_secrets(reply, key)[:500]}).")

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError(
                f"The endpoint {self.url} needs a key of printable ASCII characters in the environment variable "
                f"{self.api_key_env}."
            )
        return key

    def _accepted(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a request without the parameters that the server has refused."""
        accepted = {name: value for name, value in body.items() if name not in self._refused}
        for name, other in RENAMED.items():
            if name in body and name in self._refused and other not in self._refused:
                accepted[other] = body[name]
        return accepted | dict(self.extra_body or {})

    def _refuse(self, reply: str, sent: Mapping[str, Any]) -> bool:
        """Records the parameter of a request that the server's error names; returns whether there is one."""
        known = [name for name in (*RENAMED.values(), *OPTIONAL_PARAMETERS) if name in sent]
        # Many servers only say that the request is not valid. The parameter that most of them lack is `response_format`.
        named = [name for name in known if re.search(rf"\b{name}\b", reply)] or [
            *{"response_format"}.intersection(known)
        ]
        self._refused.update(named[:1])
        return bool(named)

    def _post(
        self, body: dict[str, Any], key: str | None, read: Callable[[Mapping[str, Any]], Any]
    ) -> tuple[int | None, Any, float | None]:
        """Posts a request once.

        Returns `(None, value of read, None)`, or after a failure the HTTP status (0 for none), the error, and the seconds to
        wait if the server names them.
        """
        headers = {"Content-Type": "application/json", **(self.headers or {})}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        handlers: list = [_NoRedirect]
        if _is_this_machine(urllib.parse.urlsplit(self.url).hostname or ""):
            # A proxy on another machine would see the key and could not reach this machine's loopback address.
            handlers.append(urllib.request.ProxyHandler({}))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout) as response:
                return None, read(json.load(response)["choices"][0]), None
        except urllib.error.HTTPError as error:
            said = error.read(MAX_ERROR_BYTES).decode(errors="replace")
            return error.code, f"status {error.code}: {said}", _seconds(error.headers.get("Retry-After"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, http.client.HTTPException) as error:
            return 0, f"{type(error).__name__}: {error}", None

    def _without_secrets(self, text: str, key: str | None) -> str:
        for secret in (key, *(self.headers or {}).values()):
            text = text.replace(secret, "***") if secret and len(secret) >= SECRET_CHARACTERS else text
        return text


def _text_of(choice: Mapping[str, Any]) -> str:
    """Returns the text of a chat completion's message: its content, which may be in parts, or its refusal."""
    message = choice["message"]
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if part.get("type") in ("text", "output_text"))
    if not isinstance(content, str):
        content = message.get("refusal")
    return content if isinstance(content, str) else ""


def _probability_of_yes(choice: Mapping[str, Any]) -> float | str:
    """Returns P(yes) / (P(yes) + P(no)) over the first token's alternatives in any case; without `logprobs`, 1 or 0 by the
    answer's first word, or the answer itself if that is neither.
    """
    tokens = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
    shares = {"yes": 0.0, "no": 0.0}
    for token in tokens:
        word = token["token"].strip().lower()
        if word in shares:
            shares[word] += math.exp(token["logprob"])
    if sum(shares.values()) > 0:
        return shares["yes"] / sum(shares.values())
    answer = _text_of(choice)
    word = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    return answer if word is None else float(word[1].lower() == "yes")


@functools.cache
def _warn_of_answer(url: str, model: str, answer: str) -> None:
    logger.warning(
        f"The model {model!r} at {url} should answer with yes or no, but its answer begins with {answer[:40]!r}. It counts as "
        "no. Choose a model that answers without thinking, or a server that returns `logprobs`."
    )


def _seconds(retry_after: str | None) -> float | None:
    """Returns the seconds of a `Retry-After` header, or `None` if it holds a date."""
    try:
        return None if retry_after is None else max(0.0, float(retry_after))
    except ValueError:
        return None


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(url: Any) -> str:
    """Returns the host of an address for messages, since the rest of the address may hold a secret."""
    try:
        return urllib.parse.urlsplit(url).hostname or ""
    except (AttributeError, TypeError, ValueError):
        return ""
