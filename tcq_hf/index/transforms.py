"""Vectors in, vectors that compare better or are shorter out: chains of steps, fitted to sets of rows.

A chain is applied here, goes in front of a FAISS index, or starts the projection of a model before training. None helps
everywhere: whitening halves the quality of a search among handwritten digits. FAISS and NumPy only.
"""

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from tqdm.auto import tqdm

from .code_index import LearnedIndex, check_vectors, faiss
from .faiss_index import index_codebooks
from .gpu_index import has_zero_centroids
from .tensor_files import load_tensors, save_tensors
from .transform_steps import FittedStep, Step, fit_step

_BLOCK_ROWS = 1 << 16
# Largest over median eigenvalue below which a spectrum is flat.
_FLAT = 1.05
# Largest error of a score of learned codes, and of the norm of a codeword.
_ERROR = 1e-5
_KIND = "chain"


@dataclass(frozen=True, eq=False)
class Chain:
    """Fitted steps, one behind the other; made by `fit_chain`.

    Args:
        steps: The steps, in the order in which a row takes them.
        input_dim: Width D of the rows that go in.
    """

    steps: tuple[FittedStep, ...]
    input_dim: int

    def __post_init__(self) -> None:
        width = self.input_dim
        for number, fitted in enumerate(self.steps):
            if fitted.weight is not None and fitted.weight.shape[1] != width:
                raise ValueError(f"step {number} takes rows of width {fitted.weight.shape[1]}, {width} comes in")
            width = width if fitted.weight is None else len(fitted.weight)

    @property
    def output_dim(self) -> int:
        """Width D' of what comes out."""
        maps = self._maps()
        return len(maps[-1].weight) if maps else self.input_dim

    @property
    def rotated(self) -> bool:
        """Whether the last map is a rotation, so that the variance is spread over all that comes out."""
        maps = self._maps()
        return bool(maps) and maps[-1].step.kind in ("opq", "rotation")

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Rows `[n, D]` transformed, float32 `[n, D']`.

        Raises:
            TypeError: If they are not floats.
            ValueError: If the width differs, or a row is not finite, naming it, or too long for float32.
        """
        x = check_vectors(x, self.input_dim, "x")
        transformed = np.empty((len(x), self.output_dim), np.float32)
        start = 0
        with np.errstate(over="ignore"):
            for block in self._blocks(x, "Transforming"):
                transformed[start : start + len(block)] = block
                start += len(block)
        fit = np.isfinite(transformed).all(axis=1)
        if not fit.all():
            raise ValueError(f"x must be short enough for float32, row {fit.argmin()} is not")
        return transformed

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight float32 `[D', D]` and bias float32 `[D']` of all steps but a first and a last `"l2"`.

        Where the chain begins with `"l2"` the map is one of rows of unit norm, else of rows as they are.

        Raises:
            ValueError: If an `"l2"` stands between two maps.
        """
        steps = list(self.steps)
        for end in (-1, 0):
            if steps and steps[end].weight is None:
                steps.pop(end)
        weight, bias = np.eye(self.input_dim), np.zeros(self.input_dim)
        for fitted in steps:
            if fitted.weight is None:
                raise ValueError(
                    "the chain has an 'l2' between other steps and is no linear map: leave that step out, or use the "
                    "chain in front of an index (export_index)"
                )
            weight, bias = fitted.weight @ weight, fitted.weight @ bias
            bias = bias if fitted.bias is None else bias + fitted.bias
        return weight.astype(np.float32), bias.astype(np.float32)

    def save(self, path: str | os.PathLike) -> None:
        """Write the chain as one safetensors file, whole or not at all."""
        tensors = {
            f"{number}.{name}": values
            for number, fitted in enumerate(self.steps)
            for name, values in vars(fitted).items()
            if isinstance(values, np.ndarray)
        }
        recipe = {"input_dim": self.input_dim, "steps": [asdict(fitted.step) for fitted in self.steps]}
        save_tensors(path, _KIND, tensors, chain=json.dumps(recipe))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Chain":
        """Read a chain that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or holds something else.
        """
        tensors, metadata = load_tensors(path, _KIND)
        try:
            recipe = json.loads(metadata["chain"])
            learned: list[dict[str, np.ndarray]] = [{} for _ in recipe["steps"]]
            for key, values in tensors.items():
                number, name = key.split(".")
                learned[int(number)][name] = values
            steps = zip(recipe["steps"], learned, strict=True)
            return cls(tuple(FittedStep(Step(**step), **arrays) for step, arrays in steps), recipe["input_dim"])
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"{_KIND} file {path} is damaged: {type(error).__name__}: {error}") from error

    def _maps(self) -> list[FittedStep]:
        return [fitted for fitted in self.steps if fitted.weight is not None]

    def _blocks(self, rows: np.ndarray, task: str) -> Iterator[np.ndarray]:
        """Transformed rows, block by block."""
        for start in tqdm(range(0, len(rows), _BLOCK_ROWS), desc=task, unit="block", delay=2):
            block = rows[start : start + _BLOCK_ROWS]
            for fitted in self.steps:
                block = fitted.apply(block)
            yield block


