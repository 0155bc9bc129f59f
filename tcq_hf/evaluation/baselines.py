"""What a user would pick instead, on the same vectors: features in, what each search compares out.

Every baseline learns from the features `train` alone and gives `(queries, database)`, float32 vectors whose inner
product is its score: `evaluate(*pq(queries, database, train, bits=32), query_labels, database_labels)`. All scale the
features to unit norm first, and refuse with a ValueError any that do not fit together or are not finite.

In an index, signs are codes of one bit a codebook and go into one as learned codes do,
`build_index(np.tile([[[-1.0], [1.0]]], (bits, 1, 1)), (database > 0).astype("uint8"))`, asked with those of queries. PQ
is `faiss.IndexPQ(F, bits // 8, 8, faiss.METRIC_INNER_PRODUCT)`, trained on, filled and asked with features of unit
norm, and OPQ the same behind `faiss.OPQMatrix(F, bits // 8)`.
"""

import faiss
import numpy as np

from tcq_hf.rerank.graph import KNNGraph

# Selection of random projections: neighbours that count, rows looked at, largest correlation of two bits.
_NEIGHBOURS, _SELECTION_ROWS, _MAX_CORRELATION = 5, 5000, 0.6


def float_cosine(
    queries: np.ndarray, database: np.ndarray, train: np.ndarray, centre: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Uncompressed features of unit norm: what codes are measured against.

    Args:
        queries: Float `[Q, F]`.
        database: Float `[N, F]`.
        train: Float `[T, F]`.
        centre: Subtract the mean of `train` first.

    Returns:
        Queries `[Q, F]` and database `[N, F]`.
    """
    _check(queries, database, train)
    mean = train.mean(axis=0) if centre else 0.0
    return _unit(queries - mean), _unit(database - mean)


def pq(
    queries: np.ndarray,
    database: np.ndarray,
    train: np.ndarray,
    bits: int,
    codebook_bits: int = 8,
    centre: bool = False,
    seed: int = 1234,
) -> tuple[np.ndarray, np.ndarray]:
    """FAISS product quantization.

    Args:
        queries: Float `[Q, F]`.
        database: Float `[N, F]`.
        train: Float `[T, F]`, at least as many rows as codewords.
        bits: Bits of a code.
        codebook_bits: Bits of a sub-code; each codebook has 2^`codebook_bits` codewords.
        centre: Subtract the mean of `train` first.
        seed: Seed of FAISS's k-means; 1234 is FAISS's own.

    Returns:
        Queries `[Q, F]` and the database as its codes restore it `[N, F]`; F filled up to a multiple of the codebooks.
    """
    queries, database, train = _prepare(queries, database, train, bits, codebook_bits, centre)
    return queries, _quantize(database, train, bits, codebook_bits, seed)


def opq(
    queries: np.ndarray,
    database: np.ndarray,
    train: np.ndarray,
    bits: int,
    codebook_bits: int = 8,
    centre: bool = False,
    seed: int = 1234,
) -> tuple[np.ndarray, np.ndarray]:
    """FAISS product quantization after the rotation that FAISS learns for it; arguments and result as those of `pq`.

    Raises:
        ValueError: Also if `train` has fewer rows than features.
    """
    queries, database, train = _prepare(queries, database, train, bits, codebook_bits, centre)
    if len(train) < train.shape[1]:  # FAISS would write beyond its memory
        raise ValueError(f"train must have at least {train.shape[1]} rows, one for each feature, got {len(train)}")
    rotation = faiss.OPQMatrix(train.shape[1], bits // codebook_bits)
    # The rotation leaves its quantizer at four k-means rounds, so the codes get another.
    quantizer = _quantizer(train.shape[1], bits, codebook_bits, seed)
    rotation.pq = quantizer
    rotation.train(train)
    queries, database, train = (rotation.apply(vectors) for vectors in (queries, database, train))
    return queries, _quantize(database, train, bits, codebook_bits, seed)


def itq(
    queries: np.ndarray, database: np.ndarray, train: np.ndarray, bits: int, seed: int = 123
) -> tuple[np.ndarray, np.ndarray]:
    """FAISS iterative quantization: signs of the first principal components, centred, after a rotation learnt for them.

    Args:
        queries: Float `[Q, F]`.
        database: Float `[N, F]`.
        train: Float `[T, F]`.
        bits: Bits of a code, at most F.
        seed: Seed of the first rotation; 123 is FAISS's own.

    Returns:
        Signs -1 and 1 of queries `[Q, bits]` and database `[N, bits]`; inner product = bits - 2 Hamming distance.
    """
    _check(queries, database, train)
    queries, database, train = (_unit(vectors) for vectors in (queries, database, train))
    if not 1 <= bits <= min(train.shape):
        raise ValueError(
            f"bits must be from 1 to {min(train.shape)}, the principal components of train {train.shape}, got {bits}"
        )
    transform = faiss.ITQTransform(train.shape[1], bits, True)
    transform.itq.seed = seed
    transform.max_train_per_dim = len(train)  # all of them; FAISS takes ten a dimension
    transform.train(train)
    return _signs(transform.apply(queries)), _signs(transform.apply(database))


def random_projections(
    queries: np.ndarray, database: np.ndarray, train: np.ndarray, bits: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Signs of orthonormal random projections of features centred on `train`.

    Args:
        queries: Float `[Q, F]`.
        database: Float `[N, F]`.
        train: Float `[T, F]`.
        bits: Bits of a code; beyond F the projections are no longer orthogonal.
        seed: Seed of the projections.

    Returns:
        Signs -1 and 1 of queries `[Q, bits]` and database `[N, bits]`; inner product = bits - 2 Hamming distance.
    """
    _check(queries, database, train)
    if bits < 1:
        raise ValueError(f"bits must be at least 1, got {bits}")
    queries, database, train = (_unit(vectors) for vectors in (queries, database, train))
    projections = faiss.RandomRotationMatrix(train.shape[1], bits)
    projections.init(seed)
    mean = train.mean(axis=0)
    return _signs(projections.apply(queries - mean)), _signs(projections.apply(database - mean))


def selected_projections(
    queries: np.ndarray, database: np.ndarray, train: np.ndarray, bits: int, seed: int = 0, pool: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """Signs of those random projections that keep neighbours together, after Fakhr et al. (NCAA 2018).

    A projection scores the probability that its bit is the same for two of the five nearest neighbours in `train`, less
    that of any two rows. Projections are taken by score as long as the signs correlate below 0.6 with those of each one
    taken before; where the pool has too few of these, the best of the others follow. The projections of the pool are
    independent: many bits of few directions can do worse than the orthonormal ones of `random_projections`.

    Args:
        queries: Float `[Q, F]`.
        database: Float `[N, F]`.
        train: Float `[T, F]`, more than five rows; 5,000 drawn by `seed` are used.
        bits: Bits of a code.
        seed: Seed of projections and draws.
        pool: Projections to choose from, at least `bits`.

    Returns:
        Signs -1 and 1 of queries `[Q, bits]` and database `[N, bits]`; inner product = bits - 2 Hamming distance.
    """
    _check(queries, database, train)
    if not 1 <= bits <= pool:
        raise ValueError(f"bits must be from 1 to {pool}, the projections to choose from, got {bits}")
    if len(train) <= _NEIGHBOURS:
        raise ValueError(f"train must have more than {_NEIGHBOURS} rows, whose neighbours are kept, got {len(train)}")
    queries, database, train = (_unit(vectors) for vectors in (queries, database, train))
    generator = np.random.default_rng(seed)
    projections = generator.standard_normal((train.shape[1], pool)).astype(np.float32)
    mean = train.mean(axis=0)
    sample = train[generator.permutation(len(train))[:_SELECTION_ROWS]] - mean
    chosen = projections[:, _select(_signs(sample @ projections), _neighbour_pairs(sample), bits, generator)]
    return _signs((queries - mean) @ chosen), _signs((database - mean) @ chosen)


def _neighbour_pairs(rows: np.ndarray) -> np.ndarray:
    """Each row with each of its five nearest neighbours by cosine, int64 `[5 n, 2]`."""
    neighbours = KNNGraph.build(rows, _NEIGHBOURS).neighbours
    return np.stack([np.repeat(np.arange(len(rows)), _NEIGHBOURS), neighbours.ravel()], axis=1)


def _select(signs: np.ndarray, pairs: np.ndarray, bits: int, generator: np.random.Generator) -> list[int]:
    """Columns of `signs` `[n, pool]`, best first."""
    random = generator.integers(len(signs), size=(len(pairs), 2))
    bits_set = signs > 0  # a quarter of the memory
    near, far = ((bits_set[some[:, 0]] == bits_set[some[:, 1]]).mean(axis=0) for some in (pairs, random))
    order = np.argsort(far - near, kind="stable")
    taken: list[int] = []
    for bit in order.tolist():
        if len(taken) == bits:
            return taken
        if not taken or np.abs(signs[:, bit] @ signs[:, taken] / len(signs)).max() < _MAX_CORRELATION:
            taken.append(bit)
    return [*taken, *(bit for bit in order.tolist() if bit not in taken)][:bits]


def float_scores(queries: np.ndarray, database: np.ndarray, centre: bool = False) -> np.ndarray:
    """Scores `[Q, N]` of `float_cosine`, centred on the database where asked; larger is closer."""
    queries, database = float_cosine(queries, database, database, centre)
    return queries @ database.T


def pq_scores(
    queries: np.ndarray,
    database: np.ndarray,
    num_codebooks: int,
    num_bits: int = 8,
    centre: bool = False,
    seed: int = 1234,
) -> np.ndarray:
    """Scores `[Q, N]` of `pq` with `num_codebooks` x `num_bits` bits, trained on the database; larger is closer."""
    queries, database = pq(queries, database, database, num_codebooks * num_bits, num_bits, centre, seed)
    return queries @ database.T


def _prepare(
    queries: np.ndarray, database: np.ndarray, train: np.ndarray, bits: int, codebook_bits: int, centre: bool
) -> list[np.ndarray]:
    """The three sets of features at unit norm and a width that the codebooks divide."""
    if bits < 1 or codebook_bits < 1 or bits % codebook_bits:
        raise ValueError(f"bits must be a multiple of codebook_bits, got {bits} and {codebook_bits}")
    _check(queries, database, train)
    if len(train) < 2**codebook_bits:
        raise ValueError(f"train must have at least {2**codebook_bits} rows, one for each codeword, got {len(train)}")
    mean = train.mean(axis=0) if centre else 0.0
    # Zeros at the end change no inner product and make any width a multiple of the codebooks.
    padding = ((0, 0), (0, -train.shape[1] % (bits // codebook_bits)))
    return [np.pad(_unit(vectors - mean), padding) for vectors in (queries, database, train)]


def _quantize(database: np.ndarray, train: np.ndarray, bits: int, codebook_bits: int, seed: int) -> np.ndarray:
    quantizer = _quantizer(train.shape[1], bits, codebook_bits, seed)
    quantizer.train(train)
    return quantizer.decode(quantizer.compute_codes(database))


def _quantizer(width: int, bits: int, codebook_bits: int, seed: int) -> faiss.ProductQuantizer:
    quantizer = faiss.ProductQuantizer(width, bits // codebook_bits, codebook_bits)
    quantizer.cp.seed = seed
    quantizer.cp.min_points_per_centroid = 1
    return quantizer


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _signs(vectors: np.ndarray) -> np.ndarray:
    return np.where(vectors < 0, np.float32(-1), np.float32(1))


def _check(queries: np.ndarray, database: np.ndarray, train: np.ndarray) -> None:
    shapes = [np.shape(vectors) for vectors in (queries, database, train)]
    if any(len(shape) != 2 or not all(shape) or shape[1] != shapes[0][1] for shape in shapes):
        listed = ", ".join(map(str, shapes))
        raise ValueError(f"queries, database and train must be features [n, F] of one width F, got {listed}")
    for name, features in (("queries", queries), ("database", database), ("train", train)):
        with np.errstate(over="ignore"):
            fit = np.isfinite(np.linalg.norm(np.asarray(features, np.float32), axis=1))
        if not fit.all():
            raise ValueError(f"{name} must be finite and shorter than 1e19, row {fit.argmin()} is not")
