"""An index on the CPU in, the same on one GPU or several out, and back. FAISS and NumPy only.

FAISS has no flat product quantizer on a GPU. What it has takes any codes in the form of `zero_coarse_index`, and shapes
that its kernels refuse are carried over without loss: codebooks of 2, 4 or 16 words are joined until a byte is full,
those of other sizes are filled with their first word, and codebooks of zeros fill up their number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .code_index import CodeIndex, check_codebooks, codebooks_of
from .fast_index import FastIndex
from .stored_codes import behind_lists, faiss, listed_codes, unpack_codes

# Sub-quantizer counts for which faiss-gpu has a kernel whose float32 tables fit into shared memory.
_GPU_NUM_CODEBOOKS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)
# Blocks that a large GPU runs at once: its multiprocessors, 108 to 144 since 2020.
_GPU_BLOCKS = 128
_BLOCK_ROWS = 1 << 20


def zero_coarse_index(index: CodeIndex | FastIndex, num_lists: int = 128, num_shards: int = 1) -> faiss.Index:
    """The same codes as an IVFPQ index with equal zero centroids, all of them probed: the form that a GPU takes.

    The residual to a zero centroid is the vector itself, so scores are those of the flat index. Rows are dealt round
    robin over the lists, so that a GPU scans one query with many blocks. A query is filled with zeros where codebooks
    were.

    Args:
        index: An index from `build_index`.
        num_lists: Lists L, from 1 to 2048.
        num_shards: Into how many parts FAISS will split it; each then has rows in all lists.

    Raises:
        ValueError: If there are more codebooks than any GPU takes, or `num_lists` is out of its range.
    """
    _check_lists(num_lists)
    exact = _exact(index)
    books = gpu_codebooks(codebooks_of(exact))
    count, _, sub_dim = books.shape
    coarse = faiss.IndexFlat(count * sub_dim, faiss.METRIC_INNER_PRODUCT)
    coarse.add(np.zeros((num_lists, count * sub_dim), dtype=np.float32))
    inverted = faiss.IndexIVFPQ(coarse, coarse.d, num_lists, count, 8, faiss.METRIC_INNER_PRODUCT)
    inverted.own_fields = True
    coarse.this.disown()  # the inverted index frees its quantizer
    faiss.copy_array_to_vector(books.ravel(), inverted.pq.centroids)
    inverted.is_trained = True
    inverted.nprobe = num_lists
    for start in tqdm(range(0, exact.ntotal, _BLOCK_ROWS), desc="Rows into lists", delay=2):
        codes = gpu_codes(exact.codes_array(start, start + _BLOCK_ROWS), exact.pq.nbits, count)
        rows = np.arange(start, start + len(codes), dtype=np.int64)
        # FAISS splits by row % num_shards.
        inverted.add_sa_codes(behind_lists(inverted, rows // num_shards % num_lists, codes), rows)
    if inverted.d == exact.d:
        return inverted
    filled = faiss.RemapDimensionsTransform(exact.d, inverted.d, False)
    outer = faiss.IndexPreTransform(filled, inverted)
    outer.own_fields = True
    filled.this.disown()
    inverted.this.disown()
    return outer


def has_zero_centroids(index: faiss.Index) -> bool:
    """Whether an index has the form of `zero_coarse_index`, in which FAISS learns none."""
    if not isinstance(index, faiss.IndexIVFPQ) or not index.by_residual:
        return False
    coarse = faiss.downcast_index(index.quantizer)
    return isinstance(coarse, faiss.IndexFlat) and not coarse.reconstruct_n(0, coarse.ntotal).any()


def flat_index(moved: faiss.Index, codebooks: Any) -> CodeIndex:
    """The index that `zero_coarse_index` was made of.

    Args:
        moved: What `zero_coarse_index` gave, on the CPU.
        codebooks: Codebooks `[M, K, d]`, or the model.

    Raises:
        ValueError: If it holds other codebooks, or rows with numbers of their own.
    """
    codebooks = check_codebooks(codebooks)
    books, inverted = gpu_codebooks(codebooks), faiss.downcast_index(moved)
    if isinstance(inverted, faiss.IndexPreTransform):
        inverted = faiss.downcast_index(inverted.index)
    if not isinstance(inverted, faiss.IndexIVFPQ):
        raise ValueError(f"expected an index from to_gpu or zero_coarse_index, got {type(inverted).__name__}")
    found = faiss.vector_to_array(inverted.pq.centroids)
    if found.size != books.size or not np.abs(found - books.ravel()).max() <= 1e-5:
        raise ValueError("the index belongs to another model: its codebooks are not those of this one")
    stored = listed_codes(inverted)
    num_bits = codebooks.shape[1].bit_length() - 1
    joined = _joined(num_bits)
    codes = unpack_codes(stored, joined * len(books), num_bits if joined > 1 else 8)
    index = CodeIndex.of(codebooks)
    index.add_codes(codes[:, : len(codebooks)])
    return index


def gpu_codebooks(codebooks: np.ndarray) -> np.ndarray:
    """Codebooks float32 `[M, K, d]` in a shape that GPUs take: 256 words each, in a number that has a kernel.

    Raises:
        ValueError: If even joined there are more than 48.
    """
    num_bits = codebooks.shape[1].bit_length() - 1
    joined = _joined(num_bits)
    books = _with_zeros(codebooks, -(-len(codebooks) // joined) * joined)
    byte = np.arange(256)
    if joined > 1:
        words = [books[part::joined][:, byte >> num_bits * part & (1 << num_bits) - 1] for part in range(joined)]
        books = np.concatenate(words, axis=2)
    else:
        books = books[:, np.where(byte < codebooks.shape[1], byte, 0)]
    allowed = [count for count in _GPU_NUM_CODEBOOKS if count >= len(books)]
    if not allowed:
        raise ValueError(f"FAISS on a GPU takes up to 48 codebooks of 256 words, got {len(books)}; search on the CPU")
    return np.ascontiguousarray(_with_zeros(books, allowed[0]))


def gpu_codes(codes: np.ndarray, num_bits: int, count: int) -> np.ndarray:
    """Codes uint8 `[n, M]` for `gpu_codebooks`: uint8 `[n, count]`."""
    joined, found = _joined(num_bits), np.zeros((len(codes), count), np.uint8)
    for book, column in enumerate(codes.T):
        found[:, book // joined] |= column << np.uint8(num_bits * (book % joined))
    return found


def to_gpu(
    index: CodeIndex | FastIndex, device: int | Sequence[int] = 0, queries: int = 1, num_lists: int | None = None
) -> Any:
    """Copy an index onto a GPU, with the scores of the CPU index.

    Args:
        index: An index from `build_index`; the exact codes of a fast one are copied.
        device: Number of the GPU, or of several: each then holds a part of the rows.
        queries: How many queries come at a time.
        num_lists: See `zero_coarse_index`; by default as many as keep a large GPU busy with so many queries.

    Returns:
        A FAISS index on the GPU, ready for `dataset.add_faiss_index(custom_index=...)`. It answers k up to 2048 and
        ignores an IDSelector.

    Raises:
        RuntimeError: If FAISS has no GPU support here or sees no such GPU.
        ValueError: If an argument is out of its range or there are too many codebooks.
    """
    devices = [device] if isinstance(device, int) else list(device)
    if not devices:
        raise ValueError("device must name a GPU or several, got none")
    rows = index.ntotal // len(devices)  # of each GPU
    num_lists = lists_for(rows, queries) if num_lists is None else _check_lists(num_lists)
    gpu_codebooks(codebooks_of(_exact(index)))  # refuses what no GPU takes
    _need_gpu_faiss()
    for number in devices:
        if not 0 <= number < faiss.get_num_gpus():
            raise RuntimeError(f"device={number}, but FAISS sees {faiss.get_num_gpus()} GPUs")
    options = faiss.GpuMultipleClonerOptions()
    options.indicesOptions = faiss.INDICES_32_BIT if index.ntotal < 1 << 31 else faiss.INDICES_64_BIT
    moved = zero_coarse_index(index, num_lists, len(devices))
    if len(devices) == 1:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), devices[0], moved, options)
    options.shard = True
    return faiss.index_cpu_to_gpu_multiple_py([faiss.StandardGpuResources() for _ in devices], moved, options, devices)


def from_gpu(index: Any, codebooks: Any) -> CodeIndex:
    """Copy an index of `to_gpu` back, to save it or to change its rows.

    Args:
        index: What `to_gpu` gave.
        codebooks: Codebooks `[M, K, d]`, or the model.

    Raises:
        RuntimeError: If FAISS has no GPU support here.
        ValueError: If it holds other codebooks.
    """
    _need_gpu_faiss()
    return flat_index(faiss.index_gpu_to_cpu(index), codebooks)


def lists_for(rows: int, queries: int) -> int:
    """Lists that keep a large GPU busy: each pair of a query and a list is one block of threads.

    Raises:
        ValueError: If `queries` is below 1.
    """
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    # Tables and results grow with the lists: no more than fill the GPU, and none of under a thousand rows.
    wanted = min(max(8, -(-_GPU_BLOCKS // queries)), max(1, rows // 1024))
    return 1 << (wanted.bit_length() - 1)


def _exact(index: CodeIndex | FastIndex) -> CodeIndex:
    exact = index.exact if isinstance(index, FastIndex) else index
    if not isinstance(exact, CodeIndex):
        raise TypeError(f"expected an exact or a fast index from build_index, got {type(exact).__name__}")
    return exact


def _need_gpu_faiss() -> None:
    if not hasattr(faiss, "StandardGpuResources"):
        raise RuntimeError("this FAISS has no GPU support: pip uninstall faiss-cpu && pip install 'tcq_hf[gpu]'")


def _check_lists(num_lists: int) -> int:
    if not 1 <= num_lists <= 2048:
        raise ValueError(f"num_lists must be from 1 to 2048, got {num_lists}")
    return num_lists


def _joined(num_bits: int) -> int:
    """Codebooks whose codes fill a byte together."""
    return 8 // num_bits if 8 % num_bits == 0 else 1


def _with_zeros(books: np.ndarray, count: int) -> np.ndarray:
    return np.pad(books, ((0, count - len(books)), (0, 0), (0, 0)))
