"""TCQModel: images or backbone features in, embeddings, codes, reconstructions and assignments out."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .backbone_tcq import create_backbone, feature_width, pretrained_backbone, rest_frozen, supports_checkpointing
from .configuration_tcq import TCQConfig
from .projection_tcq import Projection, rotated_pca, rotated_transform
from .quantization_tcq import ProductQuantizer

# Bytes; torch allocates on such borders.
_CACHE_LINE = 64


@dataclass
class TCQOutput(ModelOutput):
    """Everything that one forward pass gives, for a batch of N images.

    Attributes:
        embeddings: float32 `[N, D]`, each of the M sub-vectors of unit norm.
        codes: uint8 `[N, M]`, the nearest codeword of each sub-vector.
        reconstruction: float32 `[N, D]`, the chosen codewords, concatenated.
        assignments: float32 `[N, M, K]`, softmax over the codewords of each codebook.
    """

    embeddings: torch.FloatTensor | None = None
    codes: torch.Tensor | None = None
    reconstruction: torch.FloatTensor | None = None
    assignments: torch.FloatTensor | None = None


class TCQModel(PreTrainedModel):
    """A timm backbone, a linear projection and a product quantizer.

    `TCQModel(config)` has random weights; `from_timm` starts from a pretrained backbone,
    `initialize` sets projection and codebooks from a set of pictures.

    Args:
        config: A `TCQConfig`.

    Raises:
        ValueError: If the backbone refuses `backbone_kwargs` or cannot pool as the config asks.
    """

    config: TCQConfig
    config_class = TCQConfig
    base_model_prefix = "tcq"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules: list[str] = []
    # A code must not depend on the dtype that the backbone happens to run in.
    _keep_in_fp32_modules_strict = ["projection", "quantizer"]

    def __init__(self, config: TCQConfig) -> None:
        super().__init__(config)
        self.backbone = create_backbone(config)
        self.projection = Projection(feature_width(self.backbone, config), config.embedding_dim)
        self.quantizer = ProductQuantizer(
            config.num_codebooks, config.codebook_size, config.sub_dim, config.softmax_scale
        )
        self.supports_gradient_checkpointing = supports_checkpointing(self.backbone)
        if self.projection.weight.device.type != "meta":
            # timm has initialised its own weights; post_init() must not draw them again.
            for parameter in self.backbone.parameters():
                parameter._is_hf_initialized = True
        self.post_init()

    def forward(self, pixel_values: torch.Tensor | None = None, features: torch.Tensor | None = None) -> TCQOutput:
        """Encode images, or backbone features that were computed before.

        Args:
            pixel_values: `[N, C, image_size, image_size]`, normalised by `TCQImageProcessor`.
            features: `[N, F]`, from `get_image_features`, instead of `pixel_values`.

        Returns:
            A `TCQOutput` whose tensors are float32 (codes uint8) whatever the dtype of the backbone.

        Raises:
            ValueError: Unless exactly one input is given, in the expected shape.
        """
        if (pixel_values is None) == (features is None):
            raise ValueError("give exactly one of pixel_values and features")
        if features is None:
            features = self.get_image_features(pixel_values)
        elif features.ndim != 2 or features.shape[1] != self.projection.in_features:
            raise ValueError(f"features must have shape [N, {self.projection.in_features}], got {list(features.shape)}")
        with torch.autocast(features.device.type, enabled=False):
            projected = self.projection(features.to(self.projection.weight.dtype))
            embeddings = self.quantizer.normalize(projected)
            table = self.quantizer.lookup_table(embeddings)
            codes = self.quantizer.codes(table)
            return TCQOutput(
                embeddings=embeddings,
                codes=codes,
                reconstruction=self.quantizer.reconstruct(codes),
                assignments=self.quantizer.assignments(table),
            )

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pooled backbone features `[N, F]` in the backbone's dtype, from `pixel_values` `[N, C, H, W]`."""
        side, channels = self.config.image_size, self.config.num_channels
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (channels, side, side):
            raise ValueError(
                f"pixel_values must have shape [N, {channels}, {side}, {side}] (num_channels and image_size of the "
                f"config), got {list(pixel_values.shape)}"
            )
        pixel_values = pixel_values.to(self.device, next(self.backbone.parameters()).dtype)
        if self.config.pooling is None:
            return self.backbone(pixel_values)
        tokens = self.backbone.forward_features(pixel_values)
        prefix = self.backbone.num_prefix_tokens
        pooled = tokens[:, 0] if self.config.pooling == "token" else tokens[:, prefix:].mean(dim=1)
        # Where timm averages, its last norm may stand behind the pooling.
        return self.backbone.fc_norm(pooled) if hasattr(self.backbone, "fc_norm") else pooled

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> "TCQModel":
        """Load a saved model from a folder or the Hub, as every transformers model.

        Raises:
            OSError: If there is no such model or its weights are damaged, naming it.
        """
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"model.safetensors of {pretrained_model_name_or_path} is damaged ({error}); save or download it again"
            ) from error
        _align(loaded[0] if isinstance(loaded, tuple) else loaded)  # a tuple with output_loading_info
        return loaded

    @classmethod
    def from_timm(cls, name: str, weights: str | os.PathLike | None = None, **config: Any) -> "TCQModel":
        """A model whose backbone has pretrained timm weights, bit-exact; projection and codebooks are random.

        Args:
            name: A timm model name; its tag chooses the weights.
            weights: A local safetensors file with timm's keys (a classifier in it is left out). `None` lets timm
                fetch the weights from the Hub or its cache.
            **config: Fields of `TCQConfig`.

        Raises:
            FileNotFoundError: If `weights` does not exist.
            ValueError: If `weights` is no safetensors file or does not fit the backbone, naming the tensors.
        """
        model = cls(TCQConfig(backbone=name, **config))
        pretrained = pretrained_backbone(model.config, None if weights is None else Path(weights))
        weights_of = pretrained.state_dict()
        model.backbone.load_state_dict({name: weights_of[name] for name in model.backbone.state_dict()})
        return model.eval()

    @torch.no_grad()
    def initialize(
        self,
        features: torch.Tensor | np.ndarray | None = None,
        *,
        embeddings: Any = None,
        transform: Any = None,
        seed: int = 0,
    ) -> "TCQModel":
        """Fit projection and codebooks to pictures without labels: PCA map, random rotation, spherical k-means.

        The projection becomes the centred PCA of the features, each at root mean square 1, turned by a random
        orthogonal matrix, so that every sub-space carries the same share of the variance. The codebooks become the
        spherical k-means centroids of the resulting sub-vectors.

        A transform takes the place of the PCA and is turned like it: what comes out of it stands in the order of its
        variance, and sub-vectors lose their length, so that the first would count no more than the last. One that is
        `rotated` already stays as it is. The weights are scaled to the size that those of the PCA have.

        Args:
            features: `[n, F]` backbone features of n >= K pictures.
            embeddings: `[n, D]` instead of `features`: sets the codebooks only and leaves the projection.
            transform: A fitted chain of `tcq_hf.index.transforms` from F to D dimensions that begins with `"l2"`, or
                any object whose `linear()` gives weight `[D, F]` and bias `[D]` of a map of features at unit norm.
            seed: Seed of rotation and clustering; equal seeds give equal weights.

        Returns:
            The model itself.

        Raises:
            TypeError: If `transform` has no `linear()`.
            ValueError: If the shape is wrong, a value is not finite, there are fewer rows than codewords, or the
                transform is of other dimensions or of features at the lengths that they have.
        """
        if (features is None) == (embeddings is None):
            raise ValueError("give exactly one of features and embeddings")
        if transform is not None and embeddings is not None:
            raise ValueError("transform starts the projection, which embeddings leave as it is; give features with it")
        name, given, width = (
            ("features", features, self.projection.in_features)
            if embeddings is None
            else ("embeddings", embeddings, self.config.embedding_dim)
        )
        rows = torch.as_tensor(given, dtype=torch.float32, device=self.device)
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"{name} must have shape [n, {width}], got {list(rows.shape)}")
        if len(rows) < self.config.codebook_size:
            raise ValueError(
                f"{name} must have at least codebook_size={self.config.codebook_size} rows, got {len(rows)}; "
                "pass more pictures or choose a smaller codebook_size"
            )
        broken = ~rows.isfinite().all(dim=1)
        if broken.any():
            raise ValueError(f"{name} row {int(broken.nonzero()[0])} is not finite")
        if embeddings is None:
            if transform is None:
                weight, bias = rotated_pca(rows, self.config.embedding_dim, seed)
            else:
                weight, bias = rotated_transform(transform, rows, self.config.embedding_dim, seed)
            self.projection.weight.copy_(weight)
            self.projection.bias.copy_(bias)
            rows = self.projection(rows.to(self.projection.weight.dtype))
        self.quantizer.initialize(rows, seed)
        return self

    def freeze_backbone(self) -> "TCQModel":
        """Stop gradients into the backbone; projection and codebooks stay trainable.

        Parts can be thawed again: `model.backbone.blocks[-2:].requires_grad_(True)`. What is frozen stays in evaluation
        mode, without dropout and with its running statistics, when the model trains.
        """
        self.backbone.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "TCQModel":
        """Set the training mode of everything that is not frozen."""
        frozen = not any(parameter.requires_grad for parameter in self.backbone.parameters())
        if mode and self.training and frozen and not self.backbone.training:
            # The Trainer asks at every step; the hundreds of parts of the backbone stand as they should.
            self.projection.train()
            self.quantizer.train()
            return self
        super().train(mode)
        if mode:
            rest_frozen(self.backbone)
        return self

    def codebooks(self) -> np.ndarray:
        """Unit-norm codebooks, float32 NumPy `[M, K, d]`: what goes into FAISS."""
        return self.quantizer.normalized_codebooks().detach().cpu().numpy()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ProductQuantizer):
            init.normal_(module.codebooks)
        # Rotary and relative-position tables of timm are not in the checkpoint: after a load on the meta device they
        # hold garbage until they are computed again.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.backbone.set_grad_checkpointing(enable)
        self.gradient_checkpointing = enable  # what transformers reads


def _align(model: nn.Module) -> None:
    """Copy weights that lie where a mapped file happens to have them.

    Where they begin between two cache lines, BLAS may round products otherwise: the model would not be the one saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _CACHE_LINE:
            tensor.data = tensor.data.clone()


__all__ = ["TCQModel", "TCQOutput"]
