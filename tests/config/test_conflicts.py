"""What cannot work on any machine is refused by load(), so on the login node: by the key of the
settings file, named once, with value, rule and remedy."""

import re
from pathlib import Path

import pytest

from partialfc.config import Config, ConfigError, load
from partialfc.config.conflicts import why_no_overlap
from partialfc.config.schema import settings_of

KEYS = {key for key, _ in settings_of(Config)}

CONFLICTS = {
    # key: (overrides, value, a piece of the rule, the remedy)
    "head.center_format": (
        ["head.center_format=fp16", "head.margin.name=softmax"],
        '"fp16"',
        'head.margin.name = "softmax" looks at its length',
        "Use fp32 or bf16.",
    ),
    "head.sample_rate": (
        ["head.states_in=host"],
        "1.0",
        "with rows in host memory every step would bring all of them to the device",
        "Keep them on the device, or sample fewer.",
    ),
    "head.host_folder": (
        ["head.host_folder=/rows"],
        '"/rows"',
        "nothing lies in host memory",
        'Set centers_in or states_in to "host", or remove it.',
    ),
    "log.upload_checkpoint": (
        ["checkpoint.shared=false", "log.upload_checkpoint=true", 'log.sinks=["wandb"]'],
        "true with checkpoint.shared = false",
        "no host has the whole of a checkpoint",
        "Remove one.",
    ),
    "losses.inter_class.weight": (
        ["losses.inter_class.weight=0.5", "head.margin.name=l_softmax"],
        "0.5",
        'head.margin.name = "l_softmax" keeps their lengths',
        "use another margin.",
    ),
    "losses.triplet.margin": (
        ["losses.triplet.margin=0.3"],
        "0.3",
        "has no effect, as weight = 0 leaves this loss out",
        "Set the weight, or remove margin.",
    ),
    "head.margin.label_smoothing": (
        ["head.margin.label_smoothing=0.1", "head.margin.inter_class_filter=0.4"],
        "0.1 with inter_class_filter = 0.4",
        "one pulls every embedding to all centers",
        "Leave one out.",
    ),
    "head.margin.past_pi": (
        ["head.margin={name='combined',past_pi='easy'}"],
        '"easy"',
        "the logit would rise with the angle",
        'Use "linear" or "fold", or set allow_rising = true.',
    ),
    "head.margin.annealing_end": (
        ["head.margin={name='sphereface',annealing=1}"],
        "5.0",
        "must be at most annealing = 1.0",
        "Set both.",
    ),
    "head.margin.largest_norm": (
        ["head.margin={name='magface',largest_norm=9}"],
        "9.0",
        "must be above smallest_norm = 10.0",
        "Set both.",
    ),
    "head.margin.largest_angular": (
        ["head.margin={name='magface',smallest_angular=0.9}"],
        "0.8",
        "must be at least smallest_angular = 0.9",
        "Set both.",
    ),
    "head.margin.deviation": (
        ["head.margin={name='elasticface',margin=0.01}"],
        "0.05",
        "must be at most margin = 0.01",
        "Set both.",
    ),
    "backbone.name": (
        ["backbone.name=resnet50"],
        '"resnet50" (command line)',
        'must be "iresnet18", "iresnet34", "iresnet50"',
        'Write name = "iresnet50".',
    ),
    "data.image_size": (
        ["data.image_size=100"],
        "100",
        "iresnet50 halves the image four times, so it needs a multiple of 16",
        "Use 96 or 112.",
    ),
    "head.fused": (
        ["head.fused=true", "head.optimizer.name=adamw"],
        "true",
        "they know SGD only",
        "Remove it.",
    ),
    "head.overlap": (
        ["head.overlap=true", "run.device=cpu"],
        "true",
        "it needs a GPU, and the head is on cpu",
        "Remove it.",
    ),
    "head.compute": (
        ["head.compute=tf32", "run.device=cpu"],
        '"tf32"',
        "it needs a GPU, and the head is on cpu",
        "Use fp32 or bf16.",
    ),
    "data.global_batch": (
        ["data.global_batch=100", "optimizer.accumulation=3"],
        "100",
        "must divide by optimizer.accumulation = 3",
        "Nearest: 99 or 102.",
    ),
    "data.images_per_identity": (
        ["data.images_per_identity=3"],
        "3",
        "must divide data.global_batch = 1024",
        "Nearest batches: 1023 or 1026.",
    ),
    "data.loader": (
        ["data.loader=torch", "data.augment.blur=0.5", "data.augment.crop=0.5"],
        '"torch"',
        "it knows crop, shift and flip, not blur",
        'Use "dali", or set data.augment.blur = 0.',
    ),
    "data.augment.jpeg_quality": (
        ["data.augment.jpeg_quality=96"],
        "96 (command line)",
        "must be an integer in [1, 95]",
        "Leave it out for the default, 20.",
    ),
    "checkpoint.peers_folder": (
        ["checkpoint.peers_folder=/local"],
        '"/local"',
        "no copies are made",
        "Set peers_every_steps, or remove it.",
    ),
    "verification.pairs": (
        ['verification.pairs=["/a/lfw.bin", "/b/lfw.bin"]'],
        '"/b/lfw.bin"',
        "another set is called lfw too",
        "Rename one.",
    ),
}

