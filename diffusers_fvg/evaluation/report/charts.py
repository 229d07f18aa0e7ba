"""Draws the report's two figures as SVG, so that no plotting package is needed and the page stays one file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .statistics import Difference, Spread


# Okabe and Ito's palette, which colour-blind readers can tell apart. A condition has the same colour in all figures.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
WIDTH, LEFT, RIGHT, TOP = 720, 56, 24, 16
# The axis of a figure of differences ends at this multiple of the largest difference.
CUT = 2.5


def colours(names: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each name; if there are more names than colours, the palette repeats with half the strength."""
    return {
        name: _tint(PALETTE[number % len(PALETTE)], 0.5 ** (number // len(PALETTE)))
        for number, name in enumerate(names)
    }


def _tint(colour: str, strength: float) -> str:
    channels = (255 - strength * (255 - int(colour[start : start + 2], 16)) for start in (1, 3, 5))
    return "#" + "".join(f"{round(channel):02X}" for channel in channels)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers that span `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * number, 12) for number in range(first, max(last, first + 1) + 1)]


def _text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, style: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"{style}/>'


def _figure(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}" class="chart">'
        f"<title>{escape(label)}</title>{''.join(parts)}</svg>"
    )


def steps_chart(series: Mapping[str, Mapping[int, Spread]], colour: Mapping[str, str], what: str) -> str:
    """Draws scores against sampling steps, with a logarithmic axis of steps and whiskers of one standard deviation over seeds.

    Args:
        series (`Mapping[str, Mapping[int, Spread]]`): for each arm, its score by number of steps.
        colour (`Mapping[str, str]`): colour of each arm.
        what (`str`): name of the score.
    """
    height, bottom = 320, 280
    points = [(steps, own) for line in series.values() for steps, own in line.items()]
    numbers = sorted({steps for steps, _ in points})
    ends = [own.mean + sign * (own.deviation or 0.0) for _, own in points for sign in (-1, 1)]
    marks = ticks(min(ends), max(ends))
    left, right = math.log(numbers[0]), math.log(numbers[-1])

    def place(steps: int, value: float) -> tuple[float, float]:
        share = (math.log(steps) - left) / (right - left) if right > left else 0.5
        x = LEFT + 24 + share * (WIDTH - LEFT - RIGHT - 48)
        return x, bottom - (value - marks[0]) / (marks[-1] - marks[0]) * (bottom - TOP)

    parts = []
    for mark in marks:
        _, y = place(numbers[0], mark)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "grid"), _text(LEFT - 8, y + 4, f"{mark:g}", "end")]
    parts += [_text(place(steps, marks[0])[0], bottom + 18, str(steps)) for steps in numbers]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 4, "sampling steps", kind="axis"))
    for number, (name, line) in enumerate(series.items()):
        stroke = f' style="stroke:{colour[name]}"'
        # Points are shifted sideways, so that they do not hide each other.
        aside = 7 * (number - (len(series) - 1) / 2)
        centres = [(x + aside, y) for x, y in (place(steps, line[steps].mean) for steps in sorted(line))]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in centres)
        parts.append(f'<polyline points="{path}" class="series"{stroke}/>')
        for steps, (x, y) in zip(sorted(line), centres):
            own = line[steps]
            if own.deviation:
                ends = [place(steps, own.mean + sign * own.deviation)[1] for sign in (-1, 1)]
                parts.append(_line(x, ends[0], x, ends[1], "whisker", stroke))
            said = f"{name}, {steps} steps: {own.mean:.3f}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" style="fill:{colour[name]}"><title>{escape(said)}</title></circle>'
            )
    return _figure(height, f"{what} against sampling steps", parts)


def differences_chart(
    rows: Mapping[str, Mapping[str, Difference | None]], colour: Mapping[str, str], label: str
) -> str:
    """Draws paired differences with their intervals: one row for each category, with one point for each condition.

    Args:
        rows (`Mapping[str, Mapping[str, Difference | None]]`): for each category, the difference of each condition.
        colour (`Mapping[str, str]`): colour of each condition.
        label (`str`): title of the figure.
    """
    left, line_height, gap = 210, 15, 10
    found = [own for row in rows.values() for own in row.values() if own is not None]
    # With few prompts, intervals are far wider than the differences, so the axis is cut.
    reach = CUT * max((abs(own.mean) for own in found), default=0.0) or 1.0
    ends = [min(max(end, -reach), reach) for own in found for end in (own.mean, own.low, own.high) if end is not None]
    marks = ticks(min([0.0, *ends]), max([0.0, *ends]))
    heights = [line_height * max(1, len(row)) + gap for row in rows.values()]
    bottom = TOP + sum(heights)

    def across(value: float) -> float:
        inside = min(max(value, marks[0]), marks[-1])
        return left + (inside - marks[0]) / (marks[-1] - marks[0]) * (WIDTH - RIGHT - left)

    parts = []
    for mark in marks:
        x, kind = across(mark), "zero" if mark == 0 else "grid"
        parts += [_line(x, TOP, x, bottom, kind), _text(x, bottom + 16, f"{mark:+g}" if mark else "0")]
    top = TOP
    for (category, row), tall in zip(rows.items(), heights):
        parts.append(_text(left - 12, top + tall / 2 + 1, category.replace("_", " "), "end", "axis"))
        for number, (name, own) in enumerate(row.items()):
            if own is None:
                continue
            y = top + gap / 2 + line_height * (number + 0.5)
            if own.low is not None and own.high is not None:
                style = f' style="stroke:{colour[name]}"'
                parts.append(_line(across(own.low), y, across(own.high), y, "whisker", style))
            said = f"{name}, {category}: {own.mean:+.3f}"
            parts.append(
                f'<circle cx="{across(own.mean):.1f}" cy="{y:.1f}" r="4" style="fill:{colour[name]}">'
                f"<title>{escape(said)}</title></circle>"
            )
        top += tall
        parts.append(_line(12, top, WIDTH - RIGHT, top, "grid"))
    return _figure(bottom + 24, label, parts)
