"""What quantizer and loss add to a training step, beside backbone and projection alone."""

import argparse
import time

import numpy as np
import torch
from page import BACKBONE, write_page

from tcq_hf import TCQConfig, TCQModel, TCQTrainingArguments
from tcq_hf.training.objective import Objective

TEXT = """One training step of ViT-Ti/16 at 224 px on {images} pictures, two views each: forward and backward of
backbone and projection, and forward and backward of everything behind the projection: unit sub-vectors, lookup table,
assignments, codes, soft reconstruction, filter, loss and its logged figures. float32; the median of {repeats} rounds of
the first and of ten times as many of the second, which runs after it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model = TCQModel(TCQConfig(backbone=BACKBONE)).train()
    step = time_backbone(model, arguments)
    rows = []
    for bits, form in ((32, "soft"), (64, "soft"), (64, "cross")):
        part = time_head(bits, form, arguments)
        rows.append(
            {
                "codebooks": f"{bits // 8} x 256",
                "form": form,
                "backbone and projection, s": f"{step:.2f}",
                "quantizer and loss, s": f"{part:.4f}",
                "added": f"{part / step:.2%}",
            }
        )
    write_page("train_step", "Cost of the loss in a training step", [TEXT.format(**vars(arguments)), rows])


def time_backbone(model: TCQModel, arguments: argparse.Namespace) -> float:
    pixel_values = torch.randn(2 * arguments.images, 3, 224, 224)
    return median(
        lambda: model.projection(model.get_image_features(pixel_values)).square().mean().backward(), arguments
    )


def time_head(bits: int, form: str, arguments: argparse.Namespace) -> float:
    model = TCQModel(TCQConfig(backbone=BACKBONE, num_codebooks=bits // 8))
    objective = Objective(TCQTrainingArguments(loss_form=form, usage_weight=0.1, use_cpu=True, report_to="none"))
    features = torch.randn(2 * arguments.images, model.projection.in_features)
    projected = model.projection(features).detach()
    identity = torch.nn.Identity()
    identity.in_features, identity.weight = projected.shape[1], projected
    model.projection = identity

    def step() -> None:
        leaf = projected.clone().requires_grad_()
        loss, _ = objective(model(features=leaf), model.quantizer, epoch=0.0, joint=False)
        loss.backward()

    return median(step, arguments, 10)


def median(step, arguments: argparse.Namespace, more: int = 1) -> float:
    step()
    times = []
    for _ in range(arguments.repeats * more):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


if __name__ == "__main__":
    main()
