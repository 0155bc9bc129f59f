"""TCQConfig: fields, their checks, and the round trip through config.json."""

import json

import pytest
import timm
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from tcq_hf import TCQConfig

SMALL = {"backbone": "vit_tiny_patch16_224", "image_size": 32, "embedding_dim": 32, "num_codebooks": 4}


def test_round_trip_through_save_and_load_keeps_every_field(tmp_path):
    config = TCQConfig(
        backbone="vit_tiny_patch16_224.augreg_in21k",
        backbone_kwargs={"embed_dim": 32, "depth": 2},
        pooling="avg",
        image_size=48,
        num_channels=1,
        embedding_dim=24,
        num_codebooks=3,
        codebook_size=16,
        softmax_scale=2.5,
    )
    config.save_pretrained(tmp_path)
    loaded = TCQConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    for field in ("backbone", "backbone_kwargs", "pooling", "image_size", "num_channels", "softmax_scale"):
        assert getattr(loaded, field) == getattr(config, field), field
    assert (loaded.sub_dim, loaded.bits, loaded.code_bytes) == (8, 12, 2)


def test_auto_config_loads_a_saved_config(tmp_path):
    TCQConfig(**SMALL).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TCQConfig


def test_config_of_a_default_model_loads_without_arguments():
    assert TCQConfig().backbone == "vit_base_patch16_224.augreg_in21k"


@pytest.mark.parametrize("books", [1, 2, 3, 8])
@pytest.mark.parametrize("log_words", range(1, 9))
def test_bits_and_bytes_equal_the_length_of_the_code_written_out(books, log_words):
    config = TCQConfig(**{**SMALL, "embedding_dim": books * 5, "num_codebooks": books, "codebook_size": 2**log_words})
    written = "".join(f"{2**log_words - 1:b}" for _ in range(books))
    assert config.bits == len(written)
    assert config.code_bytes == len([written[i : i + 8] for i in range(0, len(written), 8)])
    assert config.sub_dim == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding_dim": 30}, "embedding_dim must be a positive multiple of num_codebooks=4, got 30"),
        ({"embedding_dim": 0}, "embedding_dim must be a positive multiple"),
        ({"embedding_dim": -4}, "embedding_dim must be a positive multiple"),
        ({"num_codebooks": 0}, "num_codebooks must be at least 1, got 0"),
        ({"num_codebooks": -1}, "num_codebooks must be at least 1, got -1"),
        ({"codebook_size": 1}, "codebook_size must be a power of two from 2 to 256, got 1"),
        ({"codebook_size": 0}, "codebook_size must be a power of two"),
        ({"codebook_size": -4}, "codebook_size must be a power of two"),
        ({"codebook_size": 12}, "codebook_size must be a power of two from 2 to 256, got 12"),
        ({"codebook_size": 255}, "codebook_size must be a power of two"),
        ({"codebook_size": 512}, "codebook_size must be a power of two from 2 to 256, got 512"),
        ({"softmax_scale": 0.0}, "softmax_scale must be positive.*got 0.0"),
        ({"softmax_scale": -1}, "softmax_scale must be positive.*got -1"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be positive"),
        ({"softmax_scale": float("inf")}, "softmax_scale must be"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"num_channels": 0}, "num_channels must be at least 1, got 0"),
    ],
)
def test_impossible_value_is_refused_with_field_and_value(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        TCQConfig(**{**SMALL, **fields})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embedding_dim", "64"),
        ("embedding_dim", 64.0),
        ("num_codebooks", True),
        ("codebook_size", None),
        ("softmax_scale", "10"),
        ("image_size", 32.0),
        ("pooling", "max"),
        ("backbone", 3),
        ("backbone_kwargs", "depth=2"),
    ],
)
def test_wrong_type_is_refused_with_the_field_name(field, value):
    with pytest.raises(StrictDataclassError, match=f"'{field}'"):
        TCQConfig(**{**SMALL, field: value})


