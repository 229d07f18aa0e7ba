import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version


@pytest.mark.parametrize("marks", ["not gpu and not slow", pytest.param("not gpu and slow", marks=pytest.mark.slow)])
def test_triton_kernels_in_the_interpreter(marks):
    # It converts arrays of one element to numbers, which numpy 2.4 refuses; Triton 3.7 no longer does.
    lowest = "3.7" if Version(numpy.__version__) >= Version("2.4") else "3.4"
    pytest.importorskip("triton", minversion=lowest, reason=f"with this numpy, its interpreter needs Triton {lowest}")
    here = Path(__file__).parent
    files = sorted(str(path) for path in here.glob("test_triton_*.py"))
    assert files
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "FVG_KERNELS": "auto"}
    options = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "-m", marks]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=here.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    # A run that tests nothing also ends well.
    assert re.search(r"\d+ passed", summary) and "skipped" not in summary, done.stdout
