"""What a margin takes; :mod:`partialfc.margins` computes it."""

import math
from typing import Annotated, ClassVar, Literal

from partialfc.definitions import Definition, Range, Unit

Angle = Annotated[float, Range(ge=0, le=math.pi / 2), Unit("radians")]
Additive = Annotated[float, Range(ge=0, lt=2), Unit("units of cosine")]
Share = Annotated[float, Range(gt=0, le=1)]
Base = Literal["arcface", "cosface"]

Gradient = Literal["straight_through", "exact"]
"""``"straight_through"`` takes the margin for a constant in backward, so the slope of the
positive's logit is that of a negative's, as arcface_torch computes it; ``"exact"`` is the
derivative of the equation."""

PastPi = Literal["linear", "fold", "drop", "easy", "none"]
"""How cos(φ), φ = m0·θ + m1, goes on where φ passes pi and the cosine would rise again.

``"linear"``: as cos(θ), shifted so that the curve is continuous. ``"fold"``: as
(-1)^k cos(φ) - 2k, the ψ of SphereFace. ``"drop"``: as cos(θ) - m1·sin(m1), a step down, as in
the first ArcFace code and in pytorch-metric-learning; for m0 = 1. ``"easy"``: the margin at
θ < pi/2 only, cos(θ) beyond. ``"none"``: not at all. The last two are not monotone, nor is
``"drop"`` with m0 > 1.
"""


class Margin(Definition):
    """What every margin has; one that cannot choose scale, filter or smoothing has those here."""

    unit_embeddings: ClassVar[bool] = True
    """Whether queries have unit length; otherwise the length of an embedding is kept."""
    unit_centers: ClassVar[bool] = True
    """Whether keys have unit length; otherwise the length of a class center is kept."""
    bias: ClassVar[bool] = False
    """Whether a class has a bias: the last element of its center, times 1."""
    binary: ClassVar[bool] = False
    """Whether each center is a question of its own, a yes or no, and not part of one softmax."""

    @property
    def centers_per_identity(self) -> int:
        """K; the logit of an identity is that of the nearest of its K centers."""
        return 1

    @property
    def scale(self) -> float:
        """s, the factor of every product."""
        return 1.0

    @property
    def inter_class_filter(self) -> float | None:
        """Cosine above which a negative gets no gradient; ``None``: no filter."""
        return None

    @property
    def label_smoothing(self) -> float:
        """ε: share of the target spread evenly over the sampled centers."""
        return 0.0


class _Smoothed(Margin):
    label_smoothing: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over the sampled centers."""


class _Scaled(Margin):
    scale: Annotated[float, Range(gt=0, le=1024)] = 64.0
    """s, the factor of every cosine in the softmax: the radius of the hypersphere."""


class _Filtered(_Scaled):
    inter_class_filter: Annotated[float | None, Range(gt=-1, lt=1), Unit("units of cosine")] = None
    """Cosine above which a negative is taken for the same person under another identity: its
    logit becomes 0 and it gets no gradient. Left out, there is no filter."""


class _Cosines(_Filtered, _Smoothed):
    """What margins on the positive's cosine have."""

    def conflict(self) -> str | None:
        """See :meth:`Definition.conflict`."""
        if self.label_smoothing and self.inter_class_filter is not None:
            return (
                f"label_smoothing = {self.label_smoothing} with inter_class_filter = "
                f"{self.inter_class_filter}: one pulls every embedding to all centers, the other "
                "lets some of them be. Leave one out."
            )
        return super().conflict()


class _StraightThrough(Margin):
    gradient: Gradient = "straight_through"
    """``straight_through`` takes the margin for a constant in backward, as arcface_torch does;
    ``exact`` is the paper's derivative, with a factor sin(theta + m) / sin(theta) more."""


class _Exact(Margin):
    gradient: Gradient = "exact"
    """``exact`` is the paper's derivative; ``straight_through`` takes the margin for a constant in
    backward, as arcface_torch does with ArcFace."""


class ArcFace(_Cosines, _StraightThrough):
    """s cos(theta + angular) on the positive (https://arxiv.org/abs/1801.07698, eq. 3)."""

    angular: Angle = 0.5
    """m, added to the positive's angle. 0 is a plain normalised softmax."""


class CosFace(_Cosines):
    """s (cos(theta) - additive) on the positive (https://arxiv.org/abs/1801.09414, eq. 4)."""

    additive: Additive = 0.4
    """m, subtracted from the positive's cosine. 0 is a plain normalised softmax."""


