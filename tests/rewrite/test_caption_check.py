"""The check of captions without a model, the plan, the answers of chat models, the judge."""

import json

import pytest
from planned import format_planned

import diffusers_fvg
from diffusers_fvg.rewrite.answers import is_thinking, without_thinking
from diffusers_fvg.rewrite.caption_check import caption_problem, start_clause
from diffusers_fvg.rewrite.judge import SURE, questions, read_answers, verdict
from diffusers_fvg.rewrite.plan import PLAN_SCHEMA, Plan, PlannedCaption, Subject, plan_of, plan_problem
from diffusers_fvg.rewrite.prompts import EXAMPLES, choose_examples, parse_answer, parse_planned
from diffusers_fvg.rewrite.words import is_english, root


# -- form and binding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("Will Smith eats spaghetti.", "Will Smith at a table with a full plate of spaghetti."),
        ("A growing tree in a pot.", "A growing tree in a pot."),
        ("A moving truck arrives.", "A moving truck far down a street."),
        ("A woman stands on a moving walkway.", "A woman on a moving walkway."),
        ("A changing room door opens.", "A closed changing room door."),
        (
            "A close-up shot of a barista pouring steamed milk into a cup, forming a leaf pattern in the coffee, warm light, shallow depth of field.",
            "A close-up of a barista holding a jug of steamed milk over a cup of dark coffee, warm light, shallow depth of field.",
        ),
        (
            "A cozy reading corner with a brown leather armchair, a floor lamp and a tall bookshelf. A tabby cat sleeps on the armchair, wakes up, stretches, jumps down and walks out of the room. The lamp flickers and goes off.",
            "A cozy reading corner with a brown leather armchair, a lit floor lamp and a tall bookshelf, a tabby cat asleep on the armchair.",
        ),
        (
            "Macro shot of a seed in dark soil. A green sprout pushes through the surface, two leaves unfold, and a yellow flower blooms at the end.",
            "Macro view of a seed in dark soil.",
        ),
        (
            "An astronaut plants a flag on the moon, salutes, and a blue Earth rises over the horizon.",
            "An astronaut with a folded flag in her hands on the grey ground of the moon, a black sky above an empty horizon.",
        ),
        (
            "A dog sitting atop a moving robot vacuum in a room",
            "A dog sitting on top of a robot vacuum on the floor of a room.",
        ),
        (
            "The 3D shapes are transforming from cubes into spheres.",
            "Several 3D cubes floating on a plain white background.",
        ),
        (
            "Green apple ripens to red alongside a banana yellowing from green",
            "A green apple next to a green banana on a wooden table.",
        ),
        ("A green leaf slowly turns yellow", "A green leaf on a branch."),
        ("A ball gradually turns from red to blue", "A red ball on grass."),
        ("A caterpillar transforms into a beautiful butterfly", "A fat caterpillar on a twig."),
        ("Three dogs run to the left", "3 dogs at the right, facing left."),
        ("A clear sky clouding over", "A clear sky with a few clouds far away, not yet covered by clouds."),
        ("Clouds up in the sky, clouds over a town", "A sky full of clouds above a town."),
        ("5 leaves fall from a tree", "A tree that holds five leaves, one leaf apart."),
        ("Three dogs run to the left", "A black dog at the right, a white dog behind it, a small dog on a chair."),
        (
            "2 old cats and three birds",
            "An old cat by a door, another cat on a roof, a bird above, a bird below, a red bird.",
        ),
        ("A woman draws a house", "A woman with a pencil over white paper."),
        ("The man jumps three times", "A man stands with bent knees."),
        ("A gray wolf howls", "A grey wolf on a rock."),
        ("A timelapse of a building at night", "A tall building at night."),
        ("A red circle grows and a blue square shrinks", "A red circle beside a blue square."),
        ("Ein Hund jagt 2 Katzen", "Zwei? Nein: 2 Katzen und ein Hund auf einer Wiese."),
        # Siblings of these kinds.
        ("A red circle on the left moves to the right.", "A red circle on the left."),
        ("A cat between two beds of seeds yawns", "A cat in front of two beds, one bed near a seed."),
        ("A melting pot of cultures", "A melting pot of cultures at a street market."),
        ("The boy carries two of the five bags.", "A boy with two of five bags in his arms."),
        ("A girl on the left of a dog barks", "A dog on the right of a girl."),
        ("A dog in front of a cat sleeps", "A cat behind a dog."),
        ("A white cat and a black dog", "A black dog next to a white cat."),
        ('A sign that says "NO DOGS" hangs on a door', 'A sign with the words "NO DOGS" on a door.'),
        ("Die Katze springt auf den roten Tisch", "Eine Katze vor einem roten Tisch."),
        ("一只猫跳上桌子", "一只猫在桌子旁边。"),
        ("قطة تقفز", "قطة على الأرض."),
        ("एक बिल्ली कूदती है", "मेज़ के पास एक बिल्ली।"),
        ("A leaf turns from green\nto brown\nin {braces} 🍂", "A green leaf."),
    ],
)
def test_faithful_captions_are_accepted(prompt, caption):
    assert caption_problem(prompt, caption) is None


