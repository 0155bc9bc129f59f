"""ProductQuantizer: unit-norm sub-vectors in, assignments, codes, reconstructions and lookup tables out.

Letters: N batch, D embedding width, M codebooks, K codewords in each, d = D / M sub-vector width, z embedding,
C codebooks. With unit-norm codewords the nearest codeword (L2), the largest inner product and the largest cosine are
one and the same, which is why FAISS assigns the codes that the model assigns.
"""

import logging

import torch
import torch.nn.functional as F
from torch import nn

logger = logging.getLogger(__name__)


class ProductQuantizer(nn.Module):
    """M codebooks of K trainable codewords on the unit sphere of R^d.

    Everything runs in float32 with autocast off, whatever the dtype of the model. `codebooks` holds the free
    parameters; every result uses `normalized_codebooks`.

    Args:
        num_codebooks: M.
        codebook_size: K.
        sub_dim: d.
        softmax_scale: alpha, the scale of the soft assignment.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, sub_dim: int, softmax_scale: float) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, sub_dim))

    def normalized_codebooks(self) -> torch.Tensor:
        """Codebooks C with unit-norm codewords, float32 `[M, K, d]`, differentiable."""
        return F.normalize(self.codebooks.float(), dim=-1)

    def normalize(self, vectors: torch.Tensor) -> torch.Tensor:
        """Embeddings z: each of the M sub-vectors scaled to unit norm.

        Args:
            vectors: `[N, D]`, any float dtype.

        Returns:
            float32 `[N, D]`.
        """
        return F.normalize(self._split(vectors.float()), dim=-1).flatten(1)

    def lookup_table(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Inner product of every sub-vector with every codeword of its codebook.

        The score of a stored code i is `sum_m table[n, m, i_m]`, larger is closer, at most M (asymmetric quantized
        similarity; MeCoQ, arXiv 2109.05205).

        Args:
            embeddings: float32 `[N, D]` with unit-norm sub-vectors.

        Returns:
            float32 `[N, M, K]`.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            sub_vectors = self._split(embeddings.float()).transpose(0, 1)
            return torch.bmm(sub_vectors, self.normalized_codebooks().transpose(1, 2)).transpose(0, 1)

    def assignments(self, table: torch.Tensor) -> torch.Tensor:
        """Soft assignments softmax_k(alpha table), float32 `[N, M, K]`, from a lookup table `[N, M, K]`."""
        return (self.softmax_scale * table).softmax(dim=-1)

    def codes(self, table: torch.Tensor) -> torch.Tensor:
        """Index of the nearest codeword of each sub-vector, uint8 `[N, M]`, from a lookup table `[N, M, K]`."""
        return table.argmax(dim=-1).to(torch.uint8)

    def reconstruct(self, codes: torch.Tensor) -> torch.Tensor:
        """Chosen codewords, concatenated.

        Args:
            codes: Integers `[N, M]`, each below K.

        Returns:
            float32 `[N, D]`.
        """
        if codes.ndim != 2 or codes.shape[1] != self.codebooks.shape[0]:
            raise ValueError(f"codes must have shape [N, {self.codebooks.shape[0]}], got {list(codes.shape)}")
        books = torch.arange(self.codebooks.shape[0], device=codes.device)
        return self.normalized_codebooks()[books, codes.long()].flatten(1)

    def soft_reconstruct(self, assignments: torch.Tensor) -> torch.Tensor:
        """Assignment-weighted mean of the codewords: the soft reconstruction that training uses.

        Args:
            assignments: float32 `[N, M, K]`.

        Returns:
            float32 `[N, D]`, differentiable in assignments and codebooks.
        """
        with torch.autocast(assignments.device.type, enabled=False):
            means = torch.bmm(assignments.float().transpose(0, 1), self.normalized_codebooks())
            return means.transpose(0, 1).flatten(1)

    @torch.no_grad()
    def initialize(self, embeddings: torch.Tensor, seed: int = 0, iterations: int = 25) -> None:
        """Set the codebooks to the spherical k-means centroids of the sub-vectors, one clustering a sub-space.

        Args:
            embeddings: `[n, D]` with n >= K; sub-vectors are normalised here. At most 256 K rows, drawn by `seed`, are
                used, as FAISS does.
            seed: Seed of the draw and of the starting centroids.
            iterations: Rounds of k-means.
        """
        _, size, _ = self.codebooks.shape
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(embeddings), generator=generator)[: 256 * size]
        sub_vectors = self._split(self.normalize(embeddings[rows.to(embeddings.device)]))
        for m, book in enumerate(self.codebooks):
            book.copy_(spherical_kmeans(sub_vectors[:, m], size, generator, iterations))

    def _split(self, vectors: torch.Tensor) -> torch.Tensor:
        books, _, sub_dim = self.codebooks.shape
        return vectors.unflatten(-1, (books, sub_dim))


@torch.no_grad()
def spherical_kmeans(
    points: torch.Tensor, num_centroids: int, generator: torch.Generator, iterations: int
) -> torch.Tensor:
    """k-means on the unit sphere (Dhillon and Modha 2001) with revival of empty clusters.

    A centroid without points moves onto the point that its own centroid serves worst, so every centroid is used as
    long as there are that many distinct points; with fewer, the rest stay random unit vectors.

    Args:
        points: float32 `[n, d]` of unit norm, n >= `num_centroids`.
        num_centroids: K.
        generator: CPU generator of the starting centroids.
        iterations: Rounds; fewer when the assignment no longer changes.

    Returns:
        float32 `[K, d]` of unit norm, on the device of `points`.
    """
    distinct = torch.unique(points, dim=0)
    usable = min(len(distinct), num_centroids)
    if usable < num_centroids:
        logger.warning(
            "only %d distinct sub-vectors for %d codewords: %d codewords stay random; "
            "pass more varied pictures or choose a smaller codebook_size",
            *(usable, num_centroids, num_centroids - usable),
        )
    spare = F.normalize(torch.randn(num_centroids - usable, points.shape[1], generator=generator), dim=-1)
    start = torch.randperm(len(distinct), generator=generator)[:usable]
    centroids = distinct[start.to(points.device)]
    labels = None
    for _ in range(iterations):
        nearest, _ = _assign(points, centroids)
        if labels is not None and torch.equal(labels, nearest):
            break
        labels = nearest
        centroids = F.normalize(torch.zeros_like(centroids).index_add_(0, labels, points), dim=-1)
    for _ in range(usable):
        _, revived = _assign(points, centroids)
        if not revived:
            break
        centroids[list(revived)] = points[list(revived.values())]
    return torch.cat([centroids, spare.to(centroids)])


def _assign(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, dict[int, int]]:
    """Closest centroid of each point `[n]`, and the point given to each centroid that had none."""
    blocks = [(block @ centroids.T).max(dim=1) for block in points.split(16384)]
    similarity, nearest = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    counts = torch.bincount(nearest, minlength=len(centroids)).tolist()
    empty = [k for k, count in enumerate(counts) if not count]
    revived: dict[int, int] = {}
    for point in similarity.argsort().tolist() if empty else []:
        donor = int(nearest[point])
        if counts[donor] > 1:
            counts[donor] -= 1
            nearest[point] = empty[len(revived)]
            revived[empty[len(revived)]] = point
            if len(revived) == len(empty):
                break
    return nearest, revived


__all__ = ["ProductQuantizer"]
