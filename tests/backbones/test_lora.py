"""Low-rank adapters on linear layers, and their merging."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from partialfc.backbones.lora import adapt, adapters, merge, merged_state
from partialfc.backbones.vit import VisionTransformer, ViTShape

SIZE = 24
SHAPE = ViTShape(width=16, depth=2)


def network(**lora) -> VisionTransformer:
    torch.manual_seed(0)
    made = VisionTransformer(SHAPE, embedding_dim=8, image_size=SIZE).eval()
    if lora:
        adapt(made, **{"rank": 4, "factor": 2.0, "image_size": SIZE, **lora})
    return made


def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def with_effect(made):
    """B is zero in the beginning."""
    for _, layer in adapters(made):
        nn.init.normal_(layer.lora_up, std=0.1)
    return made


def test_it_begins_as_the_network_that_it_adapts():
    adapted = network(targets=["attn.*", "mlp.fc1"])
    assert torch.equal(adapted(images()), network()(images()))
    found = [name for name, _ in adapters(adapted)]
    assert found == [
        f"blocks.{n}.{one}" for n in (0, 1) for one in ("attn.qkv", "attn.proj", "mlp.fc1")
    ]
    assert network().state_dict().keys() < adapted.state_dict().keys()


def test_a_merged_network_is_the_adapted_one():
    """Both ways to merge: a state, and a module in place. Relative to fp64."""
    adapted = with_effect(network(targets=["attn.*", "mlp.*", "feature.*"]))
    expected = adapted.double()(images().double()).detach()
    adapted.float()
    assert not torch.allclose(expected.float(), network()(images()), rtol=0.1)
    plain = network()
    plain.load_state_dict(merged_state(adapted.state_dict(), 2.0))
    merge(adapted)
    assert not [*adapters(adapted)]
    for merged in (plain, adapted):
        assert [*merged.state_dict()] == [*network().state_dict()]
        error = (merged(images()).double() - expected).norm() / expected.norm()
        assert error < 1e-6
    for name, value in plain.state_dict().items():
        assert torch.equal(value, adapted.state_dict()[name])


def test_an_adapter_is_alpha_over_rank_times_b_a():
    adapted = with_effect(network(targets=["blocks.1.mlp.fc2"]))
    ((name, layer),) = adapters(adapted)
    assert name == "blocks.1.mlp.fc2"
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    weight = layer.weight + 2.0 * layer.lora_up @ layer.lora_down
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["attn.q"]}, 'targets = "attn.q": no linear layer .* blocks.*.attn.qkv, '),
        ({"targets": ["patch_embed.proj"]}, "no linear layer"),
        ({"targets": ["mlp.*"], "rank": 16}, "rank = 16: must be below 16"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_names_there_are(lora, message):
    with pytest.raises(ValueError, match=message):
        network(**lora)


class Uncalled(nn.Module):
    """A network that computes with the weight of a layer by itself, as some of timm's do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * SIZE * SIZE, 8)

    def forward(self, x):
        return F.linear(x.flatten(1), self.fc.weight)


def test_a_layer_that_is_never_called_is_refused():
    """Its adapters would be trained by nothing, and nobody would see it."""
    with pytest.raises(ValueError, match=r"fc: this network computes with the weight by itself"):
        adapt(Uncalled(), rank=4, factor=1.0, targets=["fc"], image_size=SIZE)