def fit_chain(steps: Iterable[Step], **sets: np.ndarray) -> Chain:
    """Fit steps one after the other, each to its set of rows after the steps before it.

    Args:
        steps: The steps in order, such as `twice_pca_whitening(64)`.
        **sets: Rows float `[n, D]` by the names in `fit_on`, such as `train=rows`.

    Raises:
        TypeError: If a set is not of floats.
        ValueError: If a step names a set that is not given, the widths differ, a row is not finite, or a set has too
            few rows or varies in fewer directions than `dim`.

    Warns:
        UserWarning: If the PCA behind a whitening finds no direction in which its set varies more than that of the
            whitening: both are one set, and the two steps are an ordinary whitening.
    """
    steps = tuple(steps)
    if not sets:
        raise ValueError("give the rows to fit to by the name in fit_on: fit_chain(steps, train=rows)")
    shapes = {name: np.shape(given) for name, given in sets.items()}
    if any(len(shape) != 2 or not all(shape) for shape in shapes.values()):
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"each set must be rows [n, D], got {listed}")
    width = next(iter(shapes.values()))[1]
    rows = {name: check_vectors(given, width, name) for name, given in sets.items()}
    for step in steps:
        if step.kind not in ("l2", "rotation") and step.fit_on not in rows:
            raise ValueError(
                f"the step {step.kind!r} is fitted on {step.fit_on!r}, but the sets given are {', '.join(rows)}; "
                f"pass {step.fit_on}=rows"
            )
    chain = Chain((), width)
    for step in steps:
        given = rows.get(step.fit_on, np.empty((0, width), np.float32))
        fitted = fit_step(step, chain.output_dim, len(given), lambda task, to=chain, of=given: to._blocks(of, task))
        if step.kind == "pca" and chain.steps and chain.steps[-1].step.kind == "pca-whitening":
            _warn_if_flat(fitted, chain.steps[-1].step.fit_on)
        chain = Chain((*chain.steps, fitted), width)
    return chain


def twice_pca_whitening(dim: int) -> tuple[Step, ...]:
    """Steps of twice-PCA-whitening (Zhang et al., IEEE TNNLS 2025), for the sets `auxiliary` and `gallery`.

    The auxiliary set is whitened in all its directions; of what varies most in the gallery then, `dim` directions are
    kept: those in which the gallery varies more than the auxiliary set. It helps where what disturbs the search varies
    in both and what is searched for in the gallery alone. Where both vary in that too it is just what is lost, and no
    spectrum tells: compare on labelled rows. Put `Step("l2")` in front for rows of unequal lengths.

    Args:
        dim: Width that comes out.
    """
    return (Step("pca-whitening", fit_on="auxiliary"), Step("pca", dim, fit_on="gallery"), Step("l2"))


