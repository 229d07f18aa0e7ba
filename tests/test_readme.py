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
    values = {"score_written": 3, "score_true": 3, "detail": 1, "flow": 1}

    def cell(row: dict, value: str, places: int) -> str:
        error = row.get(value.replace("score", "error") if "score" in value else f"error_{value}")
        return f"{row[value]:.{places}f}" + (f" ± {error:.{places // 2 + 1}f}" if error is not None else "")

    table = {tuple(cells[:2]): cells[2:] for cells in rows_below(page, "system |")}
    fvg = rows["FVG, the embedded model", None]
    found = {
        ("Factorized Video Generation, the embedded model", "12,000 and 3,000 of its LoRA"): (
            fvg,
            ["score_written", "score_true"],
        )
    }
    names = {
        ("Factorized-Dreamer, all designs, the embedded model", "3,000"): ("Factorized-Dreamer", 3000),
        ("all designs, trained again", "3,000"): ("all designs", 3000),
        ("without PredictNet", "3,000"): ("without PredictNet", 3000),
        ("without PACA", "3,000"): ("without PACA", 3000),
        ("all designs", "300"): ("all designs", 300),
        ("without PACA", "300"): ("without PACA", 300),
        ("without PredictNet", "300"): ("without PredictNet", 300),
        ("without the shift (s = 1)", "300"): ("without shift (s = 1)", 300),
        ("s = 0.1", "300"): ("s = 0.1", 300),
        ("s = 0.15", "300"): ("s = 0.15", 300),
    }
    found |= {key: (rows[name], list(values)) for key, name in names.items()}
    plain = {text: rows["none: plain video UNet", steps] for steps, text in ((3000, "3,000"), (300, "300"))}
    expected = {
        key: [str(row["seeds"])]
        + [cell(row, value, places) if value in shown else "" for value, places in values.items()]
        for key, (row, shown) in found.items()
    }
    expected |= {
        ("plain video UNet, reads the prompt alone", text): [
            str(row["seeds"]),
            cell(row, "score_prompt", 3),
            "",
            "",
            "",
        ]
        for text, row in plain.items()
    }
    assert table == expected

    # What the text below the table says, and the table beside the JSON.
    claims = {(claim["figure"], claim["trained_steps"]): claim for claim in report["claims"]}
    figures = {
        "score, all designs minus plain": lambda value: f"{value:.2f}".replace("-", "−"),
        "detail in dB that goes without PACA": lambda value: f"{value:.1f} dB",
        "flow error added without PredictNet": lambda value: f"{100 * value:.0f} % more",
    }
    assert [cells[2:] for cells in rows_below(page, "comparison, with equal training steps |")] == [
        [
            f"{text(claims[name, steps]['value'])}: {'met' if claims[name, steps]['met'] else 'missed'}"
            for steps in (3000, 300)
        ]
        for name, text in figures.items()
    ]
    decoder = json.loads((RESULTS / "dreamer_shapes" / "training.json").read_text())["decoder"]
    model, kept = rows["Factorized-Dreamer", 3000], report["drift"][0]["kept"]
    both = [rows[name, 3000]["score_written"] for name in ("without PACA", "all designs")]
    for said in (
        "and scores {:.3f} instead of {:.3f} after".format(*both),
        f"which gets no first frame ({plain['3,000']['score_prompt']:.3f})",
        f"the flow errors differ by {100 * claims['flow error added without PredictNet', 3000]['value']:.0f} %",
        f"badly ({model['categories_written']['dynamic_attr']:.2f} with all stages and "
        f"{model['categories_true']['dynamic_attr']:.2f} from true",
        f"next weakest ({model['categories_written']['generative_numeracy']:.2f} and "
        f"{model['categories_true']['generative_numeracy']:.2f})",
        f"is {100 * kept[0]:.0f} % after the first window of 8 frames and {100 * kept[-1]:.0f} % after 32 frames",
        f"not that of FVG, scores {decoder['held_out']:.3f} on held-out clips (the recipe's target is {decoder['bar']})",
    ):
        assert said in " ".join(page.split()), said
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
    forms = ("slot", "slot, any", "appended")
    by = {(row["form"], tuple(row["frames"])): row for row in report["rows"]}
    differences = {tuple(row["frames"]): row for row in report["differences"]}
    page = readme("diffusers_fvg/shapes")
    sets = [frames for form, frames in by if form == "appended"]

    def cells(frames: tuple[int, ...], value: str, places: int) -> list[str]:
        return [f"{by[key][value]:.{places}f}" if (key := (form, frames)) in by else "" for form in forms]

    def difference(frames: tuple[int, ...], value: str) -> str:
        if frames not in differences:
            return ""
        return "{value:+.3f} ± {error:.3f}".format(**differences[frames][value]).replace("-", "−")

    assert len(sets) == 9 and rows_below(page, "given frames |") == [
        [
            ", ".join(map(str, frames)),
            *cells(frames, "score", 3),
            *(difference(frames, value) for value in ("score", "motion_score", "kept")),
        ]
        for frames in sets
    ]
    assert rows_below(page, "frames, PSNR in dB |") == [
        [", ".join(map(str, frames)), *cells(frames, "psnr", 1), f"{by['appended', frames]['vae']:.1f}"]
        for frames in sets
    ]
    after = [(5,), (6,), (7,), (8,), (16,)]
    below = {
        form: [by[form, frames]["vae"] - by[form, frames]["psnr"] for frames in after] for form in ("slot", "appended")
    }
    vae = [by["appended", (0,)]["vae"] - by["appended", frames]["vae"] for frames in after]
    lost = [by[form, (0,)]["kept"] - by[form, (8,)]["kept"] for form in forms]
    errors = [by[form, frames]["kept_error"] for form in forms for frames in ((0,), (8,))]
    motion = [differences[(frame,)]["motion_score"] for frame in (5, 6, 7)]
    kept = [differences[frames]["kept"] for frames in ((0, 16), (0, 8, 16))]
    told = " ".join(page.split())
    for said in (
        f"Appended anchors are {min(below['appended']):.1f} to {max(below['appended']):.1f} dB below the VAE",
        f"(frames 8 and 16: {below['slot'][3]:.1f} and {below['slot'][4]:.1f} dB below it)",
        "({2:.1f}, {1:.1f} and {0:.1f} dB at frames 7, 6 and 5)".format(*below["slot"]),
        f"the VAE alone is {min(vae):.1f} to {max(vae):.1f} dB below it",
        "the motion score is {:.2f}, {:.2f} and {:.2f} higher".format(*(row["value"] for row in motion)),
        "lose {:.2f} and {:.2f} of the videos".format(*(-row["value"] for row in kept)),
        "loses {:.3f} of the kept share of frame 0 with the embedded LoRA, {:.3f} with".format(*lost),
        f"and {lost[2]:.3f} with appended anchors",
        f"the standard errors of these shares are {min(errors):.2f} to {max(errors):.2f})",
    ):
        assert said in told, said
    assert all(2.4 < abs(row["value"]) / row["error"] < 3.3 for row in (*motion, *kept))


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
    anchored = [
        rows[number, "true_anchor", 15]["score"] - rows[number, "factorized", 15]["score"]
        for number in (500, 2000, 8000, 20_000)
    ]
    spreads = {
        arm: [f"{rows[number, arm, steps]['spread']:.3f}" for number in (500, 2000, 8000, 20_000)]
        for arm, steps in (("factorized", 15), ("direct", 50))
    }
    leads = {
        category: [
            rows[number, "factorized", 15]["categories"][category]["score"]
            - rows[number, "direct", 50]["categories"][category]["score"]
            for number in (500, 2000, 8000, 20_000)
        ]
        for category in direct["categories"]
    }
    counting, places, moving = (
        leads[name] for name in ("generative_numeracy", "spatial_relationships", "motion_binding")
    )
    targets = [(0.15 - run["lead"]["value"]) / run["lead"]["error"] < 2 for run in report["runs"].values()]
    low, high = rows[500, "true_anchor", 15], rows[2000, "true_anchor", 15]
    assert "500    0.059   0.030   no lead   2,140 (999 to 12,233)" in (RESULTS / "clips" / "clips.txt").read_text()
    told = " ".join(page.split())
    assert max(run["lead"]["value"] for run in report["runs"].values()) < 0.15
    assert targets[:4] == [False, True, True, False]
    for said in (
        f"with 2,000 clips scores {factorized['score']:.3f}, and direct did not reach that score with up to 20,000 clips "
        f"({direct['score']:.3f})",
        f"The difference is {more / math.hypot(factorized['standard_error'], direct['standard_error']):.1f} times its",
        f"in counting ({min(counting):.2f} to {max(counting):.2f}), followed by spatial relations ({min(places):.2f} to "
        f"{max(places):.2f}). In motion it is {min(moving[1:]):.2f} to {max(moving[1:]):.2f} from 2,000 clips on, and {moving[0]:.2f} with 500",
        f"for factorized ({', '.join(spreads['factorized'])})",
        f"hardly changes ({', '.join(spreads['direct'])})",
        "the differences are {:.3f}, {:.3f}, {:.3f} and {:.3f},".format(*anchored),
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
    assert [(arm, *numbers) for arm, *numbers in meant] == [("true_anchor", 500, 2000)] * 2
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
