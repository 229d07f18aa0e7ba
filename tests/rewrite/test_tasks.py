import json

import pytest
from test_rewriter import ChatServer, reply
from tiny import tiny_rewriter

from diffusers_fvg.rewrite.caption_check import start_clause
from diffusers_fvg.rewrite.rewriter import ChatEndpoint, FirstFrameRewriter
from diffusers_fvg.rewrite.storyboard import Moment
from diffusers_fvg.rewrite.tasks import (
    MOTION,
    MOTION_EXAMPLES,
    MOTION_INSTRUCTION,
    STORYBOARD_EXAMPLES,
    STORYBOARD_INSTRUCTION,
    motion_problem,
    read_moments,
    read_motion,
    storyboard_problem,
    storyboard_task,
    write_moments,
    write_motion,
)


LEAF = "A green leaf slowly turns yellow while a white cat sleeps."
START, END = "A green leaf above a white cat.", "A yellow leaf above a white cat."
LEAF_BOARD = [Moment(START, 0.0), Moment(END, 1.0)]


def board(*captions: str, times: tuple[float, ...] | None = None) -> list[Moment]:
    times = times or tuple(index / max(1, len(captions) - 1) for index in range(len(captions)))
    return [Moment(caption, time) for caption, time in zip(captions, times)]


# -- text rules -----------------------------------------------------------------------------------------------------------


def test_moments_survive_their_text():
    assert write_moments(LEAF_BOARD) == (
        '{"moments": [{"time": 0.0, "frame": "A green leaf above a white cat."}, '
        '{"time": 1.0, "frame": "A yellow leaf above a white cat."}]}'
    )
    assert read_moments(f"Here: {write_moments(LEAF_BOARD)} Enjoy {{}}") == LEAF_BOARD
    assert read_moments('{"moments": [{"time": 0, "frame": "A\\n cat."}]}') == [Moment("A cat.", 0.0)]
    assert read_motion(f"```json\n{write_motion('The leaf turns yellow.')}```") == "The leaf turns yellow."


@pytest.mark.parametrize(
    "answer",
    [
        '{"first_frame": "A cat."}',
        '{"moments": {"time": 0, "frame": "A cat."}}',
        '{"moments": ["A cat."]}',
        '{"moments": [{"time": 0}]}',
        '{"moments": [{"time": 0, "frame": " "}]}',
        '{"moments": [{"time": "0", "frame": "A cat."}]}',
        '{"moments": [{"time": 1.5, "frame": "A cat."}]}',
        '{"moments": [{"time": NaN, "frame": "A cat."}]}',
    ],
)
def test_read_moments_says_what_is_missing(answer):
    with pytest.raises(ValueError, match='no list "moments"'):
        read_moments(answer)


@pytest.mark.parametrize(("prompt", "moments"), STORYBOARD_EXAMPLES)
def test_storyboards_of_the_examples_are_valid(prompt, moments):
    assert storyboard_problem(prompt, moments, num_moments=2) is None


@pytest.mark.parametrize(
    ("prompt", "moments"),
    [
        (LEAF, LEAF_BOARD),
        ("A cat sleeps", board("A cat on a bed.")),
        ("A caterpillar transforms into a butterfly", board("A caterpillar on a twig.", "A butterfly on a twig.")),
        (
            "A red ball hits a blue box, making it disappear",
            board("A red ball by a blue box.", "A red ball on grass."),
        ),
        ("A square turns from red to blue", board("A red square.", "A red square.", "A blue square.")),
        ("A dog runs to the left", board("A dog at the right.", "A dog at the left.", times=(0.0, 0.8))),
    ],
)
def test_storyboard_problem_accepts_good_ones(prompt, moments):
    assert storyboard_problem(prompt, moments, num_moments=3) is None


@pytest.mark.parametrize(
    ("moments", "reason"),
    [
        ([], "0 moments, not 1 to 2"),
        (board(START, START, END), "3 moments, not 1 to 2"),
        (board(START, END, times=(0.1, 1.0)), "first moment has time 0.1"),
        (board(START, END, times=(0.0, 0.4)), "at least 0.5 apart"),
        (board(END, END), 'in the first moment "yellow" comes only later'),
        (board("A leaf above a white cat.", END), 'in the first moment "green" of the prompt is missing'),
        (board("A green and yellow leaf above a white cat.", END), 'in the first moment "yellow" comes only later'),
        (board(START, "A yellow leaf above a cat."), 'at time 1.0 "white" of the prompt is missing'),
        (board(START, "A yellow leaf above a white dog."), 'at time 1.0 "cat" of the prompt is missing'),
        (board(START, "A leaf that turns yellow above a white cat."), 'at time 1.0 "turns" tells of change'),
        (board(START, "A brown leaf above a white cat."), '"yellow" of the prompt is in no later moment'),
        (board(START), '"yellow" of the prompt is in no later moment'),
    ],
)
def test_storyboard_problem_names_what_is_wrong(moments, reason):
    assert reason in storyboard_problem(LEAF, moments, num_moments=2)


def test_a_later_moment_shares_something_with_the_prompt():
    moments = board("A caterpillar on a twig.", "An empty room.")
    assert storyboard_problem("A caterpillar vanishes", moments, num_moments=2) == (
        "at time 1.0 nothing of the prompt is there"
    )


@pytest.mark.parametrize(("prompt", "motion"), MOTION_EXAMPLES)
def test_motions_of_the_examples_are_valid(prompt, motion):
    assert motion_problem(prompt, motion) is None


