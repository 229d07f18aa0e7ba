"""Small files in the formats that the benchmarks publish and that their evaluators write, without any of their texts."""

import csv
import json
from pathlib import Path

from diffusers_fvg.evaluation.suites import vbench2, vbench_i2v
from diffusers_fvg.evaluation.suites.t2v_compbench import META


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def compbench_prompts(folder: Path, count: int = 2) -> Path:
    for category, name in META.items():
        items = [{"prompt": f"{category} number {number} "} for number in range(1, count + 1)]
        write_json(folder / "meta_data" / name, items)
    return folder


LONG = "°" + "a long prompt with a blank at the cut " * 6


def vbench2_prompts(folder: Path) -> Path:
    """Three prompts: one of Diversity and Mechanics, one of Mechanics, and one of Material that is too long for a file name."""
    items = [
        ("moving toy", "Mechanics"),
        ("moving toy", "Diversity"),
        ("falling stone", "Mechanics"),
        (LONG.strip(), "Material"),
    ]
    full = [{"prompt_en": prompt, "dimension": [dimension]} for prompt, dimension in items]
    write_json(folder / "VBench-2.0" / "vbench2" / "VBench2_full_info.json", full)
    text = folder / "VBench-2.0" / "prompts" / "VBench2_full_text.txt"
    text.parent.mkdir(parents=True)
    text.write_text(f"moving toy\nfalling stone\n{LONG}", encoding="utf-8")
    return folder


def evalcrafter_prompts(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompt700.txt").write_text("\n".join(f"prompt {number}" for number in range(count)), encoding="utf-8")
    return folder


def i2v_prompts(folder: Path) -> Path:
    items = [
        {"prompt_en": "a still lake", "dimension": ["i2v_background", "aesthetic_quality"], "image_name": "lake.jpg"},
        {"prompt_en": "a still lake, camera pans left", "dimension": ["camera_motion"], "image_name": "lake.jpg"},
        {"prompt_en": "a running dog", "dimension": ["i2v_subject", "dynamic_degree"], "image_name": "dog.jpg"},
    ]
    info = write_json(folder / "vbench2_beta_i2v" / "vbench2_i2v_full_info.json", items)
    for ratio in vbench_i2v.RATIOS:
        for name in ("lake.jpg", "dog.jpg"):
            picture = info.parent / "data" / "crop" / ratio / name
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.touch()
    return folder


# -- results ----------------------------------------------------------------------------------------------------------


def write_table(path: Path, header: list[str], rows: list[list], score=None, said: str = "score: ") -> Path:
    """Writes a result file of T2V-CompBench; `score` is the value of its last row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([header, *rows])
        if score is not None:
            writer.writerow([said, score])
    return path


def dimension_file(
    folder: Path, dimension: str, score: float, values: list[float], timestamp: str = "2026-01-01-00:00:00"
):
    """Writes a result file of VBench-2.0 as `evaluate.sh` does, in a further folder with the model's name."""
    listed = [
        {"video_path": f"videos/{dimension}/p{number}-0.mp4", "video_results": value}
        for number, value in enumerate(values)
    ]
    own = folder / dimension / "model"
    write_json(own / f"results_{timestamp}_full_info.json", [{"prompt_en": "p"}])
    return write_json(own / f"results_{timestamp}_eval_results.json", {dimension: [score, listed]})


def vbench2_results(folder: Path, scores: dict[str, float]) -> Path:
    """Writes the required number of results for each dimension, all equal to its score, 0.5 by default."""
    for dimension, count in vbench2.RESULTS.items():
        score = scores.get(dimension, 0.5)
        dimension_file(folder, dimension, score, [score] * count)
    return folder


def i2v_results(folder: Path, scores: dict[str, float]) -> Path:
    for dimension, count in vbench_i2v.RESULTS.items():
        score = scores[dimension]
        listed = [
            {"video_path": f"{number}.mp4", "video_results": 100 * score if dimension == "imaging_quality" else score}
            for number in range(count)
        ]
        entry = [score, {"pan_left": score}, listed] if dimension == "camera_motion" else [score, listed]
        write_json(folder / dimension / "results_2026_eval_results.json", {dimension: entry})
    return folder


def record(folder: Path, metric: str, final: float, count: int, videos: int = 2, ending: str = "mp4") -> Path:
    """Writes a record of EvalCrafter with the lines of its first videos."""
    lines = [
        f"2026-01-01 00:00:00 Vid: {number:04d}.{ending},  Current {metric}: {final}, Current avg. {metric}: {final},  "
        for number in range(videos)
    ]
    lines.append(f"2026-01-01 00:00:00 Final average {metric}: {final}, Total videos: {count}")
    path = folder / f"{metric}_record.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def evalcrafter_results(folder: Path, means: dict[str, float]) -> Path:
    """Writes all 17 metrics, 0 by default."""
    counts = dict.fromkeys(("action_score", "motion_ac_score", "ocr_score", "count_score"), 50)
    counts |= {"color_score": 46, "celebrity_id_score": 54, "detection_score": 800}
    metrics = [
        "clip_temp_score",
        "warping_error",
        "face_consistency_score",
        "flow_score",
        "clip_score",
        "blip_bleu",
        "sd_score",
    ]
    for metric in [*metrics, *counts]:
        record(folder, metric, means.get(metric, 0.0), counts.get(metric, 700))
    (folder / "IS_record.txt").write_text(
        f"2026-01-01 00:00:00 Inception score of videos: {means.get('IS', 0.0)}, std: 0.1.\n"
    )
    rows = [f"{number:04d}, {means.get('VQA_A', 0.0):4f}, {means.get('VQA_T', 0.0):4f},50.0" for number in range(700)]
    rows.append(f"Avg. scores: {means.get('VQA_A', 0.0)}, {means.get('VQA_T', 0.0)},50.0")
    (folder / "dover.csv").write_text("\n".join(rows) + "\n")
    return folder
