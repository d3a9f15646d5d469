"""Bounds of a margin by hand, and partialfc explain as a user starts it."""

import math

import pytest
import torch

from partialfc.__main__ import main
from partialfc.commands import explain
from partialfc.margins import (
    MARGINS,
    ArcFace,
    CosFace,
    ModifiedSoftmax,
    NormalizedSoftmax,
    guidance,
)
from tests.support.every_margin import EVERY_MARGIN
from tests.support.processes import partialfc


def test_smallest_scale_is_what_reaches_the_posterior():
    """With s at the bound, a perfect sample against C - 1 centers at -1/(C - 1) has P exactly."""
    for classes, wanted in ((2, 0.9), (10, 0.99), (10_572, 0.9), (10**8, 0.999)):
        scale = guidance.smallest_scale(classes, wanted)
        odds = (classes - 1) * math.exp(-scale / (classes - 1) - scale)
        assert 1 / (1 + odds) == pytest.approx(wanted, rel=1e-9)


def test_largest_additive_margin():
    assert guidance.largest_additive(8, 2) == pytest.approx(1 - math.cos(math.pi / 4))
    assert guidance.largest_additive(3, 512) == pytest.approx(1.5)
    assert guidance.largest_additive(10**6, 512) == pytest.approx(1.0, abs=1e-5)


def test_boundaries_in_degrees():
    """cos(θ + m) = 0 at 90° - m, cos(θ) = m at arccos(m)."""
    for margin, degrees in (
        (ArcFace(angular=0.5), 90 - math.degrees(0.5)),
        (CosFace(additive=0.35), math.degrees(math.acos(0.35))),
        (NormalizedSoftmax(), 90),
        (CosFace(additive=1.5), 0),
        (MARGINS["combined"](multiplicative=2, angular=0, additive=0, past_pi="fold"), 45),
    ):
        assert math.degrees(guidance.boundary(margin, 1.0)) == pytest.approx(degrees, abs=0.02)


def test_a_margin_is_looked_at_after_its_annealing_and_at_its_own_number_of_identities():
    """λ = 5 at the end: (5 cos + ψ) / 6 = 0 for m = 4 is at 66.9 degrees, not at 90."""
    assert math.degrees(guidance.boundary(MARGINS["sphereface"](), 1.0)) == pytest.approx(
        66.9, abs=0.1
    )
    adacos, theta_N = MARGINS["adacos"](), torch.zeros(1)
    for identities in (1000, 10**6):
        scale = math.sqrt(2) * math.log(identities - 1)
        found = guidance.curve(adacos, theta_N, 1.0, identities)
        assert float(found.logit_N) == pytest.approx(scale, rel=1e-5)


def test_posterior_counts_the_margin():
    plain = guidance.posterior(NormalizedSoftmax(scale=10), 100, 1.0)
    assert plain == pytest.approx(1 / (1 + 99 * math.exp(-10 / 99 - 10)), rel=1e-5)
    assert guidance.posterior(CosFace(scale=10, additive=0.5), 100, 1.0) < plain


@pytest.mark.parametrize("name", EVERY_MARGIN)
def test_every_margin_has_a_finite_curve(name):
    theta_N = torch.linspace(0, math.pi, 181)
    for norm in explain.norms(EVERY_MARGIN[name]):
        found = guidance.curve(EVERY_MARGIN[name], theta_N, norm)
        assert found.logit_N.isfinite().all()
        assert found.slope_N.isfinite().all()
        assert (found.logit_N.diff() <= 1e-3).all(), "the logit rises with the angle"


def test_warnings_name_the_key_and_the_bound():
    (sentence,) = guidance.warnings(ArcFace(scale=8), 1_000_000, 512)
    assert sentence.startswith("head.margin.scale = 8: with 1,000,000 classes")
    assert "needs a scale of 16.0" in sentence
    (sentence,) = guidance.warnings(CosFace(additive=0.35), 10, 2)
    assert sentence.startswith("head.margin.additive = 0.35: 10 class centers in 2 dimensions")
    assert "than 0.191" in sentence
    assert "scale = 2" in guidance.warnings(MARGINS["adaface"](scale=2), 10**5, 512)[0]
    elastic = MARGINS["elasticface"](base="cosface", margin=1.5)
    assert guidance.warnings(elastic, 10**5, 512)[0].startswith("head.margin.margin = 1.5")
    assert not guidance.warnings(ArcFace(), 10**8, 512)
    assert not guidance.warnings(ModifiedSoftmax(), 10**8, 512)


def test_explain_lists_every_margin_one_a_line():
    assert partialfc("explain", "--list").stdout.splitlines() == list(MARGINS)


@pytest.mark.parametrize("name", MARGINS)
def test_explain_says_what_a_margin_means(name, tmp_path, capsys):
    picture = tmp_path / "deep" / "margin.png"
    arguments = ["configs/demo.toml", "--identities", "1000", "--png", str(picture)]
    assert explain.main([*arguments, f"head.margin={{name='{name}'}}"]) == 0
    said = capsys.readouterr().out
    assert name in said
    assert "boundary" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/demo.toml", "--identities", "1"], "a softmax needs two"),
        (["configs/none.toml"], "none.toml"),
        (
            [
                "configs/demo.toml",
                "--identities",
                "9",
                "head.margin={name='combined',past_pi='easy'}",
            ],
            'head.margin.past_pi = "easy": the logit would rise',
        ),
    ],
)
def test_explain_refuses_by_name(arguments, message, capsys):
    assert main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_losses_on_pairs_want_batches_that_have_them():
    """A run that mines no triplet would learn nothing of it and say nothing."""
    (sentence,) = guidance.pair_warnings(["triplet"], None)
    assert sentence.startswith("losses.triplet.weight: ")
    assert "data.images_per_identity" in sentence
    assert guidance.pair_warnings(["contrastive"], 1)
    assert not guidance.pair_warnings(["triplet", "contrastive"], 2)
