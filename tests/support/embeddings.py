"""Embeddings for tests of protocols."""

import numpy as np


def clustered(count, identities, dim=64, seed=0):
    """Embeddings of identities that overlap, in random order."""
    generator = np.random.default_rng(seed)
    identity = generator.integers(0, identities, count)
    centers = generator.normal(size=(identities, dim))
    noise = generator.normal(size=(count, dim)) * generator.uniform(0.5, 1.5, (count, 1))
    return (centers[identity] + noise).astype(np.float32), identity
