"""arguments: defaults, impossible values, command line, JSON."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import HfArgumentParser, SchedulerType, TrainingArguments

from tcq_hf import TCQTrainingArguments


@pytest.fixture
def make(tmp_path):
    def made(**values):
        return TCQTrainingArguments(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"} | values)

    return made


@pytest.fixture
def parse(tmp_path):
    def parsed(*words):
        (found,) = HfArgumentParser(TCQTrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--use_cpu", *words]
        )
        return found

    return parsed


DEFAULTS = {
    "temperature": 0.5,
    "loss_form": "soft",
    "negative_filter": "auto",
    "positives": "neighbours",
    "feature_dropout": 0.5,
    "negative_share": 0.1,
    "clip_start": 0,
    "debias_prior": None,
    "usage_weight": 0,
    "diversity_weight": 0,
    "views": "photo",
    "backbone_learning_rate": None,
    "image_column": "image",
    "label_column": "label",
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "num_train_epochs": 20,
    "lr_scheduler_type": SchedulerType.COSINE,
    "dataloader_drop_last": True,
    "remove_unused_columns": False,
}


def test_defaults_are_those_of_the_design(make, parse):
    for found in (make(), parse()):
        assert {name: getattr(found, name) for name in DEFAULTS} == DEFAULTS
        assert type(found.lr_scheduler_type) is SchedulerType


def test_every_other_default_is_that_of_transformers(make, tmp_path):
    theirs = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    own = {field.name for field in dataclasses.fields(TCQTrainingArguments)}
    shared = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = make()
    differ = {name for name in shared if getattr(ours, name) != getattr(theirs, name)}
    assert differ <= set(DEFAULTS)
    assert differ, "some must"
    assert set(DEFAULTS) - shared <= own


def test_batches_are_pinned_for_a_gpu_alone(make):
    assert make(use_cpu=False).dataloader_pin_memory == torch.cuda.is_available()
    assert not make(use_cpu=True).dataloader_pin_memory


def test_every_argument_of_ours_has_a_help_text():
    shared = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(TCQTrainingArguments):
        assert field.name in shared or field.metadata["help"].endswith(".")


# --- Impossible values -----------------------------------------------------------------------------------------------

IMPOSSIBLE = [
    *[("temperature", value) for value in (0, 0.0, -0.1, math.inf, math.nan)],
    *[
        (name, value)
        for name in ("clip_start", "usage_weight", "diversity_weight", "backbone_learning_rate")
        for value in (-1.0, math.inf, math.nan)
    ],
    *[(name, value) for name in ("debias_prior", "feature_dropout") for value in (-0.1, 1.0, math.nan)],
    *[("negative_share", value) for value in (-0.1, 1.0, math.nan)],
    ("negative_count", -1),
    *[("negative_threshold", value) for value in (-1.1, 1.1, math.nan)],
    *[("negative_margin", value) for value in (-0.1, math.inf, math.nan)],
    *[("negative_filter", value) for value in ("fractoin", "", None)],
    *[("loss_form", value) for value in ("hard", "", None)],
    *[("positives", value) for value in ("neighbors", "", None)],
    *[("views", value) for value in ("photos", "", None)],
    ("remove_unused_columns", True),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_name(make, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must ") as caught:
        make(**{name: value})
    assert name == "remove_unused_columns" or str(caught.value).endswith(f"got {value!r}")


POSSIBLE = [
    *[("temperature", value) for value in (1e-3, 1, 50.0)],
    *[
        (name, value)
        for name in ("clip_start", "usage_weight", "diversity_weight", "backbone_learning_rate")
        for value in (0, 0.0, 3.5)
    ],
    *[(name, value) for name in ("debias_prior", "feature_dropout") for value in (0, 0.99)],
    *[("negative_share", value) for value in (0, 0.99)],
    *[("negative_count", value) for value in (0, 500)],
    *[("negative_threshold", value) for value in (-1, 1)],
    *[("negative_margin", value) for value in (0, 3.0)],
    *[("negative_filter", value) for value in ("none", "fraction", "topk", "threshold", "margin")],
    *[("loss_form", value) for value in ("soft", "cross")],
    *[("views", value) for value in ("photo", "small", "grey")],
]


@pytest.mark.parametrize(("name", "value"), POSSIBLE)
def test_the_ends_of_every_range_are_taken_as_they_are(make, name, value):
    assert getattr(make(**{name: value}), name) == value


def test_an_unknown_argument_is_refused(make):
    with pytest.raises(TypeError, match="temprature"):
        make(temprature=0.2)


# --- The filter that the arguments describe --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "dropped"),
    [
        ({"negative_filter": "none"}, 0),
        ({}, 0),  # groups decide
        ({"negative_filter": "fraction"}, 1),  # floor(0.1 x 19)
        ({"negative_filter": "fraction", "negative_share": 0.3}, 5),
        ({"negative_filter": "topk", "negative_count": 4}, 4),
        ({"negative_filter": "threshold", "negative_threshold": 0.655}, 6),
        ({"negative_filter": "margin", "negative_margin": 0.365}, 7),
    ],
)
def test_each_filter_gets_its_own_value(make, values, dropped):
    # Similarities of every anchor to the 19 others: 0.05, 0.10, ... 0.95, and 1 to its positive.
    rows = [[1.0 if i == j else (1 + (j - i - 1) % 20) / 20 for j in range(20)] for i in range(20)]
    mask = make(**values).make_filter()(torch.tensor(rows))
    assert mask.sum(dim=1).tolist() == [dropped] * 20


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "auto"),
        ({"positives": "views"}, "auto, own views"),
        ({"negative_filter": "none"}, "no filter"),
        ({"negative_filter": "none", "positives": "views"}, "vanilla contrastive"),
        ({"negative_filter": "fraction", "negative_share": 0.25}, "fraction 0.25"),
        ({"negative_filter": "topk", "negative_count": 4}, "topk 4"),
        ({"negative_filter": "threshold", "positives": "views"}, "threshold 1, own views"),
        ({"negative_filter": "margin", "negative_margin": 0.5}, "margin 0.5"),
    ],
)
def test_a_training_is_called_by_its_filter_and_positives(make, values, name):
    assert make(**values).filter_name == name


# --- Command line and JSON -------------------------------------------------------------------------------------------


def test_help_shows_every_argument(capsys):
    with pytest.raises(SystemExit) as stopped:
        HfArgumentParser(TCQTrainingArguments).parse_args(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TCQTrainingArguments):
        assert f"--{field.name}" in text or not field.init
    assert "Temperature T of the contrastive loss." in text
    assert "{auto,none,fraction,topk,threshold,margin}" in text


def test_the_command_line_reads_every_kind_of_value(parse):
    words = (
        "--temperature 0.5 --loss_form cross --negative_filter topk --negative_count 3 --clip_start 2.5 "
        "--debias_prior 0.05 --backbone_learning_rate 1e-5 --lr_scheduler_type linear --views grey --image_column scan"
    )
    found = parse(*words.split())
    assert (found.temperature, found.loss_form, found.negative_filter, found.negative_count) == (
        0.5,
        "cross",
        "topk",
        3,
    )
    assert (found.clip_start, found.debias_prior, found.backbone_learning_rate) == (2.5, 0.05, 1e-5)
    assert (found.lr_scheduler_type, found.views, found.image_column) == (SchedulerType.LINEAR, "grey", "scan")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (True, False)),
        ("--dataloader_drop_last false", (False, False)),
        ("--no_dataloader_drop_last", (False, False)),
        ("--dataloader_drop_last --dataloader_persistent_workers", (True, True)),
        ("--dataloader_drop_last no --dataloader_persistent_workers yes", (False, True)),
    ],
)
def test_booleans_of_the_command_line(parse, words, expected):
    found = parse("--dataloader_num_workers", "2", *words.split())
    assert (found.dataloader_drop_last, found.dataloader_persistent_workers) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--negative_filter fractoin", "invalid choice: 'fractoin'"),
        ("--loss_form hard", "invalid choice: 'hard'"),
        ("--temperature warm", "invalid float value: 'warm'"),
        ("--dataloader_drop_last perhaps", "dataloader_drop_last"),
    ],
)
def test_the_command_line_refuses_what_it_cannot_read(parse, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        parse(*words.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("words", "name"), [("--temperature -1", "temperature"), ("--views photos", "views")])
def test_the_command_line_refuses_impossible_values_too(parse, words, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        parse(*words.split())


def test_a_dict_is_read(tmp_path):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "negative_filter": "margin", "negative_margin": 0.2}
    (found,) = HfArgumentParser(TCQTrainingArguments).parse_dict(given)
    assert (found.negative_filter, found.negative_margin, found.temperature) == ("margin", 0.2, 0.5)
    with pytest.raises(ValueError, match="temprature"):
        HfArgumentParser(TCQTrainingArguments).parse_dict({**given, "temprature": 1.0})
    with pytest.raises(ValueError, match=r"^negative_filter must be one of auto, none, fraction"):
        HfArgumentParser(TCQTrainingArguments).parse_dict({**given, "negative_filter": "fractoin"})


def test_json_holds_every_argument_and_makes_the_same_ones(make):
    given = make(
        temperature=0.7, negative_filter="topk", negative_count=2, debias_prior=0.1, lr_scheduler_type="linear"
    )
    values = json.loads(given.to_json_string())
    assert {field.name for field in dataclasses.fields(TCQTrainingArguments) if field.init} <= set(values)
    names = [*DEFAULTS, "negative_count", "negative_threshold", "negative_margin", "positives"]
    again = make(**{name: values[name] for name in names})
    assert {name: getattr(again, name) for name in names} == {name: getattr(given, name) for name in names}
