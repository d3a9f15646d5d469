"""Speech-like features that a test makes, and a network of one's own for them."""

import numpy as np
import torch
from torch import Tensor, nn

SHAPE = (16, 24)
"""Bins and frames of a sample."""


class XVector(nn.Module):
    """Convolutions over time, mean and deviation over it, and a linear layer."""

    def __init__(self, *, embedding_dim: int, bins: int = 16, width: int = 32) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            nn.Conv1d(bins, width, 5), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3)
        )
        self.embedding = nn.Sequential(
            nn.BatchNorm1d(2 * width), nn.Linear(2 * width, embedding_dim)
        )

    def forward(self, samples: Tensor) -> Tensor:
        frames = self.frames(samples)
        return self.embedding(self.pooled(frames))

    @staticmethod
    def pooled(frames: Tensor) -> Tensor:
        """Mean and deviation over time, side by side."""
        variance, mean = torch.var_mean(frames, 2, correction=0)
        return torch.cat([mean, (variance + 1e-5).sqrt()], 1)


def voices(people: int, each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples fp32 [N, 16, 24] and identities [N]: tones of a person, at another time each.

    A person has bins that sound, each with a rhythm; every sample begins elsewhere in it, and has
    noise.
    """
    rng = np.random.default_rng(seed)
    bins, frames = SHAPE
    level = rng.random((people, bins)) ** 4 * 3
    rate = rng.uniform(0.3, 1.5, (people, bins))
    identity_N = np.repeat(np.arange(people), each)
    start = rng.uniform(0, 20, (len(identity_N), 1, 1))
    time = start + np.arange(frames)
    wave = 1 + np.sin(time * rate[identity_N][:, :, None])
    noise = rng.normal(0, 1.5, (len(identity_N), bins, frames))
    return (level[identity_N][:, :, None] * wave + noise).astype(np.float32), identity_N
