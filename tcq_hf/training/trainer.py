"""TCQTrainer: transformers' Trainer for learning codes from pictures without labels."""

from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch import nn
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_utils import PredictionOutput

from tcq_hf.model.image_processing_tcq import TCQImageProcessor
from tcq_hf.model.modeling_tcq import TCQModel, TCQOutput

from .arguments import TCQTrainingArguments
from .batches import EpochOrder, EvaluationViews, Partner, TrainingViews, as_batch, class_labels
from .chunked import in_chunks
from .feature_cache import EvaluationFeatures, FeatureCache, TrainingFeatures
from .figures import perplexity, retrieval_figures
from .grouping import GroupingTrainer
from .learning_rates import set_backbone_rates
from .objective import Objective
from .views import PRESETS, augment


class TCQTrainer(GroupingTrainer):
    """Trains a `TCQModel` with the clipped contrastive loss; used as transformers' `Trainer`.

    Logs, beside the loss: `dropped_share` of the negatives, `codebook_perplexity` (codewords in use, 1 to K) and
    `embedding_spread` (mean of 1 - cosine over all pairs, 0 when all embeddings are one). `evaluate` gives, with class
    labels, `eval_map` and `eval_map_strict` at k = 1,000 and `eval_precision@k`, where each row queries the others; and
    always the label-free `eval_quality` (0 to 1, how well the neighbourhoods of pictures agree; with
    `metric_for_best_model="eval_quality"` it selects the checkpoint; embeddings squeezed into few dimensions raise it
    too, and then `eval_view_recall@1` falls), `eval_quantization_error` (mean of 1 - score / M of a picture with its
    own code) and, where views are at hand, `eval_loss` and `eval_view_recall@1` (share of pictures that a changed copy
    finds first).
    `predict` gives embeddings `[N, D]` and codes `[N, M]`. Each checkpoint holds what `hub.save` writes.

    Args:
        model: A `TCQModel`, best one whose projection and codebooks `initialize` has set.
        args: Arguments.
        train_dataset: A `datasets.Dataset` with pictures, or a `FeatureCache` of a model with a frozen backbone.
        eval_dataset: Likewise, or several by name.
        processing_class: The image processor; that of the `FeatureCache` by default.
        compute_metrics: Instead of the figures above.
        **kwargs: Further arguments of `Trainer`.

    Raises:
        TypeError: For a dataset of another kind or a label column without integers.
        ValueError: For a missing column, fewer pictures than a batch, a batch without negatives.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: TCQModel | None = None,
        args: TCQTrainingArguments | None = None,
        train_dataset: datasets.Dataset | FeatureCache | None = None,
        eval_dataset: datasets.Dataset | FeatureCache | dict[str, Any] | None = None,
        processing_class: TCQImageProcessor | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        args = TCQTrainingArguments() if args is None else args
        if train_dataset is not None:
            self._check_dataset(args, train_dataset, "train_dataset")
        for given in (train_dataset, eval_dataset):
            if processing_class is None and isinstance(given, FeatureCache):
                processing_class = given.processor
        if processing_class is None:
            raise ValueError("processing_class must be the TCQImageProcessor of the model, got None")
        super().__init__(
            model=model,
            args=args,
            data_collator=as_batch,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or self._figures,
            **kwargs,
        )
        self._objective = Objective(args)
        self._preset = PRESETS[args.views]
        self._sums: dict[str, torch.Tensor] = {}
        self._summed = 0
        if train_dataset is not None:
            self._check_training(train_dataset)

    # ---- Data ----

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Batches of two views of each picture, each view with a draw of its own from (seed, epoch, row, view)."""
        given = self.train_dataset
        if given is None:
            raise ValueError("training needs a train_dataset")
        seed, partner = self._data_seed, self._partner()
        cached = isinstance(given, FeatureCache)
        views = TrainingFeatures(given, seed, partner) if cached else self._views(given, seed, partner)
        order = EpochOrder(len(views), seed)
        self.pop_callback(_OrderOfEpoch)
        self.add_callback(_OrderOfEpoch(order))
        return self._get_dataloader(
            views, "Training", self._train_batch_size, sampler_fn=lambda _: order, is_training=True
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Batches of pictures as search sees them, of a fixed view of each, and of labels."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        given = self.eval_dataset[given] if isinstance(given, str) else given
        if given is None:
            raise ValueError("evaluation needs an eval_dataset")
        return self._evaluation_batches(given, "eval_dataset", with_view=True)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """Batches of pictures as search sees them, and of labels."""
        return self._evaluation_batches(test_dataset, "test_dataset", with_view=False)

    def _views(self, pictures: datasets.Dataset, seed: int, partner: Partner | None = None) -> TrainingViews:
        side, column = self.core.config.image_size, self.args.image_column
        return TrainingViews(pictures, self.processing_class, column, side, self._preset, seed, partner)

    def _evaluation_batches(self, given: Any, name: str, with_view: bool) -> torch.utils.data.DataLoader:
        self._check_dataset(self.args, given, name)
        if isinstance(given, FeatureCache):
            batches = EvaluationFeatures(given, class_labels(given.dataset, self.args.label_column), with_view)
        else:
            batches = EvaluationViews(
                self._views(given, self.args.seed), class_labels(given, self.args.label_column), with_view
            )
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return self._get_dataloader(batches, name, self.args.eval_batch_size, sampler_fn=self._get_eval_sampler)
        finally:
            self.args.dataloader_drop_last = dropped

    def _check_training(self, given: Any) -> None:
        images = self.args.train_batch_size * self.args.world_size
        self._objective.check_batch(images)
        if len(given) < images and self.args.dataloader_drop_last:
            raise ValueError(
                f"train_dataset has {len(given)} pictures, fewer than one batch of {images}; lower "
                "per_device_train_batch_size"
            )
        frozen = not any(parameter.requires_grad for parameter in self.core.backbone.parameters())
        if isinstance(given, FeatureCache) and not frozen:
            raise ValueError(
                "a FeatureCache holds the features of a frozen backbone: call model.freeze_backbone() first"
            )

    @staticmethod
    def _check_dataset(args: TCQTrainingArguments, given: Any, name: str) -> None:
        if isinstance(given, FeatureCache):
            return
        if not isinstance(given, datasets.Dataset):
            raise TypeError(f"{name} must be a datasets.Dataset or a FeatureCache, got {type(given).__name__}")
        if args.image_column not in given.column_names:
            raise ValueError(
                f"{name} has no column {args.image_column!r} (image_column); its columns are {given.column_names}"
            )

    # ---- Loss ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, TCQOutput]:
        """Loss of a batch of two views, over the joint batch of all processes."""
        output = self._output(model, inputs)
        epoch, groups = self.state.epoch or 0.0, self._groups_of(inputs)
        loss, figures = self._objective(output, self.core.quantizer, epoch, model.training, groups)
        if model.training:
            if not loss.isfinite():
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {self.state.global_step}: lower learning_rate or "
                    "backbone_learning_rate, or train in float32; the last checkpoint is whole"
                )
            for name, value in figures.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._summed += 1
        return (loss, output) if return_outputs else loss

    def _output(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> TCQOutput:
        """What the model makes of the views of a batch; in training in chunks, if the arguments ask for it."""
        if "features" in inputs:
            dropout = self.args.feature_dropout if model.training else 0.0
            # Once for the whole batch: chunks do not change what is dropped.
            views, prepare = {"features": nn.functional.dropout(inputs["features"], dropout)}, dict
        else:
            views = {name: inputs[name] for name in ("crops", "draws", "pixel_values") if name in inputs}
            prepare = self._pixel_values

        def embed(*tensors: torch.Tensor) -> TCQOutput:
            return model(**prepare(**dict(zip(views, tensors, strict=True))))

        pictures = self.args.loss_chunk_size
        if pictures is None or not model.training:
            return embed(*views.values())
        return in_chunks(embed, tuple(views.values()), 2 * pictures, lambda: self.accelerator.no_sync(model))

    def _pixel_values(
        self, crops: torch.Tensor, draws: torch.Tensor, pixel_values: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Arguments of the model for views; in evaluation the first view is the picture as search sees it."""
        processor = self.processing_class
        views = augment(crops, draws, self._preset, processor.image_mean, processor.image_std)
        return {"pixel_values": views if pixel_values is None else torch.cat([pixel_values, views])}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the figures of the steps since the last time beside the loss."""
        if "loss" in logs and self._summed:
            logs["dropped_share"] = float(self._sums["dropped_share"]) / self._summed
            logs["codebook_perplexity"] = perplexity(self._sums["chosen"])
            logs["embedding_spread"] = float(self._sums["embedding_spread"]) / self._summed
            self._sums, self._summed = {}, 0
        super().log(logs, start_time)

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """Loss of a batch, its embeddings, codes and the embeddings of the views, and its labels."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            if "crops" in inputs or len(inputs.get("features", ())) == 2 * len(labels):
                loss, output = self.compute_loss(model, inputs, return_outputs=True)
            else:
                loss, output = None, model(**inputs)
        if prediction_loss_only:
            return loss, None, None
        own, views = output.embeddings[: len(labels)], output.embeddings[len(labels) :]
        found = (own, output.codes[: len(labels)], *([views] if len(views) else []))
        return loss, tuple(tensor.detach() for tensor in found), labels

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Embeddings and codes of a dataset, and the figures; `label_ids` is None where there are no labels."""
        output = super().predict(*args, **kwargs)
        return output if (output.label_ids >= 0).any() else output._replace(label_ids=None)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Figures of `eval_dataset`, or of another dataset."""
        self.results = super().evaluate(*args, **kwargs)
        return self.results

    def _figures(self, prediction: EvalPrediction) -> dict[str, float]:
        return retrieval_figures(prediction.predictions, prediction.label_ids, self.core.codebooks(), self.args.seed)

    # ---- Optimiser ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser with the layers of the backbone in groups of their own, at their own rates."""
        if self.optimizer is None:
            super().create_optimizer(model)
            rate = self.args.backbone_learning_rate
            if rate is None:
                # Adapters start at nothing: they hold no knowledge that a large step could destroy.
                rate = self.args.learning_rate / (10 if self.has_adapters else 100)
            set_backbone_rates(self.optimizer, self.core.backbone, rate, self.args.layer_decay)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the Trainer has it, without the codebooks, whose norm plays no part."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".codebooks")]


class _OrderOfEpoch(TrainerCallback):
    """Tells the order which epoch begins, however deep the Trainer has wrapped it."""

    def __init__(self, order: EpochOrder) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An epoch ends at a whole number, up to rounding.
        self.order.set_epoch(int((state.epoch or 0.0) + 1e-6))
