"""Dataclasses in, the options of a command out; a config file and a command line in, the values they give out.

Used by the commands that train. Beside their own options they take every argument of transformers' Trainer.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from tcq_hf import TCQTrainingArguments

# Arguments of the Trainer that --help shows beside our own.
_WELL_KNOWN = {
    *("output_dir", "seed", "max_steps", "warmup_steps", "weight_decay", "use_cpu", "bf16", "dataloader_num_workers"),
    *("eval_strategy", "save_strategy", "save_total_limit", "logging_steps", "report_to", "push_to_hub"),
}
# Its own that say nothing on a command line.
_FIXED = {"remove_unused_columns", "dataloader_pin_memory"}
# What a command finds out where nothing is given.
_FOUND = {"image_column": "the first of images", "label_column": "the first of class labels"}
_NOT_SET = ("", "null", "~")


@dataclass
class ModelOptions:
    """Which pictures, and which model."""

    dataset: str | None = field(
        default=None,
        metadata={
            "metavar": "NAME",
            "help": "A folder of pictures (class folders become labels), a parquet file, saved dataset or Hub name.",
        },
    )
    split: str | None = field(default=None, metadata={"help": "E.g. train, train+test or all."})
    model: str | None = field(default=None, metadata={"metavar": "NAME", "help": "A saved model: folder or Hub name."})
    backbone: str | None = field(default=None, metadata={"metavar": "NAME", "help": "A timm model, for a new one."})
    weights: str | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "Local safetensors file for it (otherwise timm's, from the Hub)."},
    )
    embedding_dim: int = field(default=128, metadata={"help": "Width of the embedding."})
    codebook_size: int = field(
        default=256, metadata={"help": "Codewords in a codebook; bits / log2 of this is the number of codebooks."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the input (otherwise the backbone's own)."})
    cached_views: int = field(
        default=1,
        metadata={
            "help": "Views of each picture whose features are kept on disk for a frozen backbone. 1: the picture as "
            "search sees it, and feature_dropout alone makes the two views of the loss."
        },
    )


class OptionsParser(HfArgumentParser):
    """HfArgumentParser as the sub-parser of a command.

    Without dataclasses it is argparse's own parser. With them: what is not given stays out of the namespace; `--help`
    shows the options of the first dataclass, those of `TCQTrainingArguments` and the best known of the Trainer's,
    `--help-all` every one; and a config file may come first, whose options the command line overrides.

    Args:
        dataclass_types: Where the options come from.
        defaults: Values by name that the command takes where nothing is given, other than those of the dataclasses.
        unshown: Options that no help shows.
        **settings: Arguments of `ArgumentParser`.
    """

    def __init__(
        self,
        dataclass_types: Sequence[type] = (),
        defaults: Mapping[str, Any] | None = None,
        unshown: Iterable[str] = (),
        **settings: Any,
    ) -> None:
        self.from_fields, self.defaults, self.hidden = bool(dataclass_types), dict(defaults or {}) | _FOUND, []
        self.unshown = set(unshown)
        own = dataclass_types[:1]
        self.shown = {each.name for kind in own for each in dataclasses.fields(kind)} | _WELL_KNOWN
        self.shown |= set(inspect.get_annotations(TCQTrainingArguments)) - _FIXED
        super().__init__(list(dataclass_types), **settings)
        if self.from_fields:
            self.add_argument("config", nargs="?", metavar="FILE", help="run.yaml or run.json: options by name")
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all arguments of the Trainer too")

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As argparse's; options that come from fields get a default and one spelling in the help alone."""
        if not self.from_fields:
            return super().add_argument(*names, **settings)
        name = names[0].lstrip("-")
        if "type" in settings:
            settings["help"] = settings.get("help", "") + _default(self.defaults.get(name, settings.get("default")))
            if len(settings.get("choices", "")) not in range(1, 7):
                settings.setdefault("metavar", {int: "N", float: "X"}.get(settings["type"], "VALUE"))
        action = super().add_argument(*names, **settings | {"default": argparse.SUPPRESS})
        if name.startswith("no_") or ("type" in settings and name not in self.shown) or name in self.unshown:
            if name not in self.unshown:
                self.hidden.append((action, action.help))
            action.help = argparse.SUPPRESS
        if name != "h" and names[0].startswith("-"):
            action.option_strings = [names[-1]]
        return action

    def given(self, arguments: argparse.Namespace, required: Iterable[str] = ()) -> dict[str, Any]:
        """Options that the config file or the command line gives, the latter first, by name of the field.

        Raises:
            SystemExit: With code 2 if a required one is missing or a value of the file is of the wrong type.
            ValueError: If the file cannot be read or names an unknown option.
        """
        fields = {each.name for kind in self.dataclass_types for each in dataclasses.fields(kind) if each.init}
        on_line = {name: value for name, value in vars(arguments).items() if name in fields}
        in_file = {}
        if hasattr(arguments, "config"):
            read = self.parse_args(_words(Path(arguments.config), fields))
            if hasattr(read, "config"):
                self.error(f"{arguments.config}: {read.config!r} is one value too many for an option that takes one")
            in_file = {name: value for name, value in vars(read).items() if name in fields}
        values = in_file | on_line
        missing = [f"--{name.replace('_', '-')}" for name in required if name not in values]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        return values


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for action, text in parser.hidden:
            action.help = text
        parser.print_help()
        parser.exit()


def _default(value: Any) -> str:
    if value is None or value == "":
        return ""
    return f" (default: {' '.join(map(str, value)) if isinstance(value, list) else getattr(value, 'value', value)})"


def _words(path: Path, fields: Iterable[str]) -> list[str]:
    """The options of a config file as a command line."""
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"the config file must end in .yaml, .yml or .json, got {path}")
    text = path.read_text(encoding="utf-8")
    try:
        # Every scalar as it stands there: argparse knows the types (YAML would make 1e-3 a text and no a bool).
        options = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options by name, such as 'bits: 64', got {type(options).__name__}")
    words = []
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise ValueError(f"{path}: there is no option {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        words += _option(name, value)
    return words


def _option(name: str, value: Any) -> list[str]:
    if value is None or value in _NOT_SET:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]
