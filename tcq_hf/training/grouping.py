"""GroupingTrainer: finds groups and neighbours of the training pictures, keeps them, takes them up again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from tcq_hf.index.encoding import extract_features
from tcq_hf.index.inference import evaluation_mode

from .batches import Partner
from .feature_cache import FeatureCache
from .objective import Objective
from .pseudo_labels import FILE_NAME, Partners, PseudoLabels, find_groups, find_pseudo_labels
from .saving import SavingTrainer


class GroupingTrainer(SavingTrainer):
    """A `SavingTrainer` that knows which of its pictures are likely to show the same.

    Attributes:
        pseudo_labels: What training found in the pictures, once it has begun; None where nothing was asked for.
    """

    _objective: Objective
    pseudo_labels: PseudoLabels | None = None
    _groups: torch.Tensor | None = None

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _partner(self) -> Partner | None:
        """Who is attracted to whom, where neighbours are; finds what has to be known before training."""
        neighbours, auto = self.args.positives == "neighbours", self.args.negative_filter == "auto"
        if self.pseudo_labels is None and (auto or neighbours):
            labels = self._once(lambda: find_pseudo_labels(self._training_features(), self._data_seed))
            self._use(labels if auto else labels.without_groups())
        return Partners(self.pseudo_labels, self._data_seed) if neighbours else None

    def _groups_of(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Group of each picture of a batch, int64 `[n]`, where there are groups: partitions take turns by step."""
        if self._groups is None or "rows" not in inputs:
            return None
        return self._groups[self.state.global_step % len(self._groups)][inputs["rows"]]

    def regroup(self, number: int | None = None) -> None:
        """Find the groups of the training pictures anew, from the embeddings that they have now.

        Args:
            number: How many, by spherical k-means; by default communities of the neighbourhood graph.
        """
        groups = self._once(lambda: find_groups(self._training_embeddings(), self._data_seed, number))
        known = self.pseudo_labels or PseudoLabels(
            groups, np.zeros(groups.shape[1] + 1, np.int64), np.empty(0, np.int64)
        )
        self._use(replace(known, groups=groups))

    def _use(self, labels: PseudoLabels) -> None:
        self.pseudo_labels = labels
        self._groups = torch.from_numpy(labels.groups).to(self.args.device)
        self._objective.share = labels.share

    def _once(self, find: Callable[[], Any]) -> Any:
        """What `find` gives in the first process, in all of them."""
        return broadcast_object_list([find() if self.is_world_process_zero() else None])[0]

    def _training_features(self) -> np.ndarray:
        """Features float32 `[N, F]` of the training pictures as search sees them."""
        given, args = self.train_dataset, self.args
        if isinstance(given, FeatureCache):
            return given.features()
        return extract_features(given, self.core, self.processing_class, args.image_column, args.eval_batch_size)

    @torch.inference_mode()
    def _training_embeddings(self) -> np.ndarray:
        """Embeddings float32 `[N, D]` of the same."""
        blocks, model = torch.from_numpy(self._training_features()).split(4096), self.core
        with evaluation_mode(model):
            return np.concatenate([model(features=block.to(model.device)).embeddings.cpu().numpy() for block in blocks])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.pseudo_labels is not None and self.args.should_save:
            self.pseudo_labels.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not Path(resume_from_checkpoint, FILE_NAME).is_file():
            return
        labels = PseudoLabels.load(Path(resume_from_checkpoint))
        if labels.groups.shape[1] != len(self.train_dataset):
            raise ValueError(
                f"{resume_from_checkpoint} has pseudo-labels of {labels.groups.shape[1]} pictures, train_dataset has "
                f"{len(self.train_dataset)}: go on with the pictures that the run began with"
            )
        self._use(labels)
