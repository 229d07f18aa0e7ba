"""Writes the report of a run: an HTML page with embedded images that opens from disk, and a Markdown file with the tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np
import PIL.Image

from ...media import Video
from ..suites.suite import Suite
from .charts import colours, differences_chart, steps_chart
from .comparison import Comparison, compare, steps_series
from .gather import Exhibit, Gathered, Shown, gather
from .table import MIB, PAIRED, SYNTHETIC, difference_text, markdown, spread_text, stage_seconds, stages_of


FRAMES = 6
# Twice the height at which the page shows an image, for high-resolution screens.
PICTURE_HEIGHT = 192
FAILURES = 50


def write_report(
    run: Path,
    folder: Path,
    suites: Mapping[str, Suite],
    scores: Path | None = None,
    baseline: str | None = None,
    gallery: int = 8,
) -> list[Path]:
    """Writes `report.html` and `report.md`.

    Args:
        run (`Path`): output folder of the run.
        folder (`Path`): folder for the two files.
        suites (`Mapping[str, Suite]`): suites by name.
        scores (`Path`, *optional*): output file of `fvg bench read`; left out, the report has times, memory and videos only.
        baseline (`str`, *optional*): condition that the others are compared with; left out, the first of the plan.
        gallery (`int`): number of prompts to show.

    Returns:
        `list[Path]`: paths of the files.

    Raises:
        `ValueError`: the folder holds no run of a suite, the scores belong to another suite or run, or the baseline is
            unknown.
    """
    gathered = gather(run, suites, scores, gallery)
    comparison = compare(gathered, baseline)
    folder.mkdir(parents=True, exist_ok=True)
    written = {"report.html": page(gathered, comparison), "report.md": markdown(gathered, comparison)}
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return [folder / name for name in written]


def page(gathered: Gathered, comparison: Comparison) -> str:
    """Returns the HTML page."""
    suite, style = gathered.suite, files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    body = [
        f"<h1>{escape(suite.title)}</h1>",
        f'<p class="soft">{escape(_made_with(gathered))}</p>',
        _facts(gathered, comparison),
        f'<p class="warning">{SYNTHETIC}</p>' if suite.synthetic else "",
        _problems(comparison),
        _scores(gathered, comparison),
        _figures(gathered, comparison),
        _gallery(gathered),
        _resources(gathered),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(suite.title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>\n{style}</style></head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _made_with(gathered: Gathered) -> str:
    record = next((own.made_with for own in gathered.conditions.values() if own.made_with), {})
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    size = (
        f"{record['num_frames']} frames of {record['width']} x {record['height']}" if record.get("num_frames") else ""
    )
    model = f"model {record['model']}" if record.get("model") else ""
    return " · ".join(part for part in (model, size, versions) if part)


def _facts(gathered: Gathered, comparison: Comparison) -> str:
    conditions = list(gathered.conditions.values())
    planned, finished = (sum(getattr(own, name) for own in conditions) for name in ("planned", "finished"))
    cells = [("conditions", str(len(conditions))), ("prompts", str(len(set(gathered.prompt_of.values()))))]
    cells += [("videos", f"{finished:,}" if finished == planned else f"{finished:,} of {planned:,}")]
    total = comparison.total
    for name in comparison.best(total)[:1] if total else ():
        cells.append((f"{total}, {name}", spread_text(comparison.spreads[str(total)][name])))
    inner = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in cells)
    return f'<div class="facts">{inner}</div>'


def _problems(comparison: Comparison) -> str:
    parts = []
    for name, problems in comparison.problems.items():
        items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
        parts.append(f'<div class="warning"><b>{escape(name)} has no official total</b><ul>{items}</ul></div>')
    for name, notes in comparison.notes.items():
        parts += [f'<p class="soft">{escape(name)}: {escape(note)}</p>' for note in notes]
    return "".join(parts)


def _name(name: str, colour: Mapping[str, str]) -> str:
    # The name may wrap between its parts, so that many columns fit.
    parts = "_<wbr>".join(f'<span class="whole">{escape(part)}</span>' for part in name.split("_"))
    return f'<span class="dot" style="background:{colour[name]}"></span>{parts}'


def _scores(gathered: Gathered, comparison: Comparison) -> str:
    names = [name for name, own in gathered.conditions.items() if own.scores]
    if not names:
        return ""
    colour = colours(list(gathered.conditions))
    rows = []
    for row, spreads in comparison.spreads.items():
        cells = []
        for name in names:
            difference = comparison.differences.get(row, {}).get(name)
            kind = "" if difference is None or not difference.is_clear else "up" if difference.mean > 0 else "down"
            words = escape(difference_text(difference)).replace("[", '<span class="whole">[').replace("]", "]</span>")
            below = f'<small class="{kind}">{words}</small>' if difference else ""
            best = ' class="best"' if name in comparison.best(row) else ""
            cells.append(f"<td{best}>{escape(spread_text(spreads[name]))}{below}</td>")
        kind = ' class="total"' if row == comparison.total else ""
        rows.append(f'<tr{kind}><th scope="row">{escape(row.replace("_", " "))}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{_name(name, colour)}</th>' for name in names)
    seeds = max(len(own.scores) for own in gathered.conditions.values())
    told = [f"± is the standard deviation over {seeds} seeds."] if seeds > 1 else []
    if len(names) > 1:
        told.append(
            f"Below each score is its difference from {comparison.baseline}, coloured if the interval excludes 0. {PAIRED}"
        )
    return (
        f'<h2>Scores</h2><p class="soft">{escape(" ".join(told))}</p><div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figures(gathered: Gathered, comparison: Comparison) -> str:
    colour, sections = colours(list(gathered.conditions)), []
    rows = {name: row for name, row in comparison.differences.items() if any(own is not None for own in row.values())}
    # A total on another scale than the categories is shown in the table only.
    if comparison.total in rows and abs(sum(gathered.suite.weights.values()) - 1) > 1e-9:
        rows.pop(comparison.total)
    if rows:
        label = f"Difference from {comparison.baseline}"
        others = {name: colour[name] for name in dict.fromkeys(name for row in rows.values() for name in row)}
        told = '<p class="soft">Points to the right are higher scores. Intervals end at the edge of the figure.</p>'
        sections.append(_figure(label, others, told + differences_chart(rows, colour, label)))
    series = steps_series(gathered, comparison)
    if len({steps for line in series.values() for steps in line}) > 1:
        arms = {
            arm: next(colour[own.name] for own in gathered.conditions.values() if own.arm == arm) for arm in series
        }
        what = f"{'synthetic ' * gathered.suite.synthetic}{comparison.total}"
        has_spread = any(own.deviation is not None for line in series.values() for own in line.values())
        whiskers = "; whiskers are one standard deviation over seeds" if has_spread else ""
        told = f'<p class="soft">The {what}{whiskers}.</p>'
        sections.append(_figure("Score against steps", arms, told + steps_chart(series, arms, what)))
    return f'<div class="figures">{"".join(sections)}</div>' if sections else ""


def _figure(title: str, colour: Mapping[str, str], inner: str) -> str:
    legend = "".join(f"<span>{_name(name, colour)}</span>" for name in colour)
    return f'<section><h2>{escape(title)}</h2><div class="legend">{legend}</div>{inner}</section>'


# -- the gallery ------------------------------------------------------------------------------------------------------


def picture(image: PIL.Image.Image) -> str:
    """Returns an image as the `data:` URL of a JPEG; small images are enlarged by integer factors, which keeps edges sharp."""
    factor = PICTURE_HEIGHT // image.height
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST)
    elif image.height > PICTURE_HEIGHT:
        size = (max(1, round(image.width * PICTURE_HEIGHT / image.height)), PICTURE_HEIGHT)
        image = image.resize(size, PIL.Image.Resampling.LANCZOS)
    held = io.BytesIO()
    image.convert("RGB").save(held, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def _frames(path: Path) -> list[tuple[str, PIL.Image.Image]]:
    video = Video(path)
    indices = np.linspace(0, len(video.times) - 1, min(FRAMES, len(video.times))).round().astype(int)
    return [
        (f"{video.times[k]:.1f} s", PIL.Image.fromarray(frame))
        for k, frame in zip(indices, video.frames(indices.tolist()))
    ]


def _strip(pictures: Sequence[tuple[str, PIL.Image.Image, bool]]) -> str:
    cells = []
    for words, image, chosen in pictures:
        kind = ' class="chosen"' if chosen else ""
        cells.append(
            f'<figure{kind}><img src="{picture(image)}" alt="{escape(words, quote=True)}"><figcaption>{escape(words)}</figcaption></figure>'
        )
    return f'<div class="strip">{"".join(cells)}</div>'


def _anchors(shown: Shown) -> list[tuple[str, PIL.Image.Image, bool]]:
    """Returns the candidates with the judge's scores, the best of them marked as the anchor; without a judge, the anchors."""
    if not shown.candidates:
        return [("anchor", _opened(path), False) for path in shown.anchors]
    best = max(range(len(shown.candidates)), key=lambda k: shown.candidates[k][1] or 0.0)
    return [
        ("judge -" if score is None else f"judge {score:.2f}", _opened(path), number == best)
        for number, (path, score) in enumerate(shown.candidates)
    ]


