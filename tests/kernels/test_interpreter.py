import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="the Triton kernels need the package triton")
    here = Path(__file__).parent
    files = sorted(str(path) for path in here.glob("test_triton_*.py"))
    assert files
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "FVG_KERNELS": "auto"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:unraisableexception", *files],
        cwd=here.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    # A run that tests nothing also ends well.
    assert re.search(r"\d{2,} passed", summary) and "skipped" not in summary, done.stdout
