"""The backbones written down again as functions of images and state_dict, for tests in fp64.

In training they move the statistics of BatchNorm in the state_dict, as the modules do in theirs.
"""

import math
import re

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


def norm(x: Tensor, w: Weights, name: str, training: bool, eps: float = 1e-5) -> Tensor:
    """BatchNorm over all axes but the channels; in training it also moves the statistics in w."""
    channels = [1, -1] + [1] * (x.ndim - 2)
    if training:
        rows = x.transpose(0, 1).flatten(1)
        mean, var = rows.mean(1), rows.var(1, correction=0)
        w[f"{name}.running_mean"] = 0.9 * w[f"{name}.running_mean"] + 0.1 * mean
        w[f"{name}.running_var"] = 0.9 * w[f"{name}.running_var"] + 0.1 * rows.var(1)
        w[f"{name}.num_batches_tracked"] = w[f"{name}.num_batches_tracked"] + 1
    else:
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    x = (x - mean.view(channels)) / (var.view(channels) + eps).sqrt()
    return x * w[f"{name}.weight"].view(channels) + w[f"{name}.bias"].view(channels)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return x.clamp(min=0) + slope.view(1, -1, 1, 1) * x.clamp(max=0)


def conv(x: Tensor, weight: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    outputs, inputs_of_group, kernel = weight.shape[:3]
    padding = kernel // 2 if padding is None else padding
    patches = F.unfold(x, kernel, padding=padding, stride=stride)
    groups = x.shape[1] // inputs_of_group
    patches = patches.view(len(x), groups, inputs_of_group * kernel**2, -1)
    weight = weight.view(groups, outputs // groups, -1)
    side = math.isqrt(patches.shape[-1])
    return torch.einsum("goi,bgil->bgol", weight, patches).reshape(len(x), outputs, side, side)


def iresnet_truth(x: Tensor, w: Weights, training: bool) -> Tensor:
    x = prelu(norm(conv(x, w["conv1.weight"]), w, "bn1", training), w["prelu.weight"])
    blocks = dict.fromkeys(key.rsplit(".bn1", 1)[0] for key in w if re.match(r"layer.*\.bn1", key))
    for b in blocks:
        stride = 2 if b.endswith(".0") else 1
        y = conv(norm(x, w, f"{b}.bn1", training), w[f"{b}.conv1.weight"])
        y = prelu(norm(y, w, f"{b}.bn2", training), w[f"{b}.prelu.weight"])
        y = norm(conv(y, w[f"{b}.conv2.weight"], stride), w, f"{b}.bn3", training)
        if f"{b}.se.fc1.weight" in w:
            squeezed = (y.mean((2, 3)) @ w[f"{b}.se.fc1.weight"].flatten(1).T).clamp(min=0)
            excited = squeezed @ w[f"{b}.se.fc2.weight"].flatten(1).T
            y = y / (1 + (-excited).exp()).view(len(y), -1, 1, 1)
        if stride == 2:
            x = conv(x, w[f"{b}.downsample.0.weight"], stride)
            x = norm(x, w, f"{b}.downsample.1", training)
        x = x + y
    x = norm(x, w, "bn2", training).flatten(1) @ w["fc.weight"].T + w["fc.bias"]
    return norm(x, w, "features", training)


def mobilefacenet_truth(x: Tensor, w: Weights, training: bool) -> Tensor:
    def conv_block(x: Tensor, name: str, stride: int = 1, padding: int | None = None) -> Tensor:
        x = conv(x, w[f"{name}.layers.0.weight"], stride, padding)
        x = norm(x, w, f"{name}.layers.1", training)
        slope = w.get(f"{name}.layers.2.weight")
        return x if slope is None else prelu(x, slope)

    def bottleneck(x: Tensor, name: str, stride: int) -> Tensor:
        x = conv_block(x, f"{name}.layers.0")
        x = conv_block(x, f"{name}.layers.1", stride)
        return conv_block(x, f"{name}.layers.2")

    def residuals(x: Tensor, name: str) -> Tensor:
        block = 0
        while f"{name}.layers.{block}.layers.0.layers.0.weight" in w:
            x, block = x + bottleneck(x, f"{name}.layers.{block}", stride=1), block + 1
        return x

    x = conv_block(x, "layers.0", stride=2)
    large = "layers.1.layers.1.layers.0.layers.0.weight" in w
    x = residuals(x, "layers.1") if large else conv_block(x, "layers.1")
    for stage in (2, 4, 6):
        x = residuals(bottleneck(x, f"layers.{stage}", stride=2), f"layers.{stage + 1}")
    x = conv_block(conv_block(x, "conv_sep"), "features.layers.0", padding=0).flatten(1)
    return norm(x @ w["features.layers.2.weight"].T, w, "features.layers.3", training)


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def vit_truth(x: Tensor, w: Weights, training: bool) -> Tensor:
    width = w["norm.weight"].numel()
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 256, 12)
    x = patches @ w["patch_embed.proj.weight"].view(width, 12).T + w["patch_embed.proj.bias"]
    x = x + w["pos_embed"]
    blocks = dict.fromkeys(
        key.rsplit(".attn", 1)[0] for key in w if key.endswith(".attn.qkv.weight")
    )
    for b in blocks:
        qkv = layer_norm(x, w, f"{b}.norm1") @ w[f"{b}.attn.qkv.weight"].T
        heads = []
        for head in range(8):
            e = width // 8
            q, k, v = (qkv[..., i * width + head * e :][..., :e] for i in range(3))
            heads.append((q @ k.mT / math.sqrt(e)).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w[f"{b}.attn.proj.weight"].T + w[f"{b}.attn.proj.bias"]
        y = layer_norm(x, w, f"{b}.norm2") @ w[f"{b}.mlp.fc1.weight"].T + w[f"{b}.mlp.fc1.bias"]
        x = x + y.clamp(0, 6) @ w[f"{b}.mlp.fc2.weight"].T + w[f"{b}.mlp.fc2.bias"]
    x = layer_norm(x, w, "norm").flatten(1) @ w["feature.0.weight"].T
    x = norm(x, w, "feature.1", training, eps=2e-5) @ w["feature.2.weight"].T
    return norm(x, w, "feature.3", training, eps=2e-5)


def convnet_truth(x: Tensor, w: Weights, training: bool) -> Tensor:
    for stage in (f"stages.{i}" for i in range(4)):
        x = norm(conv(x, w[f"{stage}.0.weight"], stride=2), w, f"{stage}.1", training).clamp(min=0)
    return norm(x.flatten(1) @ w["fc.weight"].T, w, "features", training)


def pooled_truth(x: Tensor, w: Weights, training: bool) -> Tensor:
    for stage in (f"stages.{i}" for i in range(4)):
        x = norm(conv(x, w[f"{stage}.0.weight"], stride=1), w, f"{stage}.1", training).clamp(min=0)
        x = x.unflatten(3, (-1, 2)).amax(4).unflatten(2, (-1, 2)).amax(3)
    return norm(x.flatten(1) @ w["fc.weight"].T, w, "features", training)


TRUTH = {
    "iresnet": iresnet_truth,
    "iresnet_se": iresnet_truth,
    "mobilefacenet": mobilefacenet_truth,
    "mobilefacenet_large": mobilefacenet_truth,
    "vit": vit_truth,
    "convnet": convnet_truth,
    "pooled": pooled_truth,
}
