"""A value outside its range is refused by name, whoever constructs it; what contradicts, too."""

import math
import typing
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest

from partialfc.data.augment import Augmentation
from partialfc.definitions import Range, fits
from partialfc.definitions.phrases import rule, to_value
from partialfc.head.rows.rules import ROW_RULES
from partialfc.losses import LOSSES
from partialfc.margins import MARGINS, ArcFace

KINDS = [*MARGINS.values(), *LOSSES.values(), *ROW_RULES.values(), Augmentation]
FIELDS = [(kind, name, annotation) for kind in KINDS for name, annotation in kind.takes.items()]
IDS = [f"{kind.__name__}.{name}" for kind, name, _ in FIELDS]


def beyond(annotation):
    """Values of the right type that are just outside, and ones that are just inside."""
    metadata = getattr(annotation, "__metadata__", ())
    whole = rule(annotation).startswith("integer")
    for bound in (entry for entry in metadata if isinstance(entry, Range)):
        for sign, away in (("gt", -1), ("ge", -1), ("lt", 1), ("le", 1)):
            value = getattr(bound, sign)
            if value is not None:
                outer = value + away if whole else math.nextafter(value, away * math.inf)
                inner = value - away if whole else math.nextafter(value, -away * math.inf)
                yield (outer, value) if sign in ("ge", "le") else (value, inner)


@pytest.mark.parametrize(("kind", "name", "annotation"), FIELDS, ids=IDS)
def test_every_range_ends_where_it_says_and_its_refusal_says_key_value_rule_and_remedy(
    kind, name, annotation
):
    wrong = [outside for outside, _ in beyond(annotation)]
    wrong += [None] if "None" not in str(annotation) else []
    wrong += ["a word", math.nan, [1, 2, 3]]
    for value in wrong:
        with pytest.raises(ValueError) as error:
            kind(**{name: value})
        message = str(error.value)
        assert message.startswith(f"{name} = {to_value(value)}: must be "), message
        assert message.count(name) <= 2, message
        assert rule(annotation) in message
        assert "Leave it out for the default" in message or "If that is degrees" in message
    assert all(fits(inside, annotation) for _, inside in beyond(annotation))


@pytest.mark.parametrize(("kind", "name", "annotation"), FIELDS, ids=IDS)
def test_a_bool_is_no_number(kind, name, annotation):
    for value in (False, True):
        assert fits(value, annotation) is (annotation is bool)


def test_degrees_are_recognised():
    with pytest.raises(ValueError, match=r"28\.65: .* If that is degrees, write angular = 0\.5\."):
        ArcFace(angular=28.65)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("arcface", {"label_smoothing": 0.1, "inter_class_filter": 0.4}, "Leave one out"),
        ("combined", {"past_pi": "none"}, "would rise"),
        ("combined", {"past_pi": "easy", "angular": 0}, "would rise"),
        ("combined", {"multiplicative": 2, "past_pi": "drop"}, "would rise"),
        ("elasticface", {"deviation": 0.6}, "must be at most margin = 0.5"),
        ("magface", {"largest_angular": 0.3}, "must be at least smallest_angular = 0.45"),
        ("magface", {"largest_norm": 5}, "must be above smallest_norm = 10.0"),
        ("sphereface", {"annealing": 1}, "annealing_end = 5.0: must be at most annealing = 1"),
        ("f_norm_sphereface", {"annealing_end": 1}, "must be at most annealing = 0.0"),
    ],
)
def test_values_that_contradict_are_refused(name, settings, words):
    with pytest.raises(ValueError) as error:
        MARGINS[name](**settings)
    assert words in str(error.value)
    assert str(error.value).split(" ")[0] in MARGINS[name].takes


def test_the_mathematics_is_its_definition():
    """Not one field of its own, so that a settings file can say all there is to say."""
    for name, kind in MARGINS.items():
        assert kind.__bases__[0].__module__ == "partialfc.definitions.margins", name
        assert kind.takes == kind.__bases__[0].takes
        assert kind() == replace(kind())
        with pytest.raises(AttributeError):
            kind().label_smoothing = 0.5
        assert typing.get_type_hints(kind)


@pytest.mark.parametrize(
    "decorator", [None, dataclass(frozen=True), dataclass(frozen=True, slots=True)]
)
def test_a_margin_of_ones_own_is_a_dataclass_with_or_without_saying_so(decorator):
    class Mine(ArcFace):
        angular: float = 0.25
        note: str = "x"
        steps: tuple[int, ...] = (1, 2)

    kind = Mine if decorator is None else decorator(Mine)
    mine = kind(note="y")
    assert (mine.angular, mine.note, mine.steps) == (0.25, "y", (1, 2))
    with pytest.raises(ValueError, match="scale"):
        kind(scale=-1.0)
    with pytest.raises(ValueError, match="note"):
        kind(note=3)
    with pytest.raises(ValueError, match="steps"):
        kind(steps=(1, 2.5))
    with pytest.raises(FrozenInstanceError):
        mine.angular = 0.5