def _opened(path: Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as image:
        return image.convert("RGB")


def _gallery(gathered: Gathered) -> str:
    exhibits = [exhibit for exhibit in gathered.gallery if exhibit.videos]
    if not exhibits:
        return ""
    colour = colours(list(gathered.conditions))
    inner = "".join(_exhibit(exhibit, colour) for exhibit in exhibits)
    return (
        '<h2>Gallery</h2><p class="soft">The first video of each prompt in each condition. The framed image is the candidate '
        f"that the judge chose as the anchor.</p>{inner}"
    )


def _exhibit(exhibit: Exhibit, colour: Mapping[str, str]) -> str:
    rows, told = [], None
    for shown in exhibit.videos:
        anchors = _anchors(shown)
        frames = _strip([(words, image, False) for words, image in _frames(shown.path)])
        drawn = f'<div class="drawn">{_strip(anchors) if anchors else ""}</div>'
        caption = ""
        if shown.caption and shown.caption != told:
            told = shown.caption
            caption = f'<p class="soft">first frame: {escape(shown.caption)}</p>'
        rows.append(f'<div class="made"><b>{_name(shown.condition, colour)}</b>{drawn}{frames}{caption}</div>')
    kind = escape(exhibit.category.replace("_", " ").replace("+", ", "))
    return (
        f'<section class="exhibit"><span class="soft">{kind}</span><blockquote>{escape(exhibit.prompt)}</blockquote>'
        f"{''.join(rows)}</section>"
    )


# -- times and memory -------------------------------------------------------------------------------------------------


def _resources(gathered: Gathered) -> str:
    colour, stages, rows, failures = colours(list(gathered.conditions)), stages_of(gathered), [], []
    for name, own in gathered.conditions.items():
        medians = stage_seconds(own)
        cells = [f"{own.finished} of {own.planned}", *(f"{medians[s]:.2f}" if s in medians else "-" for s in stages)]
        cells.append(f"{own.memory_bytes / MIB:,.0f}" if own.memory_bytes else "-")
        cells.append(f"{sum(own.motion) / len(own.motion):.3f}" if own.motion else "-")
        cells.append(str(len(own.failures)))
        inner = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{_name(name, colour)}</th>{inner}</tr>')
        failures += [f"<li>{escape(path)}: {escape(reason)}</li>" for path, reason in own.failures.items()]
    heads = ["", "videos", *(f"{stage}, s" for stage in stages), "memory, MiB", "motion", "missing"]
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    listed = f"<p>Missing videos and the reasons:</p><ul>{''.join(failures[:FAILURES])}</ul>" if failures else ""
    more = f"<p>{len(failures) - FAILURES} more are missing.</p>" if len(failures) > FAILURES else ""
    return (
        '<h2>Times, memory, failures</h2><p class="soft">Seconds are medians over videos; memory is the most that one process used; '
        f'motion is the share of the picture that changes.</p><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{listed}{more}"
    )
