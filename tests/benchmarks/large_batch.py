"""Memory and time of one training step on a large batch, in chunks and at once."""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import datasets
from page import BACKBONE, data_folder, write_page
from transformers import TrainerCallback

from tcq_hf import TCQConfig, TCQImageProcessor, TCQModel, TCQTrainer, TCQTrainingArguments

TEXT = """One step of `TCQTrainer` with ViT-Ti/16 at 224 px in float32, all of it trained, on clothing photographs (the
3,781 of all splits, some of them twice in the largest batch), two views each: forward, loss over the whole batch,
backward, AdamW. Each row is a process of its own; memory is the largest that it ever held, with the pictures and the
{floor:.1f} GB of Python, the libraries and the model. At once is the plain step, the others have `loss_chunk_size`.
{times}"""
TIMED = "The time is that of the step, without the reading of the pictures."
BUSY = "Other work ran on the machine, so there are no times."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at-once", type=int, nargs="*", default=[32, 64, 128], metavar="IMAGES")
    parser.add_argument("--in-chunks", type=int, nargs="*", default=[128, 1024, 4096], metavar="IMAGES")
    parser.add_argument("--chunk", type=int, default=64, help="pictures in a chunk")
    parser.add_argument("--step", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measure(*arguments.step)))
        return
    busy, found = os.getloadavg()[0] > 0.5, []
    for images, chunk in [(n, 0) for n in arguments.at_once] + [(n, arguments.chunk) for n in arguments.in_chunks]:
        command = [sys.executable, __file__, "--step", str(images), str(chunk)]
        found.append(
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[-2])
        )
        print(found[-1], file=sys.stderr)
    write(found, busy)


def write(found: list[dict], busy: bool) -> None:
    """Write the page of some steps; without times if other work ran beside them."""
    rows = []
    for step in found:
        row = {
            "pictures in the batch": f"{step['images']:,}",
            "embedded": f"{step['chunk']} at a time" if step["chunk"] else "at once",
            "peak memory, GB": f"{step['peak']:.1f}",
        }
        times = {"step, s": f"{step['seconds']:.0f}", "pictures a second": f"{step['images'] / step['seconds']:.1f}"}
        rows.append(row if busy else row | times)
    text = TEXT.format(floor=max(step["floor"] for step in found), times=BUSY if busy else TIMED)
    write_page("large_batch", "Large batches in the memory of small ones", [text, rows])


def measure(images: int, chunk: int) -> dict:
    """Peak memory in GB, that before the first picture, and seconds of one step."""
    splits = datasets.load_dataset(str(data_folder() / "clothing"))
    pictures = datasets.concatenate_datasets(list(splits.values()))
    pictures = pictures.select([row % len(pictures) for row in range(images)])
    model, watch = TCQModel(TCQConfig(backbone=BACKBONE)), Watch()
    floor = peak()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TCQTrainingArguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=images,
            loss_chunk_size=chunk or None,
            negative_filter="fraction",
            positives="views",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        processor = TCQImageProcessor.from_backbone(BACKBONE)
        TCQTrainer(model, arguments, pictures, processing_class=processor, callbacks=[watch]).train()
    return {"images": images, "chunk": chunk, "peak": peak(), "floor": floor, "seconds": watch.seconds}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Watch(TrainerCallback):
    """Times the step, from the batch at hand to the changed weights."""

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds = time.perf_counter() - self.start


if __name__ == "__main__":
    main()
