"""views: each operation against a slow reference, in closed form, under symmetry; a draw of its own for each view."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import torch
from torchvision.transforms import v2

from tcq_hf.training.views import _COLUMN, _DRAWS, PRESETS, ViewPreset, augment, cut, draw_view

# Values of at most 1 through some dozen float32 roundings of 6e-8 each; a step of uint8 is 400 times as much.
TOLERANCE = 1e-5
# Positions inside a picture of some ten pixels, where a value changes by up to 1 a pixel.
MOVED_TOLERANCE = 1e-4
# Pillow rounds to a whole level after each of two passes; the weights of the second sum to less than 1.4 in size.
PILLOW_LEVELS = 0.5 * 1.4 + 0.5

LUMA = np.array([0.299, 0.587, 0.114])
TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
BICUBIC = PIL.Image.Resampling.BICUBIC

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")),
]

# Everything happens to every image.
ALL = ViewPreset(
    area=(0.3, 0.9),
    aspect=(0.5, 2.0),
    flip=0.5,
    rotation=30.0,
    zoom=(0.7, 1.4),
    shear=15.0,
    shift=0.2,
    jitter=1.0,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.2,
    grey=0.3,
    blur=0.6,
    sigma=(5.0, 30.0),
)


def random_crops(count, channels=3, side=12, seed=0, low=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count, channels, side, side), generator=generator).byte()


def random_draws(count, seed=0):
    return torch.from_numpy(np.stack([draw_view(seed, 0, row, 0) for row in range(count)]))


def middle_draws(count=1, **values):
    """Draws from the middle of every range, but for the given columns."""
    draws = torch.full((count, len(_DRAWS)), 0.5)
    for name, value in values.items():
        draws[:, _COLUMN[name]] = torch.as_tensor(value, dtype=torch.float32)
    return draws


def plain(crops, draws, preset):
    """Views before they are normalised, float32 in 0 to 1."""
    return augment(crops, draws, preset, [0.0] * crops.shape[1], [1.0] * crops.shape[1])


def pairwise_different(rows, least=1e-4):
    return all(float(np.abs(np.asarray(a) - np.asarray(b)).max()) > least for a, b in itertools.combinations(rows, 2))


# --- Draws -----------------------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_epoch_row_and_view_alone():
    first = draw_view(3, 1, 41, 0)
    np.random.seed(9)  # noqa: NPY002
    torch.manual_seed(9)
    draw_view(0, 0, 0, 0)
    np.testing.assert_array_equal(draw_view(3, 1, 41, 0), first)
    assert first.dtype == np.float32
    assert first.shape == (len(_DRAWS),)


def test_draws_of_any_two_views_differ():
    # 2 x 3 x 4 x 3 views; equal arguments in another order are other views too.
    draws = [draw_view(*place) for place in itertools.product(range(2), range(3), range(4), range(3))]
    assert len({draw.tobytes() for draw in draws}) == 72
    # 24 bits a number: two of 72 x 16 are equal at one place by chance with probability 72^2 / 2 x 16 / 2^24 = 0.2 %.
    assert all((a != b).all() for a, b in itertools.combinations(draws, 2))


def test_draws_are_uniform_and_independent():
    count = 4000
    draws = np.stack([draw_view(5, row % 7, row, row % 2) for row in range(count)])
    assert draws.min() >= 0
    assert draws.max() < 1
    # Five deviations of the mean of uniform numbers, 1 / sqrt(12 n); of a correlation, 1 / sqrt(n).
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 5 / math.sqrt(12 * count)
    assert np.abs(np.corrcoef(draws.T) - np.eye(len(_DRAWS))).max() < 5 / math.sqrt(count)
    neighbours = [np.corrcoef(draws[:-1, column], draws[1:, column])[0, 1] for column in range(len(_DRAWS))]
    assert np.abs(neighbours).max() < 5 / math.sqrt(count)


@pytest.mark.parametrize("place", [(-1, 0, 0, 0), (0, -1, 0, 0), (0, 0, -1, 0), (0, 0, 0, -1)])
def test_negative_numbers_have_no_draw(place):
    with pytest.raises(ValueError, match="non-negative"):
        draw_view(*place)


# --- Crops -----------------------------------------------------------------------------------------------------------


def box_of(size, draw, preset):
    """The box that a crop asks Pillow for."""
    boxes = []

    def resize(side, resample, box, reducing_gap):
        boxes.append(box)
        return PIL.Image.new("RGB", side)

    cut(SimpleNamespace(width=size[0], height=size[1], resize=resize), draw, preset, 4)
    return boxes[0]


@pytest.mark.parametrize("size", [(64, 64), (40, 48), (1, 1), (500, 3), (2, 900), (8000, 6000)])
@pytest.mark.parametrize("preset", ["photo", "small", "grey"])
def test_a_crop_lies_inside_the_picture_with_its_share_and_aspect(size, preset):
    preset = PRESETS[preset]
    rounding = 1e-5
    for row in range(200):
        draw = draw_view(0, 0, row, 0)
        left, top, right, bottom = box_of(size, draw, preset)
        width, height = right - left, bottom - top
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        share, aspect = width * height / (size[0] * size[1]), width / height
        assert share <= preset.area[1] * (1 + rounding)
        if width < size[0] * (1 - rounding) and height < size[1] * (1 - rounding):
            # In float32 an edge far from the origin is known to 6e-8 of the side of the picture.
            slack = rounding + 4 * 6e-8 * max(size) / min(width, height)
            assert preset.area[0] * (1 - slack) <= share
            assert preset.aspect[0] * (1 - slack) <= aspect <= preset.aspect[1] * (1 + slack)


def test_crops_spread_over_shares_aspects_and_places():
    preset, count = ViewPreset(area=(0.1, 0.4), aspect=(0.8, 1.25)), 2000
    boxes = np.array([box_of((100, 100), draw_view(1, 0, row, 0), preset) for row in range(count)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # Nothing is clipped: sqrt(0.4 x 1.25) = 0.71. Share and logarithm of the aspect are uniform: five deviations.
    bound = 5 / math.sqrt(12 * count)
    assert abs((width * height / 1e4).mean() - 0.25) < 0.3 * bound
    assert abs(np.log(width / height).mean()) < 2 * math.log(1.25) * bound
    # So are the places where the box fits; both ends are reached.
    for start, length in ((boxes[:, 0], width), (boxes[:, 1], height)):
        place = start / (100 - length)
        assert abs(place.mean() - 0.5) < bound
        assert place.min() < 0.01
        assert place.max() > 0.99


@pytest.mark.parametrize("seed", range(6))
def test_a_crop_of_a_ramp_tells_its_box(seed):
    # Red is the column, green the row: a linear function that the symmetric weights of bicubic reproduce.
    y, x = np.mgrid[:200, :240]
    picture = PIL.Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    preset, side = ViewPreset(area=(0.3, 0.6), aspect=(0.8, 1.25)), 48
    draw = draw_view(seed, 0, 0, 0)
    left, top, right, bottom = box_of(picture.size, draw, preset)
    found = cut(picture, draw, preset, side)
    steps = (np.arange(side) + 0.5) / side
    inner = slice(4, -4)  # where the support of the weights ends inside the picture
    columns, rows = left + steps * (right - left) - 0.5, top + steps * (bottom - top) - 0.5
    assert np.abs(found[0][:, inner] - columns[None, inner]).max() <= PILLOW_LEVELS
    assert np.abs(found[1][inner] - rows[inner, None]).max() <= PILLOW_LEVELS


def integer_box():
    """Draws whose box is (8, 16, 40, 48) in a picture of 64 x 64: a quarter of it."""
    preset = ViewPreset(area=(0.25, 0.25))
    return (8, 16, 40, 48), middle_draws(left=0.25, top=0.5)[0].numpy(), preset


@pytest.mark.parametrize("side", [16, 32, 50])
def test_a_crop_of_whole_pixels_equals_pillows_crop_and_resize(side):
    box, draw, preset = integer_box()
    picture = PIL.Image.fromarray(random_crops(1, side=64, seed=1)[0].permute(1, 2, 0).numpy())
    assert box_of(picture.size, draw, preset) == box
    found = cut(picture, draw, preset, side)
    cropped = np.asarray(picture.crop(box).resize((side, side), BICUBIC)).transpose(2, 0, 1)
    # At its edge a box still sees the pixels outside, two pixels of the crop or of the picture, which are more.
    edge = math.ceil(2 * max(1, side / 32)) + 1
    inner = slice(edge, -edge)
    np.testing.assert_array_equal(found[:, inner, inner], cropped[:, inner, inner])


def bicubic_loop(pixels, box, side):
    """Antialiased bicubic (a = -0.5) of one channel inside a box, weight by weight in float64."""

    def weight(t):
        t = abs(t)
        return 1.5 * t**3 - 2.5 * t**2 + 1 if t < 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0

    def matrix(start, stop, length):
        step = (stop - start) / side
        scale = max(step, 1.0)
        rows = []
        for k in range(side):
            centre = start + (k + 0.5) * step
            weights = [weight((i + 0.5 - centre) / scale) for i in range(length)]
            rows.append([value / sum(weights) for value in weights])
        return np.array(rows)

    height, width = pixels.shape
    return (matrix(box[1], box[3], height) @ pixels @ matrix(box[0], box[2], width).T).clip(0, 255)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", [6, 14])
def test_a_crop_equals_the_bicubic_loop(seed, side):
    # Smooth enough that no value leaves 0 to 255 between the passes, where Pillow would clip it.
    pixels = np.random.default_rng(seed).integers(64, 192, (20, 24)).astype(np.uint8)
    draw, preset = draw_view(seed, 0, 0, 0), PRESETS["photo"]
    found = cut(PIL.Image.fromarray(pixels), draw, preset, side)
    assert found.shape == (1, side, side)
    expected = bicubic_loop(pixels.astype(float), box_of((24, 20), draw, preset), side)
    assert np.abs(found[0] - expected).max() <= PILLOW_LEVELS


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_crop_is_whole_in_memory_and_even_where_the_picture_is(mode, channels):
    colour = (200, 30, 40)[:channels]
    found = cut(PIL.Image.new(mode, (33, 20), colour if channels == 3 else 200), draw_view(0, 0, 0, 0), ALL, 8)
    assert found.dtype == np.uint8
    assert found.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(found, np.broadcast_to(np.uint8(colour)[:, None, None], (channels, 8, 8)))


def test_a_large_picture_is_cut_almost_as_without_the_shortcut():
    # Pillow averages blocks of pixels first where they are at least three times finer than the result.
    y, x = np.mgrid[:900, :900] / 900
    picture = PIL.Image.fromarray((128 + 100 * np.sin(7 * x + 3 * y)).astype(np.uint8))
    whole = np.asarray(picture.resize((24, 24), BICUBIC)).astype(int)
    assert np.abs(cut(picture, middle_draws()[0].numpy(), ViewPreset(), 24)[0] - whole).max() <= 2


def test_the_neutral_preset_is_a_plain_resize_and_normalise():
    picture = PIL.Image.fromarray(random_crops(1, side=40)[0].permute(1, 2, 0).numpy())
    for row in range(5):
        draw = draw_view(0, 0, row, 0)
        found = cut(picture, draw, ViewPreset(), 24)
        np.testing.assert_array_equal(found, np.asarray(picture.resize((24, 24), BICUBIC)).transpose(2, 0, 1))
        mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.3])
        view = augment(torch.from_numpy(found)[None], torch.from_numpy(draw)[None], ViewPreset(), mean, std)
        expected = (found / 255 - mean[:, None, None]) / std[:, None, None]
        assert np.abs(view[0].numpy() - expected).max() < TOLERANCE


# --- One draw an image -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 1])
def test_equal_images_come_out_pairwise_different(channels):
    crops = random_crops(1, channels).repeat(24, 1, 1, 1)
    assert pairwise_different(plain(crops, random_draws(24), ALL))
    for name, values in {"flip": {"flip": 0.5}, "blur": {"blur": 0.5}}.items():
        views = plain(crops, random_draws(24), dataclasses.replace(ViewPreset(), **values))
        assert not pairwise_different(views), f"{name} alone leaves half of the images as they are"


@pytest.mark.parametrize(
    "trap", [v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomAffine(20, (0.1, 0.1)), v2.RandomResizedCrop(12)]
)
def test_torchvision_draws_once_for_a_whole_batch(trap):
    # Why `augment` exists: the same call gives every image of a batch one and the same draw.
    views = trap(random_crops(1).repeat(8, 1, 1, 1))
    assert (views == views[0]).all()
    assert pairwise_different(plain(random_crops(1).repeat(8, 1, 1, 1), random_draws(8), ALL))


@pytest.mark.parametrize("preset", ["photo", "small", "grey"])
def test_all_views_of_one_picture_differ(preset, pictures):
    channels = 1 if preset == "grey" else 3
    picture = pictures[0].convert("L") if channels == 1 else pictures[0]
    preset = PRESETS[preset]
    draws = np.stack([draw_view(0, *place) for place in itertools.product(range(2), range(5), range(2))])
    crops = torch.from_numpy(np.stack([cut(picture, draw, preset, 32) for draw in draws]))
    assert pairwise_different(plain(crops, torch.from_numpy(draws), preset))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [3, 1])
def test_a_view_does_not_depend_on_the_other_images_or_its_place(channels, device):
    crops, draws = random_crops(9, channels).to(device), random_draws(9)
    together = plain(crops, draws, ALL)
    assert together.device.type == device
    order = torch.tensor([4, 0, 8, 2, 2, 7])
    torch.testing.assert_close(plain(crops[order], draws[order], ALL), together[order], atol=TOLERANCE, rtol=0)
    for i in range(9):
        alone = plain(crops[i : i + 1], draws[i : i + 1], ALL)[0]
        torch.testing.assert_close(alone, together[i], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(
        together.cpu(), plain(crops.cpu(), draws, ALL), atol=MOVED_TOLERANCE, rtol=0
    )  # every device gives the same views


def test_the_crops_stay_as_they_were_and_need_no_gradient():
    crops = random_crops(4)
    before = crops.clone()
    assert not plain(crops, random_draws(4), ALL).requires_grad
    assert torch.equal(crops, before)


@pytest.mark.parametrize("name", ["flip", "jitter", "grey", "blur"])
def test_probability_0_never_and_1_always(name):
    crops = random_crops(50)
    rest = {"brightness": 0.8, "sigma": (60.0, 60.0)}
    draws = random_draws(50)
    draws[0, _COLUMN[name]] = 0.0
    draws[1, _COLUMN[name]] = float(np.nextafter(np.float32(1), np.float32(0)))
    never = plain(crops, draws, ViewPreset(**rest, **{name: 0.0}))
    assert torch.equal(never, crops.float() / 255)
    always = plain(crops, draws, ViewPreset(**rest, **{name: 1.0}))
    assert ((always - never).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize("name", ["flip", "jitter", "grey", "blur"])
@pytest.mark.parametrize("probability", [0.2, 0.5, 0.7])
def test_what_may_happen_happens_as_often_as_it_should(name, probability):
    count = 2000
    preset = ViewPreset(brightness=0.8, sigma=(60.0, 60.0), **{name: probability})
    crops = random_crops(1, side=4).repeat(count, 1, 1, 1)
    changed = (plain(crops, random_draws(count, seed=1), preset) - crops / 255).abs().amax(dim=(1, 2, 3)) > 1e-4
    # Five deviations of a binomial share: one right seed in two million would fail.
    assert abs(changed.float().mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / count)


# --- Flip ------------------------------------------------------------------------------------------------------------


def test_flip_mirrors_the_chosen_images_alone():
    crops = random_crops(4)
    found = plain(crops, middle_draws(4, flip=[0.1, 0.9, 0.29, 0.31]), ViewPreset(flip=0.3)).numpy()
    expected = crops.numpy().astype(np.float32) / 255
    expected[[0, 2]] = expected[[0, 2]][..., ::-1]
    np.testing.assert_array_equal(found, expected)


# --- Moves -----------------------------------------------------------------------------------------------------------


def moved_loop(image, angle, zoom, shear, shift_x, shift_y):
    """Bilinear values of one image `[C, S, S]`, pixel by pixel, where rotation, shear, zoom and shift say."""
    side = image.shape[1]
    centre = (side - 1) / 2
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[1, math.tan(shear)], [0, 1]]) / zoom
    result = np.empty_like(image)
    for row, column in itertools.product(range(side), range(side)):
        x, y = matrix @ [column - centre, row - centre] + centre + np.array([shift_x, shift_y]) * side
        x, y = min(max(x, 0), side - 1), min(max(y, 0), side - 1)
        left, top = min(int(x), side - 2), min(int(y), side - 2)
        across, down = x - left, y - top
        result[:, row, column] = (
            (1 - down) * (1 - across) * image[:, top, left]
            + (1 - down) * across * image[:, top, left + 1]
            + down * (1 - across) * image[:, top + 1, left]
            + down * across * image[:, top + 1, left + 1]
        )
    return result


@pytest.mark.parametrize("channels", [3, 1])
def test_moves_equal_the_loop_over_pixels(channels):
    preset = ViewPreset(rotation=40.0, zoom=(0.6, 1.7), shear=20.0, shift=0.3)
    crops, draws = random_crops(6, channels, side=9), random_draws(6)

    def between(low, high, name):
        return low + (high - low) * draws[:, _COLUMN[name]].double().numpy()

    angles, shears = np.deg2rad(between(-40, 40, "rotation")), np.deg2rad(between(-20, 20, "shear"))
    zooms = between(0.6, 1.7, "zoom")
    shifts = between(-0.3, 0.3, "shift_x"), between(-0.3, 0.3, "shift_y")
    images = crops.double().numpy() / 255
    moves = zip(images, angles, zooms, shears, *shifts, strict=True)
    expected = np.stack([moved_loop(*move) for move in moves])
    assert np.abs(plain(crops, draws, preset).numpy() - expected).max() < MOVED_TOLERANCE


@pytest.mark.parametrize("side", [7, 16])
@pytest.mark.parametrize(("draw", "turns"), [(1.0, 1), (0.0, -1), (0.5, 0)])
def test_a_rotation_by_90_degrees_equals_rot90(side, draw, turns):
    crops = random_crops(2, side=side)
    found = plain(crops, middle_draws(2, rotation=draw), ViewPreset(rotation=90.0))
    expected = torch.rot90(crops.float() / 255, turns, dims=(2, 3))
    torch.testing.assert_close(found, expected, atol=MOVED_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "axis"), [("shift_x", 3), ("shift_y", 2)])
@pytest.mark.parametrize(("draw", "pixels"), [(0.0, -4), (1.0, 4), (0.25, -2)])
def test_a_shift_by_whole_pixels_moves_them_and_repeats_the_border(name, axis, draw, pixels):
    crops = random_crops(2, side=16)
    found = plain(crops, middle_draws(2, **{name: draw}), ViewPreset(shift=0.25))
    expected = np.take(crops.numpy() / 255, np.clip(np.arange(16) + pixels, 0, 15), axis=axis)
    assert np.abs(found.numpy() - expected).max() < MOVED_TOLERANCE


def test_a_zoom_moves_a_bright_pixel_away_from_the_centre():
    crops = torch.zeros(1, 1, 11, 11, dtype=torch.uint8)
    crops[0, 0, 4, 7] = 255  # 1 above and 2 right of the centre
    view = plain(crops, middle_draws(zoom=1.0), ViewPreset(zoom=(1.0, 2.0)))[0, 0]
    assert divmod(int(view.argmax()), 11) == (5 - 2 * 1, 5 + 2 * 2)
    assert float(view.max()) == pytest.approx(1, abs=MOVED_TOLERANCE)
    # A pixel twice as large in both directions, all of it inside.
    assert float(view.sum()) == pytest.approx(4, abs=MOVED_TOLERANCE)


def test_a_mirrored_picture_turned_the_other_way_is_the_mirrored_view():
    preset = ViewPreset(rotation=25.0, shear=12.0, shift=0.2, zoom=(0.8, 1.3))
    crops, draws = random_crops(5, side=10), random_draws(5)
    mirrored = draws.clone()
    for name in ("rotation", "shear", "shift_x"):
        mirrored[:, _COLUMN[name]] = 1 - draws[:, _COLUMN[name]]
    torch.testing.assert_close(
        plain(crops.flip(3), mirrored, preset), plain(crops, draws, preset).flip(3), atol=MOVED_TOLERANCE, rtol=0
    )


# --- Colours ---------------------------------------------------------------------------------------------------------


JITTER = {"brightness": 0.5, "contrast": 0.6, "saturation": 0.7}


def coloured_loop(image, brightness, contrast, saturation, turn, grey):
    """Colours of one image `[3, S, S]`, pixel by pixel: YIQ chroma turned and scaled, then contrast about mean luma."""
    pixels = []
    for pixel in image.reshape(3, -1).T:
        y, i, q = TO_YIQ @ (brightness * pixel)
        strength = 0.0 if grey else saturation
        turned = [
            strength * (i * math.cos(turn) - q * math.sin(turn)),
            strength * (i * math.sin(turn) + q * math.cos(turn)),
        ]
        pixels.append(np.linalg.solve(TO_YIQ, [y, *turned]))
    middle = sum(LUMA @ pixel for pixel in pixels) / len(pixels)
    return np.array([(contrast * (pixel - middle) + middle).clip(0, 1) for pixel in pixels]).T.reshape(image.shape)


def test_colours_equal_the_loop_over_pixels():
    preset = ViewPreset(jitter=0.7, hue=0.3, grey=0.3, **JITTER)
    crops, draws = random_crops(24, side=4), random_draws(24)
    expected = []
    for image, draw in zip(crops.double().numpy() / 255, draws.double().numpy(), strict=True):
        value = dict(zip(_DRAWS, draw, strict=True))
        jittered, grey = value["jitter"] < 0.7, value["grey"] < 0.3
        factors = [1 + jittered * strength * (2 * value[name] - 1) for name, strength in JITTER.items()]
        turn = jittered * 2 * math.pi * 0.3 * (2 * value["hue"] - 1)
        expected.append(coloured_loop(image, *factors, turn, grey))
    jittered, grey = draws[:, _COLUMN["jitter"]] < 0.7, draws[:, _COLUMN["grey"]] < 0.3
    assert len({*zip(jittered.tolist(), grey.tolist(), strict=True)}) == 4, "all four cases must occur"
    assert np.abs(plain(crops, draws, preset).numpy() - np.stack(expected)).max() < TOLERANCE


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("draw", [0.0, 0.5, 0.75, 1.0])
def test_brightness_scales_and_clips(draw, channels):
    crops = random_crops(3, channels)
    found = plain(crops, middle_draws(3, brightness=draw), ViewPreset(jitter=1.0, brightness=0.8))
    expected = (crops.double() / 255 * (0.2 + 1.6 * draw)).clamp(max=1)
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("channels", [3, 1])
def test_contrast_stretches_about_the_mean_luma(channels):
    # 0.4 to 0.6 stretched by at most 2 about a value among them stays in 0.2 to 0.8: nothing is clipped.
    crops = random_crops(3, channels, low=102, high=154)
    weights = torch.tensor(LUMA if channels == 3 else [1.0])[:, None, None]
    luma = (crops.double() / 255 * weights).sum(dim=1).mean(dim=(1, 2))[:, None, None, None]
    for draw, factor in ((0.0, 0.0), (0.25, 0.5), (1.0, 2.0)):
        found = plain(crops, middle_draws(3, contrast=draw), ViewPreset(jitter=1.0, contrast=1.0)).double()
        expected = luma + factor * (crops / 255 - luma)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        kept = (found * weights).sum(dim=1).mean(dim=(1, 2))[:, None, None, None]
        torch.testing.assert_close(kept, luma, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_a_grey_view_has_the_luma_of_bt_601_in_every_channel(jitter):
    crops = random_crops(3)
    preset = ViewPreset(grey=1.0, jitter=jitter, saturation=0.9, hue=0.4)
    found = plain(crops, random_draws(3), preset).double()
    luma = (crops.double() / 255 * torch.tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    torch.testing.assert_close(found, luma.expand(-1, 3, -1, -1), atol=TOLERANCE, rtol=0)


def test_saturation_moves_along_the_line_to_grey():
    crops = random_crops(3, low=85, high=170)
    luma = (crops.double() / 255 * torch.tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    for draw, factor in ((0.0, 0.5), (0.5, 1.0), (1.0, 1.5)):
        found = plain(crops, middle_draws(3, saturation=draw), ViewPreset(jitter=1.0, saturation=0.5))
        torch.testing.assert_close(found.double(), luma + factor * (crops / 255 - luma), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_hue_turned_by_a_full_circle_is_the_picture(draw):
    crops = random_crops(3)
    found = plain(crops, middle_draws(3, hue=draw), ViewPreset(jitter=1.0, hue=1.0))
    torch.testing.assert_close(found, crops / 255, atol=TOLERANCE, rtol=0)


def test_hue_turned_by_half_a_circle_reflects_each_colour_in_its_grey():
    crops = random_crops(3, low=85, high=170)
    luma = (crops.double() / 255 * torch.tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    found = plain(crops, middle_draws(3, hue=1.0), ViewPreset(jitter=1.0, hue=0.5))
    torch.testing.assert_close(found.double(), 2 * luma - crops / 255, atol=TOLERANCE, rtol=0)


def test_hue_leaves_grey_pictures_and_every_luma_alone():
    preset, draws = ViewPreset(jitter=1.0, hue=0.5), random_draws(6)
    grey = random_crops(6, channels=1).repeat(1, 3, 1, 1)
    torch.testing.assert_close(plain(grey, draws, preset), grey / 255, atol=TOLERANCE, rtol=0)
    crops = random_crops(6, low=100, high=150)
    weights = torch.tensor(LUMA)[:, None, None].float()
    torch.testing.assert_close(
        (plain(crops, draws, preset) * weights).sum(dim=1), (crops / 255 * weights).sum(dim=1), atol=TOLERANCE, rtol=0
    )


def test_hue_turns_red_towards_yellow_green_or_towards_violet():
    red = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    red[:, 0], red[:, 1:] = 180, 60
    views = plain(red, middle_draws(2, hue=[0.0, 1.0]), ViewPreset(jitter=1.0, hue=0.1))
    more_green, more_blue = (int(channel) for channel in views[:, 1:, 0, 0].argmax(dim=0))
    assert {more_green, more_blue} == {0, 1}, "one way raises green above blue, the other blue above green"


def test_colours_of_a_pixel_depend_on_its_place_in_nothing():
    preset = ViewPreset(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2)
    crops, draws = random_crops(5), random_draws(5)
    order = torch.randperm(144, generator=torch.Generator().manual_seed(0))

    def shuffled(images):
        return images.flatten(2)[:, :, order].view_as(images)

    torch.testing.assert_close(
        plain(shuffled(crops), draws, preset), shuffled(plain(crops, draws, preset)), atol=TOLERANCE, rtol=0
    )


def test_grey_pictures_have_brightness_and_contrast_but_no_colour():
    crops, draws = random_crops(8, channels=1), random_draws(8)
    colour = ViewPreset(jitter=1.0, saturation=0.9, hue=0.4, grey=0.9)
    torch.testing.assert_close(plain(crops, draws, colour), crops / 255, atol=TOLERANCE, rtol=0)
    preset = ViewPreset(jitter=1.0, brightness=0.5, contrast=0.5)
    same = plain(crops.repeat(1, 3, 1, 1), draws, preset)
    torch.testing.assert_close(plain(crops, draws, preset).expand_as(same), same, atol=TOLERANCE, rtol=0)


# --- Blur ------------------------------------------------------------------------------------------------------------


def blurred_loop(image, sigma, radius):
    """Two passes over the pixels of one channel `[S, S]`, the border reflected, in float64."""
    weights = [math.exp(-(step**2) / (2 * sigma**2)) for step in range(-radius, radius + 1)]
    weights = [weight / sum(weights) for weight in weights]
    side = len(image)

    def reflected(place):
        return -place if place < 0 else 2 * (side - 1) - place if place >= side else place

    for _ in range(2):
        image = np.array(
            [
                [sum(w * row[reflected(x + step - radius)] for step, w in enumerate(weights)) for x in range(side)]
                for row in image
            ]
        ).T
    return image


# Side, deviations in pixels of a side of 224, radius: ceil(2 x largest deviation of the crop), below the side.
BLURS = [(16, (14.0, 42.0), 6), (4, (20.0, 224.0), 3), (12, (0.1, 2.0), 1)]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(("side", "sigma", "radius"), BLURS)
def test_blur_equals_the_loop_and_scipy(side, sigma, radius, channels):
    crops, draws = random_crops(4, channels, side), random_draws(4)
    found = plain(crops, draws, ViewPreset(blur=1.0, sigma=sigma))
    deviations = (sigma[0] + (sigma[1] - sigma[0]) * draws[:, _COLUMN["sigma"]].double().numpy()) * side / 224
    assert np.ptp(deviations) > 0
    for view, image, deviation in zip(found.numpy(), crops.double().numpy() / 255, deviations, strict=True):
        loop = np.stack([blurred_loop(channel, deviation, radius) for channel in image])
        filtered = [
            scipy.ndimage.gaussian_filter(channel, deviation, mode="mirror", radius=radius) for channel in image
        ]
        assert np.abs(view - loop).max() < TOLERANCE
        assert np.abs(view - np.stack(filtered)).max() < TOLERANCE


def test_blur_reaches_the_chosen_images_alone():
    crops = random_crops(4)
    found = plain(crops, middle_draws(4, blur=[0.1, 0.9, 0.29, 0.31]), ViewPreset(blur=0.3, sigma=(30.0, 30.0)))
    changed = (found - crops / 255).abs().amax(dim=(1, 2, 3)) > 0
    assert changed.tolist() == [True, False, True, False]


def test_a_blurred_point_is_a_gaussian_and_an_even_picture_stays():
    side, sigma = 15, 1.2
    preset = ViewPreset(blur=1.0, sigma=(sigma * 224 / side,) * 2)
    crops = torch.zeros(1, 1, side, side, dtype=torch.uint8)
    crops[0, 0, 7, 7] = 255
    view = plain(crops, middle_draws(), preset)[0, 0]
    # Beyond three pixels, more than two deviations, the weights are cut off.
    for y, x in itertools.product(range(side), range(side)):
        inside = max(abs(y - 7), abs(x - 7)) <= 3
        expected = math.exp(-((y - 7) ** 2 + (x - 7) ** 2) / (2 * sigma**2)) if inside else 0.0
        assert float(view[y, x] / view[7, 7]) == pytest.approx(expected, abs=TOLERANCE)
    assert float(view.sum()) == pytest.approx(1, abs=TOLERANCE)
    even = torch.full((2, 3, side, side), 77, dtype=torch.uint8)
    torch.testing.assert_close(plain(even, random_draws(2), preset), even / 255, atol=TOLERANCE, rtol=0)


def test_blur_commutes_with_mirrors_and_turns():
    preset = ViewPreset(blur=1.0, sigma=(10.0, 60.0))
    crops, draws = random_crops(3), random_draws(3)
    view = plain(crops, draws, preset)
    for turn in (lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.transpose(2, 3)):
        torch.testing.assert_close(plain(turn(crops), draws, preset), turn(view), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_blur_of_tiny_crops(side):
    crops = random_crops(3, side=side)
    view = plain(crops, random_draws(3), ViewPreset(blur=1.0, sigma=(50.0, 300.0)))
    assert view.shape == crops.shape
    assert view.isfinite().all()
    sharp = plain(crops, random_draws(3), ViewPreset(blur=1.0, sigma=(0.0, 0.0)))
    torch.testing.assert_close(sharp, crops / 255, atol=TOLERANCE, rtol=0)


# --- Presets and what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("preset", "channels", "size", "side"),
    [("photo", 3, (60, 45), 32), ("small", 3, (32, 32), 32), ("grey", 1, (28, 28), 28), ("photo", 1, (60, 45), 32)],
)
def test_every_preset_runs_on_its_kind(preset, channels, size, side, device):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    picture = PIL.Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    preset, mean, std = PRESETS[preset], [0.4] * channels, [0.2] * channels
    draws = random_draws(40)
    crops = torch.from_numpy(np.stack([cut(picture, draw, preset, side) for draw in draws.numpy()])).to(device)
    views = augment(crops, draws, preset, mean, std)
    assert views.shape == (40, channels, side, side)
    assert views.dtype == torch.float32
    assert views.device.type == device
    # Every value was in 0 to 1 before it was normalised.
    assert views.min() >= (0 - 0.4) / 0.2 - TOLERANCE
    assert views.max() <= (1 - 0.4) / 0.2 + TOLERANCE
    assert views.flatten(1).std(dim=1).min() > 0.05, "a view must still show something"


def test_normalising_is_by_channel():
    crops, mean, std = random_crops(2), np.array([0.1, 0.5, 0.9]), np.array([0.5, 1.0, 2.0])
    found = augment(crops, random_draws(2), ViewPreset(), mean, std).numpy()
    for c in range(3):
        assert np.abs(found[:, c] - (crops[:, c].numpy() / 255 - mean[c]) / std[c]).max() < TOLERANCE


def test_a_preset_cannot_be_changed_under_a_cache():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["photo"].flip = 0.0


@pytest.mark.parametrize("columns", [0, len(_DRAWS) - 1, len(_DRAWS) + 1])
def test_draws_of_another_version_are_refused(columns):
    with pytest.raises(ValueError, match=rf"draws must have shape \[2, {len(_DRAWS)}\].*got \[2, {columns}\]"):
        plain(random_crops(2), torch.zeros(2, columns), ALL)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_draw_is_not_shared_by_several_crops(count):
    with pytest.raises(ValueError, match=rf"draws must have shape \[3, {len(_DRAWS)}\], one row a crop"):
        plain(random_crops(3), random_draws(count), ALL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, value)
            for name in ("flip", "jitter", "grey", "blur", "brightness", "hue", "shift")
            for value in (-0.1, 1.1)
        ],
        *[("area", value) for value in ((0.0, 1.0), (0.5, 1.2), (0.9, 0.5))],
        *[("zoom", value) for value in ((0.0, 1.0), (1.2, 0.8), (1.0, math.inf))],
        *[("aspect", value) for value in ((-1.0, 1.0), (math.nan, 1.0))],
        ("sigma", (-0.1, 1.0)),
        *[(name, value) for name in ("rotation", "shear") for value in (-1.0, math.nan)],
        ("shear", 90.0),
    ],
)
def test_impossible_ranges_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be"):
        ViewPreset(**{field: value})


@pytest.mark.parametrize("size", [(200, 50), (50, 200), (300, 100), (64, 64)])
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_a_crop_of_a_narrow_picture_keeps_its_share(size, share):
    # Red falls from left to right, green from top to bottom: the mean slopes of a crop tell its sides.
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    picture = PIL.Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    for row in range(20):
        crop = cut(picture, draw_view(0, 0, row, 0), ViewPreset(area=(share, share), aspect=(3 / 4, 4 / 3)), 32)
        width = (float(crop[0, :, -1].mean()) - float(crop[0, :, 0].mean())) / 255
        height = (float(crop[1, -1].mean()) - float(crop[1, 0].mean())) / 255
        # The outermost of 32 columns are half a column inside: 1/32 of each side, and a grey level of rounding.
        assert width * height == pytest.approx(share, abs=2 / 32 + 0.02)
