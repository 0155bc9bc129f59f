"""One step of a chain of transforms: what it is, how it is fitted to rows, applied, and made a FAISS transform.

FAISS and NumPy only.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from tqdm.auto import tqdm

from .code_index import faiss

Kind = Literal["l2", "pca", "pca-whitening", "opq", "rotation"]
# What is being done in, the rows, block by block, out: float32 `[n, D]`.
Blocks = Callable[[str], Iterable[np.ndarray]]

_EPS = float(np.finfo(np.float32).eps)
_EPSILON = 1e-5
# Words of a codebook of OPQ, and rows that FAISS learns it from at most.
_OPQ_WORDS, _OPQ_ROWS = 256, 1 << 16


@dataclass(frozen=True)
class Step:
    """One step of a chain.

    Args:
        kind: `"l2"` scales rows to unit norm and leaves a row of zeros. `"pca"` centres and keeps the directions of
            largest variance. `"pca-whitening"` also divides each by the root of its variance plus `epsilon`. `"opq"` is
            the rotation that FAISS learns for a product quantizer of 8-bit codebooks, `"rotation"` a random one.
        dim: Width that comes out; None for that which goes in. Only a rotation may go beyond it, and then keeps all
            distances.
        fit_on: Name of the set of rows that the step is fitted to; `"l2"` and `"rotation"` need none.
        epsilon: What whitening adds to a variance: an eigenvalue of the covariance, divided by n.
        num_codebooks: Codebooks of the product quantizer that OPQ serves.
        seed: Of the rotation, or of the k-means inside OPQ.

    Raises:
        ValueError: If the kind is unknown, or dim, epsilon or num_codebooks out of its range or of no use to the kind.
    """

    kind: Kind
    dim: int | None = None
    fit_on: str = "train"
    epsilon: float = _EPSILON
    num_codebooks: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.dim is not None and (self.kind == "l2" or self.dim < 1):
            raise ValueError(f"dim must be at least 1, and unset for 'l2', got {self.dim} for {self.kind!r}")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon must be a number of at least 0, got {self.epsilon}")
        if self.epsilon != _EPSILON and self.kind != "pca-whitening":
            raise ValueError(f"epsilon is for 'pca-whitening' alone, got {self.epsilon} for {self.kind!r}")
        if (self.kind == "opq") != (self.num_codebooks is not None):
            raise ValueError(f"num_codebooks must be set for 'opq' alone, got {self.num_codebooks} for {self.kind!r}")
        if self.num_codebooks is not None and self.num_codebooks < 1:
            raise ValueError(f"num_codebooks must be at least 1, got {self.num_codebooks}")


@dataclass(frozen=True, eq=False)
class FittedStep:
    """A step and what it learned: `y = weight x + bias`, or for `"l2"` nothing.

    Args:
        step: The step.
        weight: float32 `[D', D]`; None for `"l2"`.
        bias: float32 `[D']`; None for a rotation.
        mean: float32 `[D]`, of the rows that a PCA was fitted to.
        eigenvalues: float32 `[D']`, variances of those rows along the directions of a PCA, largest first.
    """

    step: Step
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    mean: np.ndarray | None = None
    eigenvalues: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.weight is None) != (self.step.kind == "l2"):
            raise ValueError(f"a step has a weight unless it is 'l2', this {self.step.kind!r} is the other way round")
        for name in ("weight", "bias", "mean", "eigenvalues"):
            values = getattr(self, name)
            if values is not None and (values.dtype != np.float32 or not np.isfinite(values).all()):
                raise ValueError(f"{name} of a step must be finite float32, got {values.dtype}")
        if self.weight is None:
            return
        if self.step.kind.startswith("pca") and any(each is None for each in (self.bias, self.mean, self.eigenvalues)):
            raise ValueError(f"a step of kind {self.step.kind!r} has a bias, a mean and eigenvalues")
        given, taken = self.weight.shape if self.weight.ndim == 2 else (None, None)
        shapes = {"weight": (given, taken), "bias": (given,), "mean": (taken,), "eigenvalues": (given,)}
        for name, shape in shapes.items():
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise ValueError(f"{name} of a step has a shape that does not fit its weight, {list(values.shape)}")

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Rows float32 `[n, D]` transformed, float32 `[n, D']`.

        Raises:
            ValueError: If `"l2"` meets a row whose length float32 cannot hold; FAISS would make it zeros.
        """
        if self.weight is not None:
            return rows @ self.weight.T if self.bias is None else rows @ self.weight.T + self.bias
        with np.errstate(over="ignore"):
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not np.isfinite(lengths).all():
            raise ValueError(f"a row is too long for float32, with values up to {np.abs(rows).max():.3g}; scale them")
        return rows / np.where(lengths > 0, lengths, np.float32(1))

    def to_faiss(self, width: int) -> faiss.VectorTransform:
        """The step as FAISS has it; `width` is what comes out."""
        if self.weight is None:
            return faiss.NormalizationTransform(width, 2.0)
        step, before = self.step, self.weight.shape[1]
        if step.kind == "opq":
            transform = faiss.OPQMatrix(before, step.num_codebooks, width)
        elif step.kind == "rotation":
            transform = faiss.RandomRotationMatrix(before, width)
        else:
            whitens = step.kind == "pca-whitening"
            transform = faiss.PCAMatrix(before, width, -0.5 if whitens else 0.0, False)
            transform.epsilon = step.epsilon
            scale = np.sqrt(self.eigenvalues + np.float32(step.epsilon)) if whitens else np.ones(width, np.float32)
            _copy(self.mean, transform.mean)
            _copy(self.eigenvalues, transform.eigenvalues)
            _copy(self.weight * scale[:, None], transform.PCAMat)
        _copy(self.weight, transform.A)
        transform.have_bias = self.bias is not None
        if self.bias is not None:
            _copy(self.bias, transform.b)
        transform.set_is_orthonormal()
        transform.is_trained = True
        return transform