ALSO = [
    # overrides, how the one line begins
    (["head.fused=true", "precision.compute=fp32"], "head.fused = true: .*they multiply in bf16"),
    (["head.fused=true", "run.device=cpu"], "head.fused = true: .*they need a GPU"),
    (["head.fused=true", "backbone.embedding_dim=1024"], "head.fused = true: .*up to 512"),
    (["head.fused=true", "head.margin.name=uniface"], "head.fused = true: .*a softmax over unit"),
    (["head.fused=true", "head.margin.name=subcenter_arcface"], "head.fused = true: .*one an id"),
    (["head.margin={name='combined',past_pi='drop',multiplicative=2}"], r"head\.margin\.past_pi"),
    (
        ["backbone.shard=fsdp2", "checkpoint.peers_every_steps=9"],
        'backbone.shard = "fsdp2" with che',
    ),
    (["head.overlap=true", "precision.compute=fp16"], "head.overlap = true with precision.comp"),
]


def refusal(overrides: list[str], folder: Path) -> str:
    path = folder / "run.toml"
    path.write_text('[data]\ntrain = "train.rec"\n')
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("key", CONFLICTS)
def test_it_is_refused_with_key_value_rule_and_remedy(key: str, tmp_path: Path) -> None:
    overrides, value, rule, remedy = CONFLICTS[key]
    message = refusal(overrides, tmp_path)
    assert key in KEYS
    assert message.startswith(f"{key} = {value}: ")
    assert message.count(key) == 1
    assert rule in message
    assert remedy in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(("overrides", "message"), ALSO)
def test_and_so_is_this(overrides: list[str], message: str, tmp_path: Path) -> None:
    assert re.match(message, refusal(overrides, tmp_path))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("head.fused=true", "head.fused = true: .*copies of them add up"),
        ("head.overlap=true", "head.ranks_per_copy = 8 with head.overlap = true: gradients of cen"),
        ("checkpoint.peers_every_steps=9", "head.ranks_per_copy = 8 with checkpoint.peers_every"),
    ],
)
def test_what_does_not_go_with_several_copies_of_centers_goes_with_one(
    setting: str, message: str, tmp_path: Path
) -> None:
    """8 ranks a copy are one copy on 8 ranks, or 4, and two on 16."""
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntrain = "train.rec"\nglobal_batch = 96\n')
    config = load(path, ["head.ranks_per_copy=8", setting])
    for ranks in (1, 4, 8):
        config.check(ranks)
    with pytest.raises(ConfigError) as error:
        config.check(16)
    assert re.match(message, str(error.value))


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize(
    ("overrides", "device", "why"),
    [
        ([], "cuda", None),
        (["precision.compute=bf16", "head.states_in=host", "head.sample_rate=0.1"], "cuda", None),
        (["head.overlap=true"], "cuda", None),
        (["precision.compute=fp16"], "cuda", "fp16 knows after the backward only"),
        (["head.ranks_per_copy=8"], "cuda", None),
        (["head.ranks_per_copy=2"], "cuda", "gradients of centers go between copies"),
        (["head.overlap=false"], "cuda", "overlap = false"),
        ([], "cpu", "there is no GPU"),
    ],
)
def test_centers_are_updated_beside_the_backward_where_it_changes_no_bit(
    overrides: list[str], device: str, why: str | None, ranks: int, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntrain = "train.rec"\n')
    found = why_no_overlap(load(path, overrides), device, ranks)
    assert found is None if why is None else found is not None and why in found


def test_conflicts_across_sections_are_in_one_message(tmp_path: Path) -> None:
    overrides = ["data.image_size=100", "head.overlap=true", "run.device=cpu"]
    header, *lines = refusal(overrides, tmp_path).splitlines()
    assert header == "2 problems"
    assert [line.split()[0] for line in lines] == ["data.image_size", "head.overlap"]
