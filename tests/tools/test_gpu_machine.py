"""What a GPU machine runs, here: without the packages that its image lacks."""

import re
import subprocess
import sys

import pytest

from tests.support import image
from tests.support.places import ROOT


@pytest.mark.slow
def test_tests_for_a_gpu_are_collected_where_packages_are_missing(tmp_path):
    """One file that asks for one of them at its top stopped the collection of all 799."""
    env = image.environment(tmp_path)
    files = ("tests/gpu", "tests/head/test_kernels.py", "tests/head/test_fused_kernels.py")
    words = ("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files)
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^(tests/\S+\.py): (\d+)$", done.stdout, re.MULTILINE))
    assert int(counts["tests/gpu/test_losses.py"]) > 200
    assert {"tests/head/test_kernels.py", "tests/head/test_fused_kernels.py"} <= set(counts)
    assert "tests/gpu/test_resume.py" not in counts, "the packages were not hidden"
