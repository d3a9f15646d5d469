"""tools/bench/sampled_gradients.py: gradients of an oracle, errors of a known truth."""

import json
import math

import pytest
import torch

from partialfc import ArcFace, CosFace
from partialfc.head.sampling import KeyedSampler, Sample
from partialfc.head.sharding import Sharding
from tests.support.places import ROOT
from tests.support.reference import truth_of
from tools.bench import sampled_gradients as tool

COUNT, ROWS, DIM = 60, 8, 16
MARGINS = [ArcFace(scale=16), CosFace(scale=16)]


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(3)
    row_BD = 3 * torch.randn(ROWS, DIM, generator=draw)
    center_CD = 0.1 * torch.randn(COUNT, DIM, generator=draw)
    return row_BD, center_CD, torch.randint(0, COUNT, (ROWS,), generator=draw)


@pytest.mark.parametrize("margin", MARGINS, ids=lambda margin: type(margin).__name__)
def test_gradients_of_all_and_of_a_sample_are_those_of_autograd(margin, batch):
    row_BD, center_CD, identity_B = batch
    whole = tool.Whole.of(row_BD, center_CD, identity_B, margin)
    sampler = KeyedSampler(
        Sharding(num_identities=COUNT, canonical_shards=2, world_size=1), 0, sample_rate=0.4, seed=1
    )
    for sample in (Sample(None, identity_B), sampler(5, identity_B)):
        _, truth_BD, _ = truth_of(margin, row_BD, center_CD, identity_B, sample.rows)
        torch.testing.assert_close(whole.gradient(sample), truth_BD, rtol=1e-9, atol=1e-12)


def test_a_weighted_negative_is_as_many_columns_as_it_stands_for(batch):
    """A center that is there twice gives what it gives once with a weight of 2."""
    row_BD, center_CD, identity_B = batch
    center_CD[30:] = center_CD[:30]
    identity_B %= 30
    margin = CosFace(scale=16)
    whole = tool.Whole.of(row_BD, center_CD, identity_B, margin)
    certain = torch.isin(torch.arange(30), identity_B)
    weight_n = torch.where(certain, 1.0, 2.0).log()
    every = torch.arange(60)[torch.cat([torch.ones(30, dtype=torch.bool), ~certain])]
    once = whole.gradient(Sample(torch.arange(30), identity_B, weight_n))
    torch.testing.assert_close(
        once, whole.gradient(Sample(every, identity_B)), rtol=1e-6, atol=1e-9
    )


def test_bias_variance_and_angle_of_known_errors_are_found():
    """Of samples G (1 + 0.3) + noise; and nothing is found where a rate changes nothing."""
    draw = torch.Generator().manual_seed(1)
    whole = torch.randn(5000, generator=draw).double()
    noise = torch.randn(200, 5000, generator=draw).double() * 0.5
    found = tool.compared(whole, [1.3 * whole + one for one in noise])
    assert found["bias"] == pytest.approx(0.3, rel=0.02)
    assert found["variance"] == pytest.approx(0.25, rel=0.05)
    assert found["angle_degrees"] < 1
    same = tool.compared(whole, [whole, whole])
    assert (same["bias"], same["variance"]) == (0, 0)


def test_a_bound_picks_no_rate_below_one_that_exceeds_it():
    def row(rate, bias, variance):
        return {
            "negatives": "uniform",
            "rate": rate,
            "embeddings": {"bias": bias, "variance": variance},
        }

    rows = [row(0.5, 0.02, 0.01), row(0.25, 0.2, 0.05), row(0.125, 0.05, 0.05)]
    found = {
        one["bound"]: one["rate"]
        for one in tool.picked({"rows": rows})
        if one["negatives"] == "uniform"
    }
    assert found == {0.03: 0.5, 0.1: 0.5, 0.3: 0.125, 1.0: 0.125}


def test_one_sample_has_no_variance():
    with pytest.raises(SystemExit, match="--samples 1: a variance needs 2"):
        tool.main(["--identities", "300", "--samples", "1"])


@pytest.mark.slow
def test_a_training_has_its_states_and_a_head_without_a_model_too(
    forty_characters, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    asked = ["--at", "2", "--rates", "0.75,0.5", "--samples", "3", "--json", str(tmp_path / "a")]
    words = ["run.steps=3", "data.global_batch=16", "head.canonical_shards=2"]
    assert tool.main(["configs/omniglot.toml", *asked, *forty_characters, *words]) == 0
    (state,) = json.loads((tmp_path / "a").read_text())["states"]
    assert state["step"] == 2
    assert len(state["rows"]) == 6
    assert len({row["embeddings"]["bias"] for row in state["rows"]}) == 6, "a kind changes nothing"
    assert all(
        math.isfinite(row["of_the_noise"]) and row["of_the_noise"] > 0 for row in state["rows"]
    )
    assert "of the noise" in capsys.readouterr().out
    assert tool.main(["--identities", "300", *asked[2:]]) == 0
    states = json.loads((tmp_path / "a").read_text())["states"]
    assert [one["cosine"] for one in states] == [*tool.COSINES]
