import pytest
import torch

from partialfc.margins import ArcFace, CosFace, Rows
from tests.support import reference

COSINES = torch.cat([torch.linspace(-1, 1, 401), torch.tensor([-1.0000001, 1.0000001])])


def positive(margin, cosine, *, norm=None, length=None, step=0, state=None):
    """Logit and slopes of a margin at some cosines."""
    return margin.positive(state or {}, Rows(cosine, norm, length, step, 0))


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("angular", [0.0, 0.3, 0.5, 1.5])
def test_arcface_equals_fp64_autograd(angular, gradient):
    margin = ArcFace(scale=64, angular=angular, gradient=gradient)
    inside = COSINES[COSINES.abs() < 0.9999]
    truth = inside.double().requires_grad_()
    expected = reference.arcface(truth, scale=64, angular=angular, gradient=gradient)
    expected.sum().backward()
    found = positive(margin, inside)
    logit, slope = found.logit_B, found.slope_B
    torch.testing.assert_close(logit.double(), expected.detach(), atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(slope.double(), truth.grad, atol=1e-3, rtol=2e-3)


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_arcface_is_monotone_continuous_and_finite_everywhere(gradient):
    """Past pi - m the plain cos(theta + m) rises again and would pull a hopeless sample away."""
    margin = ArcFace(scale=64, angular=0.5, gradient=gradient)
    found = positive(margin, COSINES.clamp(-1, 1).sort().values)
    logit, slope = found.logit_B, found.slope_B
    assert (logit.diff() >= -1e-5).all()
    assert logit.diff().max() < 64 * 0.08  # the curve's own steepest step on this grid
    assert slope.isfinite().all()
    assert (slope > 0).all()


def test_known_factor_of_the_exact_gradient():
    """COMPATIBILITY: sin(theta + m) / sin(theta) is 1.3475 at cos 0.7, m 0.5."""
    margin = ArcFace(scale=1, angular=0.5, gradient="exact")
    assert positive(margin, torch.tensor([0.7])).slope_B.item() == pytest.approx(1.3475, abs=5e-5)


def test_cosface_is_a_shift():
    found = positive(CosFace(scale=30, additive=0.35), torch.tensor([-1.0, 0.2, 1.0]))
    assert found.logit_B.tolist() == pytest.approx([-40.5, -4.5, 19.5])
    assert found.slope_B.tolist() == [30, 30, 30]


def test_without_a_margin_both_are_the_scaled_cosine():
    cosine = torch.linspace(-1, 1, 11)
    for margin in (ArcFace(scale=10, angular=0), CosFace(scale=10, additive=0)):
        torch.testing.assert_close(positive(margin, cosine).logit_B, 10 * cosine)
