"""What the model makes of two views of a batch in, the loss and the figures that are logged out."""

from typing import TYPE_CHECKING

import torch
import torch.distributed
import torch.distributed.nn
import torch.nn.functional as F

from .arguments import TCQTrainingArguments
from .losses import contrastive_loss, diversity_loss, usage_loss, view_similarity
from .negatives import drop_fraction, image_similarity, keep_all, same_group

if TYPE_CHECKING:
    from tcq_hf.model.modeling_tcq import TCQOutput
    from tcq_hf.model.quantization_tcq import ProductQuantizer


class Objective:
    """The clipped contrastive loss with its regularisers, as the arguments describe it.

    Args:
        arguments: Temperature, form, filter and weights.
    """

    # Expected share of false negatives, once groups are known: for images that are of none.
    share = 0.0

    def __init__(self, arguments: TCQTrainingArguments) -> None:
        self.arguments, self.filter = arguments, arguments.make_filter()

    def check_batch(self, images: int) -> None:
        """Refuse a number of images for which the loss says nothing.

        Raises:
            ValueError: If there is no negative, or the filter would drop every one.
        """
        if images < 2:
            raise ValueError(
                f"a batch must have at least 2 images, got {images}: without a negative there is nothing to learn; "
                "raise per_device_train_batch_size"
            )
        self.filter(torch.zeros(images, images))

    def _fits(self, images: int) -> bool:
        """Whether the filter leaves a negative: the last batch of an evaluation may be too short for its count."""
        return self.arguments.negative_filter != "topk" or self.arguments.negative_count < images - 1

    def __call__(
        self,
        output: "TCQOutput",
        quantizer: "ProductQuantizer",
        epoch: float,
        joint: bool,
        groups: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a batch, a scalar, and its figures.

        Args:
            output: Of the 2n views of n images; rows i and n + i are the views of image i.
            quantizer: The live quantizer of the model.
            epoch: Where training stands; the filter works from `clip_start` on.
            joint: Take the images of all processes as one batch, with gradient.
            groups: int64 `[n]`, pseudo-labels of the images, -1 where there is none; beside what the filter drops,
                images of one group leave each other's denominators.
        """
        arguments, embeddings = self.arguments, output.embeddings
        restored = quantizer.soft_reconstruct(output.assignments)
        usage = output.assignments.mean(dim=0)
        if joint and torch.distributed.is_initialized():
            embeddings, restored = gather_views(embeddings), gather_views(restored)
            usage = torch.stack(_gather(usage)).mean(dim=0)
            groups = None if groups is None else torch.cat(_gather(groups))
        similarity = view_similarity(embeddings if arguments.loss_form == "cross" else restored, restored)
        drop = self._dropped(image_similarity(similarity), groups, epoch)
        loss = contrastive_loss(similarity, arguments.temperature, drop, arguments.debias_prior).mean()
        if arguments.usage_weight:
            loss = loss + arguments.usage_weight * usage_loss(usage)
        if arguments.diversity_weight:
            loss = loss + arguments.diversity_weight * diversity_loss(quantizer.normalized_codebooks())
        return loss, _figures(drop, output, embeddings)

    def _dropped(self, images: torch.Tensor, groups: torch.Tensor | None, epoch: float) -> torch.Tensor:
        """Mask `[n, n]` of the negatives that leave the loss, from similarities `[n, n]` and groups `[n]`."""
        if epoch < self.arguments.clip_start:
            return keep_all(images)
        drop = self.filter(images) if self._fits(len(images)) else keep_all(images)
        if groups is not None:
            return drop | same_group(groups)
        return drop_fraction(images, self.share) if self.arguments.negative_filter == "auto" else drop


def gather_views(vectors: torch.Tensor) -> torch.Tensor:
    """The vectors of the views of all processes, `[2n, D]` to `[2N, D]`, with gradient, views apart as before.

    Every process gets the gradient of its own vectors from the losses of all: averaged, as DistributedDataParallel does
    it, the gradient is that of one process with the joint batch.
    """
    parts = _gather(vectors)
    return torch.cat([part[: len(part) // 2] for part in parts] + [part[len(part) // 2 :] for part in parts])


def _gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.distributed.nn.functional.all_gather(tensor.contiguous()))


@torch.no_grad()
def _figures(drop: torch.Tensor, output: "TCQOutput", embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    """Share of negatives dropped, how often each codeword was chosen `[M, K]`, spread of the embeddings."""
    images, words = len(drop), output.assignments.shape[2]
    chosen = F.one_hot(output.codes.long(), words).sum(dim=0)
    # Mean of 1 - cosine over all pairs: 0 when all embeddings are one.
    spread = 1 - F.normalize(embeddings, dim=1).mean(dim=0).square().sum()
    return {"dropped_share": drop.sum() / max(1, images * (images - 1)), "chosen": chosen, "embedding_spread": spread}