def test_integer_is_accepted_in_the_float_field():
    assert TCQConfig(**SMALL, softmax_scale=5).softmax_scale == 5


def test_later_assignment_of_a_wrong_type_is_refused():
    config = TCQConfig(**SMALL)
    with pytest.raises(StrictDataclassError, match="embedding_dim"):
        config.embedding_dim = "64"


def test_impossible_combination_made_later_is_refused_on_save(tmp_path):
    config = TCQConfig(**SMALL)
    config.num_codebooks = 5
    with pytest.raises(StrictDataclassError, match="multiple of num_codebooks=5"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_impossible_value_edited_into_config_json_is_refused_on_load(tmp_path):
    TCQConfig(**SMALL).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "codebook_size": 100}))
    with pytest.raises(StrictDataclassError, match="codebook_size must be a power of two"):
        TCQConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("image_size", [None, 32])
def test_unknown_backbone_names_a_close_one_and_the_timm_version(image_size):
    with pytest.raises((ValueError, StrictDataclassError)) as caught:
        TCQConfig(backbone="vit_tiny_patch16_242", image_size=image_size)
    message = str(caught.value)
    assert "vit_tiny_patch16_242" in message
    assert "vit_tiny_patch16_224" in message
    assert timm.__version__ in message


def test_unknown_backbone_without_a_close_name_says_so_without_a_hint():
    with pytest.raises(ValueError, match="unknown to timm") as caught:
        TCQConfig(backbone="§§§§§§")
    assert "closest" not in str(caught.value)


@pytest.mark.parametrize("image_size", [None, 32])
def test_unknown_pretrained_tag_lists_the_known_ones(image_size):
    with pytest.raises((ValueError, StrictDataclassError), match="pretrained tag") as caught:
        TCQConfig(backbone="vit_tiny_patch16_224.nonsense", image_size=image_size)
    assert "vit_tiny_patch16_224.augreg_in21k" in str(caught.value)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("codebok_size", "codebook_size"),
        ("num_codebook", "num_codebooks"),
        ("embeding_dim", "embedding_dim"),
        ("img_size", "image_size"),
        ("softmax_scal", "softmax_scale"),
    ],
)
def test_misspelt_field_is_refused_and_the_right_one_suggested(misspelt, meant):
    with pytest.raises(ValueError, match=f"no field '{misspelt}'; did you mean '{meant}'"):
        TCQConfig(**{**SMALL, misspelt: 4})


def test_unknown_field_without_a_close_name_is_refused():
    with pytest.raises(ValueError, match=r"no field 'zzzz'$"):
        TCQConfig(**SMALL, zzzz=1)


def test_positional_argument_is_refused():
    with pytest.raises(ValueError, match="keyword"):
        TCQConfig("vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("img_size", "image_size"),
        ("in_chans", "num_channels"),
        ("global_pool", "pooling"),
        ("pretrained", "from_timm"),
        ("checkpoint_path", "weights"),
        ("num_classes", ""),
        ("features_only", ""),
    ],
)
def test_backbone_kwargs_that_the_config_decides_itself_are_refused(name, instead):
    with pytest.raises(StrictDataclassError, match=f"must not hold '{name}'.*{instead}"):
        TCQConfig(**SMALL, backbone_kwargs={name: 1})


@pytest.mark.parametrize(
    ("backbone", "side"), [("vit_tiny_patch16_224", 224), ("vit_tiny_patch16_384", 384), ("test_vit", 160)]
)
def test_image_size_none_takes_the_side_that_timm_gives(backbone, side):
    assert timm.models.get_pretrained_cfg(backbone).input_size == (3, side, side)
    assert TCQConfig(backbone=backbone).image_size == side


def test_backbone_with_oblong_default_input_asks_for_image_size():
    with pytest.raises(ValueError, match="1024x768 input by default; set image_size"):
        TCQConfig(backbone="vit_base_patch16_sapiens2")
    assert TCQConfig(backbone="vit_base_patch16_sapiens2", image_size=64).image_size == 64
