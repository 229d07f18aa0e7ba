"""A judge that asks servers which behave as real ones were reported to."""

import base64
import io
import math

import PIL.Image
import pytest
from test_endpoint_kinds import Server, good, refusing

from diffusers_fvg import AnchorJudge, ChatEndpoint
from diffusers_fvg.compose.questions import WHOLE_CAPTION, YES_OR_NO
from diffusers_fvg.pipelines.parts import as_judge


CAPTION = "A red circle."
# Of a first token: two spellings of yes, one of no, and another word.
SHARES = {"Yes": 0.3, " yes": 0.1, "No": 0.2, "The": 0.4}


def told(shares: dict[str, float], content: str = "Yes"):
    """An answer with the probabilities of its first token."""
    top = [{"token": token, "logprob": math.log(share)} for token, share in shares.items()]
    first = {"token": content, "logprob": top[0]["logprob"], "top_logprobs": top}
    return 200, {"message": {"content": content}, "logprobs": {"content": [first]}}, {}


KINDS = {
    "probabilities": (lambda body, number: told(SHARES), 4 / 6),
    "yes alone among the likely": (lambda body, number: told({"Yes": 0.9, "The": 0.1}), 1.0),
    "a yes that is cut off from them": (lambda body, number: told({"The": 1.0}, "Yes, it does"), 1.0),
    "no logprobs": (refusing("logprobs", 400, "'logprobs' is not supported with this model"), 0.0),
    "fewer of them": (refusing("top_logprobs", 422, "top_logprobs must be at most 5"), 0.0),
    "reasoning": (refusing("max_tokens", 400, "Unsupported parameter: 'max_tokens'"), 0.0),
    "words": (lambda body, number: good("**Yes**, it shows a circle."), 1.0),
    "a word that begins with no": (lambda body, number: good("Nothing else is there."), 0.0),
    "null": (lambda body, number: good(None, refusal=None), 0.0),
    "null in the probabilities": (
        lambda body, number: (200, {"message": {"content": "no"}, "logprobs": None}, {}),
        0.0,
    ),
}
# Their answers count as no, and are told of.
NEITHER = {"a word that begins with no", "null", "no logprobs", "fewer of them", "reasoning"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_s_answer_becomes_a_probability(kind, caplog):
    respond, expected = KINDS[kind]
    with Server(respond) as server:
        judge = as_judge(ChatEndpoint(server.url, "m"))
        (made,) = judge.judge([PIL.Image.new("RGB", (4, 2), "red")], [CAPTION])
    question = WHOLE_CAPTION.format(caption=CAPTION)
    assert made.score == pytest.approx(expected) and made.answers == {question: made.score}
    assert ("should answer with yes or no" in caplog.text) == (kind in NEITHER)
    image, text = server.bodies[-1]["messages"][0]["content"]
    assert text == {"type": "text", "text": YES_OR_NO.format(question=question)}
    # The picture itself, without loss.
    content = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert PIL.Image.open(io.BytesIO(content)).getcolors() == [(8, (255, 0, 0))]


def test_a_server_that_fails_is_named_and_the_key_is_not(monkeypatch):
    monkeypatch.setenv("FVG_TEST_KEY", "a-secret-key")
    with Server(lambda body, number: (401, "a-secret-key is no key", {})) as server:
        judge = AnchorJudge(endpoint=ChatEndpoint(server.url, "m", api_key_env="FVG_TEST_KEY"))
        with pytest.raises(OSError, match="status 401") as error:
            judge.judge([PIL.Image.new("RGB", (4, 4))], [CAPTION])
    assert server.url in str(error.value) and "a-secret-key" not in str(error.value)
    assert server.headers[0]["Authorization"] == "Bearer a-secret-key"


def test_an_address_alone_is_no_judge():
    with pytest.raises(
        ValueError, match="`anchor_judge='http://127.0.0.1:1/v1'` is a server's address: pass `ChatEnd"
    ):
        as_judge("http://127.0.0.1:1/v1")
