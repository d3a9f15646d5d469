"""Settings of the margins, one section each; what they compute is in :mod:`partialfc.margins`."""

import math
from typing import Annotated, Literal

from pydantic import Field

from partialfc.config.schema import Section, Unit

Angle = Annotated[float, Field(ge=0, le=math.pi / 2), Unit("radians")]
Additive = Annotated[float, Field(ge=0, lt=2), Unit("units of cosine")]
Share = Annotated[float, Field(gt=0, le=1)]
Base = Literal["arcface", "cosface"]
Gradient = Literal["straight_through", "exact"]


class Margin(Section):
    """What every margin has. A new margin is a subclass and an entry in ``AnyMargin``."""

    name: str
    """Which margin; ``partialfc explain --list`` prints all."""


class _Smoothed(Margin):
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over the sampled centers."""


class _Scaled(Margin):
    scale: Annotated[float, Field(gt=0, le=1024)] = 64.0
    """s, the factor of every cosine in the softmax: the radius of the hypersphere."""


class _Filtered(_Scaled):
    inter_class_filter: Annotated[float | None, Field(gt=-1, lt=1), Unit("units of cosine")] = None
    """Cosine above which a negative is taken for the same person under another identity: its
    logit becomes 0 and it gets no gradient. Left out, there is no filter."""


class _Cosines(_Filtered, _Smoothed):
    """What margins on the positive's cosine have."""


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

    name: Literal["arcface"] = "arcface"
    """Which margin."""

    angular: Angle = 0.5
    """m, added to the positive's angle. 0 is a plain normalised softmax."""


class CosFace(_Cosines):
    """s (cos(theta) - additive) on the positive (https://arxiv.org/abs/1801.09414, eq. 4)."""

    name: Literal["cosface"] = "cosface"
    """Which margin."""

    additive: Additive = 0.4
    """m, subtracted from the positive's cosine. 0 is a plain normalised softmax."""


class CombinedMargin(_Cosines, _Exact):
    """s (cos(m0 theta + m1) - m2) on the positive (https://arxiv.org/abs/1801.07698, sec. 2.2)."""

    name: Literal["combined"] = "combined"
    """Which margin."""

    multiplicative: Annotated[float, Field(ge=1, le=4)] = 1.0
    """m0, a factor of the angle. 1 is none."""

    angular: Angle = 0.3
    """m1, added to the angle. 0 is none."""

    additive: Additive = 0.2
    """m2, subtracted from the cosine. 0 is none."""

    past_pi: Literal["linear", "fold", "drop", "easy", "none"] = "linear"
    """How the curve goes on where m0 theta + m1 passes pi: ``linear`` as cos(theta), ``fold`` as
    SphereFace's psi, ``drop`` a step down as in the first ArcFace code, ``easy`` the margin below
    pi/2 only, ``none`` not at all."""

    allow_rising: bool = False
    """Accept ``easy``, ``none`` and ``drop`` with m0 > 1, where the logit rises with the angle
    somewhere."""


class Softmax(_Smoothed):
    """w x + b: the softmax of a linear layer, no unit lengths, no margin."""

    name: Literal["softmax"] = "softmax"
    """Which margin."""


class ModifiedSoftmax(_Smoothed):
    """||x|| cos(theta): unit centers, no bias, no margin (https://arxiv.org/abs/1704.08063)."""

    name: Literal["modified_softmax"] = "modified_softmax"
    """Which margin."""


class NormalizedSoftmax(_Cosines):
    """s cos(theta), no margin: NSL (https://arxiv.org/abs/1801.09414, eq. 3)."""

    name: Literal["normalized_softmax"] = "normalized_softmax"
    """Which margin."""


class _Multiplicative(_Smoothed):
    multiplicative: Annotated[int, Field(ge=1, le=4)] = 4
    """m, the factor of the positive's angle."""

    annealing: Annotated[float, Field(ge=0)] = 1000.0
    """Weight of the logit without the margin at the first step, next to 1 for the logit with it."""

    annealing_decay: Annotated[float, Field(ge=0)] = 0.12
    """Speed at which that weight falls: annealing / (1 + annealing_decay step)."""

    annealing_end: Annotated[float, Field(ge=0)] = 5.0
    """Smallest value of that weight; at most ``annealing``."""


class LSoftmax(_Multiplicative):
    """||w|| ||x|| psi(theta) on the positive (https://arxiv.org/abs/1612.02295)."""

    name: Literal["l_softmax"] = "l_softmax"
    """Which margin."""


class SphereFace(_Multiplicative):
    """||x|| psi(theta) on the positive: A-Softmax (https://arxiv.org/abs/1704.08063)."""

    name: Literal["sphereface"] = "sphereface"
    """Which margin."""


