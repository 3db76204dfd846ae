"""Deterministic weights from the names of parameters, so that golden files store outputs only.

RandomState is used because its streams are the same in all versions of NumPy.
"""

import zlib
from functools import cache

import numpy as np


def tensor(key: str, shape) -> np.ndarray:
    """Return the float32 array of one entry of a state dict (int64 zero for counters)."""
    return _tensor(key, tuple(shape)).copy()


@cache
def _tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    rng = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    if key.endswith("running_var"):
        return rng.uniform(0.8, 1.2, shape).astype(np.float32)
    if key.endswith("running_mean"):
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)
    if len(shape) <= 1:  # norm scales, biases, learnable level scales
        if key.endswith("bias"):
            return (0.05 * rng.standard_normal(shape)).astype(np.float32)
        return rng.uniform(0.6, 1.0, shape).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return (rng.standard_normal(shape) * np.sqrt(1.0 / fan_in)).astype(np.float32)


def weights(shapes: dict) -> dict:
    return {key: tensor(key, shape) for key, shape in shapes.items()}
