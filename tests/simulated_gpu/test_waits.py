"""A run of training waits for the device at its records and pauses, and nowhere else."""

import itertools

import pytest

import partialfc.training.run as training
from partialfc.config import load
from partialfc.definitions.margins import MARGINS
from partialfc.runtime.process import running
from tests.simulated_gpu import library
from tests.support.places import ROOT
from tests.support.tiny_pack import SIZE, write_tiny_pack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not library.loaded, reason="make test-simulated-gpu runs it, on the simulated GPU"
    ),
]

if library.loaded:
    from tests.simulated_gpu.watch import Watch

RULES = {
    "sgd": [],
    "sgd int8": ["head.optimizer.momentum_format=int8", "head.center_format=bf16"],
    "adamw": ["head.optimizer.name=adamw"],
    "adagrad": ["head.optimizer.name=adagrad"],
}
PLACES = {
    "device": [],
    "states in host": ["head.states_in=host"],
    "both in host": ["head.states_in=host", "head.centers_in=host"],
}
STEPS = 7
COUNTED = slice(2, 6)
"""Steps whose waits are counted; the first two make what all others use, the last is a pause."""


def cases():
    """Every two of margin, rule, place, overlap and accumulation: as many runs as that takes."""
    margins = itertools.cycle(sorted(MARGINS))
    product = itertools.product(RULES, PLACES, (False, True), (0.5, 1.0))
    for number, (rule, place, overlap, rate) in enumerate(product):
        if rate == 1 and place != "device":
            continue  # all rows are used at every step: there is nothing to bring
        accumulation = 1 + (number // 4 + number) % 2
        words = f"head.sample_rate={rate}", f"optimizer.accumulation={accumulation}"
        margin = next(margins)
        more = [f"head.overlap={str(overlap).lower()}", f"head.margin.name={margin}", *words]
        name = f"{margin}, {rule}, {place}, rate {rate}, {accumulation} parts"
        yield name + ", overlap" * overlap, [*RULES[rule], *PLACES[place], *more]


CASES = dict(cases())


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return write_tiny_pack(tmp_path_factory.mktemp("pack") / "tiny.rec")


def settings_of(pack, folder, *overrides):
    return load(
        ROOT / "configs" / "omniglot.toml",
        [
            f"data.train={pack}",
            f"data.image_size={SIZE}",
            "data.global_batch=8",
            "data.loader=torch",
            f"run.folder={folder}",
            f"run.steps={STEPS}",
            "run.epochs=",
            "run.device=cuda",
            "run.hang_seconds=0",
            "backbone.name=convnet_s",
            "backbone.embedding_dim=16",
            "schedule.warmup_steps=0",
            "verification.pairs=[]",
            "verification.identification=[]",
            "verification.every_steps=0",
            "log.every_steps=3",
            "log.tensorboard=false",
            "log.progress=false",
            "head.margin.scale=",
            "head.margin.angular=",
            *overrides,
        ],
    )


def places_of_waits(pack, folder, name, monkeypatch):
    """File and function of each wait of the thread that trains, in some steps without a pause."""
    monkeypatch.setattr(training.Recorder, "finish", lambda self: None)
    config = settings_of(pack, folder, *CASES[name])
    begun = []
    step = training.train_step

    def counted(*given):
        begun.append(len(watch.waits))
        return step(*given)

    monkeypatch.setattr(training, "train_step", counted)
    with Watch() as watch, running(config) as runtime:
        training.train(config, runtime)
    assert not watch.races
    waits = watch.waits[begun[COUNTED.start] : begun[COUNTED.stop]]
    places = [
        next(place for place in wait.places if place[0].startswith("partialfc/"))
        for wait in waits
        if not wait.thread.startswith(("staging", "save", "batch"))
        and ("partialfc/training/recorder.py", "stepped") not in wait.places
    ]
    recorded = sum(wait.places[1][1] == "stepped" for wait in waits if len(wait.places) > 1)
    assert recorded <= 2, "a record reads its numbers once, and what makes a run unsound once"
    return {(file.removeprefix("partialfc/"), function) for file, function in places}


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing(name, pack, tmp_path, monkeypatch):
    """At a sample rate, too: identities are on the host when a batch arrives."""
    assert places_of_waits(pack, tmp_path, name, monkeypatch) == set()
