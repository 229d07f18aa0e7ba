"""Figures of the README files are those of the committed results."""

import json
import math
import re
from pathlib import Path

import pytest

from diffusers_fvg import RECIPES
from diffusers_fvg.overview import memory_cells
from diffusers_fvg.shapes.dreamer_report import report_text


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"


def readme(folder: str = ".") -> str:
    return (ROOT / folder / "README.md").read_text(encoding="utf-8")


def rows_below(page: str, header: str) -> list[list[str]]:
    """Cells of the table whose header begins so."""
    (table,) = re.findall(rf"^\| {re.escape(header)}.*\n\|[-:|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_scores_are_those_of_the_study():
    study, page = json.loads((RESULTS / "shapes" / "study.json").read_text()), readme("diffusers_fvg/shapes")
    words = {">=": "at least", "<=": "at most", "": ""}
    verdicts = {True: "met", False: "missed", None: "no target"}
    claims = [
        [
            f"{claim['value']:.3f}",
            f"{words[claim['relation']]} {'' if claim['bar'] is None else format(claim['bar'], 'g')}".strip(),
            verdicts[claim["met"]],
        ]
        for claim in study["claims"]
    ]
    assert [row[1:] for row in rows_below(page, "measure |")] == claims
    scores = {
        row["arm"]: [*(found["score"] for found in row["categories"].values()), row["score"]]
        for row in study["results"]
        if row["steps"] == 15
    }
    table = rows_below(page, "way to make the video")
    assert {re.match(r"`(\w+)`", row[0])[1]: row[1:] for row in table} == {
        arm: [f"{score:.3f}" for score in values] for arm, values in scores.items()
    }


@pytest.mark.parametrize("number", [0, 1])
def test_memory_is_that_of_the_benchmark(number):
    run = json.loads((RESULTS / "modulation.json").read_text())["runs"][number]
    (row,) = re.findall(rf"^\| {run['tokens']:,} \| {run['dtype']}.*$", readme("diffusers_fvg/kernels"), re.MULTILINE)
    stock, ours, ratio = (cell.strip() for cell in row.split("|")[3:6])
    assert (
        stock == f"{run['stock_peak_bytes'] / 2**20:.0f} MiB"
        and ours == f"{run['anchored_peak_bytes'] / 2**20:.0f} MiB"
    )
    assert float(ratio) == round(run["ratio"], 2)


def test_dreamer_s_table_is_that_of_its_report():
    page = readme("diffusers_fvg/dreamer")
    report = json.loads((RESULTS / "dreamer_shapes" / "dreamer.json").read_text())
    rows = {(row["row"], row.get("trained_steps")): row for row in report["rows"]}
    keys = {"score_written": 3, "score_true": 3, "detail": 1, "flow": 1}

    def cells(start: str) -> list[str]:
        (line,) = re.findall(rf"^\| {re.escape(start)}.*$", page, re.MULTILINE)
        return [cell.strip() for cell in line.strip("|").split("|")][2:]

    table = {
        "Factorized Video Generation, the embedded model": [("FVG, the embedded model", None)],
        "Factorized-Dreamer, all designs | 3,000": [("Factorized-Dreamer", 3000)],
        "Factorized-Dreamer, all designs | 300": [("all designs", 300)],
        "without PACA": [("without PACA", 300)],
        "without PredictNet | 3,000": [("without PredictNet", 3000)],
        "without PredictNet | 300": [("without PredictNet", 300)],
        "s = 0.1, 0.15, no shift": [("s = 0.1", 300), ("s = 0.15", 300), ("without shift (s = 1)", 300)],
    }
    for start, names in table.items():
        found = [", ".join(f"{rows[name][key]:.{places}f}" for name in names) for key, places in keys.items()]
        assert cells(start) == found
    for steps, text in ((3000, "3,000"), (300, "300")):
        plain = rows["none: plain video UNet", steps]["score_prompt"]
        assert cells(f"plain video UNet, reads the prompt alone | {text}") == [f"{plain:.3f}", "", "", ""]

    # What the text below the table says, and the table beside the JSON.
    claims = {(claim["figure"], claim["trained_steps"]): claim["value"] for claim in report["claims"]}
    decoder = json.loads((RESULTS / "dreamer_shapes" / "training.json").read_text())["decoder"]
    model, kept = rows["Factorized-Dreamer", 3000], report["drift"][0]["kept"][-1]
    for said in (
        f"scores {claims['score, all designs minus plain', 3000]:.2f} more than the plain UNet (target: 0.10 more)",
        f"{18 * model['categories_written']['dynamic_attr']:.0f} of 18 such videos are right with all stages",
        f"{18 * model['categories_true']['dynamic_attr']:.0f} of 18 from true first frames",
        f"after 3,000 steps is {100 * claims['flow error added without PredictNet', 3000]:.0f} % higher (the target",
        f"{claims['detail in dB that goes without PACA', 300]:.1f} dB of the first frame's detail",
        f"after 31 frames {100 * kept:.0f} % of videos",
        f"this model's VAE scores {decoder['held_out']:.3f} on held-out clips (the recipe's target is {decoder['bar']})",
    ):
        assert said in " ".join(page.split())
    assert (RESULTS / "dreamer_shapes" / "dreamer.txt").read_text() == report_text(report) + "\n"


def test_figures_beside_a_report_stand_in_it():
    page = readme("diffusers_fvg/shapes")
    rows = re.findall(r"^\|(.*)\| \[\w+\]\(\.\./\.\./(examples/results/shapes/\w+\.txt)\) \|$", page, re.MULTILINE)
    assert len(rows) >= 5
    for row, path in rows:
        figures = re.findall(r"\d\.\d\d+", row)
        missing = set(figures) - set(re.findall(r"\d\.\d+", (ROOT / path).read_text(encoding="utf-8")))
        assert figures and not missing, (row, missing)


def test_anchors_at_their_exact_frame_are_those_of_the_report():
    report = json.loads((RESULTS / "shapes" / "appended.json").read_text())
    by = {(row["form"], tuple(row["frames"])): row for row in report["rows"]}
    expected = [
        [
            ", ".join(map(str, frames)),
            *(f"{by[key]['score']:.3f}" if (key := (form, frames)) in by else "" for form in ("slot", "appended")),
            *(f"{by[key]['psnr']:.1f}" if (key := (form, frames)) in by else "" for form in ("slot", "appended")),
            f"{by['appended', frames]['vae']:.1f}",
        ]
        for form, frames in by
        if form == "appended"
    ]
    page = readme("diffusers_fvg/shapes")
    assert rows_below(page, "given frames |") == expected and len(expected) == 9
    lost = {form: by[form, (0,)]["kept"] - by[form, (8,)]["kept"] for form in ("slot", "appended")}
    below = [by["appended", (0,)]["vae"] - by["appended", frames]["vae"] for frames in ((5,), (6,), (7,), (8,), (16,))]
    errors = [row["error"] for row in report["rows"] if row["frames"] != [0]]
    told = " ".join(page.split())
    for said in (
        f"motion score {by['appended', (5,)]['motion_score']:.3f} and {by['slot', (5,)]['motion_score']:.3f}",
        f"standard errors of their rows ({min(errors):.3f} to {max(errors):.3f})",
        f"The VAE alone is {min(below):.1f} to {max(below):.1f} dB below it",
        f"middle frame loses {lost['slot']:.3f} of the videos",
    ):
        assert said in told, said
    assert f"{lost['appended']:.3f}" == f"{lost['slot']:.3f}"


def test_the_front_page_is_short_and_its_scores_are_those_of_the_study():
    assert len(readme().splitlines()) <= 250
    results = json.loads((RESULTS / "shapes" / "study.json").read_text())["results"]
    scores = {(row["arm"], row["steps"]): f"{row['score']:.3f}" for row in results}
    arms = {"the video model alone": "direct", "all three stages": "factorized", "true first frames": "true_anchor"}
    for start, arm in arms.items():
        (row,) = re.findall(rf"^\| {start}.*\|$", readme(), re.MULTILINE)
        assert [cell.strip() for cell in row.split("|")[2:5]] == [
            scores.get((arm, steps), "") for steps in (4, 15, 50)
        ]


def test_the_front_page_s_cards_are_what_is_planned():
    for name, recipe in RECIPES.items():
        (row,) = re.findall(rf"^\| `{re.escape(name)}` \|.*\|$", readme(), re.MULTILINE)
        small, medium, large, larger, largest = (cell.strip() for cell in row.split("|")[4:9])
        plans = memory_cells(recipe, ("8GB", "12GB", "16GB", "24GB", "32GB", "48GB", "80GB"))
        pairs = [plan.removesuffix("+").split() for plan in plans]
        planned = [f"{placed}, {peak}" for placed, peak in pairs]
        assert planned == [small, medium, medium, large, larger, larger, largest]


def test_the_study_of_few_clips_is_its_report():
    report = json.loads((RESULTS / "clips" / "clips.json").read_text())
    scores = {
        (row["clips"], row["arm"], row["steps"]): f"{row['score']:.3f}"
        for row in report["rows"]
        if not row.get("embedded")
    }
    page = (ROOT / "examples" / "clips" / "README.md").read_text()
    found = re.findall(r"^\| ([\d,]+) \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \|$", page, re.MULTILINE)
    assert [number for number, *_ in found] == ["500", "2,000", "8,000", "20,000"] and report["synthetic"] is True
    for number, direct, factorized, lead, error in found:
        clips = int(number.replace(",", ""))
        assert (direct, factorized) == (scores[clips, "direct", 50], scores[clips, "factorized", 15])
        assert [lead, error] == [f"{report['runs'][str(clips)]['lead'][name]:.3f}" for name in ("value", "error")]

    rows = {
        (row["clips"], row["arm"], row["steps"]): row
        for row in report["rows"]
        if "categories" in row and not row.get("embedded")
    }
    factorized, direct = rows[2000, "factorized", 15], rows[20_000, "direct", 50]
    more = factorized["score"] - direct["score"]
    by_category = {
        name: factorized["categories"][name]["score"] - direct["categories"][name]["score"]
        for name in direct["categories"]
    }
    few, all_ = rows[500, "factorized", 15], rows[20_000, "factorized", 15]
    anchored = {
        number: rows[number, "true_anchor", 15]["score"] - rows[number, "factorized", 15]["score"]
        for number in (500, 2000, 8000, 20_000)
    }
    embedded = {row["arm"]: row["score"] for row in report["rows"] if row.get("embedded") and row["steps"] == 15}
    less = sorted(-value for number, value in anchored.items() if number != 2000)
    targets = [(0.15 - run["lead"]["value"]) / run["lead"]["error"] < 2 for name, run in report["runs"].items()]
    low, high = rows[500, "true_anchor", 15], rows[2000, "true_anchor", 15]
    told = " ".join(page.split())
    assert max(run["lead"]["value"] for run in report["runs"].values()) < 0.15
    assert targets[:4] == [False, True, True, False]
    for said in (
        f"factorized with 2,000 clips ({factorized['score']:.3f}): with all 20,000 clips it scores {direct['score']:.3f}",
        f"The difference is {more / math.hypot(factorized['standard_error'], direct['standard_error']):.1f} times its",
        f"{by_category['generative_numeracy']:.2f} more than direct with 20,000 in counting and "
        f"{by_category['spatial_relationships']:.2f} more in spatial relations, {by_category['consistent_attr']:.2f}, "
        f"{by_category['motion_binding']:.2f} and {by_category['action_binding']:.2f} more in constant attributes",
        f"and {-by_category['dynamic_attr']:.2f} less in changing attributes",
        f"falls from {few['spread']:.3f} to {all_['spread']:.3f} for factorized; for direct it is {direct['spread']:.3f}",
        f"in three of the four runs (by {less[0]:.3f} to {less[-1]:.3f}) and {anchored.pop(2000):.3f} more in the other; "
        f"with the embedded model it scores {embedded['true_anchor'] - embedded['factorized']:.3f} more",
        f"by {high['score'] - low['score']:.3f} from 500 to 2,000 clips, and its spread is {low['spread']:.3f} and {high['spread']:.3f}",
    ):
        assert said in told, said

    # The rule of the protocol: a difference of neighbours within the spread over seeds has no meaning.
    meant = [
        (arm, fewer, more)
        for arm, steps in (
            ("direct", 50),
            ("direct", 15),
            ("factorized", 50),
            ("factorized", 15),
            ("true_anchor", 50),
            ("true_anchor", 15),
        )
        for fewer, more in ((500, 2000), (2000, 8000), (8000, 20_000))
        if rows[more, arm, steps]["score"] - rows[fewer, arm, steps]["score"]
        > max(rows[number, arm, steps]["spread"] for number in (fewer, more))
    ]
    assert {(arm, *numbers) for arm, *numbers in meant} == {("true_anchor", 500, 2000)}
    missing = re.findall(r"^\| ([\d,]+) \| (0\.\d+) \| (0\.\d+) \|$", page, re.MULTILINE)
    assert [(number, *values) for number, *values in missing] == [
        (
            f"{int(number):,}",
            f"{1 - rows[int(number), 'true_anchor', 15]['score']:.3f}",
            f"{1 - run['true_anchor_motion']:.3f}",
        )
        for number, run in report["runs"].items()
        if number != "embedded"
    ]

    # Factorized-Dreamer's table: scores, and what more clips add.
    pairs: dict[int, list[dict]] = {}
    for row in report["rows"]:
        if row["series"].startswith("Dreamer"):
            pairs.setdefault(row["clips"], []).append(row)
    expected = [
        [
            f"{clips:,}",
            *(f"{row['score']:.3f}" for row in pair),
            *("{value:.3f} ({error:.3f})".format(**row["added"]) if "added" in row else "" for row in pair),
        ]
        for clips, pair in pairs.items()
    ]
    table = page[page.index("Factorized-Dreamer, 10 steps.") :]
    lines = [line for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [[cell.strip() for cell in line[1:-1].split("|")] for line in lines] == expected
    assert all([row["arm"] for row in pair] == ["written", "true"] for pair in pairs.values())
