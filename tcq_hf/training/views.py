"""Pictures in, augmented views out, each with a draw of its own from (seed, epoch, row, view).

A view is made in two steps. `cut` takes the random crop out of the full picture, where the picture is decoded;
`augment` does the rest to a whole batch at once, each image by its own draw, on the device where the batch lies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

# Uniform numbers that one view takes, by use.
_DRAWS = (
    *("area", "aspect", "left", "top"),
    *("flip", "rotation", "zoom", "shear", "shift_x", "shift_y"),
    *("jitter", "brightness", "contrast", "saturation", "hue", "grey"),
    *("blur", "sigma"),
)
_COLUMN = {name: column for column, name in enumerate(_DRAWS)}

# Luma of ITU-R BT.601, and RGB to YIQ, in whose IQ plane hue is an angle.
_LUMA = (0.299, 0.587, 0.114)
_RGB_TO_YIQ = (_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))

# Side in pixels that `sigma` refers to.
_SIGMA_SIDE = 224


@dataclass(frozen=True)
class ViewPreset:
    """Ranges that the draws of a view come from.

    Args:
        area: Smallest and largest share of the picture that a crop keeps.
        aspect: Smallest and largest ratio of width to height of a crop; gives way where the picture is too narrow.
        flip: Probability of a horizontal flip.
        rotation: Largest rotation in degrees, either way.
        zoom: Smallest and largest scale.
        shear: Largest horizontal shear in degrees, either way.
        shift: Largest shift as a share of the side, either way.
        jitter: Probability of colour jitter.
        brightness: The brightness is scaled by 1 - brightness to 1 + brightness.
        contrast: Likewise the difference to the mean grey.
        saturation: Likewise the difference to grey.
        hue: Largest turn of the hue as a share of the full circle, either way.
        grey: Probability of losing all colour.
        blur: Probability of a Gaussian blur.
        sigma: Its smallest and largest deviation in pixels of a picture of side 224.
    """

    area: tuple[float, float] = (1.0, 1.0)
    aspect: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    rotation: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    shift: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "brightness", "contrast", "saturation", "hue", "shift"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {getattr(self, name)}")
        for name, most in (("area", 1), ("aspect", math.inf), ("zoom", math.inf), ("sigma", math.inf)):
            low, high = getattr(self, name)
            if not (0 < low or (name == "sigma" and low == 0)) or not low <= high <= most or high == math.inf:
                raise ValueError(f"{name} must be a range of positive numbers up to {most}, got {(low, high)}")
        for name in ("rotation", "shear"):
            if not 0 <= getattr(self, name) < (90 if name == "shear" else math.inf):
                raise ValueError(f"{name} must be an angle of at least 0 degrees, got {getattr(self, name)}")


# The augmentation of MeCoQ, arXiv 2109.05205.
_PHOTO = ViewPreset(
    area=(0.5, 1.0),
    aspect=(3 / 4, 4 / 3),
    flip=0.5,
    jitter=0.7,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey=0.2,
    blur=0.5,
)

PRESETS = {
    "photo": _PHOTO,
    # Pictures of some dozen pixels a side: a blur would leave nothing.
    "small": replace(_PHOTO, blur=0.0),
    # Digits, letters, scans: no mirror images, no colour, the whole picture moved. Chosen on MNIST (see the demo).
    "grey": ViewPreset(
        rotation=20.0,
        zoom=(0.8, 1.2),
        shear=20.0,
        shift=0.12,
        jitter=1.0,
        brightness=0.2,
    ),
}


def draw_view(seed: int, epoch: int, row: int, view: int) -> np.ndarray:
    """The uniform numbers of one view, float32, a function of the four arguments alone."""
    return np.random.default_rng((seed, epoch, row, view)).random(len(_DRAWS), dtype=np.float32)


def cut(picture: PIL.Image.Image, draw: np.ndarray, preset: ViewPreset, side: int) -> np.ndarray:
    """The random crop of a view, scaled to the square input of the model.

    Args:
        picture: An 8-bit picture, RGB or grey.
        draw: From `draw_view`.
        preset: Ranges of share and aspect.
        side: Side of the result in pixels.

    Returns:
        uint8 `[C, side, side]`.
    """
    area = _between(preset.area, draw[_COLUMN["area"]]) * picture.width * picture.height
    aspect = math.exp(_between((math.log(preset.aspect[0]), math.log(preset.aspect[1])), draw[_COLUMN["aspect"]]))
    width = min(math.sqrt(area * aspect), picture.width)
    height = min(area / width, picture.height)
    width = min(area / height, picture.width)
    left, top = draw[_COLUMN["left"]] * (picture.width - width), draw[_COLUMN["top"]] * (picture.height - height)
    box = (float(left), float(top), float(min(left + width, picture.width)), float(min(top + height, picture.height)))
    pixels = np.asarray(picture.resize((side, side), PIL.Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


@torch.no_grad()
def augment(
    crops: torch.Tensor, draws: torch.Tensor, preset: ViewPreset, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Flip, move, colour, blur and normalise a batch of crops, each by its own draw.

    Brightness, saturation, hue and grey are one linear map of the colours of an image; contrast stretches the result
    about its mean luma. Hue turns the chroma plane of YIQ.

    Args:
        crops: uint8 `[n, C, S, S]` with 3 channels, or 1, on any device.
        draws: float32 `[n, draws]`, the rows of `draw_view`.
        preset: Ranges.
        mean: Mean of each channel that the backbone expects, of values in 0 to 1.
        std: Deviation of each channel.

    Returns:
        float32 `[n, C, S, S]` on the device of the crops: `pixel_values`.

    Raises:
        ValueError: Unless there is one draw for each crop.
    """
    if draws.shape != (len(crops), len(_DRAWS)):
        raise ValueError(f"draws must have shape {[len(crops), len(_DRAWS)]}, one row a crop, got {list(draws.shape)}")
    draw = dict(zip(_DRAWS, draws.to(crops.device).unbind(dim=1), strict=True))
    images = crops.float() / 255
    if preset.flip:
        images = torch.where((draw["flip"] < preset.flip)[:, None, None, None], images.flip(3), images)
    if preset.rotation or preset.shear or preset.shift or preset.zoom != (1.0, 1.0):
        images = _moved(images, draw, preset)
    if preset.jitter or preset.grey:
        images = _coloured(images, draw, preset)
    if preset.blur:
        images = _blurred(images, draw, preset)
    shape = (1, -1, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def _between(bounds: tuple[float, float], draw: float | torch.Tensor) -> float | torch.Tensor:
    return bounds[0] + draw * (bounds[1] - bounds[0])


def _moved(images: torch.Tensor, draw: dict[str, torch.Tensor], preset: ViewPreset) -> torch.Tensor:
    """Rotate, scale, shear and shift about the centre; the border goes on outside."""
    angle = _between((-preset.rotation, preset.rotation), draw["rotation"]).deg2rad()
    shear = _between((-preset.shear, preset.shear), draw["shear"]).deg2rad().tan()
    scale = 1 / _between(preset.zoom, draw["zoom"])
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # Sides are 2 long in the coordinates of affine_grid.
    shift_x, shift_y = (_between((-2 * preset.shift, 2 * preset.shift), draw[name]) for name in ("shift_x", "shift_y"))
    matrix = torch.stack([cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _coloured(images: torch.Tensor, draw: dict[str, torch.Tensor], preset: ViewPreset) -> torch.Tensor:
    def factor(name: str, strength: float) -> torch.Tensor:
        return torch.where(jittered, _between((1 - strength, 1 + strength), draw[name]), 1.0)

    jittered = draw["jitter"] < preset.jitter
    brightness, contrast = factor("brightness", preset.brightness), factor("contrast", preset.contrast)
    channels = images.shape[1]
    luma = images.new_tensor(_LUMA if channels == 3 else (1.0,))
    change = brightness[:, None, None] * torch.eye(channels, device=images.device)
    if channels == 3:
        change = change @ _colour_change(draw, jittered, factor("saturation", preset.saturation), preset)
    # The mean of a linear map is the map of the mean.
    middle = (change @ images.mean(dim=(2, 3))[:, :, None]).transpose(1, 2) @ luma[:, None]
    offset = (1 - contrast)[:, None, None] * middle
    changed = torch.baddbmm(offset, contrast[:, None, None] * change, images.flatten(2))
    return changed.clamp_(0, 1).view_as(images)


def _colour_change(
    draw: dict[str, torch.Tensor], jittered: torch.Tensor, saturation: torch.Tensor, preset: ViewPreset
) -> torch.Tensor:
    """The linear map `[n, 3, 3]` that turns the hue, changes the saturation and takes the colour away."""
    to_yiq = torch.tensor(_RGB_TO_YIQ, device=jittered.device)
    turn = torch.where(jittered, _between((-preset.hue, preset.hue), draw["hue"]), 0.0) * (2 * math.pi)
    saturation = torch.where(draw["grey"] < preset.grey, 0.0, saturation)
    cos, sin, zero = turn.cos() * saturation, turn.sin() * saturation, torch.zeros_like(turn)
    chroma = torch.stack([zero + 1, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ chroma @ to_yiq


def _blurred(images: torch.Tensor, draw: dict[str, torch.Tensor], preset: ViewPreset) -> torch.Tensor:
    """Gaussian blur of the images whose draw says so, in two passes, the border reflected."""
    chosen = (draw["blur"] < preset.blur).nonzero()[:, 0]
    count, channels, side = len(chosen), images.shape[1], images.shape[3]
    if not count or side < 2:
        return images
    sigma = _between(preset.sigma, draw["sigma"][chosen]) * side / _SIGMA_SIDE
    radius = min(math.ceil(2 * preset.sigma[1] * side / _SIGMA_SIDE), side - 1)
    steps = torch.arange(-radius, radius + 1, device=images.device)
    weights = (-(steps**2) / (2 * sigma[:, None] ** 2).clamp_min(1e-12)).softmax(dim=1).repeat_interleave(channels, 0)
    planes = images[chosen].view(1, count * channels, side, side)
    planes = F.conv2d(
        F.pad(planes, (radius, radius, 0, 0), "reflect"), weights[:, None, None, :], groups=count * channels
    )
    planes = F.conv2d(
        F.pad(planes, (0, 0, radius, radius), "reflect"), weights[:, None, :, None], groups=count * channels
    )
    return images.index_copy(0, chosen, planes.view(count, channels, side, side))
