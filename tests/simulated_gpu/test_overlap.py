"""Centers that are updated beside the backbone's backward: nothing is in no order, and every bit is
that of centers that are updated behind it.

The simulated device does what it is given one after the other, so equal bits say that both ways do
the same arithmetic, and no race that any other time of doing it would be the same. Each wait but
the first is taken out in each setting: without it, there is a race. test_orders.py takes out the
first in one.
"""

import pytest
import torch

from partialfc import RowSGD
from partialfc.checkpoint.peers.copying import Copier, Ring
from partialfc.checkpoint.peers.memory import Memory
from partialfc.checkpoint.saving import Saver
from partialfc.config.heads import rows_of_heads
from partialfc.distributed.ranks import Ranks
from partialfc.head.rows.side_stream import SideStream
from partialfc.model.build import build
from partialfc.model.heads import Numbering
from partialfc.model.step import train_step
from partialfc.runtime.process import Runtime
from tests.simulated_gpu import library
from tests.simulated_gpu.orders import orders_in
from tests.support.models import batch, settings
from tests.support.staging import batches, head_of

pytestmark = pytest.mark.skipif(
    not library.loaded, reason="make test-simulated-gpu runs it, on the simulated GPU"
)

if library.loaded:
    from tests.simulated_gpu.watch import Watch

IDENTITIES, SIZE, STEPS = 400, 32, 4
MOVES = RowSGD(unsampled="move"), "fp32"
STATES, BOTH = {"states_in": "host"}, {"states_in": "host", "centers_in": "host"}
STAYS, INT8 = {"name": "sgd", "unsampled": "stay"}, {"name": "sgd", "momentum_format": "int8"}
ADAMW, ADAGRAD = {"name": "adamw"}, {"name": "adagrad"}
SETS = {"faces": range(300), "things": range(300, IDENTITIES)}
TWO = {
    "faces": {"sets": ["faces"], "sample_rate": 0.3},
    "things": {"sets": ["things"], "optimizer": ADAMW},
}


def head(sample_rate=0.3, **more):
    margin = {"name": "arcface", "scale": 16}
    return {"head": {"sample_rate": sample_rate, "margin": margin, **more}}


PARTS, CLIPS = {"name": "sgd", "accumulation": 3}, {"name": "sgd", "clip_norm": 0.01}
CASES = {
    "all rows": head(1.0),
    "all rows, int8": head(1.0, optimizer=INT8, center_format="fp16"),
    "sampled, move": head(),
    "sampled, move, parts": {**head(), "optimizer": PARTS},
    "sampled, stay, clipped": {**head(optimizer=STAYS), "optimizer": CLIPS},
    "adamw, bf16, parts": {
        **head(optimizer=ADAMW),
        "precision": {"compute": "bf16"},
        "optimizer": PARTS,
    },
    "adagrad, no memory kept": head(optimizer=ADAGRAD, keep_mib=0),
    "weighted, bf16 rows": head(negatives="weighted", center_format="bf16"),
    "nearest": head(negatives="nearest", nearest={"every_steps": 2}),
    "states in host": {**head(**STATES), "optimizer": PARTS},
    "both in host, int8": head(**BOTH, optimizer=STAYS | INT8, center_format="fp16"),
    "both in host, adamw, parts": {**head(**BOTH, optimizer=ADAMW), "optimizer": PARTS},
    "average, losses on centers": {
        **head(),
        "backbone": {"ema": 0.9},
        "losses": {"center": {"weight": 0.1}, "inter_class": {"weight": 0.1}},
    },
    "lamb": {**head(optimizer=ADAMW), "optimizer": {"name": "lamb"}},
    "two heads": {
        "heads": TWO,
        "data": {
            "global_batch": 24,
            "sets": {name: {"train": f"{name}.rec", "images": 12} for name in SETS},
        },
    },
}


class Unlocked(Memory):
    """The simulated device does not lock pages of files."""

    def slot(self, start, name, *, pinned=False):
        return super().slot(start, name)


def model_of(overlap, **sections):
    data = sections.pop("data", {"train": "unused.rec", "global_batch": 24})
    data = {**data, "image_size": SIZE}
    if "heads" in sections:
        sections["heads"] = {k: {**v, "overlap": overlap} for k, v in sections["heads"].items()}
        numberings = {name: Numbering((span,)) for name, span in SETS.items()}
    else:
        sections["head"] = {**sections["head"], "overlap": overlap}
        numberings = {"": Numbering((range(IDENTITIES),))}
    backbone = {"name": "convnet_s", "embedding_dim": 16, **sections.pop("backbone", {})}
    config = settings(data=data, backbone=backbone, **sections)
    runtime = Runtime(Ranks(), torch.device("cuda"))
    torch.manual_seed(0)
    return config, build(config, runtime, numberings), runtime


