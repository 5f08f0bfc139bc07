"""Golden logits: what the weights in the package compute for fixed images.

`python tests/models/golden.py` writes them for weights that have none; those that are there stay,
for they are the promise that published weights keep their outputs.
"""

import json
from pathlib import Path

import timm
import torch
from torch import Tensor

from emax_timm.models.weights_index import INDEX
from emax_timm.training import TrainConfig
from emax_timm.training.data import open_split

FILE = Path(__file__).with_name("golden_logits.json")
SHIPPED = [entry.name for entry in INDEX if entry.repo is None]


def golden_images(size: int = 32) -> Tensor:
    """Eight of the sample's test images, and four of noise [12, 3, size, size]."""
    dataset = open_split(
        TrainConfig(dataset="sample/fashion_mnist"), "test.tar", "RGB", training=False, batch_size=1
    )
    images = []
    for index in range(0, 1000, 125):
        image = dataset[index][0]
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)  # [3, 28, 28]
        margin = (size - 28) // 2
        images.append(torch.nn.functional.pad(pixels, [margin] * 4) / 255)
    # Not from a generator of torch's, whose numbers are no promise.
    values = torch.arange(4 * 3 * size * size, dtype=torch.float64)
    noise = (torch.sin(values * 12.9898) * 43758.5453).frac().abs().view(4, 3, size, size)
    return (torch.cat([torch.stack(images).double(), noise]) - 0.286).div(0.353).float()


def logits_of(name: str, **kwargs: object) -> Tensor:
    """[12, classes]"""
    model = timm.create_model(name, pretrained=True, **kwargs).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        return model(golden_images())


def read() -> dict[str, list[list[float]]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


if __name__ == "__main__":
    golden = read()
    for shipped in SHIPPED:
        if shipped not in golden:
            golden[shipped] = [[round(v, 5) for v in row] for row in logits_of(shipped).tolist()]
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
