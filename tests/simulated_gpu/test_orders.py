"""Each order that the package asks for is needed: without it, the watch sees a race.

The orders are found in the source, so a new one needs a program here that fails without it.
"""

from itertools import count, pairwise
from threading import Semaphore

import pytest
import torch

from partialfc import RowSGD
from partialfc.checkpoint.saving import Saver
from partialfc.distributed.ranks import Ranks
from partialfc.head import steps
from partialfc.head.rows.staging import Staging
from partialfc.model.build import assemble
from partialfc.pinned import to_host
from partialfc.runtime.process import Runtime
from tests.simulated_gpu import library
from tests.simulated_gpu.orders import orders_in
from tests.support.models import Flat, settings
from tests.support.places import ROOT
from tests.support.staging import HOST, batches, head_of

pytestmark = pytest.mark.skipif(
    not library.loaded, reason="make test-simulated-gpu runs it, on the simulated GPU"
)

if library.loaded:
    from tests.simulated_gpu.watch import Watch

MEASURES = {
    "partialfc/training/preflight.py",
    "partialfc/training/preflight_network.py",
    "partialfc/training/recorder.py",
}
"""They wait for the device because they take its time."""

NEEDS_RANKS = {
    ("partialfc/checkpoint/saving.py", "Saver._whole"),
    ("partialfc/checkpoint/peers/copying.py", "Copier.copy"),
}
"""Several devices are not simulated."""


FOUND = [
    order
    for path in sorted((ROOT / "partialfc").rglob("*.py"))
    if (file := str(path.relative_to(ROOT))) not in MEASURES
    for order in orders_in(file)
    if (file, order.function) not in NEEDS_RANKS
]


RULE = RowSGD(unsampled="stay"), "fp32"


def trained(options, *, ahead=False, drawn=False, verdict=False, forwarded=None, given_back=None):
    """Some steps that read nothing on the host, which would put all of them in order."""
    head = head_of(*RULE, options, device="cuda")
    given = [(embeddings.cuda(), labels.cuda()) for embeddings, labels in batches(5)]
    for step, ((embeddings, labels), (_, following)) in enumerate(pairwise(given)):
        if ahead:
            head.prefetch(following)
        if drawn:
            head.sample_step(following + 0, ahead=True)  # of the device, and given back at once
            torch.zeros_like(following)
            if given_back:
                given_back.release()
        loss = head(embeddings.clone().requires_grad_(), labels)
        if forwarded and step:
            forwarded.release()
        loss.backward()
        if verdict:
            head.optimizer.found_inf = torch.zeros((), device="cuda")
        head.optimizer.step()
    head.optimizer.settle()


def staged(folder):
    trained(HOST, ahead=True)


def staged_late(folder):
    """The thread asks for memory when the step has given back what the step before had."""
    fetch, forwarded, calls = Staging._fetch, Semaphore(0), count()

    def late(self, rows):
        if next(calls) > 1:  # the first step waits for the second call
            assert forwarded.acquire(timeout=300)
        return fetch(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "_fetch", late)
        trained(HOST, ahead=True, forwarded=forwarded)


def fixed_ahead(folder):
    """Identities of the device are gathered beside the step, and read by a thread."""
    trained(None, drawn=True)


def fixed_late(folder):
    """The thread has waited for no copy when the memory of the identities is given out again."""
    given_back = Semaphore(0)

    def late(value):
        arrived = to_host(value)

        def wait():
            assert given_back.acquire(timeout=300)
            return arrived()

        return wait

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "to_host", late)
        trained(None, drawn=True, given_back=given_back)


def beside(folder):
    trained({"overlap": True})


def judged(folder):
    """The update beside the backward waits for the verdict on the step."""
    trained({"overlap": True}, verdict=True)


def saved(folder):
    """Twice, so that copies are used again; and the weights change while they are written."""
    runtime = Runtime(Ranks(), torch.device("cuda"))
    centers = head_of(*RULE, None, device="cuda")
    model = assemble(settings(), runtime, Flat(8, centers.embedding_dim), centers)
    with Saver(folder, {}, runtime, keep=9) as saver:
        for step in (1, 2):
            saver.save(step, model)
            with torch.no_grad():
                model.head.centers.add_(1)


PROGRAMS = {
    "partialfc/head/rows/staging.py": (staged, staged_late),
    "partialfc/head/rows/side_stream.py": (beside, judged),
    "partialfc/checkpoint/saving.py": (saved,),
    "partialfc/head/steps.py": (fixed_ahead, fixed_late),
    "partialfc/pinned.py": (fixed_ahead,),
}


def races_of(programs, folder):
    """Of each program until one has some."""
    for program in programs:
        with Watch() as watch:
            program(folder / program.__name__)
        if watch.races:
            return watch.races
    return set()


@pytest.mark.parametrize("file", PROGRAMS)
def test_all_is_in_order(file, tmp_path):
    assert races_of(PROGRAMS[file], tmp_path) == set()


@pytest.mark.parametrize("order", FOUND, ids=str)
def test_without_an_order_there_is_a_race(order, tmp_path, monkeypatch):
    monkeypatch.setattr(order.of, "__code__", order.code_without())
    assert races_of(PROGRAMS[order.file], tmp_path)


def test_the_orders_of_staging_overlap_and_saver_are_found():
    """Or this file would test nothing."""
    found = {(order.file.rpartition("/")[2], order.what) for order in FOUND}
    assert found >= {
        ("staging.py", "wait_event"),
        ("staging.py", "record_stream"),
        ("staging.py", "synchronize"),
        ("side_stream.py", "wait_event"),
        ("side_stream.py", "wait_stream"),
        ("steps.py", "record_stream"),
        ("saving.py", "synchronize"),
    }
