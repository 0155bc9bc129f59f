"""A model as a Hub repository: weights, config, processor, code, card and the trained empty FAISS index."""

import copy
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError

from .index.code_cache import weights_digest

if TYPE_CHECKING:
    from .model.image_processing_tcq import TCQImageProcessor
    from .model.modeling_tcq import TCQModel


def save(
    model: "TCQModel",
    processor: "TCQImageProcessor",
    folder: str | os.PathLike,
    results: Sequence[Mapping[str, Any]] = (),
    recipe: Mapping[str, Any] | None = None,
    model_id: str | None = None,
) -> Path:
    """Write everything that a Hub repository of the model holds.

    `model.safetensors`, `config.json`, `preprocessor_config.json`, the code for `trust_remote_code=True`, `README.md`
    (the model card) and, where FAISS is installed, `index.faiss`. All files are written aside first and then renamed.

    Args:
        model: The model; adapters of peft are merged into the weights that are written.
        processor: Its image processor.
        folder: Where to; other files in it stay.
        results: Rows of the table of measured figures, all with the same keys.
        recipe: How they were measured (data, queries, cut-off, ties, seed); required with `results`.
        model_id: Hub name to show in the card; the folder's name by default.

    Returns:
        The folder.

    Raises:
        ValueError: If there are results without a recipe, rows with different keys, or unmergeable adapters.
        OSError: If the disk refuses a file; what was there before is kept.
    """
    folder, model = Path(folder), merged(model)
    card = model_card(model, results, recipe, model_id or folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        try:
            model.save_pretrained(aside)
        except SafetensorError as error:
            raise OSError(f"could not write the weights to {folder}: {error}") from error
        processor.save_pretrained(aside)
        Path(aside, "README.md").write_text(card, encoding="utf-8")
        if _has_faiss():
            from .index.faiss_index import build_index, save_index

            save_index(build_index(model), Path(aside, "index.faiss"), model_id)
        for path in sorted(Path(aside).iterdir()):
            path.replace(folder / path.name)
    return folder


def merged(model: "TCQModel") -> "TCQModel":
    """The model itself; or of one with adapters, a `peft.PeftModel`, a plain copy with the adapters merged in.

    Raises:
        ValueError: If the model has adapters without being a `PeftModel`.
    """
    check_adapters(model)
    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model


def check_adapters(model: "TCQModel") -> None:
    """Refuse a model that could not be saved.

    Raises:
        ValueError: If it has adapters without being a `PeftModel`.
    """
    if hasattr(model, "peft_config") and not hasattr(model, "merge_and_unload"):
        raise ValueError(
            "model has adapters in it that cannot be merged: pass the PeftModel that peft.get_peft_model or "
            "tcq_hf.training.adapters.add_lora gives, not the model inside, and not one changed by add_adapter"
        )


def push(
    model: "TCQModel",
    processor: "TCQImageProcessor",
    repo_id: str,
    results: Sequence[Mapping[str, Any]] = (),
    recipe: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload TCQModel",
) -> str:
    """Upload what `save` writes to a Hub repository, which is created if need be.

    Args:
        model: The model.
        processor: Its image processor.
        repo_id: `user/name`.
        results: See `save`.
        recipe: See `save`.
        private: Visibility of a new repository.
        token: Hub token; the stored one by default.
        commit_message: Message of the commit.

    Returns:
        Address of the commit.

    Raises:
        huggingface_hub.errors.OfflineModeIsEnabled: Under `HF_HUB_OFFLINE=1`; other errors are the Hub client's own.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(model, processor, folder, results, recipe, model_id=repo_id)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


def model_card(
    model: "TCQModel", results: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any] | None, model_id: str
) -> str:
    """The model card as Markdown with its metadata header."""
    if results and not recipe:
        raise ValueError(
            "results need a recipe: say data, queries, cut-off, ties and seed, so that they can be repeated"
        )
    if len({tuple(row) for row in results}) > 1:
        raise ValueError("all rows of results must have the same keys")
    config = model.config
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["tcq", "timm", "faiss", "image-retrieval", "product-quantization"],
    )
    fields = ("backbone", "embedding_dim", "num_codebooks", "codebook_size", "bits", "code_bytes", "image_size")
    card = ModelCard.from_template(
        data,
        template_path=str(assets() / "model_card.md"),
        model_id=model_id,
        title=model_id.split("/")[-1] or "TCQModel",
        version=_version(),
        num_channels=config.num_channels,
        whole_bytes=config.codebook_size == 256,
        has_index=_has_faiss(),
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        digest=weights_digest(model),
        results=[dict(row) for row in results],
        recipe=dict(recipe or {}),
        **{name: getattr(config, name) for name in fields},
    )
    return str(card)


def assets() -> Path:
    """Folder of the templates: inside an installed package, beside it in a source checkout."""
    packaged = Path(__file__).parent / "hub_assets"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "hub_assets"


def _has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def _version() -> str:
    from . import __version__

    return __version__
