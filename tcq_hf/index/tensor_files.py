"""Arrays in, one safetensors file that says what it holds out, and back."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .writing import written_aside


def save_tensors(path: str | os.PathLike, kind: str, tensors: Mapping[str, np.ndarray], **metadata: str) -> None:
    """Write arrays by name as one safetensors file, whole or not at all.

    Args:
        path: The file.
        kind: What it holds, a noun, which `load_tensors` asks for.
        tensors: The arrays.
        metadata: Texts that go with them.
    """
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    with written_aside(Path(path)) as aside:
        save_file(contiguous, aside, metadata={"format": "np", "kind": f"tcq_hf {kind}"} | metadata)


def load_tensors(path: str | os.PathLike, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the arrays of `save_tensors` by name, and the texts that go with them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {kind} file {path}")
    try:
        with safe_open(path, "np") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{kind} file {path} is damaged: {error}") from error
    if metadata.get("kind") != f"tcq_hf {kind}":
        raise ValueError(f"{path} holds no {kind}")
    return tensors, metadata