def fit_step(step: Step, width: int, count: int, blocks: Blocks) -> FittedStep:
    """Fit a step to rows.

    Args:
        step: The step.
        width: Width D of the rows.
        count: Their number n; 0 for a step that needs none.
        blocks: Gives the rows each time that it is called.

    Raises:
        ValueError: If `dim` is more than the rows have, or there are too few of them.
    """
    if step.kind == "l2":
        return FittedStep(step)
    if step.kind == "rotation":
        rotation = faiss.RandomRotationMatrix(width, step.dim or width)
        rotation.init(step.seed)
        return FittedStep(step, _matrix(rotation))
    if (step.dim or 1) > width:
        raise ValueError(f"dim of {step.kind!r} must be from 1 to {width}, the width that goes in, got {step.dim}")
    return (_fit_opq if step.kind == "opq" else _fit_pca)(step, width, count, blocks)


def _fit_pca(step: Step, width: int, count: int, blocks: Blocks) -> FittedStep:
    mean, covariance, rounding = _moments(width, count, blocks)
    variances, directions = np.linalg.eigh(covariance)
    variances, directions = np.maximum(variances[::-1], 0), directions[:, ::-1].T
    rank = int((variances > rounding).sum())
    if rank < (step.dim or 1):
        raise ValueError(
            f"{step.kind!r} asks for dim={step.dim or 1} directions, but the {count} rows of {step.fit_on!r} vary in "
            f"{rank} only; pass more rows or a smaller dim"
        )
    if step.kind == "pca-whitening" and rank < width and step.dim is None and (count <= width or not step.epsilon):
        raise ValueError(
            f"whitening in all {width} directions needs more than {width} rows that vary in all of them, or an epsilon "
            f"above 0 where more rows do not; {step.fit_on!r} has {count} rows that vary in {rank}: set dim"
        )
    directions, variances = directions[: step.dim], variances[: step.dim]
    # The sign of an eigenvector is arbitrary: fix it, so that one set gives one map on every machine.
    largest = np.abs(directions).argmax(axis=1)[:, None]
    weight = directions * np.sign(np.take_along_axis(directions, largest, axis=1))
    if step.kind == "pca-whitening":
        weight = weight / np.sqrt(variances + step.epsilon)[:, None]
    return FittedStep(step, *(each.astype(np.float32) for each in (weight, -weight @ mean, mean, variances)))


def _moments(width: int, count: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and covariance of rows, float64, and the variance that rounding them to float32 may have made."""
    mean, covariance, square = np.zeros(width), np.zeros((width, width)), 0.0
    for block in blocks("Mean"):
        mean += block.sum(axis=0, dtype=np.float64) / count
    for block in blocks("Covariance"):
        centred = block - mean
        covariance += centred.T @ centred / count
        square += float(np.square(block, dtype=np.float64).sum()) / count
    return mean, covariance, width * _EPS**2 * square


def _fit_opq(step: Step, width: int, count: int, blocks: Blocks) -> FittedStep:
    dim, books = step.dim or width, step.num_codebooks
    if dim % books:
        raise ValueError(f"the width that comes out of 'opq', {dim}, must be a multiple of num_codebooks={books}")
    # FAISS would write beyond its memory where there are fewer rows than features.
    needed = max(width, _OPQ_WORDS)
    if count < needed:
        raise ValueError(f"'opq' needs at least {needed} rows at width {width}, {step.fit_on!r} has {count}")
    rotation, quantizer = faiss.OPQMatrix(width, books, dim), faiss.ProductQuantizer(dim, books, 8)
    quantizer.cp.seed, quantizer.cp.min_points_per_centroid = step.seed, 1
    rotation.pq = quantizer
    rows = np.concatenate([block[:: -(-count // _OPQ_ROWS)] for block in blocks("Rows for OPQ")])
    rounds, rotation.niter = rotation.niter, 1
    for _ in tqdm(range(rounds), desc="OPQ", unit="round", delay=2):
        rotation.train(rows)
        rotation.niter_pq_0 = rotation.niter_pq  # a round goes on from the one before, as inside one call
    return FittedStep(step, _matrix(rotation))


def _matrix(transform: faiss.LinearTransform) -> np.ndarray:
    return faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)


def _copy(values: np.ndarray, vector: faiss.Float32Vector) -> None:
    faiss.copy_array_to_vector(np.ascontiguousarray(values, np.float32).ravel(), vector)
