"""What tests of a CUDA device ask of it: a real one, or the simulated one."""

import os

import pytest
import torch

from tests.simulated_gpu import library

INTERPRETED = library.loaded and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels are interpreted, a program after the other: few rows and steps do."""

needs_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def needs_a_real_gpu(why: str) -> pytest.MarkDecorator:
    """Skip a test on the simulated device, which lacks what the test is about."""
    return pytest.mark.skipif(library.loaded, reason=f"the simulated GPU has no {why}")
