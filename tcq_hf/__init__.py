"""tcq_hf: unsupervised image retrieval with learned codes for Hugging Face users.

Importing the package registers `TCQModel` with the Auto classes of transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .model.configuration_tcq import TCQConfig
from .model.image_processing_tcq import TCQImageProcessor
from .model.modeling_tcq import TCQModel, TCQOutput

if TYPE_CHECKING:
    from .evaluation.metrics import evaluate, mean_average_precision
    from .index.dataset_index import add_code_index, codes_array, search
    from .index.encoding import encode_dataset, extract_features
    from .index.faiss_index import build_index, load_index, save_index
    from .index.gpu_index import from_gpu, to_gpu
    from .training.arguments import TCQTrainingArguments
    from .training.feature_cache import FeatureCache
    from .training.trainer import TCQTrainer

__version__ = "0.1.0"

AutoConfig.register("tcq", TCQConfig, exist_ok=True)
AutoModel.register(TCQConfig, TCQModel, exist_ok=True)
AutoImageProcessor.register(
    TCQConfig, image_processor_classes={"pil": TCQImageProcessor, "torchvision": TCQImageProcessor}, exist_ok=True
)
# From here on save_pretrained() copies the code too, for trust_remote_code=True where tcq_hf is not installed.
TCQConfig.register_for_auto_class()
TCQModel.register_for_auto_class("AutoModel")
TCQImageProcessor.register_for_auto_class("AutoImageProcessor")

# Resolved on first use: these need datasets, and FAISS, which is an extra.
_LAZY = {
    "encode_dataset": "index.encoding",
    "extract_features": "index.encoding",
    "build_index": "index.faiss_index",
    "load_index": "index.faiss_index",
    "save_index": "index.faiss_index",
    "from_gpu": "index.gpu_index",
    "to_gpu": "index.gpu_index",
    "add_code_index": "index.dataset_index",
    "codes_array": "index.dataset_index",
    "search": "index.dataset_index",
    "evaluate": "evaluation.metrics",
    "mean_average_precision": "evaluation.metrics",
    "FeatureCache": "training.feature_cache",
    "TCQTrainer": "training.trainer",
    "TCQTrainingArguments": "training.arguments",
}

__all__ = ["TCQConfig", "TCQImageProcessor", "TCQModel", "TCQOutput", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
