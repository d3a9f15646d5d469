"""The fused passes against the steps of a tile: the kernels alone, and through the whole head.

As in test_kernels, they run in Triton's interpreter in a worker, and on a GPU where there is one.

Shape suffixes: B = rows of the gathered batch, D = embedding, S = splits of a tile, T = rows of a
tile.
"""

import importlib
import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from partialfc import AdaFace, ArcFace, RowAdamW, RowSGD, SubCenterArcFace
from partialfc.head import machine
from partialfc.head.plan import Machine
from partialfc.head.rows.formats import FIRST_SCALE, decode
from partialfc.head.tiles import cards, fused
from partialfc.margins import CurricularFace, Softmax, UniFace
from tests.support.heads import flat_head, small_tiles
from tests.support.places import ROOT

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: NO Triton kernel is tested", allow_module_level=True)

from tests.support.kernels import (
    BENDS,
    bend_of,
    compiled_python,
    exponential_truth,
    pack,
    unpack,
)

IDENTITIES, BATCH = 170, 66
"""More than one block of each, and no multiple of anything."""


# --- pass 1, alone -----------------------------------------------------------------------------


def _pulled(device, arguments, names, card):
    """Call ``pull_`` with buffers full of NaN: what is not written shows."""
    arguments = unpack(arguments)
    kernels = importlib.import_module("partialfc.head.tiles.fused_kernels")
    query_BD, key_TD = (arguments[name].to(device) for name in ("query_BD", "key_TD"))
    batch, dim = query_BD.shape

    def empty(name, *size, dtype=torch.float32):
        return torch.full(size, torch.nan, dtype=dtype, device=device) if name in names else None

    found = {
        "sum_SB": empty("sum_SB", 3, batch),
        "maximum_SB": empty("maximum_SB", 3, batch),
        "pull_SBD": empty("pull_SBD", 3, batch, dim),
        "exp_TB": empty("exp_TB", len(key_TD), batch, dtype=query_BD.dtype),
    }
    bend = arguments["bend"]
    if bend is not None:
        bend = type(bend)(bend.threshold_B.to(device), bend.coefficient_3.to(device))
    column_B = arguments["column_B"].to(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "ASSUMED", card)
        kernels.pull_(query_BD, key_TD, column_B, scale=16, bend=bend, **found)
    return pack({name: value.cpu() for name, value in found.items() if value is not None})


@pytest.mark.parametrize("kept", ["exp_TB", "maximum_SB"])
@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize(
    ("shape", "card"),
    [
        *(((70, 230, 20), cards.H200), ((1, 1, 3), cards.H200), ((64, 64, 128), cards.H200)),
        *(((66, 70, 300), card) for card in (cards.H200, cards.DEFAULT)),
    ],
    ids=lambda one: getattr(one, "name", None) or str(one),
)
def test_sums_pulls_and_exponentials_of_a_tile(launch, shape, card, bend, kept):
    """With 64, 32 and 16 rows streamed."""
    batch, rows, dim = shape
    generator = torch.Generator().manual_seed(rows)
    dtype = torch.bfloat16 if launch.device == "cuda" else torch.float32

    def units(count):
        value = torch.randn(count, dim, generator=generator)
        return torch.nn.functional.normalize(value, dim=1).to(dtype)

    query_BD, key_TD = units(batch), units(rows)
    column_B = torch.randint(-rows, 2 * rows, (batch,), generator=generator)
    edges = torch.tensor([0, rows - 1, -1, rows, 2**32, 2**40 + 1])[:batch]
    column_B[: len(edges)] = edges
    arguments = {"query_BD": query_BD, "key_TD": key_TD, "column_B": column_B}
    arguments["bend"] = bend_of(bend, batch)
    names = ("sum_SB", "pull_SBD", kept)
    found = unpack(launch.run(_pulled, launch.device, pack(arguments), names, card))
    logit_TB = 16 * key_TD.double() @ query_BD.double().T
    exp_TB, sum_B = exponential_truth(logit_TB, column_B, arguments["bend"], None)
    weight_SB = torch.ones(3, batch, dtype=torch.float64)
    if kept == "maximum_SB":
        assert found["maximum_SB"].isfinite().all()
        weight_SB = found["maximum_SB"].double().exp()
    wanted = {
        "sums": ((found["sum_SB"] * weight_SB).sum(0), sum_B),
        "pulls": (
            (found["pull_SBD"] * weight_SB.unsqueeze(2)).sum(0),
            exp_TB.T @ key_TD.double(),
        ),
    }
    if kept == "exp_TB":
        wanted["exponentials"] = found["exp_TB"].double(), exp_TB
    for name, (mine, truth) in wanted.items():
        error = (mine - truth).norm()
        assert error <= (1e-5 if dtype == torch.float32 else 1e-2) * truth.norm(), name


# --- what they take ---------------------------------------------------------------------------


