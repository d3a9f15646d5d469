"""Vision transformers for faces as arcface_torch trains them on WebFace42M.

Equal to arcface_torch: the names and shapes of a state_dict, so that its files load strictly; the
patches of 9 pixels at 112, of which 12 x 12 cover 108 pixels and the last 4 rows and columns are
not seen; LayerNorm before attention and MLP, ReLU6, no bias on queries, keys and values, drop path
growing linearly with depth, masked patches, and an embedding made from all tokens at once.

Not equal: attention is one fused call, which under autocast takes its inputs in the autocast dtype
and keeps the softmax in fp32, where arcface_torch computes all of it in fp32; and the token in
place of masked patches is not trained where nothing is masked.

Masks and drop path draw from torch's default generator of the device.

Shape suffixes: B = images, N = tokens, D = width of a token, H = heads, E = D / H.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partialfc.backbones.parts import run_block, run_in_weight_dtype

HEADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTShape:
    """The settings in which the sizes differ.

    Attributes:
        width: Of a token, divisible by 8 heads.
        depth: Transformer blocks.
    """

    width: int
    depth: int


SHAPES = {
    "vit_t": ViTShape(width=256, depth=12),
    "vit_s": ViTShape(width=512, depth=12),
    "vit_b": ViTShape(width=512, depth=24),
    "vit_l": ViTShape(width=768, depth=24),
    "vit_h": ViTShape(width=1024, depth=48),
}
"""arcface_torch's for WebFace42M: vit_t_dp005_mask0, vit_s_dp005_mask_0, vit_b_dp005_mask_005,
vit_l_dp005_mask_005 and vit_h."""


class VisionTransformer(nn.Module):
    """Images [b, 3, S, S] in [-1, 1] to embeddings [b, D].

    The patch has S // 12 pixels a side, so that the grid is about 12 x 12. The layers that make
    the embedding run outside autocast.

    Args:
        shape: Width and depth.
        embedding_dim: D, >= 1.
        image_size: S in pixels, >= 24.
        checkpoint_activations: Recompute the blocks' activations in backward.
        masked: Share of the patches left out in training, in [0, 0.9].
        drop_path: Probability in the last block of leaving a branch out, in [0, 1); 0 in the first
            block and linear between.
    """

    def __init__(
        self,
        shape: ViTShape,
        *,
        embedding_dim: int = 512,
        image_size: int = 112,
        checkpoint_activations: bool = False,
        masked: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.masked = masked
        width, patch = shape.width, image_size // 12
        tokens = (image_size // patch) ** 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width), requires_grad=masked > 0)
        drop_paths = torch.linspace(0, drop_path, shape.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(_Block(width, drop_path) for drop_path in drop_paths)
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(tokens * width, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, eps=2e-5),
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings [b, D] of images [b, 3, S, S], in the dtype of the weights."""
        x_BND = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        if self.training and self.masked > 0:
            kept_BND, index_BND = _keep(x_BND, 1 - self.masked)
            kept_BND = self._transform(kept_BND)
            x_BND = self.mask_token.to(kept_BND.dtype).expand_as(x_BND)
            x_BND = x_BND.scatter(1, index_BND, kept_BND)
        else:
            x_BND = self._transform(x_BND)
        return run_in_weight_dtype(x_BND.flatten(1), self.feature)

    def _transform(self, x_BND: Tensor) -> Tensor:
        for block in self.blocks:
            x_BND = run_block(block, x_BND, recompute=self.checkpoint_activations)
        normed_BND: Tensor = self.norm(x_BND)
        return normed_BND


class _Block(nn.Module):
    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attn = _Attention(width)
        self.mlp = _Mlp(width)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self._drop(self.attn(self.norm1(x_BND)))
        return x_BND + self._drop(self.mlp(self.norm2(x_BND)))

    def _drop(self, branch_BND: Tensor) -> Tensor:
        """Leave the branch out for some images and scale it up for the others (stochastic depth,
        https://arxiv.org/abs/1603.09382)."""
        if not self.training or self.drop_path == 0:
            return branch_BND
        kept_B11 = torch.rand(len(branch_BND), 1, 1, device=branch_BND.device) >= self.drop_path
        return branch_BND * (kept_B11 / (1 - self.drop_path))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        qkv_BN3HE = self.qkv(x_BND).unflatten(2, (3, HEADS, -1))
        query_BHNE, key_BHNE, value_BHNE = qkv_BN3HE.permute(2, 0, 3, 1, 4)
        mixed_BHNE = F.scaled_dot_product_attention(query_BHNE, key_BHNE, value_BHNE)
        out_BND: Tensor = self.proj(mixed_BHNE.transpose(1, 2).flatten(2))
        return out_BND


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        out_BND: Tensor = self.fc2(self.act(self.fc1(x_BND)))
        return out_BND


def _keep(x_BND: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Keep a random ``share`` of each image's tokens; also their positions, int64 [B, kept, D]."""
    batch, tokens, width = x_BND.shape
    order_BN = torch.rand(batch, tokens, device=x_BND.device).argsort(dim=1)
    index_BND = order_BN[:, : int(tokens * share)].unsqueeze(2).expand(-1, -1, width)
    return x_BND.gather(1, index_BND), index_BND