class CombinedMargin(_Cosines, _Exact):
    """s (cos(m0 theta + m1) - m2) on the positive (https://arxiv.org/abs/1801.07698, sec. 2.2)."""

    multiplicative: Annotated[float, Range(ge=1, le=4)] = 1.0
    """m0, a factor of the angle. 1 is none."""

    angular: Angle = 0.3
    """m1, added to the angle. 0 is none."""

    additive: Additive = 0.2
    """m2, subtracted from the cosine. 0 is none."""

    past_pi: PastPi = "linear"
    """How the curve goes on where m0 theta + m1 passes pi: ``linear`` as cos(theta), ``fold`` as
    SphereFace's psi, ``drop`` a step down as in the first ArcFace code, ``easy`` the margin below
    pi/2 only, ``none`` not at all."""

    allow_rising: bool = False
    """Accept ``easy``, ``none`` and ``drop`` with m0 > 1, where the logit rises with the angle
    somewhere."""

    def conflict(self) -> str | None:
        """See :meth:`Definition.conflict`."""
        rises = (
            self.past_pi == "easy"
            or (self.past_pi == "none" and (self.multiplicative > 1 or self.angular > 0))
            or (self.past_pi == "drop" and self.multiplicative > 1)
        )
        if rises and not self.allow_rising:
            return (
                f'past_pi = "{self.past_pi}": the logit would rise with the angle somewhere, and '
                'push a hopeless sample away from its own center. Use "linear" or "fold", or set '
                "allow_rising = true."
            )
        return super().conflict()


class Softmax(_Smoothed):
    """w x + b: the softmax of a linear layer, no unit lengths, no margin."""

    unit_embeddings: ClassVar[bool] = False
    unit_centers: ClassVar[bool] = False
    bias: ClassVar[bool] = True


class ModifiedSoftmax(_Smoothed):
    """||x|| cos(theta): unit centers, no bias, no margin (https://arxiv.org/abs/1704.08063)."""

    unit_embeddings: ClassVar[bool] = False


class NormalizedSoftmax(_Cosines):
    """s cos(theta), no margin: NSL (https://arxiv.org/abs/1801.09414, eq. 3)."""


class Multiplicative(_Smoothed):
    """What margins that multiply the angle have."""

    multiplicative: Annotated[int, Range(ge=1, le=4)] = 4
    """m, the factor of the positive's angle."""

    annealing: Annotated[float, Range(ge=0)] = 1000.0
    """Weight of the logit without the margin at the first step, next to 1 for the logit with it."""

    annealing_decay: Annotated[float, Range(ge=0)] = 0.12
    """Speed at which that weight falls: annealing / (1 + annealing_decay step)."""

    annealing_end: Annotated[float, Range(ge=0)] = 5.0
    """Smallest value of that weight; at most ``annealing``."""

    def conflict(self) -> str | None:
        """See :meth:`Definition.conflict`."""
        if self.annealing_end > self.annealing:
            return (
                f"annealing_end = {self.annealing_end}: must be at most annealing = "
                f"{self.annealing}. Set both."
            )
        return super().conflict()


class LSoftmax(Multiplicative):
    """||w|| ||x|| psi(theta) on the positive (https://arxiv.org/abs/1612.02295)."""

    unit_embeddings: ClassVar[bool] = False
    unit_centers: ClassVar[bool] = False


class SphereFace(Multiplicative):
    """||x|| psi(theta) on the positive: A-Softmax (https://arxiv.org/abs/1704.08063)."""

    unit_embeddings: ClassVar[bool] = False


class FNormSphereFace(Multiplicative, _Cosines):
    """s psi(theta) on the positive: SphereFace with a fixed scale."""

    multiplicative: Annotated[int, Range(ge=1, le=4)] = 2
    """m, the factor of the positive's angle."""

    annealing: Annotated[float, Range(ge=0)] = 0.0
    """Weight of the logit without the margin at the first step, next to 1 for the logit with it."""

    annealing_end: Annotated[float, Range(ge=0)] = 0.0
    """Smallest value of that weight; at most ``annealing``."""


class AdaFace(_Cosines, _Exact):
    """A margin that follows the image's quality, known by the norm of its embedding
    (https://arxiv.org/abs/2204.00964)."""

    margin: Angle = 0.4
    """m, an angular margin for poor images and an additive one for good images."""

    concentration: Annotated[float, Range(gt=0, le=100)] = 0.333
    """h: a norm 1 / h standard deviations from the mean counts as poorest or best."""

    averaging: Share = 0.01
    """Share of the new batch in the moving mean and deviation of the norms."""