def _asked_for(device, scale, parts):
    """Bytes of exponentials that pass 1 kept, and of the buffers that both passes asked for."""
    with small_tiles(kernels=True, programs=64):
        head = flat_head(
            130,
            16,
            ArcFace(scale=scale),
            compute="bf16" if device == "cuda" else "fp32",
            keep_mib=1,
            fused=True,
            device=device,
        )
        labels = torch.arange(2048, device=device) % 130
        head.sample_step(labels)
        for label in labels.chunk(parts):
            embeddings = torch.randn(len(label), 16, device=device, requires_grad=True)
            head(embeddings, label).backward()
        kept = head.optimizer.kept_bytes
        head.optimizer.step()
    return kept, sum(buffer.nbytes for buffer in head.optimizer.workspace._buffers.values())


@pytest.mark.parametrize(
    ("scale", "parts"), [(64, 1), pytest.param(128, 2, marks=pytest.mark.slow)]
)
def test_the_estimate_counts_what_the_passes_ask_for(launch, scale, parts, monkeypatch):
    """Byte for byte: the buffers, and the exponentials that are kept, of two tiles of three, or of
    none where a row maximum may grow. An estimate that counts tile by tile is wrong by half."""
    pytest.importorskip("pydantic")  # the kernels need no settings
    from partialfc.commands._estimate import head as estimate
    from partialfc.config import load

    monkeypatch.setattr(fused, "_TILE_ROWS", 64)
    card = replace(machine.card_of(None), multiprocessors=64)
    monkeypatch.setattr(machine, "ASSUMED", card)
    if launch.device == "cpu":
        monkeypatch.setattr(estimate, "_machine", lambda _: Machine("cpu", has_kernels=True))
    compute = "bf16" if launch.device == "cuda" else "fp32"
    size = ["data.global_batch=2048", "backbone.embedding_dim=16", f"head.margin.scale={scale}"]
    ways = ["head.fused=true", "head.keep_mib=1"]
    config = load(
        str(ROOT / "configs/ms1mv3_r50.toml"),
        [*size, *ways, f"optimizer.accumulation={parts}", "head.sample_rate=1"],
    )
    head = config.head.model_copy(update={"compute": compute})  # the interpreter has no bf16
    config = config.model_copy(update={"head": head})
    shard = estimate.shard_of(config, 130, 1, "cuda")
    of_head = estimate.head_parts(config, shard, 1, "cuda", card)
    (tile,) = (part for part in of_head if part.name == "tile")
    kept, buffers = launch.run(_asked_for, launch.device, scale, parts)
    assert tile.bytes == (buffers,) * 4
    assert shard.kept == kept
    assert bool(kept) == (scale == 64)


# --- the whole head ----------------------------------------------------------------------------

MARGINS = {
    "arcface": ArcFace(scale=32),
    "smoothed": ArcFace(scale=32, label_smoothing=0.1),
    "row maximum": ArcFace(scale=128, inter_class_filter=0.1),
    "curricular": CurricularFace(),
    "adaface": AdaFace(),
}
FORMATS = [("fp32", "fp32"), ("fp16", "int8"), ("bf16", "bf16"), ("fp8", "int8")]


def _trained(device, forced, margin, formats, dim, settings, parts):
    """Two steps: losses, the embeddings' last gradient, centers and momentum, on the CPU.

    ``parts``: micro-batches, negative where each has a sample of its own.
    """
    centers, momentum = formats
    with small_tiles(kernels=forced):
        head = flat_head(
            IDENTITIES,
            dim,
            MARGINS[margin],
            optimizer=RowSGD(lr=0.1, momentum_format=momentum),
            center_format=centers,
            compute="bf16" if device == "cuda" else "fp32",
            fused=forced,
            device=device,
            **{"sample_rate": 0.6, **settings},
        )
        start = torch.randn(IDENTITIES, dim, generator=torch.Generator().manual_seed(5)) * 0.01
        head.centers.data.copy_(start / FIRST_SCALE.get(head.centers.dtype, 1))
        losses = []
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            # Transposed in memory, as an embedding may be.
            embeddings = torch.randn(BATCH, dim, generator=generator).T.contiguous().T
            embeddings = embeddings.to(device).requires_grad_()
            labels = torch.randint(0, 40, (BATCH,), generator=generator).to(device)
            if parts > 0:
                head.sample_step(labels)
            pieces = zip(embeddings.chunk(abs(parts)), labels.chunk(abs(parts)), strict=True)
            for embedding, label in pieces:
                loss = head(embedding, label)
                loss.backward()
                losses.append(loss.item())
            head.optimizer.step()
        head.optimizer.settle()
    states = head.optimizer.states()
    rows = decode(head.centers.detach(), states.get("centers_scale")).cpu()
    velocity = decode(states["momentum"], states.get("momentum_scale")).cpu()
    return losses, embeddings.grad.cpu(), rows, velocity


