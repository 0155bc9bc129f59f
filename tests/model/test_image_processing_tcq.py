"""TCQImageProcessor: equal to timm's evaluation transform bit by bit, for pictures of every kind."""

import io
import pickle
import resource
import struct
import zlib

import datasets
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from timm.data import create_transform
from transformers import AutoImageProcessor

from tcq_hf import TCQConfig, TCQImageProcessor
from tcq_hf.model.image_processing_tcq import _LONGEST_SCALED

VIT = "vit_tiny_patch16_224"
# A backbone and a side: together they cover both crop modes and filters, odd and even margins, no margin.
CASES = [
    (VIT, None),
    (VIT, 32),
    (VIT, 33),
    ("coatnet_bn_0_rw_224.sw_in1k", None),
    ("botnet26t_256.c1_in1k", 64),
    ("cspresnet50.ra_in1k", 48),
    ("fbnetv3_b.ra2_in1k", None),
    ("fbnetv3_b.ra2_in1k", 50),
    ("vit_large_patch14_clip_336", 56),
    ("vit_large_patch14_clip_336", None),
    ("dm_nfnet_f0.dm_in1k", None),
    ("vit_medium_patch16_gap_384.sw_in12k_ft_in1k", 40),
    ("vit_base_patch16_lingbot.robbyant", 32),
    ("vit_small_patch14_dinov2.lvd142m", 28),
]
SIZES = [(1, 1), (1, 2), (2, 1), (7, 3), (32, 32), (33, 32), (40, 36), (35, 35), (223, 225), (61, 300), (301, 64)]


def timm_transform(name, side=None):
    defaults = timm.models.get_pretrained_cfg(name)
    return create_transform(
        (3, side, side) if side else defaults.input_size,
        interpolation=defaults.interpolation,
        mean=defaults.mean,
        std=defaults.std,
        crop_pct=defaults.crop_pct,
        crop_mode=defaults.crop_mode,
    )


def noise(width, height, mode="RGB", seed=0):
    rng = np.random.default_rng([width, height, seed])
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return PIL.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)


def values(processor, picture) -> torch.Tensor:
    return processor(picture, return_tensors="pt").pixel_values


