"""A saved folder: what is in it, who can read it, what survives a failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import AutoImageProcessor, AutoModel

from tcq_hf import TCQImageProcessor, TCQModel, hub

FILES = {
    *("README.md", "config.json", "preprocessor_config.json", "model.safetensors", "index.faiss", "index.faiss.json"),
    *("backbone_tcq.py", "configuration_tcq.py", "image_processing_tcq.py", "modeling_tcq.py", "projection_tcq.py"),
    "quantization_tcq.py",
}

CARD = """\
---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- tcq
- timm
- faiss
- image-retrieval
- product-quantization
---

# my-model

Turns a picture into a code of 2 bytes and finds similar pictures by their codes. A
[vit_tiny_patch16_224](https://huggingface.co/timm) backbone from timm, a projection to 32 dimensions and a
product quantizer of 4 codebooks with 16 codewords each (16 bits). Projection
and codebooks were made with tcq_hf VERSION without labels; whether the backbone saw labels is told by its own card.

## Use

```python
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("me/my-model", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("me/my-model", trust_remote_code=True)
codes = model(**processor(picture, return_tensors="pt")).codes  # uint8 [1, 4]
```

With `tcq_hf` installed, `trust_remote_code` is not needed, and a dataset of pictures becomes a search engine:

```python
from tcq_hf import add_code_index, encode_dataset, search

dataset = add_code_index(encode_dataset(dataset, model, processor), "codes", model)
rows = search(dataset, "query.jpg", model, processor, k=10)
```

`index.faiss` is an empty FAISS index (`IndexPQ`, inner product) with the learned codebooks, for any language that FAISS
speaks: `read_index`, then `add` embeddings or `add_sa_codes` codes (packed by FAISS's bit string writer). Never call \
`train` on it.

## Weights

| | |
|---|---|
| parameters | 33,792 |
| SHA-256 of all weights | `DIGEST` |
| input | 3 x 32 x 32 |

## Measured

| search with | mAP@1000 |
|---|---|
| codes | 0.5 |
| PQ | 0.4 |

- data: drawn
- seed: 0

## Method

TransClippedCLR: Dubey, Dubey, Singh, Chu, "Transformer-based Clipped Contrastive Quantization Learning for Unsupervised
Image Retrieval", [arXiv 2401.15362](https://arxiv.org/abs/2401.15362)."""

RESULTS = [{"search with": "codes", "mAP@1000": 0.5}, {"search with": "PQ", "mAP@1000": 0.4}]

WITHOUT_US = """
import sys
sys.modules["tcq_hf"] = None  # importing it raises, as where it is not installed
import numpy as np
from transformers import AutoConfig, AutoImageProcessor, AutoModel
folder, picture, out = sys.argv[1:]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).num_codebooks == 4
model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
output = model(**processor(picture, return_tensors="pt"))
np.savez(out, **{name: value.detach().numpy() for name, value in output.items()})
"""


@pytest.fixture
def folder(model, processor, tmp_path):
    return hub.save(model, processor, tmp_path / "my-model")


def test_folder_holds_a_whole_repository(folder):
    assert {path.name for path in folder.iterdir()} == FILES


def test_card_is_the_expected_text(model):
    from tcq_hf import __version__
    from tcq_hf.index.code_cache import weights_digest

    card = hub.model_card(model, RESULTS, {"data": "drawn", "seed": 0}, "me/my-model")
    expected = CARD.replace("VERSION", __version__).replace("DIGEST", weights_digest(model))
    assert card.strip() == expected
    assert "Not measured." in hub.model_card(model, [], None, "m")


def test_results_need_a_recipe_and_equal_keys(model, processor, tmp_path):
    with pytest.raises(ValueError, match="recipe"):
        hub.save(model, processor, tmp_path / "m", results=RESULTS)
    with pytest.raises(ValueError, match="same keys"):
        hub.save(model, processor, tmp_path / "m", results=[{"a": 1}, {"b": 2}], recipe={"seed": 0})
    assert not (tmp_path / "m").exists()


def test_index_of_the_folder_serves_plain_faiss(folder, model):
    index = faiss.read_index(str(folder / "index.faiss"))
    assert index.ntotal == 0
    assert index.is_trained
    np.testing.assert_array_equal(faiss.vector_to_array(index.pq.centroids), model.codebooks().ravel())


def test_auto_classes_by_registration(folder, model, processor, pictures):
    loaded, reader = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    assert type(loaded) is TCQModel
    assert type(reader) is TCQImageProcessor
    pixels = reader(pictures, return_tensors="pt")
    assert torch.equal(pixels["pixel_values"], processor(pictures, return_tensors="pt")["pixel_values"])
    assert torch.equal(loaded(**pixels).embeddings, model(**pixels).embeddings)


def test_invariant_3_trust_remote_code_is_bit_equal_without_the_package(folder, model, processor, pictures, tmp_path):
    pictures[3].save(tmp_path / "p.png")
    environment = dict(os.environ, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", WITHOUT_US, str(folder), str(tmp_path / "p.png"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    expected = model(**processor(tmp_path / "p.png", return_tensors="pt"))
    with np.load(tmp_path / "out.npz") as found:
        assert set(found) == {"embeddings", "codes", "reconstruction", "assignments"}
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value.detach().numpy())


def test_no_code_without_trust(folder, tmp_path):
    program = "import sys; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 1
    assert "trust_remote_code" in done.stderr


def test_saving_again_replaces_and_keeps_other_files(folder, model, processor):
    (folder / "notes.txt").write_text("mine")
    with torch.no_grad():
        model.projection.bias.add_(1)
    hub.save(model, processor, folder)
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt"}
    assert torch.equal(TCQModel.from_pretrained(folder).projection.bias, model.projection.bias)


def test_full_disk_leaves_the_saved_model_whole(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    program = """
import sys, torch
from tcq_hf import TCQImageProcessor, TCQModel, hub
model, processor = TCQModel.from_pretrained(sys.argv[1]), TCQImageProcessor.from_pretrained(sys.argv[1])
torch.nn.init.ones_(model.projection.weight)
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
hub.save(model, processor, sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OSError: could not write the weights to" in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_push_offline_fails_with_the_hub_clients_own_error(model, processor):
    with pytest.raises(OfflineModeIsEnabled):
        hub.push(model, processor, "nobody/nothing")
    with pytest.raises(OfflineModeIsEnabled):
        model.push_to_hub("nobody/nothing")


def test_recipe_of_the_saved_index_names_the_model(model, processor, tmp_path):
    hub.save(model, processor, tmp_path / "m", model_id="me/m")
    assert json.loads((tmp_path / "m" / "index.faiss.json").read_text())["model"] == "me/m"
    assert "me/m" in (tmp_path / "m" / "README.md").read_text()


def test_templates_are_found():
    assert {"model_card.md", "demo_page.html"} <= {path.name for path in Path(hub.assets()).iterdir()}