class FNormSphereFace(_Multiplicative, _Cosines):
    """s psi(theta) on the positive: SphereFace with a fixed scale."""

    name: Literal["f_norm_sphereface"] = "f_norm_sphereface"
    """Which margin."""

    multiplicative: Annotated[int, Field(ge=1, le=4)] = 2
    """m, the factor of the positive's angle."""

    annealing: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the logit without the margin at the first step, next to 1 for the logit with it."""

    annealing_end: Annotated[float, Field(ge=0)] = 0.0
    """Smallest value of that weight; at most ``annealing``."""


class AdaFace(_Cosines, _Exact):
    """A margin that follows the image's quality, known by the norm of its embedding
    (https://arxiv.org/abs/2204.00964)."""

    name: Literal["adaface"] = "adaface"
    """Which margin."""

    margin: Angle = 0.4
    """m, an angular margin for poor images and an additive one for good images."""

    concentration: Annotated[float, Field(gt=0, le=100)] = 0.333
    """h: a norm 1 / h standard deviations from the mean counts as poorest or best."""

    averaging: Share = 0.01
    """Share of the new batch in the moving mean and deviation of the norms."""


class MagFace(_Cosines):
    """An angular margin that grows with the norm, which is rewarded for growing
    (https://arxiv.org/abs/2103.06627)."""

    name: Literal["magface"] = "magface"
    """Which margin."""

    smallest_norm: Annotated[float, Field(gt=0)] = 10.0
    """Norm of the smallest margin; a shorter embedding counts as this long."""

    largest_norm: Annotated[float, Field(gt=0)] = 110.0
    """Norm of the largest margin; a longer embedding counts as this long."""

    smallest_angular: Angle = 0.45
    """Margin at ``smallest_norm``."""

    largest_angular: Angle = 0.8
    """Margin at ``largest_norm``."""

    norm_weight: Annotated[float, Field(ge=0)] = 35.0
    """Weight of the term that pulls norms up."""


class CurricularFace(_Scaled, _Exact):
    """ArcFace whose hard negatives gain weight during the run (https://arxiv.org/abs/2004.00288)."""

    name: Literal["curricularface"] = "curricularface"
    """Which margin."""

    angular: Angle = 0.5
    """m, added to the positive's angle."""

    averaging: Share = 0.01
    """Share of the new batch in the moving average of the positive cosine."""


class MVSoftmax(_Scaled, _Exact):
    """Mis-classified negatives weighed up (https://arxiv.org/abs/1912.00833)."""

    name: Literal["mv_softmax"] = "mv_softmax"
    """Which margin."""

    base: Base = "arcface"
    """Margin on the positive: MV-Arc-Softmax or MV-AM-Softmax."""

    margin: Annotated[float, Field(ge=0, le=math.pi / 2)] = 0.5
    """m: radians for ``arcface``, units of cosine for ``cosface``."""

    weighting: Literal["fixed", "adaptive"] = "adaptive"
    """Whether the weight is the same for all mis-classified negatives or grows with their
    cosine."""

    weight: Annotated[float, Field(ge=1, le=2)] = 1.2
    """t; 1 changes nothing."""


class ElasticFace(_Cosines, _Exact):
    """A margin drawn anew for every sample (https://arxiv.org/abs/2109.09416)."""

    name: Literal["elasticface"] = "elasticface"
    """Which margin."""

    base: Base = "arcface"
    """Where the margin goes: onto the angle or off the cosine."""

    margin: Annotated[float, Field(ge=0, le=math.pi / 2)] = 0.5
    """Mean of the margin: radians for ``arcface``, units of cosine for ``cosface``."""

    deviation: Annotated[float, Field(ge=0, le=math.pi / 2)] = 0.05
    """Standard deviation of the margin, and the most that it differs from its mean."""

    sort: bool = False
    """Give the largest margins of a batch to the smallest cosines: ElasticFace+."""


class AdaCos(_Smoothed):
    """s cos(theta) with a scale that follows the run (https://arxiv.org/abs/1905.00292)."""

    name: Literal["adacos"] = "adacos"
    """Which margin."""


class SubCenterArcFace(_Filtered, _StraightThrough):
    """ArcFace on the nearest of several centers of an identity, for labels with noise."""

    name: Literal["subcenter_arcface"] = "subcenter_arcface"
    """Which margin."""

    angular: Angle = 0.5
    """m, added to the positive's angle."""

    sub_centers: Annotated[int, Field(ge=1, le=10)] = 3
    """Centers of an identity; each costs what a center costs."""


class UniFace(_Scaled):
    """Every center as a yes or no, with one threshold for all (UniFace, ICCV 2023)."""

    name: Literal["uniface"] = "uniface"
    """Which margin."""

    additive: Additive = 0.4
    """m, subtracted from the positive's cosine."""

    bias_rate: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Learning rate of the threshold."""


AnyMargin = Annotated[
    ArcFace
    | CosFace
    | CombinedMargin
    | Softmax
    | ModifiedSoftmax
    | NormalizedSoftmax
    | LSoftmax
    | SphereFace
    | FNormSphereFace
    | AdaFace
    | MagFace
    | CurricularFace
    | MVSoftmax
    | ElasticFace
    | AdaCos
    | SubCenterArcFace
    | UniFace,
    Field(discriminator="name"),
]
