"""What must be the same for a run to go on from a checkpoint."""

from types import SimpleNamespace

import pytest

from partialfc.checkpoint.teacher import Teacher
from partialfc.training.must_match import must_match
from tests.support.models import settings

PACK = SimpleNamespace(fingerprint="of a pack", labels_fingerprint="of its labels")


@pytest.mark.parametrize(("rate", "differs"), [(1.0, False), (0.5, True)])
def test_what_unsampled_rows_do_is_a_fact_where_there_are_any(rate, differs):
    """At a rate of 1 a run must go on from a checkpoint of when the default was another one."""
    found = {
        unsampled: must_match(
            settings(
                head={"sample_rate": rate, "optimizer": {"name": "sgd", "unsampled": unsampled}}
            ),
            PACK,
        )["head.optimizer.unsampled"]
        for unsampled in ("stay", "move")
    }
    assert (found["stay"], found["move"]) == ("stay", "move" if differs else "stay")


def test_a_rule_without_unsampled_has_no_such_fact():
    config = settings(head={"sample_rate": 0.5, "optimizer": {"name": "adamw"}})
    facts = must_match(config, PACK)
    assert facts["head.optimizer.unsampled"] is None


def test_what_negatives_count_for_is_a_fact_where_some_are_drawn():
    """Older checkpoints say nothing of it; other lists are other samples."""
    near = {"neighbours": 8, "every_steps": 100, "share": 0.5}

    def fact(rate, negatives, nearest=()):
        head = {"sample_rate": rate, "negatives": negatives, "nearest": dict(nearest)}
        return must_match(settings(head=head), PACK)["head.negatives"]

    assert fact(0.5, "uniform") is None
    assert fact(0.5, "weighted") == "weighted"
    assert fact(0.5, "nearest", {"neighbours": 8, "every_steps": 100}.items()) == {"nearest": near}


def test_a_look_at_a_run_needs_no_teacher():
    """clean and identities open a run whose teacher may be gone; training itself opens it."""
    teaches = {"weight": 1.0, "from": "gone", "final_factor": 0.5}
    config, data = settings(losses={"teacher": teaches}), PACK
    assert "losses.teacher" not in must_match(config, data)
    teacher = Teacher(lambda images, sample_ids: images, 16, "0123456789abcdef")
    fact = must_match(config, data, teacher)["losses.teacher"]
    assert (fact["digest"], fact["final_factor"]) == ("0123456789abcdef", 0.5)
    assert "from" not in fact, "it may lie elsewhere"
    assert must_match(settings(), data)["losses.teacher"] is None


def test_options_of_a_backbone_at_their_defaults_are_what_older_checkpoints_have():
    """A ViT's checkpoint of before it had options says nothing of them, and goes on."""
    dataset = SimpleNamespace(fingerprint="", labels_fingerprint="")
    for options, expected in (({}, None), ({"masked": 0.1}, {"masked": 0.1})):
        config = settings(backbone={"name": "vit_b", "options": options})
        assert must_match(config, dataset)["backbone.options"] == expected


def test_the_order_of_names_makes_no_other_run():
    """What is frozen or adapted is a set of parts."""
    found = []
    for order in (1, -1):
        parts = ["conv1", "layer1"][::order]
        lora = {"rank": 4, "targets": parts, "also_train": parts}
        found += [
            must_match(settings(backbone={"freeze": parts}), PACK),
            must_match(settings(backbone={"lora": lora}, run={"start_from": "base.pt"}), PACK),
        ]
    for one, other in zip(found[:2], found[2:], strict=True):
        for name in ("backbone.freeze", "backbone.lora"):
            assert one[name] == other[name]
    one_word = settings(backbone={"freeze": "conv1"})
    assert must_match(one_word, PACK)["backbone.freeze"] == ["conv1"]
