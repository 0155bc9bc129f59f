"""Published figures of other systems on the same protocols, with another backbone: to be read beside, not against."""

# mAP@1000, hits within k, by protocol and bits. MeCoQ: the table of its paper (AAAI 2022, arXiv 2109.05205). HiHPQ:
# AAAI 2024, arXiv 2401.07212, taken from quotations of it.
PUBLISHED: dict[str, dict[int, dict[str, float]]] = {
    "cifar10-i": {16: {"MeCoQ": 0.6820}, 32: {"MeCoQ": 0.6974}, 64: {"MeCoQ": 0.7106, "HiHPQ": 0.7371}},
    "cifar10-ii": {16: {"MeCoQ": 0.6288}, 32: {"MeCoQ": 0.6409}, 64: {"MeCoQ": 0.6507}},
}
BACKBONE = "VGG16"
SOURCES = "MeCoQ: arXiv 2109.05205; HiHPQ: arXiv 2401.07212, second-hand"