def export_index(chain: Chain, inner: faiss.Index) -> faiss.IndexPreTransform:
    """A FAISS index that transforms rows and queries by the chain and leaves the rest to `inner`.

    It keeps `inner` in memory. Where `inner` is on a GPU the chain stays on the CPU; FAISS cannot move a chain with
    `"l2"`: move the inner index, with `to_gpu` or `from_gpu`, and wrap it anew.

    Args:
        chain: From `fit_chain`.
        inner: A FAISS index of the width that comes out, on CPU or GPU. Rows that it holds count as transformed.

    Returns:
        The index, for `dataset.add_faiss_index(column, custom_index=...)` and `faiss.write_index`.

    Raises:
        TypeError: If `chain` is not fitted or `inner` no FAISS index.
        ValueError: If the widths differ, or `inner` holds learned codebooks and the chain does not leave embeddings as
            they are: codes and scores would no longer be those of the model. (An index on a GPU hides its codebooks.)
    """
    if not isinstance(chain, Chain):
        raise TypeError(f"chain must come from fit_chain(steps, ...), got {type(chain).__name__}")
    if not isinstance(inner, faiss.Index):
        raise TypeError(f"inner must be a FAISS index, got {type(inner).__name__}")
    if inner.d != chain.output_dim:
        raise ValueError(f"the chain gives vectors of width {chain.output_dim}, the inner index takes {inner.d}")
    num_codebooks = _learned_codebooks(inner)
    if num_codebooks and not all(_keeps_embeddings(fitted, num_codebooks) for fitted in chain.steps):
        raise ValueError(
            "inner holds learned codebooks, which are those of the model's own embeddings: start the projection from "
            "the chain before training, model.initialize(features, transform=chain), or learn codebooks of the "
            "transformed vectors: export_index(chain, faiss.IndexPQ(...)), then train"
        )
    outer = faiss.IndexPreTransform(inner)
    for fitted in reversed(chain.steps):
        outer.prepend_transform(fitted.to_faiss(outer.d))
    if not chain.steps:
        # Behind an empty chain FAISS would train `inner` anew, learned codebooks and all.
        outer.prepend_transform(faiss.RemapDimensionsTransform(inner.d, inner.d, False))
    return outer


def _warn_if_flat(fitted: FittedStep, whitened: str) -> None:
    # Of rows that were whitened by themselves no variance is above 1: one direction alone is no flat spectrum.
    largest = float(fitted.eigenvalues.max())
    ratio = largest / float(np.median(fitted.eigenvalues))
    if max(ratio, largest) < _FLAT:
        warnings.warn(
            f"whitened on {whitened!r}, the rows of {fitted.step.fit_on!r} vary alike in all directions (largest / "
            f"median eigenvalue {ratio:.3f}): the two sets are one or alike, and the chain is an ordinary whitening; "
            "whiten on another set",
            UserWarning,
            stacklevel=3,
        )


def _learned_codebooks(index: faiss.Index) -> int:
    """Number of learned codebooks in an index of ours, or in one that FAISS read from its file; 0 for any other."""
    while isinstance(index, (faiss.IndexPreTransform, faiss.IndexIDMap)):
        index = faiss.downcast_index(index.index)
    if isinstance(index, (faiss.IndexShards, faiss.IndexReplicas)):
        return max((_learned_codebooks(faiss.downcast_index(index.at(n))) for n in range(index.count())), default=0)
    if isinstance(index, faiss.IndexRefine) and index_codebooks(index) is None:
        return _learned_codebooks(faiss.downcast_index(index.base_index))
    codebooks = index_codebooks(index)
    if codebooks is None:
        return 0
    norms = np.linalg.norm(codebooks, axis=-1)
    # Those that FAISS learns are means of rows, and not of unit norm.
    if not isinstance(index, LearnedIndex) and not has_zero_centroids(index) and np.abs(norms - 1).max() > _ERROR:
        return 0
    # In the form for a GPU a codebook may be two of the model's, or none.
    return round(float((norms[:, 0] ** 2).sum()))


def _keeps_embeddings(fitted: FittedStep, num_codebooks: int) -> bool:
    """Whether no score of an embedding, M unit sub-vectors, with a code moves by more than rounding."""
    if fitted.weight is None:
        return num_codebooks == 1  # else all scores are divided by the root of M
    if fitted.weight.shape[0] != fitted.weight.shape[1]:
        return False
    # Embeddings and reconstructions have norm sqrt(M).
    length = math.sqrt(num_codebooks)
    moved = float(np.linalg.norm(fitted.weight - np.eye(len(fitted.weight)))) * length
    moved += 0.0 if fitted.bias is None else float(np.linalg.norm(fitted.bias))
    return moved * length <= _ERROR
