"""TCQImageProcessor: pictures of any kind in, the backbone's `pixel_values` out."""

import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling, SizeDict

from .configuration_tcq import default_image_size, timm_defaults

# Long side of a scaled picture, in units of the crop, past which only the cropped part is computed.
_LONGEST_SCALED = 512


class TCQImageProcessor(PilBackend):
    """timm's evaluation transform as a transformers image processor, equal to it bit by bit.

    Takes a picture or a list of pictures: PIL images, paths, URLs, encoded bytes, `{"path", "bytes"}` rows of
    `datasets`, uint8 or uint16 arrays `[H, W]`, `[H, W, C]`, `[C, H, W]`. EXIF rotation is applied, transparency is
    laid on white, 16-bit pictures are scaled to 8 bits; CMYK, palette and grey become RGB (or grey, where `image_mean`
    has one channel). Gives `pixel_values` float32 `[N, C, H, W]`.
    """

    size = {"shortest_edge": 248}
    crop_size = {"height": 224, "width": 224}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_convert_rgb = do_resize = do_center_crop = do_rescale = do_normalize = True

    @classmethod
    def from_backbone(cls, name: str, image_size: int | None = None, num_channels: int = 3) -> "TCQImageProcessor":
        """The processor of a timm backbone.

        Args:
            name: A timm model name, with or without a pretrained tag.
            image_size: Side of the square output in pixels; `None` takes the backbone's own.
            num_channels: 3, or 1 for a grey backbone (timm's mean and deviation averaged over the channels).

        Raises:
            ValueError: If timm does not know the name, or its transform is one that this class cannot reproduce.
        """
        defaults = timm_defaults(name)
        if num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 or 3 for pictures, got {num_channels}")
        if defaults.crop_mode not in ("center", "squash") or defaults.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(
                f"the evaluation transform of {name!r} (crop_mode={defaults.crop_mode!r}, "
                f"interpolation={defaults.interpolation!r}) is not supported; crop_mode must be center or squash, "
                "interpolation bicubic or bilinear"
            )
        side = default_image_size(name) if image_size is None else image_size
        if side < 1:
            raise ValueError(f"image_size must be at least 1, got {side}")
        scaled = math.floor(side / defaults.crop_pct)
        mean, std = (
            values if num_channels == 3 else (sum(values) / len(values),) for values in (defaults.mean, defaults.std)
        )
        return cls(
            size={"shortest_edge": scaled} if defaults.crop_mode == "center" else {"height": scaled, "width": scaled},
            crop_size={"height": side, "width": side},
            resample=getattr(PILImageResampling, defaults.interpolation.upper()),
            image_mean=list(mean),
            image_std=list(std),
        )

    def process_image(self, image: Any, image_mean: Sequence[float] | None = None, **kwargs: Any) -> PIL.Image.Image:
        """One picture of any kind as an upright 8-bit PIL image, RGB or grey.

        Raises:
            TypeError: If it is no picture.
            ValueError: If its pixel format has no defined 8-bit form.
            OSError: If the file is missing, damaged or no image.
        """
        mode = "L" if len(image_mean or self.image_mean) == 1 else "RGB"
        return _to_mode(PIL.ImageOps.exif_transpose(self._open(image)), mode)

    def _open(self, image: Any) -> PIL.Image.Image:
        if isinstance(image, PIL.Image.Image):
            return image
        if isinstance(image, dict) and {"path", "bytes"} <= image.keys():
            image = image["path"] if image["bytes"] is None else image["bytes"]
        if isinstance(image, bytes):
            return PIL.Image.open(io.BytesIO(image))
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            return self.fetch_images(image)
        if isinstance(image, (str, os.PathLike)):
            return PIL.Image.open(image)
        if isinstance(image, (np.ndarray, torch.Tensor)):
            return _from_array(np.asarray(image))
        raise TypeError(
            f"a picture must be a PIL image, path, URL, bytes, array or datasets row, got {type(image).__name__}"
        )

    def _prepare_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> list[PIL.Image.Image]:
        batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        return [self.process_image(image, **kwargs) for image in (images if batch else [images])]

    def _preprocess(
        self,
        images: list[PIL.Image.Image],
        do_resize: bool,
        size: SizeDict,
        resample: int,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        scale = np.float32(1 / rescale_factor) if do_rescale else None
        mean, std = (np.float32(image_mean), np.float32(image_std)) if do_normalize else (None, None)
        cropped = []
        for image in images:
            scaled = _scaled_size(image, size) if do_resize else image.size
            crop = (crop_size.width, crop_size.height) if do_center_crop else scaled
            cropped.append(_resize_and_crop(image, scaled, crop, resample))
        if not images:
            raise ValueError("there are no pictures to process")
        shapes = [(len(image.getbands()), image.height, image.width) for image in cropped]
        one_shape = len(set(shapes)) == 1
        pixel_values = (
            np.empty((len(cropped), *shapes[0]), np.float32)
            if one_shape
            else [np.empty(shape, np.float32) for shape in shapes]
        )
        for image, values in zip(cropped, pixel_values, strict=True):
            _fill(values, image, scale, mean, std)
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


def _to_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    if image.mode.startswith("I"):
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(f"a picture of 32-bit integers must hold 0 to 65535, got {array.min()} to {array.max()}")
        image = _from_array(array.astype(np.uint16))
    elif image.mode == "F":
        raise ValueError("a picture of float pixels (mode F) has no defined brightness; convert it to 8 or 16 bits")
    elif image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = PIL.Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    image.load()
    return image if image.mode == mode else image.convert("RGB").convert(mode)


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        raise ValueError(f"a picture array must have shape [H, W], [H, W, C] or [C, H, W], got {list(array.shape)}")
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"a picture array must be uint8 or uint16, got {array.dtype}")
    if array.dtype == np.uint16:
        array = (array.astype(np.float32) / 257 + 0.5).astype(np.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _scaled_size(image: PIL.Image.Image, size: SizeDict) -> tuple[int, int]:
    """Width and height after torchvision's Resize: the long side is rounded down."""
    if size.height and size.width:
        return size.width, size.height
    if not size.shortest_edge:
        raise ValueError(f"size must have 'shortest_edge', or 'height' and 'width', got {dict(size)}")
    short, long = size.shortest_edge, int(size.shortest_edge * max(image.size) / min(image.size))
    return (short, long) if image.width <= image.height else (long, short)


def _resize_and_crop(
    image: PIL.Image.Image, scaled: tuple[int, int], crop: tuple[int, int], resample: int
) -> PIL.Image.Image:
    """Resize to `scaled` and cut `crop` from the middle."""
    left, top = (round((whole - part) / 2) for whole, part in zip(scaled, crop, strict=True))
    if max(scaled) > _LONGEST_SCALED * max(crop):
        # A 1 x 20,000 picture would grow to gigabytes before the crop: compute the cropped part alone. Pillow rounds
        # and clips the two ways differently, so all other pictures take timm's way below.
        step_x, step_y = image.width / scaled[0], image.height / scaled[1]
        box = (left * step_x, top * step_y, (left + crop[0]) * step_x, (top + crop[1]) * step_y)
        return image.resize(crop, resample, box=box)
    image = image if image.size == scaled else image.resize(scaled, resample)
    return image if image.size == crop else image.crop((left, top, left + crop[0], top + crop[1]))


def _fill(
    values: np.ndarray,
    image: PIL.Image.Image,
    scale: np.float32 | None,
    mean: np.ndarray | None,
    std: np.ndarray | None,
) -> None:
    """Write an image into float32 `[C, H, W]`, scaled and normalised in the order of torchvision's operations."""
    for c, band in enumerate(image.split()):
        channel = values[c]
        np.copyto(channel, np.asarray(band))
        if scale is not None:
            channel /= scale
        if mean is not None:
            channel -= mean[c]
            channel /= std[c]


__all__ = ["TCQImageProcessor"]
