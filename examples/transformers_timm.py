"""Save an EMAX model with timm, and use it in Hugging Face transformers.

    pip install 'emax-timm[downstream]'
    python examples/transformers_timm.py [--output FOLDER]

transformers wraps timm's models: it reads the `config.json` and `model.safetensors` that timm
writes, and creates the model with `timm.create_model`. So every script that loads the folder has to
`import emax_timm` before it calls `from_pretrained`.

Here a resnet18_emax with attention in its last two stages only is trained for a few seconds on
the sample of Fashion-MNIST in the package, saved, and loaded by three of transformers' classes,
whose outputs are compared with timm's.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn

import emax_timm  # noqa: F401  (registers the models with timm, where transformers finds them)
from emax_timm.samples.scenes import SAMPLE

try:
    import transformers
except ImportError as error:
    print(f"transformers_timm.py: {error}: pip install 'emax-timm[downstream]'", file=sys.stderr)
    raise SystemExit(2) from None

INPUT = {"input_size": (1, 32, 32), "mean": (0.286,), "std": (0.353,), "crop_pct": 1.0}
STAGES = (1, 2, 3, 4)


def load_images(
    split: str, limit: int | None = None
) -> tuple[list[Image.Image], Tensor, list[str]]:
    """Load PIL images, their labels [n], and the names of the classes."""
    dataset: Any = create_dataset("", root=str(SAMPLE), split=f"{split}.tar", input_img_mode="L")
    # The files are sorted by class, so a stride takes equally many of each.
    chosen = range(0, len(dataset), max(1, len(dataset) // limit) if limit else 1)
    images, labels = zip(*(dataset[index] for index in chosen), strict=True)
    return list(images), torch.tensor(labels), list(dataset.reader.class_name_to_idx)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Train on random batches of 32 images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def save(model: nn.Module, folder: Path, data_config: dict[str, Any], classes: list[str]) -> None:
    """Write the folder that both libraries read."""
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"label_names": classes},
        data_config=data_config,
        safe_serialization=True,
    )
    # timm records all arguments of the model as `model_args`, `num_classes` among them, and records
    # `num_classes` beside them too; transformers 5 would pass it to create_model twice.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2))


def load_backbone(folder: Path) -> Any:
    """Load a `TimmBackbone`, the class from which transformers' detectors get their features."""
    name = f"local-dir:{folder}"
    backbone = transformers.TimmBackbone.from_pretrained(name, out_indices=STAGES, num_channels=1)
    # transformers 5 resets the running statistics of every BatchNorm after timm has loaded the
    # weights, so they are loaded once more.
    features = timm.create_model(name, pretrained=True, features_only=True, out_indices=STAGES)
    backbone._backbone.load_state_dict(features.state_dict())
    return backbone.eval()


def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the greatest absolute difference of tensors; NaN counts as infinity."""
    return max(
        torch.nan_to_num((a - b).abs(), nan=float("inf")).max().item()
        for a, b in zip(first, second, strict=True)
    )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()


def run(folder: Path, steps: int, limit: int) -> int:
    """Train a model, save it to `folder`, load it and compare; return the exit status."""
    torch.manual_seed(0)
    model: Any = timm.create_model("resnet18_emax", num_classes=10, in_chans=1, attn_stages=(2, 3))
    data_config = resolve_data_config(INPUT, model=model)
    transform: Any = create_transform(**data_config, is_training=False)
    images, labels, classes = load_images("train")
    train(model, torch.stack([transform(image) for image in images]), labels, steps)
    save(model, folder, data_config, classes)

    images, labels, _ = load_images("test", limit)
    inputs = torch.stack([transform(image) for image in images])
    with torch.inference_mode():
        logits = model(inputs)
        features = model.forward_intermediates(inputs, intermediates_only=True)[1:]

    folder_name = str(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder_name)
    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder_name)
    encoder = transformers.TimmWrapperModel.from_pretrained(folder_name)
    backbone = load_backbone(folder)
    processed = processor(images)
    with torch.inference_mode():
        found = classifier(**processed).logits
        hidden = encoder(**processed, output_hidden_states=list(STAGES)).hidden_states
        maps = backbone(processed["pixel_values"]).feature_maps

    kept = classifier.config.model_args["attn_stages"]
    gates = [name for name in classifier.timm_model.state_dict() if "residual_gate" in name]
    attended = sorted({int(name.removeprefix("layer")[0]) - 1 for name in gates})
    differences = {
        f"inputs, {type(processor).__name__}": difference([processed["pixel_values"]], [inputs]),
        f"logits, {type(classifier).__name__}": difference([found], [logits]),
        f"features, {type(encoder).__name__}": difference(hidden, features),
        f"features, {type(backbone).__name__}": difference(maps, features),
    }
    print(f"attn_stages: config.json {kept}, as loaded {attended}")
    print(f"classes {', '.join(classifier.config.id2label.values())}")
    print("greatest difference from timm's")
    for name, value in differences.items():
        print(f"  {name:46} {value:.1e}")
    print(f"test accuracy: timm {accuracy(logits, labels):.3f}, ", end="")
    print(f"transformers {accuracy(found, labels):.3f}, chance 0.100")
    return 0 if all(value < 1e-4 for value in differences.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="An EMAX model in transformers.")
    parser.add_argument("--steps", type=int, default=100, help="of training, 32 images each")
    parser.add_argument("--limit", type=int, default=500, help="test images, about")
    parser.add_argument("--output", type=Path, help="folder for the model")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.output:
        return run(arguments.output, arguments.steps, arguments.limit)
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), arguments.steps, arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
