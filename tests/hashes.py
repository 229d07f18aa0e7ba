"""Writes the packages that pip would install as requirements with hashes.

    python tests/hashes.py REPORT OUTPUT

REPORT is what `pip install --dry-run --report` writes; of OUTPUT the comment at its beginning stays.
"""

import json
import re
import sys
from pathlib import Path


def main(report: str, output: str) -> None:
    path, lines = Path(output), []
    for package in json.loads(Path(report).read_text())["install"]:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        # Only the project itself, a folder, has no hash.
        if "archive_info" in package["download_info"]:
            digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name}=={package['metadata']['version']} --hash=sha256:{digest}\n")
    comment = [line for line in path.read_text().splitlines(keepends=True) if line.startswith("#")]
    path.write_text("".join([*comment, *sorted(lines)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
