"""Servers that behave as real ones were reported to, each asked for one caption and for two at once."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from planned import format_planned

from diffusers_fvg import ChatEndpoint, Plan, Subject
from diffusers_fvg.rewrite import chat_endpoint
from diffusers_fvg.rewrite.plan import PlannedCaption
from diffusers_fvg.rewrite.prompts import format_answer
from diffusers_fvg.rewrite.rewriter import FirstFrameRewriter
from diffusers_fvg.rewrite.storyboard import Moment
from diffusers_fvg.rewrite.tasks import write_moments


PROMPT = "A red circle on the left moves to the right."
CAPTION, START = "A red circle on the left.", "A red circle on the left moves to the right"
GOOD = format_answer(CAPTION)
PLAN = Plan((Subject("circle", attributes=("red",)),))


class Server:
    """Answers by a function of the request and of how many came before; keeps the requests."""

    def __init__(self, respond):
        self.bodies, self.paths, self.headers = [], [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.paths.append(self.path)
                    server.headers.append(self.headers)
                status, message, headers = respond(body, number)
                choice = message if "message" in message else {"message": message}
                known = {"choices": [choice]} if status == 200 else {"error": {"message": message}}
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(json.dumps(known).encode())

            def log_message(self, *args):
                pass

        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def good(content=GOOD, **message):
    return 200, {"content": content, **message}, {}


def refusing(name: str, status: int, says: str, allowed=()):
    """Refuses a parameter by its name, unless it has an allowed value."""
    return lambda body, number: (status, says, {}) if body.get(name, allowed) not in (allowed, *allowed) else good()


KINDS = {
    "reasoning": refusing(
        "max_tokens", 400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    ),
    "fixed temperature": refusing("temperature", 400, "temperature must be 1", (1,)),
    "no seed": refusing("seed", 422, "unknown parameter: seed"),
    "no schema": refusing("response_format", 400, "'response_format' of type json_schema is not supported"),
    "no schema, unnamed": refusing("response_format", 400, "invalid request"),
    "busy once": lambda body, number: (429, "slow down", {"Retry-After": "0.05"}) if number == 0 else good(),
    "loading once": lambda body, number: (503, "loading", {}) if number == 0 else good(),
    "parts": lambda body, number: good([{"type": "reasoning", "text": "no"}, {"type": "text", "text": GOOD}]),
    "thinking": lambda body, number: good(f'<think>{{"first_frame": "no"}}</think>{GOOD}'),
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(chat_endpoint, "FIRST_WAIT_SECONDS", 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_s_ways_are_learnt_and_remembered(kind):
    with Server(KINDS[kind]) as server:
        rewriter = FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m"), judge=False)
        assert rewriter.rewrite([PROMPT]) == [CAPTION]
        asked = len(server.bodies)
        # Two prompts at once, with the same rewriter and with one that has not used the server yet.
        assert rewriter.rewrite([PROMPT] * 2) == [CAPTION] * 2
        assert len(server.bodies) == asked + 2
        fresh = FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m"), judge=False)
        assert fresh.rewrite([PROMPT] * 2) == [CAPTION] * 2
    assert "max_completion_tokens" in server.bodies[-1] if kind == "reasoning" else "max_tokens" in server.bodies[-1]


@pytest.mark.parametrize("message", [{"content": None}, {"content": None, "refusal": "no"}, {"content": []}])
def test_an_answer_without_text_is_no_error_of_the_call(message, caplog):
    with Server(lambda body, number: (200, message, {})) as server:
        rewriter = FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m"), judge=False)
        for prompts in ([PROMPT], [PROMPT] * 2):
            outcomes = rewriter.rewrite_outcomes(prompts)
            assert [outcome.made for outcome in outcomes] == [START] * len(prompts)
            assert {(outcome.status, outcome.attempts) for outcome in outcomes} == {("fallback", 3)}
    assert any("it holds no JSON object" in record.getMessage() for record in caplog.records)


def test_captions_made_are_kept_when_another_fails(caplog):
    fails = "A blue square."
    with Server(
        lambda body, number: (401, "no", {}) if body["messages"][-1]["content"] == fails else good()
    ) as server:
        rewriter = FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m", max_concurrent=2), judge=False)
        outcomes = rewriter.rewrite_outcomes([PROMPT, PROMPT, fails])
        assert [outcome.status for outcome in outcomes] == ["accepted", "accepted", "fallback"]
        assert "status 401" in outcomes[2].reasons[0] and outcomes[2].made == "A blue square"
        with pytest.raises(OSError, match="status 401"):
            rewriter.rewrite([fails] * 3)


def test_every_third_question_fails():
    with Server(lambda body, number: (500, "try again", {}) if number % 3 == 2 else good()) as server:
        rewriter = FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m"), judge=False)
        assert rewriter.rewrite([PROMPT] * 5) == [CAPTION] * 5


def test_address_headers_body_timeout_and_limit():
    running, most = [], []

    def respond(body, number):
        running.append(number)
        most.append(len(running))
        threading.Event().wait(0.02)
        running.pop()
        return good()

    with Server(respond) as server:
        settings = {"headers": {"X-Team": "films"}, "extra_body": {"top_k": 20, "seed": 7}, "max_concurrent": 2}
        endpoint = ChatEndpoint(f"{server.url}/chat/completions", "m", **settings)
        assert FirstFrameRewriter(endpoint=endpoint, judge=False).rewrite([PROMPT] * 6) == [CAPTION] * 6
        assert {*server.paths} == {"/v1/chat/completions"} and max(most) == 2
        assert server.headers[0]["X-Team"] == "films" and "films" not in repr(endpoint)
        assert server.bodies[0]["top_k"] == 20 and server.bodies[0]["seed"] == 7
        slow = ChatEndpoint(server.url, "m", timeout=0.005)
        with pytest.raises(OSError, match="(?i)time"):
            FirstFrameRewriter(endpoint=slow).rewrite([PROMPT])
    with pytest.raises(ValueError, match="headers over plain http"):
        ChatEndpoint("http://example.org", "m", headers={"X-Key": "secret"})
    for timeout in (0, float("nan"), None):
        with pytest.raises(ValueError, match="timeout"):
            ChatEndpoint(server.url, "m", timeout=timeout)


@pytest.mark.parametrize(("judges", "status"), [(["yes", "no"], "accepted"), (["no", "no"], "fallback")])
def test_the_server_judges_its_captions(judges, status):
    """With the judge's verdict against it, a caption that is right by its words stands in all the same."""

    def respond(body, number):
        judging = "Answer with JSON" in body["messages"][-1]["content"]
        planned = format_planned(PlannedCaption(CAPTION, PLAN))
        return good(json.dumps({"answers": judges}) if judging else planned)

    with Server(respond) as server:
        (outcome,) = FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m")).rewrite_outcomes([PROMPT])
    assert (outcome.status, outcome.made) == (status, CAPTION)
    assert outcome.plan == (PLAN if status == "accepted" else None)
    assert outcome.judged == 2 * outcome.attempts and 0 < outcome.judge_seconds < outcome.seconds
    assert server.bodies[0]["response_format"]["json_schema"]["schema"]["required"][-1] == "first_frame"
    if status == "fallback":
        assert outcome.reasons == ('"red circle" is missing',) * 2
        assert '"red circle" is missing' in server.bodies[2]["messages"][-1]["content"]


def test_the_server_judges_the_first_moment_of_a_storyboard():
    """Later moments show what happens later, and are not asked about."""
    moments = [Moment(CAPTION, 0.0), Moment("A red circle on the right.", 1.0)]

    def respond(body, number):
        judging = "Answer with JSON" in body["messages"][-1]["content"]
        return good(json.dumps({"answers": ["yes", "no"]}) if judging else write_moments(moments))

    with Server(respond) as server:
        (board,) = FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m")).storyboard([PROMPT])
    assert board == moments and (board[0].rewrite.status, board[0].rewrite.judged) == ("accepted", 2)
    asked = server.bodies[-1]["messages"][-1]["content"]
    assert f"first frame: {CAPTION}" in asked and "on the right" not in asked
    assert "Does the description have this: red circle?" in asked
    assert "show or tell anything that happens only later" in asked
