"""Speed of encode_dataset against the bare timm forward, from JPEG files and from decoded pictures."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
from page import BACKBONE, data_folder, write_page

from tcq_hf import TCQImageProcessor, TCQModel, encode_dataset

TEXT = """Photographs of the clothing data set (JPEG, short side 256 px), ViT-Ti/16 at 224 px, float32, batches of
{batch_size}. Each figure is the median over {repeats} rounds; in each round every way encodes the same {count}
pictures, and the bare timm forward runs before and after it on tensors that are ready: the share is the ratio of the
two times. Nothing is read from the cache."""

NOTES = """On a CPU each core decodes and encodes batches of its own, with one thread of torch
(`num_workers=0`, the default): no core waits for another inside a forward pass, which pays for most of the decoding.
With all cores in each forward pass and the decoding between two of them the shares were 0.83 to 0.85. Worker
processes (`num_workers=1`) compete with the model for the cores and are slower here; on a GPU they are the default.
`dataset.map` is what the guides of `datasets` show: timm's
transform and the model in one function, on pictures that `datasets` has decoded one by one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    data = data_folder()
    model = TCQModel.from_timm(BACKBONE, weights=data / BACKBONE / "model.safetensors")
    processor = TCQImageProcessor.from_backbone(BACKBONE)
    photos = datasets.load_dataset(str(data / "clothing"), split="train").select(range(arguments.count))
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(model, processor, photos, Path(folder), arguments.batch_size)
        ratios, speeds = measure(ways, model, arguments)
    rows = [
        {
            "way": way,
            "pictures a second": f"{np.median(speeds[way]):.1f}",
            "share of the bare forward": f"{np.median(ratios[way]):.3f}",
            "worst round": f"{min(ratios[way]):.3f}",
            "best round": f"{max(ratios[way]):.3f}",
        }
        for way in ways
    ]
    text = TEXT.format(**vars(arguments))
    write_page("encode", "Speed of encoding", [text, rows, NOTES])


def make_ways(
    model: TCQModel, processor: TCQImageProcessor, photos: datasets.Dataset, folder: Path, batch_size: int
) -> dict[str, Callable]:
    (folder / "jpeg").mkdir()
    for i, row in enumerate(photos.cast_column("image", datasets.Image(decode=False))):
        (folder / "jpeg" / f"{i:05d}.jpg").write_bytes(row["image"]["bytes"])
    files = datasets.load_dataset("imagefolder", data_dir=str(folder / "jpeg"), split="train", cache_dir=str(folder))
    decoded = [picture.convert("RGB") for picture in photos["image"]]
    stream = datasets.IterableDataset.from_generator(lambda: ({"image": picture} for picture in decoded))
    config = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(BACKBONE).to_dict())
    transform = timm.data.create_transform(**config, is_training=False)

    def by_map(rows: dict) -> dict:
        pixel_values = torch.stack([transform(picture.convert("RGB")) for picture in rows["image"]])
        with torch.inference_mode():
            return {"codes": model(pixel_values).codes.numpy()}

    def encode(dataset: datasets.Dataset, **options: int) -> None:
        for _ in encode_dataset(dataset, model, processor, batch_size=batch_size, **options).select_columns(["codes"]):
            pass

    return {
        "encode_dataset, JPEG files": lambda: encode(files),
        "encode_dataset, decoded pictures": lambda: encode(stream),
        "encode_dataset, JPEG files, 1 worker process": lambda: encode(files, num_workers=1),
        "dataset.map with timm's transform, JPEG files": lambda: files.map(by_map, batched=True, batch_size=batch_size),
    }


def measure(
    ways: dict[str, Callable], model: TCQModel, arguments: argparse.Namespace
) -> tuple[dict[str, list], dict[str, list]]:
    pixel_values = torch.randn(arguments.batch_size, 3, 224, 224)

    def bare() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(arguments.count // arguments.batch_size):
                model.backbone(pixel_values)
        return time.perf_counter() - start

    bare()
    ratios, speeds = {way: [] for way in ways}, {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way, run in ways.items():
            before = bare()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            ratios[way].append((before + bare()) / 2 / seconds)
            speeds[way].append(arguments.count / seconds)
    return ratios, speeds


if __name__ == "__main__":
    main()
