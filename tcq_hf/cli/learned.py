"""Features of a split in, the ways of searching that are learnt from its train rows out."""

import functools
from typing import Any

import numpy as np
from transformers import PrinterCallback

from tcq_hf import FeatureCache, TCQConfig, TCQModel, TCQTrainer, TCQTrainingArguments
from tcq_hf.evaluation.protocols import Split

from .comparison import Vectors, Way, coded

# What each filter is called, and by which value.
_VALUE = {
    "fraction": "negative_share",
    "topk": "negative_count",
    "threshold": "negative_threshold",
    "margin": "negative_margin",
}
# Published training, to compare with: each picture attracts its own views.
_VANILLA = {"negative_filter": "none", "positives": "views"}
_FIXED_SHARE = {"negative_filter": "fraction", "positives": "views"}
_FRACTION = {"negative_filter": "fraction"}


def _name(given: TCQTrainingArguments) -> str:
    """What training with these arguments is called."""
    if given.negative_filter == "none" and given.positives == "views":
        return "vanilla contrastive"
    value = f" {getattr(given, _VALUE[given.negative_filter]):g}" if given.negative_filter in _VALUE else ""
    filtered = "no filter" if given.negative_filter == "none" else given.negative_filter + value
    return filtered + (", own views" if given.positives == "views" else "")


class Learner:
    """Trains projection and codebooks of one number of bits on cached features.

    Args:
        config: Of the models to train.
        source: Model with the frozen backbone.
        features: float32 `[n, F]` of all rows of the split.
        split: The split.
        train: Features of its train rows.
        values: Options by name; those of `TCQTrainingArguments` count.
    """

    def __init__(
        self,
        config: TCQConfig,
        source: TCQModel,
        features: np.ndarray,
        split: Split,
        train: FeatureCache,
        values: dict[str, Any],
    ) -> None:
        self.model, self.processor = TCQModel(config), train.processor
        self.model.backbone = source.backbone
        self.model.freeze_backbone().to(source.device)
        self.features, self.split, self.train = features, split, train
        fields = TCQTrainingArguments.__dataclass_fields__
        self.values = {name: value for name, value in values.items() if name in fields}

    def ways(self, seeds: range, shares: list[float]) -> list[Way]:
        """The untrained start, vanilla contrastive learning, a fixed share, other shares, and what was asked for, last.

        Raises:
            ValueError: For what cannot be trained, before anything is measured.
        """
        given = TCQTrainingArguments(**self.values)
        TCQTrainer(self.model, given, self.train)
        for share in shares:
            TCQTrainingArguments(**self.values | {"negative_share": share})
        bits, asked = self.model.config.bits, _name(given)

        def way(name: str, changed: dict[str, Any], share: float | None = None) -> Way:
            return Way(f"tcq_hf, {name}", bits, functools.partial(self.learn, changed), seeds, share)

        ways = [
            Way("tcq_hf, untrained start", bits, self.start, seeds),
            way("vanilla contrastive", _VANILLA),
            way(f"fraction {given.negative_share:g}, own views", _FIXED_SHARE),
            *(way(f"fraction {share:g}", {**_FRACTION, "negative_share": share}, share) for share in shares),
        ]
        return [other for other in ways if other.name != f"tcq_hf, {asked}"] + [way(asked, {})]

    def start(self, seed: int) -> Vectors:
        """Search with what `initialize` makes of the train rows."""
        self.model.initialize(self.features[self.split.train], seed=seed)
        return coded(self.model, self.features, self.split)

    def learn(self, changed: dict[str, Any], seed: int) -> Vectors:
        """Search after training from there, with these options instead of those given."""
        self.model.initialize(self.features[self.split.train], seed=seed)
        trainer = TCQTrainer(self.model, TCQTrainingArguments(**self.values | changed | {"seed": seed}), self.train)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return coded(self.model, self.features, self.split)