def assert_trains_alike(launch, margin, formats=FORMATS[0], dim=20, parts=1, **settings):
    arguments = margin, formats, dim, settings, parts
    there = launch.run(_trained, launch.device, True, *arguments)
    here = _trained("cpu", False, *arguments)
    exact = formats[0] == "fp32" and launch.device == "cpu"
    assert there[0] == pytest.approx(here[0], rel=1e-5 if exact else 1e-3)
    for mine, theirs in zip(there[1:], here[1:], strict=True):
        assert (mine - theirs).norm() / theirs.norm() < (1e-4 if exact else 2e-2)


@pytest.mark.parametrize("margin", MARGINS)
def test_every_margin_trains_as_tile_by_tile(launch, margin):
    """With the exponentials of the first tile kept, and those of the others computed again."""
    assert_trains_alike(launch, margin, keep_mib=64 * BATCH * 4 / 2**20)


@pytest.mark.parametrize("keep_mib", [0, None], ids=["no", "all"])
def test_exponentials_of_no_tile_or_of_all(launch, keep_mib):
    assert_trains_alike(launch, "arcface", keep_mib=keep_mib)


@pytest.mark.parametrize(
    ("formats", "places"),
    [
        (FORMATS[0], {"centers_in": "host", "states_in": "host"}),
        (FORMATS[1], {}),
        (FORMATS[2], {}),
        pytest.param(FORMATS[3], {}, marks=pytest.mark.slow),
    ],
    ids=["fp32 on its way", "fp16 int8", "bf16 bf16", "fp8 int8"],
)
def test_every_format_and_rows_on_their_way(launch, formats, places):
    """Also rows of a width that no block has, and D = 50 whose last lane of bits is not full."""
    assert_trains_alike(launch, "arcface", formats, dim=50, **places)


@pytest.mark.parametrize(
    ("margin", "parts"), [("curricular", 2), ("smoothed", -2)], ids=["one sample", "own samples"]
)
def test_micro_batches_are_added(launch, margin, parts):
    assert_trains_alike(launch, margin, parts=parts)


def test_all_rows(launch):
    assert_trains_alike(launch, "arcface", sample_rate=1.0)


# --- where it cannot work ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "settings", "why"),
    [
        (ArcFace(), {}, "need a GPU and Triton, and the head is on cpu"),
        (SubCenterArcFace(), {}, "one an identity"),
        (Softmax(), {}, "a softmax over unit centers"),
        (UniFace(), {}, "a softmax over unit centers"),
        (ArcFace(), {"optimizer": RowAdamW()}, "SGD only"),
        (ArcFace(), {"embedding_dim": 513}, "up to 512 elements, not 513"),
    ],
    ids=["cpu", "sub-centers", "softmax", "uniface", "adamw", "dim"],
)
def test_what_the_kernels_do_not_know_is_refused(margin, settings, why, monkeypatch):
    monkeypatch.setattr(machine, "FORCED", "GPU" not in why)
    settings = {"embedding_dim": 8, **settings}
    with pytest.raises(ValueError, match=f"fused = true: .* cannot: they .*{why}.*Remove it"):
        flat_head(20, margin=margin, fused=True, **settings)


# --- compiled, without a GPU -------------------------------------------------------------------

SPILLS = {80: 0, 90: 0, 100: 176}
"""Bytes of a thread; Blackwell's are of its accumulators' way out of tensor memory."""
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.parametrize(
    "target", [pytest.param(one, marks=pytest.mark.slow) for one in (80, 90, 100)]
)
def test_they_compile_into_what_a_multiprocessor_has(target):
    """No spills, and on Hopper all warps share each product of tensor cores."""
    script = """
import json
import sys
from tools.bench import compile_kernels
compiled = compile_kernels.compile_only(int(sys.argv[1]))
for _, _, call in (
    compile_kernels._pull(512, "y", "n", "y"),
    compile_kernels._update(512, "fp16", "int8"),
):
    call()
    print(json.dumps(compile_kernels.resources(compiled.pop())))
"""
    done = compiled_python("-c", script, str(target))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2, done.stderr
    for row in rows:
        assert row["shared_bytes"] <= SHARED[target]
        assert row["spill_bytes"] <= SPILLS[target]
        assert target != 90 or row["mma_warps"] == ["4, 2"]


@pytest.mark.parametrize("target", SHARED)
def test_the_record_has_both_passes(target):
    rows = [row for row in record_of(target) if row["kernel"] in ("pull_", "update_")]
    assert {row["kernel"] for row in rows} == {"pull_", "update_"}
    assert all(row["shared_bytes"] <= SHARED[target] for row in rows)
    assert all(row["spill_bytes"] <= SPILLS[target] for row in rows)
    assert target != 90 or all(row["mma_warps"] == ["4, 2"] for row in rows)


def record_of(target):
    path = ROOT / f"tools/bench/results/kernels_sm{target}.json"
    return json.loads(path.read_text())["kernels"]
