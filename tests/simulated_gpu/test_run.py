"""A whole run on the simulated device: evaluation, checkpoints, a stop and a resume."""

import numpy as np
import pytest

import partialfc.training.run as training
from partialfc.config import load
from partialfc.runtime.process import running
from tests.simulated_gpu import library
from tests.support.runs import losses, words
from tools.bench._faults.runs import tensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not library.loaded, reason="make test-simulated-gpu runs it, on the simulated GPU"
    ),
]

if library.loaded:
    from tests.simulated_gpu.watch import Watch

SETTINGS = {
    "plain": (),
    "staged": (
        "head.centers_in=host",
        "head.states_in=host",
        "head.center_format=fp16",
        "head.optimizer.momentum_format=int8",
        "head.overlap=true",
        "optimizer.accumulation=2",
    ),
}
STEPS = 8


class Stopped(Exception):
    """A run ended in the middle of a step."""


def run(packs, folder, device, *more):
    """Train; a folder that has a checkpoint goes on."""
    overrides = [f"run.device={device}", f"run.steps={STEPS}", "run.hang_seconds=0", *more]
    overrides += ["data.loader=torch", "checkpoint.every_steps=2", "verification.every_steps=4"]
    overrides += ["log.progress=false", "log.tensorboard=false"]
    _, file, *overrides = words(packs, folder, *overrides)
    config = load(file, overrides)
    with running(config) as runtime:
        training.train(config, runtime)


def stopped_in(number):
    """A step that fails when so many have been taken."""
    step = training.train_step

    def stops(model, *given):
        if model.heads.steps == number:
            raise Stopped
        return step(model, *given)

    return stops


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_stops_and_goes_on_is_that_of_the_cpu(
    name, packs, tmp_path, monkeypatch, capsys
):
    """A resume is equal to the last bit. The CPU goes another way, with sums in another order: the
    first losses are close, until training has made more of what differs.
    """
    more = SETTINGS[name]
    with Watch() as watch:
        run(packs, tmp_path / "straight", "cuda", *more)
        said = capsys.readouterr().out.splitlines()[0]
        assert said.endswith("head fp32; centers updated beside the backbone's backward")
        with monkeypatch.context() as patch:
            patch.setattr(training, "train_step", stopped_in(5))
            with pytest.raises(Stopped):
                run(packs, tmp_path / "resumed", "cuda", *more)
        run(packs, tmp_path / "resumed", "cuda", *more)
    assert not watch.races
    straight, resumed = (tensors(tmp_path / one, STEPS) for one in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    for key, value in straight.items():
        assert np.array_equal(value, resumed[key]), key
    on_cpu = [one for one in more if not one.startswith("head.overlap")]
    run(packs, tmp_path / "cpu", "cpu", *on_cpu)
    there, here = losses(tmp_path / "straight"), losses(tmp_path / "cpu")
    assert there.keys() == here.keys()
    for step, limit in {1: 1e-5, 2: 1e-3, 3: 1e-2}.items():
        assert there[step] == pytest.approx(here[step], rel=limit)