@pytest.mark.parametrize(
    ("motion", "reason"),
    [
        ("", "0 characters"),
        ("The leaf turns yellow. " * 20, "460 characters"),
        ("The leaf changes.", '"yellow" of the prompt is missing'),
    ],
)
def test_motion_problem_names_what_is_wrong(motion, reason):
    assert reason in motion_problem("A leaf slowly turns yellow", motion)


def test_a_motion_caption_speaks_of_the_prompt():
    assert motion_problem("A leaf falls", "Something drops.") == "nothing of the prompt is there"
    assert motion_problem("A leaf on a table", "All stays still.") is None


# -- the rewriter ---------------------------------------------------------------------------------------------------------


def ask(answers: list[str], ask_for, **settings):
    """Returns a rewriter's results for a server's answers, and its requests."""
    with ChatServer(*map(reply, answers)) as server:
        made = ask_for(FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "m"), **settings))
    return made, [body for _, _, body in server.requests]


def test_a_storyboard_is_asked_for_checked_and_asked_for_again():
    answers = [write_moments(board(START, "A yellow leaf above a cat.")), write_moments(LEAF_BOARD)]
    made, (first, retry) = ask(answers, lambda rewriter: rewriter.storyboard([LEAF], 2), judge=False)
    assert made == [LEAF_BOARD]
    system, *turns, question = first["messages"]
    assert system["content"] == STORYBOARD_INSTRUCTION.replace("{num_moments}", "2")
    assert "at most 2 moments" in system["content"]
    assert turns == [] and question["content"] == LEAF
    # The answer had the right form, so no example is shown.
    assert len(retry["messages"]) == 2
    # Room for as many captions as there are moments.
    assert first["max_tokens"] == 2 * 256
    assert 'at time 1.0 "white" of the prompt is missing' in retry["messages"][-1]["content"]


def test_without_a_valid_storyboard_the_prompt_is_its_only_moment(caplog):
    made, requests = ask(["no", "never"], lambda rewriter: rewriter.storyboard([LEAF], 3, max_new_tokens=40))
    assert made == [[Moment(start_clause(LEAF), 0.0)]] and len(requests) == 2
    assert made[0][0].rewrite.status == "fallback" and made[0][0].rewrite.attempts == 2
    assert requests[0]["max_tokens"] == 40
    # Asked again for the form, it is shown examples that have nothing of the prompt.
    shown = [read_moments(turn["content"]) for turn in requests[1]["messages"][2:-1:2]]
    fitting = ("A brown dog runs to the right across a snowy field.", "A girl builds a tower of wooden blocks.")
    assert shown == [moments for prompt, moments in STORYBOARD_EXAMPLES if prompt in fitting]


def test_a_motion_caption_is_asked_for():
    motion = "The leaf turns yellow."
    made, (request,) = ask([write_motion(motion)], lambda rewriter: rewriter.describe_motion([LEAF]))
    assert made == [motion]
    system, *turns, _ = request["messages"]
    assert system["content"] == MOTION_INSTRUCTION
    assert turns == []


def test_a_motion_caption_is_written_by_the_names_of_the_first_frame():
    prompts, captions = [LEAF, LEAF], ["A green leaf above a white cat.", "A leaf above a cat."]
    motion = write_motion("The leaf turns yellow.")
    _, requests = ask([motion] * 2, lambda rewriter: rewriter.describe_motion(prompts, captions=captions))
    asked = {request["messages"][-1]["content"] for request in requests}
    assert asked == {f"{LEAF}\n(First frame: {caption})" for caption in captions}
    with pytest.raises(ValueError, match="`captions` has 1 texts for 2 prompts"):
        ask([], lambda rewriter: rewriter.describe_motion(prompts, captions=captions[:1]))
    # A model that was trained for prompts alone is shown these.
    settings = {"instruction": {"motion": "motion"}}
    _, (request,) = ask([motion], lambda rewriter: rewriter.describe_motion([LEAF], captions=captions[:1]), **settings)
    assert request["messages"][-1]["content"] == LEAF


def test_instructions_of_one_s_own_reach_their_question(tmp_path):
    settings = {"instruction": {"first_frame": "", "storyboard": "board {num_moments}"}, "examples": False}
    tiny = tiny_rewriter()
    FirstFrameRewriter(tiny.model, tiny.tokenizer, **settings).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "rewriter_config.json").read_text())["instruction"] == settings["instruction"]
    loaded = FirstFrameRewriter.from_pretrained(tmp_path)
    assert [turn["content"] for turn in loaded.messages("a cat")] == ["a cat"]
    assert [turn["content"] for turn in loaded.messages("a cat", storyboard_task(4))] == ["board 4", "a cat"]
    assert loaded.messages("a cat", MOTION)[0]["content"] == MOTION_INSTRUCTION
    # One text is that of the first frame, and examples of one's own are examples of it.
    endpoint = ChatEndpoint("http://127.0.0.1:9/v1", "m")
    own = FirstFrameRewriter(endpoint=endpoint, instruction="Short.", examples=[["a", "b"]])
    assert own.messages("a cat")[0]["content"] == "Short."
    assert own.messages("a dog", MOTION)[1]["content"] == MOTION_EXAMPLES[0][0]
    with pytest.raises(ValueError, match="'storybord'"):
        FirstFrameRewriter(endpoint=endpoint, instruction={"storybord": "x"})


def test_a_storyboard_has_at_least_two_moments():
    rewriter = FirstFrameRewriter(endpoint=ChatEndpoint("http://127.0.0.1:9/v1", "m"))
    with pytest.raises(ValueError, match="num_moments=1"):
        rewriter.storyboard([LEAF], 1)
