"""TCQConfig: which backbone, how wide the embedding, how many codebooks of what size."""

import difflib
import math
from typing import Any, Literal

import timm
from huggingface_hub.dataclasses import strict
from timm.models import PretrainedCfg, get_pretrained_cfg
from transformers import PreTrainedConfig

# timm arguments that this config decides itself: they have a field of their own or would change the output.
_RESERVED_BACKBONE_KWARGS = {
    "img_size": "image_size",
    "in_chans": "num_channels",
    "global_pool": "pooling",
    "pretrained": "TCQModel.from_timm",
    "checkpoint_path": "TCQModel.from_timm(weights=...)",
    "num_classes": None,
    "features_only": None,
}

# Keywords that transformers itself writes into config.json or passes on, beside its dataclass fields.
_TRANSFORMERS_KEYWORDS = {
    *PreTrainedConfig().to_dict(),
    *PreTrainedConfig.__dataclass_fields__,
    *("attn_implementation", "auto_map", "custom_pipelines", "experts_implementation", "name_or_path", "num_labels"),
    *("torch_dtype", "use_cache"),
}


def timm_defaults(backbone: str) -> PretrainedCfg:
    """What timm knows about a backbone: input size, crop, mean, pretrained weights.

    Args:
        backbone: A timm model name, with or without a pretrained tag.

    Raises:
        ValueError: If the installed timm has no such model or tag.
    """
    if not timm.is_model(backbone):
        close = difflib.get_close_matches(backbone.split(".")[0], timm.list_models(), n=3)
        hint = f"; closest names: {', '.join(close)}" if close else ""
        raise ValueError(
            f"backbone must be a timm model name, got {backbone!r}, unknown to timm {timm.__version__}{hint}"
        )
    try:
        return get_pretrained_cfg(backbone)
    except RuntimeError as error:
        tags = timm.list_pretrained(backbone.split(".")[0] + ".*")
        raise ValueError(
            f"backbone {backbone!r} has a pretrained tag that timm {timm.__version__} does not know; "
            f"known: {', '.join(tags) or 'none, use the name without a tag'}"
        ) from error


def default_image_size(backbone: str) -> int:
    """Side in pixels of the square input that a backbone has by default; ValueError where it is not square."""
    height, width = timm_defaults(backbone).input_size[1:]
    if height != width:
        raise ValueError(f"backbone {backbone!r} wants {height}x{width} input by default; set image_size")
    return height


@strict
class TCQConfig(PreTrainedConfig):
    """Configuration of a `TCQModel`: a timm backbone, a linear projection and M codebooks of K unit-norm codewords.

    Fields are keyword-only. `embedding_dim` is D, `num_codebooks` M, `codebook_size` K; one image costs
    `code_bytes` = ceil(M log2 K / 8) bytes.

    Attributes:
        backbone: A timm model name, optionally with a pretrained tag.
        backbone_kwargs: Further keyword arguments of `timm.create_model`.
        pooling: `"token"` takes the class token, `"avg"` the mean of the patch tokens, `None` what timm does for this
            backbone (the class token for a plain ViT, the average for a convolutional network).
        image_size: Side of the square input in pixels; `None` takes the backbone's own.
        num_channels: Channels of the input image.
        embedding_dim: Width D of the embedding, a multiple of `num_codebooks`.
        num_codebooks: Number M of sub-spaces.
        codebook_size: Codewords K in one codebook, a power of two from 2 to 256.
        softmax_scale: Scale alpha of the soft assignment `softmax(alpha <z, c>)`.

    Raises:
        ValueError: For an unknown or misspelt field, and for a backbone that timm does not know.
        huggingface_hub.errors.StrictDataclassError: For a wrong type or an impossible combination, naming the field.
    """

    model_type = "tcq"

    backbone: str = "vit_base_patch16_224.augreg_in21k"
    backbone_kwargs: dict[str, Any] | None = None
    pooling: Literal["token", "avg"] | None = None
    image_size: int | None = None
    num_channels: int = 3
    embedding_dim: int = 128
    num_codebooks: int = 8
    codebook_size: int = 256
    softmax_scale: float | int = 10.0

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in _TRANSFORMERS_KEYWORDS and not name.startswith("_"):
                close = difflib.get_close_matches(name, type(self).__dataclass_fields__, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"TCQConfig has no field {name!r}{hint}")
        if self.image_size is None and isinstance(self.backbone, str):
            self.image_size = default_image_size(self.backbone)
        super().__post_init__(**kwargs)

    @property
    def sub_dim(self) -> int:
        """Width d = D / M of one sub-vector."""
        return self.embedding_dim // self.num_codebooks

    @property
    def bits(self) -> int:
        """Bits of one code, M log2 K."""
        return self.num_codebooks * (self.codebook_size.bit_length() - 1)

    @property
    def code_bytes(self) -> int:
        """Bytes of one packed code, ceil(bits / 8)."""
        return (self.bits + 7) // 8

    def validate_backbone(self) -> None:
        """The backbone exists and its keyword arguments do not contradict this config."""
        timm_defaults(self.backbone)
        for name in self.backbone_kwargs or {}:
            if name in _RESERVED_BACKBONE_KWARGS:
                instead = _RESERVED_BACKBONE_KWARGS[name]
                raise ValueError(
                    f"backbone_kwargs must not hold {name!r}" + (f"; use {instead} instead" if instead else "")
                )

    def validate_input(self) -> None:
        """Image side and channels are positive."""
        for name in ("image_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def validate_codebooks(self) -> None:
        """D, M, K and alpha fit together."""
        dim, books, words = self.embedding_dim, self.num_codebooks, self.codebook_size
        if books < 1:
            raise ValueError(f"num_codebooks must be at least 1, got {books}")
        if dim < 1 or dim % books:
            raise ValueError(f"embedding_dim must be a positive multiple of num_codebooks={books}, got {dim}")
        if not 2 <= words <= 256 or words & (words - 1):
            raise ValueError(f"codebook_size must be a power of two from 2 to 256, got {words}")
        if not 0 < self.softmax_scale < math.inf:
            raise ValueError(f"softmax_scale must be positive and finite, got {self.softmax_scale}")


__all__ = ["TCQConfig"]
