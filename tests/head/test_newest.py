"""Rows of a CPU that the two passes bring up to date on their way, against a pass of its own."""

import copy

import pytest
import torch

from partialfc import ArcFace, RowSGD
from partialfc.head.rows.formats import decode
from partialfc.head.rows.optimizer import RowOptimizer
from partialfc.head.tiles.torch_steps import put_rows_
from partialfc.margins import Softmax, SubCenterArcFace
from tests.support.heads import flat_head
from tests.support.staging import batches

IDENTITIES, DIM, STEPS = 400, 16, 14
WITHOUT_STEP, NOT_FINITE, FORGOTTEN, SAVED, SEEN = 3, 5, 7, 9, 11

HEADS = {
    "momentum": {},
    "no momentum": {"optimizer": RowSGD(momentum=0.0, weight_decay=5e-3)},
    "nothing kept": {"keep_mib": 0},
    "bf16 products": {"compute": "bf16"},
    "several centers": {"margin": SubCenterArcFace(scale=16, sub_centers=2)},
    "logits above 64": {"margin": ArcFace(scale=128)},
    "no unit centers": {"margin": Softmax()},
    "apart": {"inter_class_weight": 0.5},
    "in host memory": {"centers_in": "host", "states_in": "host"},
}
FORMATS = [("fp32", "fp32"), ("fp32", "int8"), ("bf16", "bf16"), ("fp16", "int8"), ("fp8", "int8")]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces of a tile, and a last one that is shorter."""
    monkeypatch.setattr("partialfc.head.rows.tile._PIECE_BYTES", 4 * DIM * 37)


@pytest.fixture
def in_a_pass_of_its_own(monkeypatch):
    """What a GPU does: rows are written as they are now before pass 1 reads them."""
    return lambda: monkeypatch.setattr(RowOptimizer, "_reads_newest", False)


def trained(*, parts=1, fixed=False, interrupted=False, **settings):
    """All that a run leaves; ``interrupted``: with forward passes that no step follows."""
    margin = settings.pop("margin", ArcFace(scale=16))
    rule = copy.deepcopy(settings.pop("optimizer", RowSGD(weight_decay=5e-3)))
    head = flat_head(IDENTITIES, DIM, margin, sample_rate=0.3, optimizer=rule, **settings)
    found = []
    for number, (embeddings, labels) in enumerate(batches(STEPS)):
        if fixed:
            head.sample_step(labels)
        if number == SEEN and interrupted:
            with torch.no_grad():
                found.append(head(embeddings, labels.flip(0) // 2))
        if number == WITHOUT_STEP and interrupted:
            head(embeddings.clone().requires_grad_(), labels)
        for own, identities in zip(embeddings.chunk(parts), labels.chunk(parts), strict=True):
            own = own.clone().requires_grad_()
            loss = head(own / 0 if number == NOT_FINITE and interrupted else own, identities)
            loss.backward()
            found += [loss.detach(), own.grad]
        if number == FORGOTTEN and interrupted:
            head.optimizer.zero_grad()
        head.optimizer.step()
        if number == SAVED:
            head.optimizer.catch_up(None)
            found.append(head.state_dict()["centers"].clone())
    head.optimizer.catch_up(None)
    found += [head.centers.detach(), *head.optimizer.states().values()]
    return [value.nan_to_num().flatten() for value in found]


@pytest.mark.parametrize("accumulation", [(1, False), (2, False), (2, True)], ids=str)
@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_fp32_rows_have_the_bits_of_a_pass_of_its_own(settings, accumulation, in_a_pass_of_its_own):
    parts, fixed = accumulation
    ours = trained(parts=parts, fixed=fixed, **settings)
    in_a_pass_of_its_own()
    theirs = trained(parts=parts, fixed=fixed, **settings)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [{}, HEADS["in host memory"]], ids=["", "in host memory"])
def test_forward_passes_without_a_step_change_no_more_than_a_rounding(
    settings, in_a_pass_of_its_own
):
    """Rows of before are read once more; a pass of its own has written them, and rounded them."""
    ours = trained(interrupted=True, **settings)
    in_a_pass_of_its_own()
    theirs = trained(interrupted=True, **settings)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def behind(centers, momentum):
    """A head whose rows missed up to four steps, and the next batch."""
    rule = RowSGD(weight_decay=5e-3, momentum_format=momentum)
    margin, formats = ArcFace(scale=16), {"center_format": centers}
    head = flat_head(IDENTITIES, DIM, margin, sample_rate=0.3, optimizer=rule, **formats)
    *before, last = batches(5)
    for embeddings, labels in before:
        head(embeddings.requires_grad_(), labels).backward()
        head.optimizer.step()
    return head, last


@pytest.mark.parametrize(("centers", "momentum"), FORMATS)
def test_the_passes_read_what_fp64_has_and_write_only_once(centers, momentum):
    """A step rounds a row of few bits once; an evaluation leaves it as it is."""
    head, (embeddings, labels) = behind(centers, momentum)
    states, optimizer = head.optimizer.states(), head.optimizer
    stored = {"centers": head.centers.detach().clone()}
    stored |= {name: state.clone() for name, state in states.items()}
    row_CD, velocity_CD = (
        decode(stored[name], stored.get(f"{name}_scale")).double()
        for name in ("centers", "momentum")
    )
    at_C = stored["at_step"][:, 0].long()
    assert len(at_C.unique()) == 5
    product_C22 = optimizer.shared_state()["moves"][at_C]
    expected = product_C22[:, 0, :1] * row_CD + product_C22[:, 0, 1:] * velocity_CD
    rows = torch.arange(0, IDENTITIES, 3)
    _, row_set = optimizer.open(rows)
    place = torch.tensor([5, 0, 7, 7])
    found = row_set.newest(place).double()
    torch.testing.assert_close(found, expected[rows[place]], rtol=1e-6, atol=1e-9)

    head(embeddings.requires_grad_(), labels).backward()
    for name, value in {"centers": head.centers.detach(), **states}.items():
        assert torch.equal(value.view(torch.uint8), stored[name].view(torch.uint8)), name
    optimizer.step()
    assert (states["at_step"] == 5).float().mean() >= 0.25


@pytest.mark.parametrize("dim", [16, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("first", [0, 3], ids=["aligned", "3 elements on"])
def test_rows_move_whole_whatever_words_they_are_moved_in(dtype, dim, first):
    """NaN of any payload too, and rows of no whole number of words or at odd addresses."""
    size = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(1)
    memory = torch.randint(256, (first * size + 9 * dim * size,), generator=generator)
    table = memory.byte()[first * size :].view(9, dim * size)
    rows = torch.randint(256, (3, dim * size), generator=generator).byte()
    rows[0] = 255
    place = torch.tensor([7, 0, 4])
    expected = table.clone()
    expected[place] = rows
    put_rows_(table.view(dtype), place, rows.view(dtype))
    assert torch.equal(table, expected)