@pytest.mark.parametrize(
    ("prompt", "caption", "reason"),
    [
        (
            "Forbidden City, tilt up.",
            "A ginger cat on a shelf, one paw raised beside a full glass of water.",
            "is copied from",
        ),
        (
            "The plastic seat turned into a wooden seat.",
            "A plastic seat turned into a wooden seat.",
            "tells of change",
        ),
        (
            "The 3D shapes are transforming from cubes into spheres.",
            "Smooth 3D spheres floating on a white background.",
            '"spheres" comes only later',
        ),
        (
            "Six dogs dig in the sand, and four cats walking nearby.",
            "Four dogs in the sand and six cats nearby.",
            'contradicts "6 dogs"',
        ),
        (
            "A white rabbit hops across a red carpet in a living room",
            "A red rabbit on a white carpet in a living room.",
            "contradicts",
        ),
        (
            "A photographer setting up a tripod on the left of a tree",
            "A photographer with a tripod on the right of a tree.",
            '"right" contradicts "left"',
        ),
        ("A man without a hat waves", "A man with a hat.", 'there is no "hat"'),
        ("A cat that is not black sleeps", "A black cat.", 'there is no "black"'),
        ("Tom waves to Anna in a park", "A park with trees.", '"tom waves" of the prompt is missing'),
        ("fireworks", "...", "no words"),
        ("A panda making latte art", "Panda 1.0.1.1.1.1.1.1", "more digits and marks than letters"),
        ("Un gato rojo salta sobre la mesa", "???", "no words"),
        ("cinematic, 4k, rain", "I'm sorry, I can't help with that.", "a refusal"),
        ("Un gato rojo salta sobre la mesa", "null", "a placeholder"),
        ("A green leaf slowly turns yellow", "A leaf on a branch.", '"green" of the prompt is missing'),
        ("A green leaf slowly turns yellow", "A green leaf with yellow veins.", '"yellow" comes only later'),
        ("A green leaf slowly turns yellow", "A green tree.", '"leaf" of the prompt is missing'),
        ("A ball gradually turns from red to blue", "A ball on grass.", '"red" of the prompt is missing'),
        ("A ball gradually turns from red to blue", "A red and blue ball.", '"blue" comes only later'),
        (
            "A caterpillar transforms into a butterfly",
            "A caterpillar near a butterfly.",
            '"butterfly" comes only later',
        ),
        ("Three dogs run", "Two dogs on a lawn.", '"2 dogs" contradicts "3 dogs"'),
        ("Three dogs run", "A dog on a lawn, a dog in a house.", '"3 dogs" of the prompt is missing'),
        ("Two dogs run", "A dog, a dog and a dog on a lawn.", '"2 dogs" of the prompt is missing'),
        ("Two dogs and three birds", "A dog, a dog, a bird and a bird.", '"3 birds" of the prompt is missing'),
        ("A cat jumps over a wooden fence", "A cat in a garden.", '"wooden fence" of the prompt is missing'),
        ("A cat walks while two white birds sing", "A cat and two birds.", '"white" of the prompt is missing'),
        ("A leaf turns brown while two birds sing", "A leaf on a twig.", '"birds" of the prompt is missing'),
        ("A cat walks", "A cat that then walks away.", '"then" tells of change or time'),
        ("A cat walks", "A cat slowly lifts a paw.", '"slowly" tells of change or time'),
        ("A cat walks", "", "has 0 characters"),
        ("A cat walks", "A cat. " * 400, "has 2800 characters"),
        # Siblings of these kinds.
        ("Two red apples and three green pears", "Three red apples and two green pears.", "contradicts"),
        (
            "A red car beside a blue bus",
            "A blue car beside a red bus.",
            '"blue car" contradicts "red car" of the prompt',
        ),
        (
            "A purple vase beside an orange cup",
            "An orange vase.",
            '"orange vase" contradicts "purple vase" of the prompt',
        ),
        ("A bird above a car", "A bird below a car.", '"below" contradicts "above"'),
        ("A dog behind a tree", "A tree behind a dog.", '"behind" of the prompt is turned round'),
        ("A room without windows", "A room with windows.", 'there is no "windows"'),
        ("A clear sky clouding over", "A sky covered by dark clouds.", '"clouds" comes only later'),
        ("The sky clouds over as a lake is icing up", "A lake under a layer of ice.", '"ice" comes only later'),
        ("A snowman melts in the sun", "A melted snowman in the sun.", '"melted" comes only later'),
        ("A banana ripens from green to yellow", "A yellow banana.", '"yellow" comes only later'),
        ("A cat sleeps", "Frame 1: a cat. Frame 2: the cat wakes.", "several pictures"),
        ("A cat sleeps", "[description of the first frame]", "a placeholder"),
        ("A cat sleeps", "Lo siento, no puedo ayudar.", "a refusal"),
        ("A cat sleeps", "A cat on a bed \ud83d.", "lone surrogate"),
    ],
)
def test_wrong_captions_are_refused_with_the_reason(prompt, caption, reason):
    assert reason in caption_problem(prompt, caption)