def encoded(picture, form="PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


# equal to timm


def test_cases_cover_what_their_comment_says():
    kinds = set()
    for name, side in CASES:
        defaults = timm.models.get_pretrained_cfg(name)
        side = side or defaults.input_size[1]
        margin = int(side / defaults.crop_pct) - side
        kinds.add((defaults.crop_mode, defaults.interpolation, "none" if not margin else ("even", "odd")[margin % 2]))
    assert {("center", f, m) for f in ("bicubic", "bilinear") for m in ("even", "odd")} <= kinds
    assert {("squash", "bicubic", m) for m in ("none", "even", "odd")} <= kinds
    assert {("center", "bicubic", "none"), ("squash", "bilinear", "none")} <= kinds


@pytest.mark.parametrize(("name", "side"), CASES)
def test_pixel_values_are_bit_equal_to_timm_for_every_size(name, side):
    processor, transform = TCQImageProcessor.from_backbone(name, image_size=side), timm_transform(name, side)
    rng = np.random.default_rng(0)
    for width, height in [*SIZES, *rng.integers(1, 400, (6, 2)).tolist()]:
        picture = noise(width, height)
        assert torch.equal(values(processor, picture)[0], transform(picture)), (width, height)


def test_tag_of_the_backbone_decides_mean_and_crop():
    for name in ("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_clip_224.openai"):
        processor = TCQImageProcessor.from_backbone(name)
        assert tuple(processor.image_mean) == timm.models.get_pretrained_cfg(name).mean
        picture = noise(250, 300)
        assert torch.equal(values(processor, picture)[0], timm_transform(name)(picture))


def test_real_photos_are_bit_equal_to_timm(data):
    photos = datasets.load_dataset(
        "parquet", data_files=str(data / "clothing" / "data" / "test-00000-of-00001.parquet"), split="train"
    ).select(range(32))
    photos = [row["image"] for row in photos.cast_column("image", datasets.Image())]
    for name in (VIT, "fbnetv3_b.ra2_in1k"):
        expected = torch.stack([timm_transform(name)(photo.convert("RGB")) for photo in photos])
        assert torch.equal(values(TCQImageProcessor.from_backbone(name), photos), expected)


def test_pixel_values_equal_a_slow_loop_when_nothing_is_resized():
    processor = TCQImageProcessor.from_backbone("vit_small_patch14_dinov2.lvd142m", image_size=5)
    picture = noise(5, 5)
    given = values(processor, picture)[0]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for x in range(5):
        for y in range(5):
            for c, level in enumerate(picture.getpixel((x, y))):
                expected = (level / 255 - mean[c]) / std[c]
                assert abs(float(given[c, y, x]) - expected) <= 3 * 2**-23 / std[c]


@pytest.mark.parametrize(("level", "value"), [(0, -1.0), (255, 1.0)])
def test_black_is_minus_one_and_white_is_one_where_mean_and_deviation_are_a_half(processor, level, value):
    assert values(processor, PIL.Image.new("RGB", (50, 40), (level,) * 3)).eq(value).all()


def test_batch_equals_the_pictures_one_by_one_in_order(processor, pictures):
    batch = values(processor, pictures)
    assert batch.shape == (32, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert all(torch.equal(row, values(processor, picture)[0]) for row, picture in zip(batch, pictures, strict=True))


def test_pictures_of_many_sizes_and_kinds_share_a_batch(processor):
    mixed = [noise(9, 90), noise(64, 64, "RGBA"), noise(31, 8, "L"), np.asarray(noise(50, 20)), encoded(noise(7, 7))]
    assert values(processor, mixed).shape == (5, 3, 32, 32)


def test_mirrored_picture_gives_the_mirrored_pixel_values():
    # Side 32 of 36: both margins are even, so mirror and crop commute; a resize of 1 : 1 changes nothing.
    processor = TCQImageProcessor.from_backbone(VIT, image_size=32)
    assert processor.size["shortest_edge"] == 35
    processor.size = {"shortest_edge": 36}
    picture = noise(36, 36)
    mirrored = picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    assert torch.equal(values(processor, mirrored), values(processor, picture).flip(-1))


def test_the_picture_given_is_left_as_it_was(processor):
    picture = noise(50, 40, "RGBA")
    before = picture.tobytes()
    values(processor, picture)
    assert (picture.mode, picture.size, picture.tobytes()) == ("RGBA", (50, 40), before)


# pixel formats


def test_grey_equals_the_same_levels_in_three_channels(processor):
    grey = noise(50, 40, "L")
    assert torch.equal(values(processor, grey), values(processor, PIL.Image.merge("RGB", [grey] * 3)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(processor, mode):
    clear = PIL.Image.new(mode, (40, 40), (10, 0) if mode == "LA" else (10, 20, 30, 0))
    assert torch.equal(values(processor, clear), values(processor, PIL.Image.new("RGB", (40, 40), "white")))
    opaque = noise(40, 40, mode)
    opaque.putalpha(255)
    assert torch.equal(values(processor, opaque), values(processor, opaque.convert("RGB")))


def test_half_transparency_is_the_mean_with_white(processor):
    half = PIL.Image.new("RGBA", (40, 40), (55, 155, 255, 51))  # alpha 51 of 255 is one fifth
    expected = PIL.Image.new("RGB", (40, 40), tuple(round(0.2 * level + 0.8 * 255) for level in (55, 155, 255)))
    assert torch.equal(values(processor, half), values(processor, expected))


@pytest.mark.parametrize("source", ["memory", "file"])
def test_palette_with_transparency_is_laid_on_white(processor, source):
    picture = PIL.Image.new("P", (40, 40), 0)
    picture.putpalette([200, 0, 0, 0, 90, 0])
    picture.paste(1, (0, 0, 20, 40))
    picture.info["transparency"] = 0
    if source == "file":
        picture = encoded(picture, transparency=0)
    expected = PIL.Image.new("RGB", (40, 40), "white")
    expected.paste((0, 90, 0), (0, 0, 20, 40))
    assert torch.equal(values(processor, picture), values(processor, expected))


def test_palette_without_transparency_is_its_colours(processor):
    palette = noise(40, 40).quantize(16)
    assert palette.mode == "P"
    assert torch.equal(values(processor, palette), values(processor, palette.convert("RGB")))


def test_rgb_file_with_a_transparent_colour_shows_white_there(processor):
    picture = PIL.Image.new("RGB", (40, 40), (1, 2, 3))
    picture.paste((90, 80, 70), (0, 0, 40, 20))
    expected = picture.copy()
    expected.paste("white", (0, 20, 40, 40))
    assert torch.equal(values(processor, encoded(picture, transparency=(1, 2, 3))), values(processor, expected))


def test_cmyk_becomes_rgb(processor):
    ink = PIL.Image.new("CMYK", (40, 40), (255, 0, 0, 0))
    assert torch.equal(values(processor, ink), values(processor, PIL.Image.new("RGB", (40, 40), (0, 255, 255))))
    jpeg = encoded(noise(40, 40).convert("CMYK"), "JPEG")
    expected = PIL.Image.open(io.BytesIO(jpeg)).convert("RGB")
    assert torch.equal(values(processor, jpeg), values(processor, expected))


@pytest.mark.parametrize("via_and_mode", ["RGB HSV", "RGB YCbCr", "RGB LAB", "RGB RGBX", "RGBA RGBa", "LA La", "P PA"])
def test_rarer_modes_give_the_picture_nearly_back(processor, via_and_mode):
    via, mode = via_and_mode.split()
    picture = PIL.Image.new("RGB", (40, 40), (200, 120, 40)).convert(via)  # opaque
    given = picture.convert(mode)
    assert given.mode == mode
    # Eight bits in another colour space: a few levels of 2 / 255 each.
    difference = (values(processor, given) - values(processor, picture.convert("RGB"))).abs().max()
    assert difference <= 6 * 2 / 255


def test_one_bit_picture_is_black_and_white(processor):
    bits = PIL.Image.new("1", (40, 40), 0)
    bits.paste(1, (0, 0, 40, 20))
    expected = PIL.Image.new("RGB", (40, 40), "black")
    expected.paste("white", (0, 0, 40, 20))
    assert torch.equal(values(processor, bits), values(processor, expected))


def test_sixteen_bit_levels_become_the_nearest_eight_bit_levels():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.array([(2 * level + 257) // 514 for level in range(65536)]).reshape(256, 256)
    grey = TCQImageProcessor.from_backbone(VIT, num_channels=1)
    for given in (levels, PIL.Image.fromarray(levels), encoded(PIL.Image.fromarray(levels))):
        assert np.array_equal(np.asarray(grey.process_image(given)), expected)
    assert (expected[0, 0], expected[-1, -1]) == (0, 255)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_white_is_white_in_every_mode(processor, mode):
    if mode == "I;16B":
        picture = PIL.Image.frombytes("I;16B", (40, 40), b"\xff\xff" * 1600)
    else:
        picture = PIL.Image.fromarray(np.full((40, 40), 65535, np.int32 if mode == "I" else np.uint16))
    assert picture.mode == mode
    assert torch.equal(values(processor, picture), values(processor, PIL.Image.new("RGB", (40, 40), "white")))


@pytest.mark.parametrize("level", [-1, 65536])
def test_32_bit_picture_out_of_the_16_bit_range_is_refused(processor, level):
    with pytest.raises(ValueError, match="must hold 0 to 65535"):
        processor(PIL.Image.fromarray(np.full((4, 4), level, np.int32)))


def test_float_picture_is_refused(processor):
    with pytest.raises(ValueError, match="mode F"):
        processor(PIL.Image.fromarray(np.zeros((40, 40), np.float32)))


INVERSE = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
INVERSE |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("source", ["bytes", "row", "pil", "path"])
def test_exif_orientation_is_applied(processor, tmp_path, orientation, source):
    upright = noise(50, 40)
    stored = upright
    if orientation > 1:
        stored = upright.transpose(PIL.Image.Transpose[INVERSE[orientation]])
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = encoded(stored, exif=exif)
    (tmp_path / "turned.png").write_bytes(file)
    given = {
        "bytes": file,
        "row": {"path": None, "bytes": file},
        "pil": PIL.Image.open(io.BytesIO(file)),
        "path": tmp_path / "turned.png",
    }[source]
    assert torch.equal(values(processor, given), values(processor, upright))


# sources


def test_every_source_of_one_picture_gives_the_same_pixel_values(processor, tmp_path):
    picture = noise(50, 40)
    picture.save(tmp_path / "picture.png")
    array, file = np.asarray(picture), (tmp_path / "picture.png").read_bytes()
    sources = {
        "path": str(tmp_path / "picture.png"),
        "pathlib": tmp_path / "picture.png",
        "bytes": file,
        "row of bytes": {"path": None, "bytes": file},
        "row with name and bytes": {"path": "elsewhere.png", "bytes": file},
        "row with path": {"path": str(tmp_path / "picture.png"), "bytes": None},
        "HWC": array,
        "CHW": array.transpose(2, 0, 1),
        "HWC not contiguous": np.asarray(picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT))[:, ::-1],
        "uint16 HWC": array.astype(np.uint16) * 257,
        "tensor HWC": torch.from_numpy(array.copy()),
        "tensor CHW": torch.from_numpy(array.transpose(2, 0, 1).copy()),
        "list of one": [picture],
        "array of one": array[None],
    }
    expected = values(processor, picture)
    assert [key for key, source in sources.items() if not torch.equal(values(processor, source), expected)] == []


def test_grey_arrays_hw_hwc_and_chw_are_one_picture(processor):
    grey = np.asarray(noise(50, 40, "L"))
    expected = values(processor, PIL.Image.fromarray(grey))
    for given in (grey, grey[..., None], grey[None], torch.from_numpy(grey.copy())):
        assert torch.equal(values(processor, given), expected)


def test_array_with_alpha_is_laid_on_white(processor):
    picture = noise(50, 40, "RGBA")
    array = np.asarray(picture)
    for given in (array, array.transpose(2, 0, 1)):
        assert torch.equal(values(processor, given), values(processor, picture))


def test_four_dimensional_array_and_tensor_are_batches(processor):
    array = np.stack([np.asarray(noise(50, 40, seed=seed)) for seed in range(3)])
    expected = values(processor, [PIL.Image.fromarray(picture) for picture in array])
    for given in (array, torch.from_numpy(array), torch.from_numpy(array).permute(0, 3, 1, 2)):
        assert torch.equal(values(processor, given), expected)


def test_column_of_a_dataset_gives_the_pixel_values_of_its_pictures(processor, dataset):
    decoded = values(processor, dataset[:4]["image"])
    undecoded = values(processor, dataset.cast_column("image", datasets.Image(decode=False))[:4]["image"])
    assert torch.equal(decoded, undecoded)
    assert decoded.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_file_formats_open(processor, form):
    file = encoded(noise(50, 40), form)
    expected = values(processor, PIL.Image.open(io.BytesIO(file)).convert("RGB"))
    assert torch.equal(values(processor, file), expected)


# grey backbones


def test_grey_backbone_takes_any_picture_as_one_channel():
    grey = TCQImageProcessor.from_backbone(VIT, image_size=32, num_channels=1)
    picture = noise(50, 40, "L")
    coloured = TCQImageProcessor.from_backbone(VIT, image_size=32)
    expected = values(coloured, picture)[:, :1]
    for given in (picture, PIL.Image.merge("RGB", [picture] * 3), np.asarray(picture), picture.convert("LA")):
        assert torch.equal(values(grey, given), expected)


def test_grey_backbone_averages_mean_and_deviation():
    grey = TCQImageProcessor.from_backbone("resnet18", num_channels=1)
    assert grey.image_mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3], rel=1e-15)
    assert grey.image_std == pytest.approx([(0.229 + 0.224 + 0.225) / 3], rel=1e-15)


# refused


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.int64, bool, np.complex64])
def test_arrays_other_than_uint8_and_uint16_are_refused(processor, dtype):
    with pytest.raises(ValueError, match="must be uint8 or uint16"):
        processor(np.ones((40, 40, 3), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_other_than_uint8_and_uint16_are_refused(processor, dtype):
    with pytest.raises((TypeError, ValueError)):
        processor(torch.ones(3, 40, 40, dtype=dtype))


@pytest.mark.parametrize("shape", [(40,), (40, 40, 2), (2, 40, 40), (5, 40, 40), (0, 40, 3), (40, 0), ()])
def test_arrays_of_other_shapes_are_refused_with_the_shape(processor, shape):
    with pytest.raises(ValueError, match="must have shape") as caught:
        processor(np.zeros(shape, np.uint8))
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize("given", [None, 3, 2.5, {"image": 1}, object(), [None], [[noise(4, 4)]]])
def test_what_is_no_picture_is_refused_by_type(processor, given):
    with pytest.raises(TypeError, match="a picture must be"):
        processor(given)


def test_row_with_neither_path_nor_bytes_is_refused(processor):
    with pytest.raises(TypeError, match="a picture must be"):
        processor({"path": None, "bytes": None})


def test_text_file_named_png_is_refused_by_name(processor, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(OSError, match=r"notes\.png"):
        processor(tmp_path / "notes.png")


def test_missing_file_is_refused_by_name(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        processor(str(tmp_path / "absent.png"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_truncated_file_is_an_os_error(processor, form):
    file = encoded(noise(200, 200), form)
    with pytest.raises(OSError):  # noqa: PT011 (Pillow words it differently for each format)
        processor(file[: len(file) // 2])


@pytest.mark.parametrize("junk", [b"", b"junk"])
def test_bytes_that_are_no_picture_are_an_os_error(processor, junk):
    with pytest.raises(OSError, match="cannot identify"):
        processor(junk)


def test_empty_list_is_refused(processor):
    with pytest.raises(ValueError, match="no pictures"):
        processor([], return_tensors="pt")


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_channel_counts_are_refused(channels):
    with pytest.raises(ValueError, match=f"num_channels must be 1 or 3 for pictures, got {channels}"):
        TCQImageProcessor.from_backbone(VIT, num_channels=channels)


def test_unknown_backbone_is_refused_with_close_names():
    with pytest.raises(ValueError, match=f"unknown to timm {timm.__version__}.*vit_tiny_patch16_224"):
        TCQImageProcessor.from_backbone("vit_tiny_patch16_22")


def test_transform_that_cannot_be_reproduced_is_refused_in_words():
    with pytest.raises(ValueError, match=r"crop_mode='border'.*not supported; crop_mode must be center or squash"):
        TCQImageProcessor.from_backbone("deepseek_vit_412m")


@pytest.mark.parametrize("side", [0, -3])
def test_impossible_image_size_is_refused(side):
    with pytest.raises(ValueError, match="image_size"):
        TCQImageProcessor.from_backbone(VIT, image_size=side)


def test_oblong_default_input_is_refused_without_image_size():
    with pytest.raises(ValueError, match="image_size"):
        TCQImageProcessor.from_backbone("vit_base_patch16_sapiens2")


# extreme sizes


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_extreme_aspect_ratio_stays_small_in_memory(size):
    processor = TCQImageProcessor.from_backbone(VIT)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    given = values(processor, PIL.Image.new("RGB", size, (255, 0, 255)))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert given.shape == (1, 3, 224, 224)
    assert torch.equal(given, values(processor, PIL.Image.new("RGB", (300, 300), (255, 0, 255))))
    # Scaled as a whole the picture would be 248 x 4,960,000 pixels, 4.9 GB; ru_maxrss counts KiB.
    assert grown < 300 * 1024


@pytest.mark.parametrize("name", [VIT, "fbnetv3_b.ra2_in1k"])
@pytest.mark.parametrize(("width", "height"), [(1, 700), (700, 1), (2, 1201), (1201, 2), (3, 1600)])
def test_very_long_picture_agrees_with_timm_to_two_grey_levels(name, width, height):
    processor = TCQImageProcessor.from_backbone(name, image_size=32)
    assert processor.size["shortest_edge"] * max(width, height) / min(width, height) > _LONGEST_SCALED * 32
    # Levels 64 to 191: no overshoot of the filter is clipped between the two passes, whose order Pillow chooses.
    picture = PIL.Image.fromarray(64 + np.asarray(noise(width, height)) // 2)
    difference = values(processor, picture)[0] - timm_transform(name, 32)(picture)
    levels = (difference * 255 * torch.tensor(processor.image_std)[:, None, None]).abs().max()
    # Each pass rounds by half a level and the second weighs the first by at most 1.25: 2 * (0.5 * 1.25 + 0.5) = 2.25.
    assert levels < 2.25


def test_long_picture_below_the_limit_is_bit_equal_to_timm():
    processor = TCQImageProcessor.from_backbone(VIT, image_size=32)
    for size in ((1, 400), (400, 1), (3, 1300), (31, 1200)):
        assert processor.size["shortest_edge"] * max(size) / min(size) < _LONGEST_SCALED * 32
        assert torch.equal(values(processor, noise(*size))[0], timm_transform(VIT, 32)(noise(*size)))


def png_header(width, height) -> bytes:
    """A one-bit PNG of the given size whose pixels are missing: enough to open it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("source", ["bytes", "path"])
def test_picture_of_20000_by_20000_pixels_surfaces_the_error_of_pillow(processor, tmp_path, source):
    bomb = png_header(20_000, 20_000)
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(PIL.Image.DecompressionBombError, match="400000000 pixels"):
        processor(bomb if source == "bytes" else tmp_path / "bomb.png")


# saving


ROUND_TRIPS = [
    (VIT, 32, 3),
    (VIT, 32, 1),
    ("fbnetv3_b.ra2_in1k", 50, 3),
    ("vit_medium_patch16_gap_384.sw_in12k_ft_in1k", 40, 3),
]


@pytest.mark.parametrize(("name", "side", "channels"), ROUND_TRIPS)
@pytest.mark.parametrize("loader", [AutoImageProcessor, TCQImageProcessor])
def test_saved_processor_loads_and_gives_equal_pixel_values(tmp_path, name, side, channels, loader):
    processor = TCQImageProcessor.from_backbone(name, image_size=side, num_channels=channels)
    processor.save_pretrained(tmp_path)
    TCQConfig(backbone=name, image_size=side).save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is TCQImageProcessor
    pictures = [noise(70, 45), noise(45, 71, "RGBA"), noise(33, 33, "L")]
    assert torch.equal(values(loaded, pictures), values(processor, pictures))
    assert loaded.to_dict() == processor.to_dict()


@pytest.mark.parametrize(("name", "side", "channels"), ROUND_TRIPS)
def test_pickled_processor_gives_equal_pixel_values(name, side, channels):
    processor = TCQImageProcessor.from_backbone(name, image_size=side, num_channels=channels)
    copy = pickle.loads(pickle.dumps(processor))
    assert torch.equal(values(copy, noise(70, 45)), values(processor, noise(70, 45)))


def test_processor_without_arguments_has_the_defaults_of_a_plain_vit():
    picture = noise(300, 260)
    assert torch.equal(values(TCQImageProcessor(), picture), values(TCQImageProcessor.from_backbone(VIT), picture))


def test_steps_can_be_turned_off_for_one_call(processor):
    picture = noise(50, 40)
    raw = processor(
        picture, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    assert np.array_equal(raw.pixel_values[0].numpy(), np.asarray(picture).transpose(2, 0, 1))


def test_return_tensors_np_gives_the_same_numbers(processor):
    picture = noise(50, 40)
    given = processor(picture, return_tensors="np").pixel_values
    assert isinstance(given, np.ndarray)
    assert np.array_equal(given, values(processor, picture).numpy())
