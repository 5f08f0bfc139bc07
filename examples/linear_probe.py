"""Nearest neighbours and a linear probe on the frozen features of a backbone.

    python examples/linear_probe.py
    python examples/linear_probe.py --checkpoint runs/quickstart/model.safetensors

How good are the features of a model that is not trained further? Two simple classifiers are fitted
to the features of the training images in the package's sample of Fashion-MNIST, and tested on the
test images: a vote of the nearest neighbours, and logistic regression. The baselines are raw pixels
and a backbone with random weights. The settings of both classifiers are fixed, so no image is used
to choose them.
"""

import argparse
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn

import emax_timm  # noqa: F401  (registers the models with timm)
from emax_timm.samples.scenes import SAMPLE

# The quickstart's architecture and input, for use without a checkpoint. `resolve_data_config` takes
# the rest from the model's config; with a checkpoint it takes everything from there.
MODEL: dict[str, Any] = {"model_name": "resnet10t_emax", "channels": (32, 64, 128, 256)}
INPUT = {"input_size": (1, 32, 32), "mean": (0.286,), "std": (0.353,), "crop_pct": 1.0}

Data = tuple[Tensor, Tensor]
"""Images or features [n, ...], and labels [n]."""


def load_images(split: str, data_config: dict[str, Any], limit: int | None) -> Data:
    """Load images preprocessed for the model, [n, c, h, w], and their labels [n]."""
    mode = "L" if data_config["input_size"][0] == 1 else "RGB"
    transform: Any = create_transform(**data_config, is_training=False)
    dataset: Any = create_dataset("", root=str(SAMPLE), split=f"{split}.tar", input_img_mode=mode)
    # The files are sorted by class, so a stride takes equally many of each.
    chosen = range(0, len(dataset), max(1, len(dataset) // limit) if limit else 1)
    images, labels = zip(*(dataset[index] for index in chosen), strict=True)
    return torch.stack([transform(image) for image in images]), torch.tensor(labels)


@torch.inference_mode()
def extract(model: nn.Module, images: Tensor) -> Tensor:
    """Extract the pooled features [n, c] of a model without a classifier."""
    model.eval()
    return torch.cat([model(part) for part in images.split(100)]).clone()


def nearest_neighbours(train: Data, test: Data, neighbours: int = 10) -> float:
    """Measure the accuracy of a vote of the training images of greatest cosine similarity."""
    (known, labels), (asked, expected) = train, test
    center = known.mean(dim=0)
    known, asked = (nn.functional.normalize(x - center, dim=1) for x in (known, asked))
    votes = labels[(asked @ known.T).topk(neighbours).indices]  # [n, neighbours]
    return (votes.mode(dim=1).values == expected).double().mean().item()


def linear_probe(train: Data, test: Data, weight_decay: float = 1e-4) -> float:
    """Measure the accuracy of logistic regression on standardised features, fitted by L-BFGS."""
    (known, labels), (asked, expected) = train, test
    mean, std = known.mean(dim=0), known.std(dim=0).clamp(min=1e-6)
    known, asked = (known - mean) / std, (asked - mean) / std
    weight = torch.zeros(known.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(known @ weight + bias, labels)
        value = value + weight_decay * weight.square().sum()
        value.backward()
        return value.item()

    optimizer.step(loss)
    with torch.inference_mode():
        predicted = (asked @ weight + bias).argmax(dim=1)
    return (predicted == expected).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Probes of frozen features.")
    parser.add_argument("--checkpoint", type=Path, help="model.safetensors in a run directory")
    parser.add_argument("--limit", type=int, help="use about this many images of each split")
    parser.add_argument("--output", type=Path, help="folder for the features, as safetensors")
    arguments = parser.parse_args()
    checkpoint: Path | None = arguments.checkpoint

    torch.manual_seed(0)
    models: dict[str, Any] = {}
    if checkpoint is None:
        models["random weights"] = timm.create_model(**MODEL, num_classes=0, in_chans=1)
        data_config = resolve_data_config(INPUT, model=models["random weights"])
    else:
        # timm reads the weights under this name, and the config.json beside them.
        if checkpoint.name != "model.safetensors" or not checkpoint.is_file():
            parser.error(f"{checkpoint} is not the model.safetensors of a run")
        name = f"local-dir:{checkpoint.parent}"
        models["random weights"] = timm.create_model(name, num_classes=0)
        models["checkpoint"] = timm.create_model(name, pretrained=True, num_classes=0)
        data_config = resolve_data_config(model=models["checkpoint"])

    images, labels = zip(
        *(load_images(split, data_config, arguments.limit) for split in ("train", "test")),
        strict=True,
    )
    features = {"raw pixels": [x.flatten(1) for x in images]}
    for name, model in models.items():
        features[name] = [extract(model, x) for x in images]

    # `num_classes=0` leaves the pooled features; `forward_features` gives the map before pooling.
    name, model = list(models.items())[-1]
    with torch.inference_mode():
        feature_map = model.forward_features(images[1][:8])
    pooled = features[name][1][:8]
    print(f"map {[*feature_map.shape[1:]]}, pooled {[*pooled.shape[1:]]}")
    torch.testing.assert_close(feature_map.mean(dim=(2, 3)), pooled)

    print(f"test accuracy, {len(labels[0])} images to fit, {len(labels[1])} to test, chance 0.100")
    print("features        nearest neighbours  linear probe")
    for name, (train, test) in features.items():
        known, asked = (train, labels[0]), (test, labels[1])
        row = nearest_neighbours(known, asked), linear_probe(known, asked)
        print(f"{name:14}  {row[0]:18.3f}  {row[1]:12.3f}")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        tensors = {"train_labels": labels[0], "test_labels": labels[1]}
        for split, values in zip(("train", "test"), features[list(models)[-1]], strict=True):
            tensors[f"{split}_features"] = values
        safetensors.torch.save_file(tensors, arguments.output / "features.safetensors")


if __name__ == "__main__":
    main()