def test_no_example_is_a_caption_of_another_prompt():
    for _, caption in EXAMPLES:
        assert "copied" in caption_problem("A mirror", caption)
        assert caption_problem("A mirror", f"A mirror. {caption}") is not None
    for prompt, caption in EXAMPLES:
        assert caption not in [shown for _, shown in choose_examples(prompt, EXAMPLES)]


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("A green leaf slowly turns yellow.", "A green leaf"),
        ("The sky is shifting from dark to bright.", "The sky, dark"),
        ("A person reads on a couch, then they get up and sweep.", "A person reads on a couch"),
        ("A woman draws a house while a dog sleeps on a rug.", "A woman and a dog sleeps on a rug"),
        ("Two cats play in a garden.", "Two cats play in a garden"),
        ("Un gato rojo salta. Luego duerme.", "Un gato rojo salta."),
        ("The camera pans slowly. A red barn in a field.", "A red barn in a field"),
    ],
)
def test_what_stands_in_is_the_start_of_the_prompt(prompt, start):
    assert start_clause(prompt) == start


@pytest.mark.parametrize(
    "forms",
    [
        "leaf leaves",
        "fly flies flying",
        "rust rusted rusting rusty",
        "wood wooden",
        "knife knives",
        "run running",
        "three 3",
    ],
)
def test_forms_of_a_word_have_one_root(forms):
    assert len({root(word) for word in forms.split()}) == 1


def test_english_is_told_from_other_languages():
    assert all(
        map(
            is_english,
            ("fireworks", "a cat in a hat", "Pikachu snowboarding", "The man and la dolce vita with the cat"),
        )
    )
    assert not any(map(is_english, ("Un gato rojo salta sobre la mesa", "Ein Hund jagt 2 Katzen", "一只猫", "123")))


# -- plan -----------------------------------------------------------------------------------------------------------------

PLAN = Plan(
    (Subject("door", attributes=("red",), state="closed"), Subject("cat", 2)),
    ("the cats are before the door",),
    "",
    "open",
)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("A closed red door and two cats before it.", None),
        ("A red door and two cats.", '"closed" of the plan is missing'),
        ("A closed door and two cats.", '"red" of the plan is missing'),
        ("A closed red door and a cat.", '"2 cat" of the plan is missing'),
        ("A closed red door.", '"cat" of the plan is missing'),
        ("A closed red door, an open lock and two cats.", '"open" comes only later'),
    ],
)
def test_a_caption_keeps_its_plan(caption, reason):
    found = plan_problem("The door lets the cats in.", caption, PLAN)
    assert found is None if reason is None else reason in found


def test_the_public_check_takes_a_plan():
    prompt, caption = "A red door lets two cats in.", "A red door and two cats."
    assert diffusers_fvg.caption_problem(prompt, caption) is None
    assert diffusers_fvg.caption_problem(prompt, caption, PLAN) == '"closed" of the plan is missing'


