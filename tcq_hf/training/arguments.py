"""TCQTrainingArguments: the arguments of transformers' Trainer and those of the contrastive loss."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import SchedulerType, TrainingArguments

from .negatives import FilterName, negative_filter
from .views import PRESETS

# The value that each filter uses.
_VALUE = {
    "fraction": "negative_share",
    "topk": "negative_count",
    "threshold": "negative_threshold",
    "margin": "negative_margin",
}


@dataclass
class TCQTrainingArguments(TrainingArguments):
    """Arguments of `TCQTrainer`: all of `TrainingArguments`, some with other defaults, and those below.

    Other defaults: batches of 128 pictures a device, learning rate 1e-3 with a cosine schedule, 20 epochs, the last
    short batch left out, all columns kept.

    Raises:
        ValueError: For an impossible value, naming the argument.
    """

    temperature: float = field(default=0.5, metadata={"help": "Temperature T of the contrastive loss."})
    loss_form: Literal["soft", "cross"] = field(
        default="soft",
        metadata={
            "help": "What is contrasted: the soft reconstructions of both views (soft), or the embedding of one view "
            "with the soft reconstruction of the other (cross)."
        },
    )
    negative_filter: FilterName = field(
        default="auto",
        metadata={
            "help": "Which negatives leave the loss: those of the anchor's group in the neighbourhood graph of the "
            "features, found without labels (auto), none, or by similarity: fraction, topk, threshold or margin."
        },
    )
    positives: Literal["neighbours", "views"] = field(
        default="neighbours",
        metadata={
            "help": "What is attracted to a picture: a view of the picture itself (views), or of a mutual neighbour in "
            "the neighbourhood graph of the features, the picture among them (neighbours)."
        },
    )
    negative_share: float = field(
        default=0.1,
        metadata={"help": "For fraction: share of the negatives that leave the loss, most similar first."},
    )
    negative_count: int = field(default=0, metadata={"help": "For topk: number of negatives that leave the loss."})
    negative_threshold: float = field(
        default=1.0, metadata={"help": "For threshold: cosine above which a negative leaves the loss."}
    )
    negative_margin: float = field(
        default=0.0, metadata={"help": "For margin: a negative less than this below the positive leaves the loss."}
    )
    clip_start: float = field(default=0.0, metadata={"help": "Epoch from which on the filter works."})
    debias_prior: float | None = field(
        default=None, metadata={"help": "Probability of a false negative, to debias the loss with; none leaves it."}
    )
    usage_weight: float = field(
        default=0.0, metadata={"help": "Weight of the regulariser that makes all codewords be used."}
    )
    diversity_weight: float = field(
        default=0.0, metadata={"help": "Weight of the regulariser that centres each codebook."}
    )
    views: str = field(
        default="photo", metadata={"help": f"Augmentation of the pictures, one of {', '.join(PRESETS)}."}
    )
    feature_dropout: float = field(
        default=0.5, metadata={"help": "Dropout of the features when training from a FeatureCache."}
    )
    backbone_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the backbone; by default a hundredth of learning_rate, or a tenth for adapters."
        },
    )
    layer_decay: float = field(
        default=1.0,
        metadata={"help": "Learning rate of each layer of the backbone as a share of that of the layer behind it."},
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Pictures embedded at a time, for batches that do not fit into memory: the loss stays that of the "
            "whole batch, a step takes one forward pass more."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column of the pictures."})
    label_column: str = field(default="label", metadata={"help": "Column of class labels, used by evaluation alone."})

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Pictures in a batch, for each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pictures in a batch of evaluation."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of projection and codebooks."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Epochs."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Schedule of the learning rates."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last short batch, which has fewer negatives."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin batches in memory, for a GPU."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: pictures are a column."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_filter()
        self._check_numbers()
        for name, choices in (
            ("loss_form", ("soft", "cross")),
            ("positives", ("neighbours", "views")),
            ("views", tuple(PRESETS)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the column of pictures is none that forward() names")

    def _check_numbers(self) -> None:
        for name in ("temperature", "clip_start", "usage_weight", "diversity_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (name == "temperature" and not value):
                bound = "positive" if name == "temperature" else "at least 0"
                raise ValueError(f"{name} must be {bound} and finite, got {value}")
        rate = self.backbone_learning_rate
        if rate is not None and not 0 <= rate < math.inf:
            raise ValueError(f"backbone_learning_rate must be at least 0 and finite, got {rate}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size must be at least 1 picture, or None, got {self.loss_chunk_size}")
        if self.debias_prior is not None and not 0 <= self.debias_prior < 1:
            raise ValueError(f"debias_prior must be at least 0 and below 1, got {self.debias_prior}")
        if not 0 <= self.feature_dropout < 1:
            raise ValueError(f"feature_dropout must be at least 0 and below 1, got {self.feature_dropout}")

    @property
    def filter_name(self) -> str:
        """What training with this filter and these positives is called in tables and on cards."""
        if self.negative_filter == "none" and self.positives == "views":
            return "vanilla contrastive"
        value = f" {getattr(self, _VALUE[self.negative_filter]):g}" if self.negative_filter in _VALUE else ""
        name = "no filter" if self.negative_filter == "none" else self.negative_filter + value
        return name + (", own views" if self.positives == "views" else "")

    def make_filter(self) -> Any:
        """The `NegativeFilter` that these arguments describe."""
        return negative_filter(
            self.negative_filter,
            share=self.negative_share,
            count=self.negative_count,
            threshold=self.negative_threshold,
            margin=self.negative_margin,
        )
