"""Features of a split in, the ways of searching that are learnt from its train rows out."""

import functools
from typing import Any

import numpy as np
from transformers import PrinterCallback

from tcq_hf import FeatureCache, TCQConfig, TCQModel, TCQTrainer, TCQTrainingArguments
from tcq_hf.evaluation.protocols import Split

from .comparison import Vectors, Way, coded

# Published training, to compare with: each picture attracts its own views.
_VANILLA = {"negative_filter": "none", "positives": "views"}
_FIXED_SHARE = {"negative_filter": "fraction", "positives": "views"}
_FRACTION = {"negative_filter": "fraction"}
# What the other rows change of the training that was asked for.
OTHER_TRAINING = "; ".join(
    f"{name}: {', '.join(f'{key} {value}' for key, value in changed.items())}"
    for name, changed in {
        "vanilla contrastive": _VANILLA,
        "fraction X, own views": _FIXED_SHARE,
        "fraction X": {**_FRACTION, "negative_share": "X"},
    }.items()
)


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

        What comes to the same training is measured once.

        Raises:
            ValueError: For what cannot be trained, before anything is measured.
        """
        TCQTrainer(self.model, self._arguments({}), self.train)
        dropped = [{**_FRACTION, "negative_share": share} for share in shares]
        points = {self._name(changed): changed["negative_share"] for changed in dropped}
        compared = {self._name(changed) for changed in (_VANILLA, _FIXED_SHARE, {})}
        bits, found = self.model.config.bits, {}
        for changed in (_VANILLA, _FIXED_SHARE, *dropped, {}):
            name = self._name(changed)
            search = functools.partial(self.learn, changed)
            found.pop(name, None)  # the last of equal ones stays, in its place
            found[name] = Way(name, bits, search, seeds, points.get(name), for_shares=name not in compared)
        return [Way("tcq_hf, untrained start", bits, self.start, seeds), *found.values()]

    def start(self, seed: int) -> Vectors:
        """Search with what `initialize` makes of the train rows."""
        self.model.initialize(self.features[self.split.train], seed=seed)
        return coded(self.model, self.features, self.split)

    def learn(self, changed: dict[str, Any], seed: int) -> Vectors:
        """Search after training from there, with these options instead of those given."""
        self.model.initialize(self.features[self.split.train], seed=seed)
        trainer = TCQTrainer(self.model, self._arguments(changed | {"seed": seed}), self.train)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return coded(self.model, self.features, self.split)

    def _arguments(self, changed: dict[str, Any]) -> TCQTrainingArguments:
        return TCQTrainingArguments(**self.values | changed)

    def _name(self, changed: dict[str, Any]) -> str:
        return f"tcq_hf, {self._arguments(changed).filter_name}"
