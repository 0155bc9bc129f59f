"""Features of the training pictures in, groups of like pictures and their mutual neighbours out.

Pictures of one group are likely false negatives of each other: they leave the denominator of each other's loss, as
those with a label in common would. Nothing has to be known about the pictures, neither how many groups there are nor
how large they are: groups are the communities of the neighbourhood graph. How finely to split it is not known either,
so there are several partitions, which the steps of training take in turn.
"""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from transformers import TrainerCallback

from tcq_hf.model.quantization_tcq import spherical_kmeans
from tcq_hf.rerank.graph import KNNGraph

if TYPE_CHECKING:
    from .trainer import TCQTrainer

logger = logging.getLogger(__name__)

FILE_NAME = "pseudo_labels.safetensors"

# Pictures in the graph; those beyond join the group of the nearest one inside.
_GRAPH_ROWS = 50_000
# Exponent of a similarity as the weight of an edge, as in diffusion on such graphs (Iscen et al., CVPR 2017).
_SHARPNESS = 3
# Resolutions of the modularity (Reichardt and Bornholdt 2006): 1 is Newman's, smaller ones give larger communities.
_RESOLUTIONS = (1.0, 0.7, 0.5)


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """What the training knows of its pictures without labels.

    Args:
        groups: int64 `[R, N]`, group of each picture in each of R partitions; -1 for one that has none.
        starts: int64 `[N + 1]`: the mutual neighbours of picture i are `neighbours[starts[i] : starts[i + 1]]`.
        neighbours: int64 rows of pictures.
    """

    groups: np.ndarray
    starts: np.ndarray
    neighbours: np.ndarray

    @property
    def share(self) -> float:
        """Probability that two different pictures are of one group: the expected share of false negatives."""
        count = self.groups.shape[1]
        pairs = sum((sizes * (sizes - 1.0)).sum() for sizes in self._sizes())
        return float(pairs / len(self.groups) / max(1, count * (count - 1)))

    def __str__(self) -> str:
        sizes, count = self._sizes(), self.groups.shape[1]
        return (
            f"{', '.join(str((each > 0).sum()) for each in sizes)} groups of {count:,} pictures, the largest with "
            f"{max(each.max() for each in sizes) / count:.1%} of them: {self.share:.1%} of the negatives are taken for "
            "false ones"
        )

    def _sizes(self) -> list[np.ndarray]:
        return [np.bincount(groups[groups >= 0], minlength=1) for groups in self.groups]

    def partners(self, seed: int, epoch: int) -> np.ndarray:
        """For each picture itself or one of its mutual neighbours, each as likely: a function of seed and epoch."""
        draws = np.random.default_rng((seed, epoch, 2)).integers(np.diff(self.starts) + 1)
        others = np.append(self.neighbours, 0)[self.starts[:-1] + draws - 1]
        return np.where(draws == 0, np.arange(len(draws)), others)

    def without_groups(self) -> "PseudoLabels":
        """The neighbours alone."""
        return replace(self, groups=np.full_like(self.groups, -1))

    def save(self, folder: Path) -> None:
        """Write `pseudo_labels.safetensors`."""
        save_file({"groups": self.groups, "starts": self.starts, "neighbours": self.neighbours}, folder / FILE_NAME)

    @classmethod
    def load(cls, folder: Path) -> "PseudoLabels":
        """Read what `save` wrote."""
        return cls(**load_file(folder / FILE_NAME))


class Partners:
    """Epoch and row in, the row that the second view is of out: `PseudoLabels.partners`, an epoch at a time.

    Args:
        labels: The neighbours.
        seed: Seed of the draws.
    """

    def __init__(self, labels: PseudoLabels, seed: int) -> None:
        self.labels, self.seed, self._epoch = labels, seed, -1

    def __call__(self, epoch: int, row: int) -> int:
        """Row of the partner."""
        if epoch != self._epoch:
            self._rows, self._epoch = self.labels.partners(self.seed, epoch).tolist(), epoch
        return self._rows[row]


