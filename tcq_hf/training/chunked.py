"""A batch too large for the memory in, what the model makes of it out, with the gradient of the whole batch.

The contrastive loss needs the embeddings of all pictures at once, but not what the backbone remembers of each for its
gradient, which is nearly all of the memory. So the pictures run through the model in chunks that remember nothing; the
loss is that of the joint batch; and as its gradient comes back, each chunk runs once more, remembered this time, takes
its part of the gradient and is forgotten (gradient caching, Gao et al. 2021, arXiv 2101.06983). Memory grows with the
chunk instead of the batch; a step takes one forward pass more.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils.checkpoint import checkpoint

from tcq_hf.model.modeling_tcq import TCQOutput


def in_chunks(
    embed: Callable[..., TCQOutput],
    tensors: tuple[torch.Tensor, ...],
    size: int,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
) -> TCQOutput:
    """The output of the joint batch, equal to `embed(*tensors)` up to rounding, in the memory of a chunk.

    torch's checkpoints make the two passes: they keep the random state and the autocast of each chunk, so that dropout
    and stochastic depth are the same in both. Layers that look at their batch see a chunk: batch normalisation that is
    trained takes the statistics of each chunk.

    Args:
        embed: The model on some rows of the tensors; must do the same when it is called again.
        tensors: Each `[n, ...]`, one row a view.
        size: Rows in a chunk.
        no_sync: Keeps DistributedDataParallel from exchanging gradients: it does so once, after the last chunk.

    Returns:
        A `TCQOutput` of n rows.
    """
    chunks = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
    if len(chunks) == 1:
        return embed(*tensors)
    # The gradient comes back from the last chunk to the first, which is therefore the one to exchange after.
    outputs = [_forgotten(embed, chunk, no_sync if number else nullcontext) for number, chunk in enumerate(chunks)]
    return TCQOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


def _forgotten(
    embed: Callable[..., TCQOutput], chunk: tuple[torch.Tensor, ...], context: Callable[[], AbstractContextManager]
) -> tuple[torch.Tensor, ...]:
    """The tensors of the output of a chunk, which is computed again when their gradient comes.

    The reentrant checkpoint keeps no graph of the first pass. The other kind keeps one, without its tensors: thousands
    of small objects that lie scattered in the memory of a CPU, so that what is freed between them is not used again.
    """

    def run(_: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with context():
            return embed(*rows).to_tuple()

    # A result has a gradient only if an argument has one.
    return checkpoint(run, torch.zeros((), requires_grad=True), *chunk, use_reentrant=True)
