import json
import re
from pathlib import Path

from hashes import main


ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    """Package to version; of a build for CPUs the version is the public one."""
    lines = [line.split()[0] for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    named = (line.partition("==") for line in lines)
    return {re.sub(r"[-_.]+", "-", package).lower(): version.partition("+")[0] for package, _, version in named}


def test_hashes_are_of_the_tested_set():
    hashed, tested = pins("constraints-hashes.txt"), pins("constraints.txt")
    assert len(hashed) > 70 and {name: tested[name] for name in hashed.keys() & tested.keys()} == {
        name: hashed[name] for name in hashed.keys() & tested.keys()
    }
    # Packages only in the tested set are for documents; those only in the other set are dependencies.
    assert len(hashed.keys() - tested.keys()) < 6 and {"torch", "diffusers", "safetensors"} <= hashed.keys()
    for line in (ROOT / "constraints-hashes.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line), line


def test_a_report_becomes_requirements(tmp_path):
    def package(name, version, **info):
        return {"metadata": {"name": name, "version": version}, "download_info": info}

    report = [package("B_b", "2", archive_info={"hashes": {"sha256": "f" * 64}}), package("own", "1", dir_info={})]
    (tmp_path / "report.json").write_text(json.dumps({"install": report}))
    (tmp_path / "out.txt").write_text("# A comment.\nold==1 --hash=sha256:0\n")
    main(str(tmp_path / "report.json"), str(tmp_path / "out.txt"))
    assert (tmp_path / "out.txt").read_text() == f"# A comment.\nb-b==2 --hash=sha256:{'f' * 64}\n"
