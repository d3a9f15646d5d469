"""A run on a CUDA device that is killed goes on bit for bit, with deterministic kernels."""

import numpy as np
import pytest

pytest.importorskip("pydantic")

from tests.support.gpu import needs_a_gpu, needs_a_real_gpu
from tests.support.runs import held
from tools.bench._faults.runs import Run, command, losses, steps_in, tensors
from tools.bench.faults import COMMON

pytestmark = [*needs_a_gpu, needs_a_real_gpu("DALI, Triton and cuDNN in one run")]


def test_kill_9_on_a_gpu_continues_bit_for_bit(packs, tmp_path):
    """DALI's GPU decoder, Triton's kernels, pinned copies of the saver, cuDNN: all of them."""

    def start(name, *, held_up=False):
        words = [f"data.train={packs / 'train.rec'}", f"run.folder={tmp_path / name}", *COMMON]
        words += ["run.steps=60", "checkpoint.every_steps=5", "run.device=cuda"]
        words += ["run.deterministic=true", "head.sample_rate=0.5"]
        line = command("configs/omniglot.toml", words, 1)
        return Run(held(40, line) if held_up else line, tmp_path / f"{name}.log")

    straight = start("straight")
    assert straight.wait(300) == 0, straight.text()[-3000:]
    killed = start("killed", held_up=True)
    killed.until(lambda: steps_in(tmp_path / "killed") >= 17)
    killed.kill()
    again = start("killed")
    assert again.wait(300) == 0, again.text()[-3000:]
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    expected, found = tensors(tmp_path / "straight", 60), tensors(tmp_path / "killed", 60)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert np.array_equal(value, found[name]), name