def given(config):
    """Batches whose places have identities of their sets, as a loader gives them."""
    for step in range(STEPS + 1):
        images, identities = batch(step, 24, identities=IDENTITIES, size=SIZE)
        if dict(config.heads):
            for name, rows in rows_of_heads(config).items():
                span, places = SETS[name], torch.from_numpy(rows)
                identities[places] = identities[places] % len(span) + span.start
        yield images, identities


def trained(folder, overlap, **sections):
    """All that a step may change, after some with a checkpoint and copies between."""
    config, model, runtime = model_of(overlap, **sections)
    beside = {one.optimizer.overlaps for one in model.heads.values()}
    assert beside == {overlap is not False}, "on a GPU it is the default"
    found = [*given(config)]
    ring, memory = Ring(None, None, True), Unlocked(folder, "0" * 32)
    copier = Copier(memory, "start", runtime, runtime.links(), ring)
    with Saver(folder / "checkpoints", {}, runtime, keep=9) as saver:
        for step in range(STEPS):
            if model.heads.draw_ahead:
                model.heads.sample_step(config, found[step + 1][1], ahead=True)
            images, identities = (one.pin_memory().cuda(non_blocking=True) for one in found[step])
            train_step(model, config, images, identities, 0.05)
            if step == 1:
                saver.save(step, model)
            if step == 2:
                copier.copy(step, model, {}, "", 0)
        copier.wait()
    copier.close()
    tensors = dict(model.backbone.state_dict())
    for name, one in model.heads.items():
        one.optimizer.settle()
        tensors |= {f"{name} {state}": value for state, value in one.optimizer.states().items()}
        tensors[f"{name} centers"] = one.centers.detach()
    return {name: value.cpu().clone() for name, value in tensors.items()}


def bits(value):
    return value.contiguous().flatten().view(torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_changes_no_bit_and_all_is_in_order(name, tmp_path):
    with Watch() as watch:
        beside = trained(tmp_path / "beside", None, **CASES[name])
    assert watch.races == set()
    behind = trained(tmp_path / "behind", False, **CASES[name])
    assert beside.keys() == behind.keys()
    for key, value in behind.items():
        assert torch.equal(bits(beside[key]), bits(value)), key


WAITS = [*orders_in("partialfc/head/rows/side_stream.py")]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_of_its_waits_is_needed_in_each_setting(name, tmp_path, monkeypatch):
    """The one that waits for a verdict is not: nobody gives one here."""
    caught = []
    assert [order.what for order in WAITS] == ["wait_stream", "wait_event", "wait_stream"]
    for number, order in enumerate(WAITS[1:]):
        with monkeypatch.context() as patch, Watch() as watch:
            patch.setattr(order.of, "__code__", order.code_without())
            trained(tmp_path / str(number), None, **CASES[name])
        caught.append(bool(watch.races))
    assert caught == [True, True]


def read_between(head, labels):
    """A forward pass that wants no gradient."""
    with torch.no_grad():
        head(torch.randn(len(labels), head.embedding_dim, device="cuda"), labels)


def caught_up_between(head, labels):
    head.optimizer.catch_up(None)


def saved_between(head, labels):
    for value in head.optimizer.state_dict()["state"].get(0, {}).values():
        value.clone()


class _Once:
    """An event that nobody forgets."""

    def __get__(self, owner, kind):
        return owner.__dict__.get("event")

    def __set__(self, owner, event):
        owner.__dict__["event"] = event or owner.__dict__.get("event")


@pytest.mark.parametrize("between", [read_between, caught_up_between, saved_between])
def test_what_uses_the_rows_between_backward_and_step_is_waited_for(between, monkeypatch):
    """In a loop of one's own; without it, the update would run beside that, too."""

    def races():
        one = head_of(*MOVES, {"overlap": True}, device="cuda")
        with Watch() as watch:
            for embeddings, labels in batches(3):
                own, labels = embeddings.cuda().requires_grad_(), labels.cuda()
                one(own, labels).backward()
                between(one, labels)
                one.optimizer.step()
        return watch.races

    assert races() == set()
    monkeypatch.setattr(SideStream, "_ready", _Once(), raising=False)
    assert races()
