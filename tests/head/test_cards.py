"""The table of the fused kernels' tiles, against what chose it, and that launches follow it."""

import importlib.util
import json

import pytest
import torch

from partialfc.head import machine
from partialfc.head.plan import Machine, decide
from partialfc.head.tiles import cards
from tests.support.places import ROOT

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: NO Triton kernel is tested", allow_module_level=True)

EVERY = (*cards.CARDS, *cards.OTHERS, cards.DEFAULT)
RECORDS = {
    "sm80": cards.card_for((8, 0)),
    "sm90": cards.card_for((9, 0)),
    "sm100": cards.card_for((10, 0)),
    "small": cards.DEFAULT,
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_table_is_what_was_chosen(name):
    """A shape that nobody compiled may have no room on its card, or spill."""
    path = ROOT / f"tools/bench/results/kernel_shapes_{name}.json"
    record = json.loads(path.read_text())
    chosen = {(row["kernel"], row["dim"]): row for row in record["tried"] if row["chosen"]}
    assert set(chosen) == {(kernel, dim) for kernel in cards.H200.shapes for dim in (512, 500)}
    for (kernel, dim), row in chosen.items():
        shape = cards.Shape(row["streamed"], row["warps"], row["stages"])
        assert RECORDS[name].shape(kernel, dim) == shape, (kernel, dim)
        assert row["shared_bytes"] <= record["shared_bytes"] <= RECORDS[name].shared_bytes
        assert row["spill_bytes"] <= (176 if name == "sm100" else 0)


@pytest.mark.parametrize("card", EVERY, ids=lambda card: card.name)
@pytest.mark.parametrize("dim", [128, 256, 300, 512])
def test_the_blocks_of_a_shape_find_room(card, dim):
    width = 1 << (dim - 1).bit_length()
    for kernel in card.shapes:
        shape = card.shape(kernel, dim)
        kept = 0 if kernel == "update_kept" else 64
        assert 2 * width * (kept + shape.streamed * shape.stages) <= card.shared_bytes
        assert shape.streamed >= 16, "the least that tensor cores take"


@pytest.mark.parametrize(
    ("capability", "name", "card"),
    [
        ((9, 0), "NVIDIA H200", "H200"),
        ((9, 0), "NVIDIA H100 80GB HBM3", "H100"),
        ((9, 0), "NVIDIA H100 PCIe", "H100 PCIe"),
        ((9, 0), "NVIDIA GH200 480GB", "H200"),
        ((9, 0), "NVIDIA H20", "sm_90"),
        ((10, 0), "NVIDIA B200", "B200"),
        ((10, 0), "NVIDIA GB200", "B200"),
        ((10, 3), "NVIDIA B300 SXM6 AC", "B300"),
        ((10, 3), "NVIDIA GB300", "B300"),
        ((10, 3), "NVIDIA unknown", "sm_103"),
        ((8, 0), "NVIDIA A100-SXM4-80GB", "A100"),
        ((8, 0), "NVIDIA A30", "sm_80"),
        ((8, 9), "NVIDIA L40S", "any other"),
        ((12, 0), "NVIDIA GeForce RTX 5090", "any other"),
        ((7, 0), "Tesla V100-SXM2-32GB", None),
    ],
)
def test_a_card_is_known_by_its_name_and_then_by_its_capability(capability, name, card):
    found = cards.card_for(capability, name)
    assert (found and found.name) == card
    asked = {"dim": 512, "unit_centers": True, "centers_per_identity": 1, "binary": False}
    there = Machine("cuda", True, capability, name)
    plan = decide(there, **asked, sgd=True, compute="bf16", fused=True)
    assert (plan.path == "fused") == (card is not None)
    if card is None:
        with pytest.raises(ValueError, match="tensor cores for bf16, which Tesla V100"):
            plan.refuse(fused=True)


@pytest.mark.parametrize("card", [cards.H200, cards.DEFAULT], ids=lambda card: card.name)
def test_a_launch_has_the_shape_of_its_card(card, monkeypatch):
    from partialfc.head.tiles import fused_kernels

    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *given, **named: launched.append((given, named))

    monkeypatch.setattr(fused_kernels, "_pull", Recorder())
    monkeypatch.setattr(machine, "ASSUMED", card)
    query_BD, key_TD = torch.zeros(64, 512), torch.zeros(64, 512)
    outputs = {"sum_SB": torch.zeros(1, 64), "maximum_SB": None, "pull_SBD": None, "exp_TB": None}
    column_B = torch.zeros(64, dtype=torch.int64)
    fused_kernels.pull_(query_BD, key_TD, column_B, scale=1.0, bend=None, **outputs)
    ((given, named),) = launched
    shape = card.shape("pull", 512)
    assert given[-3:] == (64, shape.streamed, 512)
    assert named == {"num_warps": shape.warps, "num_stages": shape.stages}
