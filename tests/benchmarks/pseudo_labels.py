"""Pseudo-label masks against similarity filters, on digits, with the loss of the package."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from page import write_page
from sklearn.datasets import load_digits

sys.path.append(str(Path(__file__).parents[1] / "systems"))
from digits_training import learn

TEXT = """1,797 digits of 8 x 8 pixels; an encoder 64-256-64 from random weights, views by shift, gain and noise, T 0.2,
batch 128, Adam 1e-3, 60 epochs, seeds {seeds}. Groups are found from the embeddings at epoch 10 and every 10 epochs
after: k-means with a number of groups (the true one is 10), or the communities of the neighbourhood graph, for which
nothing has to be known. mAP over the whole ranking, each digit querying the others, with min(k, relevant). *False
negatives* is the share of pairs of one digit among those that stay in the loss, in the last epoch; without a filter it
is a tenth."""

WAYS = {
    "no filter": {},
    "fraction 0.1": {"share": 0.1},
    "groups: k-means, 10": {"groups": 10},
    "groups: k-means, 20": {"groups": 20},
    "fraction 0.1 or groups: k-means, 20": {"share": 0.1, "groups": 20},
    "groups: communities": {"groups": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    rows = []
    for way, options in WAYS.items():
        found = [learn(images, labels, seed, arguments.epochs, **options) for seed in range(arguments.seeds)]
        figures, false, dropped = np.array(found).T
        spread = f"{figures.mean():.3f} ± {figures.std():.3f}"
        row = {"what leaves the loss": way, "mAP": spread, "false negatives": f"{false.mean():.3f}"}
        rows.append(row | {"dropped": f"{dropped.mean():.3f}"})
        print(*rows[-1].values(), flush=True)
    text = TEXT.format(seeds=", ".join(map(str, range(arguments.seeds))))
    write_page("pseudo_labels", "Masks of pseudo-labels", [text, rows])


if __name__ == "__main__":
    main()
