"""Benches of the published systems: handwritten digits."""

import numpy as np
import pytest
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels of 1,797 digits at unit norm, float32 `[1797, 64]`, and what they are."""
    found = load_digits()
    pixels = found.data.astype(np.float32)
    return pixels / np.linalg.norm(pixels, axis=1, keepdims=True), found.target