def test_a_plan_survives_its_text_and_malformed_parts_are_left_out():
    made = PlannedCaption("A closed red door.", PLAN)
    assert parse_planned(format_planned(made)) == made
    assert [*json.loads(format_planned(made))] == PLAN_SCHEMA["required"]
    assert parse_planned('{"first_frame": "A cat."}') == PlannedCaption("A cat.", None)
    value = {"subjects": [{"name": "cat", "count": "2", "attributes": "red"}, {"name": 3}, "dog"], "later": None}
    assert plan_of(value) == Plan((Subject("cat"),))


# -- answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        (
            'Maybe {"first_frame": "DRAFT: a red circle on the right."}? No.\n</think>\n{"first_frame": "A red circle on the left."}',
            "A red circle on the left.",
        ),
        ('<think>Maybe {"first_frame": "DRAFT: a red circle on the right."}? No, it must', None),
        (
            '[THINK]Maybe {"first_frame": "DRAFT: a red circle on the right."}?[/THINK]{"first_frame": "A red circle on the left."}',
            "A red circle on the left.",
        ),
        (
            '<thinking>Maybe {"first_frame": "DRAFT: a red circle on the right."}?</thinking>{"first_frame": "A red circle on the left."}',
            "A red circle on the left.",
        ),
        (
            '<|channel|>analysis<|message|>Maybe {"first_frame": "DRAFT: a red circle on the right."}?<|end|><|start|>assistant<|channel|>final<|message|>{"first_frame": "A red circle on the left."}',
            "A red circle on the left.",
        ),
        ('You want {"first_frame": "..."}: {"first_frame": "A red circle on the left."}', "A red circle on the left."),
        ('<reasoning>{"first_frame": "no"}</reasoning>{"first_frame": "A cat."}', "A cat."),
        ('◁think▷{"first_frame": "no"}◁/think▷{"first_frame": "A cat."}', "A cat."),
        (
            '<think>a</think>{"first_frame": "no"}<think>{"first_frame": "no"}</think>{"first_frame": "A cat."}',
            "A cat.",
        ),
        ('{"first_frame": "A cat."} {"first_frame": "..."}', "A cat."),
        ('{"first_frame": "A dog."} No: {"subjects": [{"name": "cat"}], "first_frame": "A cat."}', "A cat."),
        ("{" * 5000, None),
        ("", None),
    ],
)
def test_the_caption_of_an_answer(answer, caption):
    if caption is None:
        with pytest.raises(ValueError, match="no JSON object|cut off"):
            parse_answer(answer)
    else:
        assert parse_answer(answer) == caption


def test_a_template_that_opens_the_thinking_is_seen():
    assert is_thinking("<|user|>hi<|assistant|><think>\n") and is_thinking("[THINK]")
    assert not is_thinking("<think>\n\n</think>\n\n") and not is_thinking("<|assistant|>")
    assert without_thinking("A cat.") == "A cat."


# -- judge ----------------------------------------------------------------------------------------------------------------


def test_the_judge_asks_for_the_start_and_for_nothing_of_later():
    asked = questions("The door opens.", PLAN)
    assert [question.wanted for question in asked] == [True, True, True, False]
    assert "red door, closed" in asked[0].text and "2 cat" in asked[1].text and "(open)" in asked[-1].text
    assert [question.text for question in questions("Three dogs run in a park", None)][0].endswith("this: 3 dogs?")
    assert len(questions("一只猫", None)) == 1


def test_only_a_sure_answer_refuses():
    asked = questions("The door opens.", PLAN)
    assert verdict(asked, [1, 1, 1, 0]) is None and verdict(asked, [0.5] * 4) is None
    assert verdict(asked, [1 - SURE - 0.01, 1, 1, 0]) == '"red door, closed" is missing'
    assert verdict(asked, [1, 1, 1, SURE + 0.01]) == "it shows what happens only later (open)"


def test_answers_to_questions_are_read():
    assert read_answers('Sure: {"answers": ["Yes", "no.", true, "maybe"]}', 4) == [1, 0, 1, 0.5]
    assert read_answers('{"answers": ["yes"]}', 2) == read_answers("yes", 2) == [0.5, 0.5]
