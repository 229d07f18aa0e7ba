"""Measures the check of captions on the published prompt suites.

The suites are other people's: none of their text is here. They are read from the folder that `FVG_PROMPT_SUITES` names, which
holds `t2v_compbench/v2/meta_data/*.json` (T2V-CompBench, CVPR 2025), `vbench2/prompts/VBench2_full_text.txt` and
`vbench2/VBench2_full_info.json` (VBench-2.0), and `evalcrafter/metadata.json` (EvalCrafter): 3,113 prompts.

    FVG_PROMPT_SUITES=... python -m pytest -m slow tests/rewrite/test_caption_suites.py -s
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from functools import cache
from pathlib import Path

from diffusers_fvg.rewrite.caption_check import caption_problem, start_clause
from diffusers_fvg.rewrite.judge import questions, verdict
from diffusers_fvg.rewrite.plan import Plan, Subject
from diffusers_fvg.rewrite.prompts import EXAMPLES


FOLDER = os.environ.get("FVG_PROMPT_SUITES")
FAITHFUL = Path(__file__).with_name("faithful_captions.jsonl")
NUMBERS = "zero one two three four five six seven eight nine ten".split()
COLOURS = "red orange yellow green blue purple pink brown black white grey gray gold golden silver".split()
OPPOSITES = (
    ("on the left", "on the right"),
    ("in front of", "behind"),
    ("above", "below"),
    ("on top of", "under"),
    ("under", "above"),
    ("beneath", "above"),
    ("over", "under"),
    (" on ", " under "),
)


@cache
def compbench() -> dict[str, list[dict]]:
    files = sorted(Path(FOLDER, "t2v_compbench/v2/meta_data").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


@cache
def prompts() -> list[str]:
    found = [entry["prompt"] for entries in compbench().values() for entry in entries]
    found += Path(FOLDER, "vbench2/prompts/VBench2_full_text.txt").read_text(encoding="utf-8").splitlines()
    crafted = json.loads(Path(FOLDER, "evalcrafter/metadata.json").read_text(encoding="utf-8"))
    return found + [entry["prompt"] for entry in crafted.values()]


def is_accepted(prompt: str, caption: str, plan: Plan | None = None) -> bool:
    return caption_problem(prompt, caption, plan) is None


def exchanged(text: str, one: str, other: str) -> str:
    """Exchanges two words of a text."""
    there = {one: other, other: one}
    return re.sub(rf"\b({one}|{other})\b", lambda match: there[match[0].lower()], text, flags=re.IGNORECASE)


def opposite(prompt: str) -> str | None:
    """Reverses the relation of places in a prompt."""
    for one, other in (pair for both in OPPOSITES for pair in (both, both[::-1])):
        if one in prompt:
            return prompt.replace(one, other, 1)
    return None


def end_states() -> dict[str, int]:
    """Of T2V-CompBench's dynamic attributes: states as the caption, without a plan and with one that holds the first state."""
    entries = compbench()["dynamic_attribute_binding"]
    planned = [(entry, Plan((Subject("", state=entry["state 0"]),))) for entry in entries]
    reasons = [(entry, caption_problem(entry["prompt"], entry["state 0"]) or "") for entry in entries]
    end_words = [
        (set(re.findall(r"\w+", f"{e['state 1']}".lower())), set(re.findall(r"\w+", reason))) for e, reason in reasons
    ]
    return {
        "end state accepted": sum(is_accepted(entry["prompt"], entry["state 1"]) for entry in entries),
        "end state accepted with a plan": sum(is_accepted(e["prompt"], e["state 1"], plan) for e, plan in planned),
        "start state refused": sum(bool(reason) for _, reason in reasons),
        "start state refused for want of the end state": sum(
            "is missing" in reason and bool(end & said) for (end, said), (_, reason) in zip(end_words, reasons)
        ),
        "start state refused with a plan": sum(
            not is_accepted(e["prompt"], e["state 0"], plan) for e, plan in planned
        ),
    }


def exchanges() -> dict[str, tuple[int, int]]:
    """Captions that are the prompt with two counts, two colours or a place turned round: accepted, and how many there are."""
    counted = [entry for entry in compbench()["generative_numeracy"] if "," in entry["numbers"]]
    pairs = [(entry["prompt"], [NUMBERS[int(number)] for number in entry["numbers"].split(",")]) for entry in counted]
    coloured = [entry["prompt"] for entry in compbench()["consistent_attribute_binding"]]
    coloured = [(text, [word for word in re.findall("[a-z]+", text.lower()) if word in COLOURS]) for text in coloured]
    placed = [entry["prompt"] for entry in compbench()["spatial_relationships"]]
    made = {
        "counts exchanged": [(text, exchanged(text, *two)) for text, two in pairs if two[0] != two[1]],
        "colours exchanged": [(text, exchanged(text, *two)) for text, two in coloured if len({*two}) == len(two) == 2],
        "place turned round": [
            (text, opposite(text)) for text in placed if opposite(text) and is_accepted(text, text)
        ],
    }
    return {name: (sum(is_accepted(*pair) for pair in found), len(found)) for name, found in made.items()}


def strangers(seed: int) -> tuple[int, int]:
    """Another prompt, and its start clause, as the caption of each prompt: accepted."""
    others = prompts()[:]
    random.Random(seed).shuffle(others)
    pairs = [(prompt, other) for prompt, other in zip(prompts(), others) if prompt != other]
    whole = sum(is_accepted(*pair) for pair in pairs)
    return whole, sum(is_accepted(prompt, start_clause(other)) for prompt, other in pairs)


def others() -> dict[str, int]:
    """Examples as captions, and the fallback by the rules."""
    pasted = sum(any(is_accepted(prompt, caption) for _, caption in EXAMPLES) for prompt in prompts())
    broken = sum(not is_accepted(prompt, start_clause(prompt)) for prompt in prompts())
    return {"prompts that accept an example": pasted, "fallbacks that break the rules": broken}


def faithful() -> list[tuple[str, str, str | None]]:
    """Prompt, a person's caption of its first frame, and what the check says."""
    known = [*prompts()]
    known += [
        entry["prompt_en"]
        for entry in json.loads(Path(FOLDER, "vbench2/VBench2_full_info.json").read_text(encoding="utf-8"))
    ]
    by_hash = {hashlib.sha256(prompt.encode()).hexdigest(): prompt for prompt in known}
    rows = [json.loads(line) for line in FAITHFUL.read_text(encoding="utf-8").splitlines()]
    pairs = [(by_hash[row["prompt_sha256"]], row["caption"]) for row in rows]
    return [(prompt, caption, caption_problem(prompt, caption)) for prompt, caption in pairs]


def judged(right: float, seed: int = 0) -> dict[str, int]:
    """Start and end states that the words leave through, by a judge whose answers are right with a probability, and sure."""
    draws = random.Random(seed)
    counts = dict.fromkeys(("start states", "start states kept", "end states", "end states kept"), 0)
    for entry in compbench()["dynamic_attribute_binding"]:
        for name, key in (("start states", "state 0"), ("end states", "state 1")):
            if not is_accepted(entry["prompt"], entry[key]):
                continue
            asked = questions(entry["prompt"], None)
            # Only of an end state the answer to "does it show what happens later" is yes.
            truth = [question.wanted or key == "state 1" for question in asked]
            yes = [float(answer if draws.random() < right else not answer) for answer in truth]
            counts[name] += 1
            counts[f"{name} kept"] += verdict(asked, yes) is None
    return counts