class MagFace(_Cosines):
    """An angular margin that grows with the norm, which is rewarded for growing
    (https://arxiv.org/abs/2103.06627)."""

    smallest_norm: Annotated[float, Range(gt=0)] = 10.0
    """Norm of the smallest margin; a shorter embedding counts as this long."""

    largest_norm: Annotated[float, Range(gt=0)] = 110.0
    """Norm of the largest margin; a longer embedding counts as this long."""

    smallest_angular: Angle = 0.45
    """Margin at ``smallest_norm``."""

    largest_angular: Angle = 0.8
    """Margin at ``largest_norm``."""

    norm_weight: Annotated[float, Range(ge=0)] = 35.0
    """Weight of the term that pulls norms up."""

    def conflict(self) -> str | None:
        """See :meth:`Definition.conflict`."""
        if self.largest_norm <= self.smallest_norm:
            return (
                f"largest_norm = {self.largest_norm}: must be above smallest_norm = "
                f"{self.smallest_norm}. Set both."
            )
        if self.largest_angular < self.smallest_angular:
            return (
                f"largest_angular = {self.largest_angular}: must be at least smallest_angular = "
                f"{self.smallest_angular}. Set both."
            )
        return super().conflict()


class CurricularFace(_Scaled, _Exact):
    """ArcFace whose hard negatives gain weight during the run (https://arxiv.org/abs/2004.00288)."""

    angular: Angle = 0.5
    """m, added to the positive's angle."""

    averaging: Share = 0.01
    """Share of the new batch in the moving average of the positive cosine."""


class MVSoftmax(_Scaled, _Exact):
    """Mis-classified negatives weighed up (https://arxiv.org/abs/1912.00833)."""

    base: Base = "arcface"
    """Margin on the positive: MV-Arc-Softmax or MV-AM-Softmax."""

    margin: Annotated[float, Range(ge=0, le=math.pi / 2)] = 0.5
    """m: radians for ``arcface``, units of cosine for ``cosface``."""

    weighting: Literal["fixed", "adaptive"] = "adaptive"
    """Whether the weight is the same for all mis-classified negatives or grows with their
    cosine."""

    weight: Annotated[float, Range(ge=1, le=2)] = 1.2
    """t; 1 changes nothing."""


class ElasticFace(_Cosines, _Exact):
    """A margin drawn anew for every sample (https://arxiv.org/abs/2109.09416)."""

    base: Base = "arcface"
    """Where the margin goes: onto the angle or off the cosine."""

    margin: Annotated[float, Range(ge=0, le=math.pi / 2)] = 0.5
    """Mean of the margin: radians for ``arcface``, units of cosine for ``cosface``."""

    deviation: Annotated[float, Range(ge=0, le=math.pi / 2)] = 0.05
    """Standard deviation of the margin, and the most that it differs from its mean."""

    sort: bool = False
    """Give the largest margins of a batch to the smallest cosines: ElasticFace+."""

    def conflict(self) -> str | None:
        """See :meth:`Definition.conflict`."""
        if self.deviation > self.margin:
            return (
                f"deviation = {self.deviation}: must be at most margin = {self.margin}, or a "
                "margin would be negative. Set both."
            )
        return super().conflict()


class AdaCos(_Smoothed):
    """s cos(theta) with a scale that follows the run (https://arxiv.org/abs/1905.00292)."""


class SubCenterArcFace(_Filtered, _StraightThrough):
    """ArcFace on the nearest of several centers of an identity, for labels with noise."""

    angular: Angle = 0.5
    """m, added to the positive's angle."""

    sub_centers: Annotated[int, Range(ge=1, le=10)] = 3
    """Centers of an identity; each costs what a center costs."""

    @property
    def centers_per_identity(self) -> int:
        """K."""
        return self.sub_centers


class UniFace(_Scaled):
    """Every center as a yes or no, with one threshold for all (UniFace, ICCV 2023)."""

    binary: ClassVar[bool] = True

    additive: Additive = 0.4
    """m, subtracted from the positive's cosine."""

    bias_rate: Annotated[float, Range(gt=0, le=100)] = 0.1
    """Learning rate of the threshold."""


MARGINS: dict[str, type[Margin]] = {
    "arcface": ArcFace,
    "cosface": CosFace,
    "combined": CombinedMargin,
    "softmax": Softmax,
    "modified_softmax": ModifiedSoftmax,
    "normalized_softmax": NormalizedSoftmax,
    "l_softmax": LSoftmax,
    "sphereface": SphereFace,
    "f_norm_sphereface": FNormSphereFace,
    "adaface": AdaFace,
    "magface": MagFace,
    "curricularface": CurricularFace,
    "mv_softmax": MVSoftmax,
    "elasticface": ElasticFace,
    "adacos": AdaCos,
    "subcenter_arcface": SubCenterArcFace,
    "uniface": UniFace,
}
"""Every margin by the name it has in a settings file; the first is the default."""
