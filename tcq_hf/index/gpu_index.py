"""An index on the CPU in, the same on a GPU out. FAISS and NumPy only."""

from typing import Any

import numpy as np

from .code_index import CodeIndex, codebooks_of, faiss, packed_codes
from .fast_index import FastIndex

# Sub-quantizer counts for which faiss-gpu has a kernel whose float32 tables fit into shared memory.
_GPU_NUM_CODEBOOKS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)
_BLOCK_ROWS = 1 << 20


def zero_coarse_index(index: CodeIndex | FastIndex, num_lists: int = 128) -> faiss.IndexIVFPQ:
    """The same codes as an IVFPQ index with equal zero centroids, all of them probed: the form that a GPU takes.

    The residual to a zero centroid is the vector itself, so scores are those of the flat index. Rows are dealt round
    robin over the lists, so that a GPU scans one query with many blocks.

    Args:
        index: An index from `build_index`.
        num_lists: Lists L; near the number of multiprocessors for few queries, 8 to 16 for large batches.
    """
    index = index.exact if isinstance(index, FastIndex) else index
    codebooks, num_bits = codebooks_of(index), index.pq.nbits
    coarse = faiss.IndexFlat(index.d, faiss.METRIC_INNER_PRODUCT)
    coarse.add(np.zeros((num_lists, index.d), dtype=np.float32))
    inverted = faiss.IndexIVFPQ(coarse, index.d, num_lists, index.pq.M, num_bits, faiss.METRIC_INNER_PRODUCT)
    inverted.own_fields = True
    coarse.this.disown()  # the inverted index frees its quantizer
    faiss.copy_array_to_vector(codebooks.ravel(), inverted.pq.centroids)
    inverted.is_trained = True
    inverted.nprobe = num_lists
    packed = packed_codes(index)
    for start in range(0, len(packed), _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, len(packed)), dtype=np.int64)
        lists = (rows % num_lists).astype("<u8").view(np.uint8).reshape(-1, 8)[:, : inverted.coarse_code_size()]
        inverted.add_sa_codes(np.ascontiguousarray(np.hstack([lists, packed[rows]])), rows)
    return inverted


def to_gpu(index: CodeIndex | FastIndex, device: int = 0, num_lists: int = 128) -> Any:
    """Copy an index onto a GPU, with the scores of the CPU index.

    Args:
        index: An index from `build_index`.
        device: Number of the GPU.
        num_lists: See `zero_coarse_index`.

    Returns:
        A `faiss.GpuIndexIVFPQ`, ready for `dataset.add_faiss_index(custom_index=...)`. It answers k up to 2048 and
        ignores an IDSelector.

    Raises:
        RuntimeError: If FAISS has no GPU support here or sees no such GPU.
        ValueError: If M or K is one that the GPU kernels refuse.
    """
    num_codebooks, codebook_size, _ = codebooks_of(index).shape
    if codebook_size != 256:
        raise ValueError(f"FAISS on a GPU takes codebook_size=256 only, got {codebook_size}; search on the CPU")
    if num_codebooks not in _GPU_NUM_CODEBOOKS:
        raise ValueError(f"FAISS on a GPU takes num_codebooks in {_GPU_NUM_CODEBOOKS}, got {num_codebooks}")
    if not 1 <= num_lists <= 2048:
        raise ValueError(f"num_lists must be from 1 to 2048, got {num_lists}")
    if not hasattr(faiss, "StandardGpuResources"):
        raise RuntimeError("this FAISS has no GPU support: pip uninstall faiss-cpu && pip install 'tcq_hf[gpu]'")
    if device >= faiss.get_num_gpus():
        raise RuntimeError(f"device={device}, but FAISS sees {faiss.get_num_gpus()} GPUs")
    options = faiss.GpuClonerOptions()
    options.indicesOptions = faiss.INDICES_32_BIT if index.ntotal < 1 << 31 else faiss.INDICES_64_BIT
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device, zero_coarse_index(index, num_lists), options)
