"""Counts the rows of the table by what becomes of them: `python tests/bad_inputs/count_rows.py`."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path


TESTS = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path += [str(TESTS), *(str(folder) for folder in sorted(TESTS.iterdir()) if folder.is_dir())]

from bad_rows import CLASSES, Row, Shared, outcome  # noqa: E402


def all_rows() -> list[Row]:
    """The table."""
    import command_rows
    import config_rows
    import data_rows
    import lora_rows
    import picture_rows
    import python_rows
    import repository_rows

    modules = (python_rows, command_rows, config_rows, picture_rows, lora_rows, repository_rows, data_rows)
    rows, seen = [], Counter()
    for row in (row for module in modules for row in module.ROWS):
        # Tensors of one shape look alike.
        seen[row.name] += 1
        rows.append(replace(row, name=f"{row.name} ({seen[row.name]})") if seen[row.name] > 1 else row)
    return rows


def count_rows(rows: list[Row]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """How many rows of each kind came out in each class, and what was said to those that are not right."""
    shared, counts, wrong = Shared(), {}, []
    shared.load()
    for row in rows:
        found, said = outcome(row, shared)
        counts.setdefault(row.name.split(":")[0], dict.fromkeys(CLASSES, 0))[found] += 1
        if found != "right":
            wrong.append(f"{found}: {row.name}: {said}")
    return counts, wrong


def main() -> None:
    # Modular Diffusers logs each error that it passes on.
    logging.disable(logging.CRITICAL)
    rows, begun = all_rows(), time.process_time()
    counts, wrong = count_rows(rows)
    counts["all"] = {name: sum(count[name] for count in counts.values()) for name in CLASSES}
    print(f"{'':16}{'rows':>8}{''.join(f'{name:>9}' for name in CLASSES)}")
    for kind, count in counts.items():
        print(f"{kind:16}{sum(count.values()):>8}{''.join(f'{count[name]:>9}' for name in CLASSES)}")
    print("\n".join([*wrong, f"{time.process_time() - begun:.0f} seconds of the processor"]))


if __name__ == "__main__":
    main()