def find_pseudo_labels(features: np.ndarray, seed: int = 0) -> PseudoLabels:
    """Groups and mutual neighbours of pictures, from their features alone.

    Centred features become a graph of k = 2 ln N nearest neighbours by cosine, with either-way edges of weight
    cosine^3; the groups are its communities of greatest modularity (Louvain, Blondel et al. 2008) at the resolutions 1,
    0.7 and 0.5, whose number and sizes come out. Two pictures that name each other are mutual neighbours.

    Args:
        features: float32 `[N, F]`, N at least 3. Of more than 50,000 pictures, as many drawn by `seed` make the graph;
            each of the others joins the group of the nearest one and has no neighbours.
        seed: Seed of the draw and of the communities.

    Raises:
        ValueError: If there are too few pictures or a value is not finite.
    """
    if features.ndim != 2 or len(features) < 3:
        raise ValueError(
            f"groups need the features [N, F] of at least 3 pictures, got {list(features.shape)}; train with "
            "negative_filter='fraction' and positives='views'"
        )
    count = len(features)
    rows = np.sort(np.random.default_rng(seed).permutation(count)[:_GRAPH_ROWS])
    centred = features - features[rows].mean(axis=0)
    graph = KNNGraph.build(centred[rows], min(round(2 * math.log(len(rows))), len(rows) - 1))
    inside = communities(graph, seed)
    groups = inside if len(rows) == count else inside[:, _nearest(centred, centred[rows])]
    mutual = graph.adjacency(mutual=True).tocsr()
    degrees = np.zeros(count, np.int64)
    degrees[rows] = np.diff(mutual.indptr)
    found = PseudoLabels(groups, np.concatenate([[0], degrees.cumsum()]), rows[mutual.indices])
    logger.info("in the graph of %d neighbours of each picture: %s", graph.neighbours.shape[1], found)
    return found


def communities(graph: KNNGraph, seed: int) -> np.ndarray:
    """Community of each row of a neighbourhood graph at each resolution, int64 `[R, N]`, the largest first."""
    weighted = networkx.from_scipy_sparse_array(graph.adjacency().power(_SHARPNESS))
    groups = np.empty((len(_RESOLUTIONS), len(weighted)), np.int64)
    for partition, resolution in zip(groups, _RESOLUTIONS, strict=True):
        found = networkx.community.louvain_communities(weighted, resolution=resolution, seed=seed)
        for number, members in enumerate(sorted(found, key=len, reverse=True)):
            partition[list(members)] = number
    return groups


def find_groups(vectors: np.ndarray, seed: int = 0, number: int | None = None) -> np.ndarray:
    """Groups alone, int64 `[R, N]`.

    Args:
        vectors: float32 `[N, D]`.
        seed: Seed of what is random.
        number: How many, by spherical k-means, in one partition; by default as `find_pseudo_labels` finds them.
    """
    if number is None:
        return find_pseudo_labels(vectors, seed).groups
    points = F.normalize(torch.as_tensor(vectors), dim=1)
    centroids = spherical_kmeans(points, number, torch.Generator().manual_seed(seed), iterations=25)
    return torch.cat([(block @ centroids.T).argmax(dim=1) for block in points.split(16384)]).numpy()[None]


def _nearest(vectors: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Row of `among` `[n, F]` with the largest cosine, int64 `[N]`, for each of `vectors` `[N, F]`."""
    targets = F.normalize(torch.as_tensor(among), dim=1).T
    return torch.cat([(block @ targets).argmax(dim=1) for block in torch.as_tensor(vectors).split(2048)]).numpy()


class PseudoLabelCallback(TrainerCallback):
    """Groups the training pictures anew every few epochs, by the embeddings that they have by then.

    After Zhu et al. (IEEE SPL 2019), whose features and pseudo-labels are refreshed together: pictures of one group
    leave each other's denominators, beside those that the negative filter drops.

    Args:
        trainer: The `TCQTrainer` that the callback is added to.
        every: Epochs from one grouping to the next.
        warmup: Epochs before the first one; until then no picture has a group.
        clusters: Number of groups, found by spherical k-means; by default communities of the neighbourhood graph.

    Raises:
        ValueError: For an impossible value.
    """

    def __init__(self, trainer: "TCQTrainer", every: int = 5, warmup: int = 0, clusters: int | None = None) -> None:
        if every < 1 or warmup < 0 or (clusters is not None and clusters < 2):
            raise ValueError(
                "every must be at least 1, warmup at least 0 and clusters at least 2 or None, got "
                f"every={every}, warmup={warmup}, clusters={clusters}"
            )
        self.trainer, self.every, self.warmup, self.clusters = trainer, every, warmup, clusters

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Group the pictures if it is time."""
        # An epoch begins at a whole number, up to rounding; one that a resumed run goes on with has its groups.
        epoch = state.epoch or 0.0
        since = round(epoch) - self.warmup
        if abs(epoch - round(epoch)) < 1e-6 and since >= 0 and since % self.every == 0:
            self.trainer.regroup(self.clusters)
