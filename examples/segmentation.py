"""Segment items in scenes: segmentation_models_pytorch's U-Net with an EMAX encoder from timm.

    pip install 'emax-timm[downstream]'
    python examples/segmentation.py [--output FOLDER]

The scenes are composed of the Fashion-MNIST items in the package (see emax_timm/samples/scenes.py):
training scenes of the training items, test scenes of the test items. Everything starts from random
weights.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import emax_timm  # noqa: F401  (registers the models with timm, where smp finds them)
from emax_timm.samples.scenes import GROUPS, MEAN, STD, Items, compose, load_items

try:
    import segmentation_models_pytorch as smp
except ImportError as error:
    print(f"segmentation.py: {error}: pip install 'emax-timm[downstream]'", file=sys.stderr)
    raise SystemExit(2) from None

SIZE = 64  # a multiple of 32, the encoder's stride
CLASSES = ["canvas", *GROUPS]
COLORS = torch.tensor([[0, 0, 0], [230, 80, 60], [70, 130, 230], [90, 190, 90], [240, 190, 50]])


def build_model() -> nn.Module:
    """Build a small U-Net; the prefix `tu-` makes smp create the encoder with timm."""
    return smp.Unet(
        encoder_name="tu-resnet18_emax",
        encoder_weights=None,
        decoder_channels=(128, 64, 48, 32, 16),
        in_channels=1,
        classes=len(CLASSES),
    )


def batch(items: Items, random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Compose random scenes: normalised images [count, 1, s, s] and masks [count, s, s]."""
    scenes = [compose(items, random, SIZE, count=(1, 3), side=(20, 32)) for _ in range(count)]
    images = torch.stack([scene.image for scene in scenes])
    return (images - MEAN) / STD, torch.stack([scene.mask for scene in scenes])


def train(model: nn.Module, steps: int, batch_size: int = 8) -> None:
    """Train on random scenes, which are composed during training."""
    items, random = load_items("train"), np.random.default_rng(0)
    dice = smp.losses.DiceLoss(mode="multiclass")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        images, masks = batch(items, random, batch_size)
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, masks) + dice(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps:
            print(f"step {step:4d}  loss {loss.item():.3f}")


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Predict the class of every pixel, [n, s, s]."""
    model.eval()
    return torch.cat([model(part).argmax(dim=1) for part in images.split(16)])


def intersection_over_union(predicted: Tensor, masks: Tensor) -> Tensor:
    """Compute the IoU of each class over all pixels of all scenes."""
    statistics = smp.metrics.get_stats(
        predicted,  # pyright: ignore[reportArgumentType]
        masks,  # pyright: ignore[reportArgumentType]
        mode="multiclass",
        num_classes=len(CLASSES),
    )
    hits, false, missed, _ = (count.sum(dim=0).double() for count in statistics)
    return hits / (hits + false + missed)


def main() -> None:
    parser = argparse.ArgumentParser(description="A U-Net with an EMAX encoder.")
    parser.add_argument("--steps", type=int, default=80, help="of training, 8 scenes each")
    parser.add_argument("--scenes", type=int, default=64, help="to test on")
    parser.add_argument("--output", type=Path, help="folder for the weights and a picture")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    images, masks = batch(load_items("test"), np.random.default_rng(1), arguments.scenes)
    model = build_model()
    untrained = intersection_over_union(predict(model, images), masks)
    train(model, arguments.steps)
    predicted = predict(model, images)
    trained = intersection_over_union(predicted, masks)
    # A baseline that outlines every item exactly, but gives all of them the most frequent class: it
    # tells items from the canvas, and not from each other.
    commonest = int(masks[masks > 0].mode().values)
    outlined = intersection_over_union((masks > 0) * commonest, masks)
    print(f"IoU on {len(masks)} test scenes  untrained  outlines only  trained")
    for name, *row in zip(CLASSES, untrained, outlined, trained, strict=True):
        print(f"{name:>22}  {row[0]:9.3f}  {row[1]:13.3f}  {row[2]:7.3f}")
    print(f"{'mean':>22}  {untrained.mean():9.3f}  {outlined.mean():13.3f}  {trained.mean():7.3f}")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(model.state_dict(), arguments.output / "unet.safetensors")
        shown = (images[:8] * STD + MEAN).mul(255).expand(-1, 3, -1, -1)
        colored = COLORS[torch.stack([masks[:8], predicted[:8]])].permute(0, 1, 4, 2, 3)
        rows = torch.cat([shown, *colored]).byte()  # the scenes, the truth, the prediction
        to_pil_image(make_grid(rows, nrow=len(shown))).save(arguments.output / "masks.png")


if __name__ == "__main__":
    main()
