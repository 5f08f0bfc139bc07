"""Detect items in scenes: torchvision's Faster R-CNN with a feature pyramid on an EMAX backbone.

    python examples/detection.py [--output FOLDER]

The scenes are composed of the Fashion-MNIST items in the package (see emax_timm/samples/scenes.py):
training scenes of the training items, test scenes of the test items. Everything starts from random
weights, so this shows how the parts fit together and that they learn, not what the detector could
reach.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

import emax_timm  # noqa: F401  (registers the models with timm)
from emax_timm.samples.scenes import GROUPS, MEAN, STD, Scene, compose, load_items

SIZE = 96


class PyramidBackbone(nn.Module):
    """The feature maps of a timm model, and a feature pyramid with the same channels at each level.

    This is for timm models what torchvision's `BackboneWithFPN` is for its own. timm's
    `features_only` returns the maps as a list; the pyramid and the detector take them by name.
    """

    def __init__(self, name: str, out_channels: int) -> None:
        super().__init__()
        self.body: Any = timm.create_model(
            name, features_only=True, out_indices=(1, 2, 3, 4), in_chans=1
        )
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): features for i, features in enumerate(self.body(x))})


def build_detector() -> FasterRCNN:
    """Build a small detector for images of 96 x 96, with one anchor size per pyramid level."""
    return FasterRCNN(
        PyramidBackbone("resnet18_emax", out_channels=64),
        num_classes=1 + len(GROUPS),  # with the background
        min_size=SIZE,
        max_size=SIZE,
        image_mean=[MEAN],
        image_std=[STD],
        rpn_anchor_generator=AnchorGenerator(
            sizes=((16,), (24,), (32,), (48,)), aspect_ratios=((0.5, 1.0, 2.0),) * 4
        ),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=50,
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=32,
        box_detections_per_img=20,
    )


def train(model: FasterRCNN, steps: int, batch_size: int = 8) -> None:
    """Train on random scenes, which are composed during training."""
    items, random = load_items("train"), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        scenes = [compose(items, random, SIZE) for _ in range(batch_size)]
        targets = [{"boxes": scene.boxes, "labels": scene.groups} for scene in scenes]
        losses = model([scene.image for scene in scenes], targets)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps:
            print(f"step {step:4d}  loss {loss.item():.3f}")


@torch.inference_mode()
def detect(model: FasterRCNN, scenes: list[Scene]) -> list[dict[str, Tensor]]:
    """Return the detections in each scene: `boxes`, `labels` and `scores`, the best first."""
    model.eval()
    return [detection for scene in scenes for detection in model([scene.image])]


def average_precision(
    detections: list[dict[str, Tensor]], scenes: list[Scene], label: int, threshold: float = 0.5
) -> float:
    """Compute the average precision of one class: the area under its precision-recall curve.

    A detection is correct if its IoU with an item of its class is at least `threshold`, and no
    detection with a higher score has found that item before.
    """
    scored: list[tuple[float, bool]] = []
    total = 0
    for detection, scene in zip(detections, scenes, strict=True):
        truth = scene.boxes[scene.groups == label]
        total += len(truth)
        chosen = detection["labels"] == label
        found: set[int] = set()
        for box, score in zip(detection["boxes"][chosen], detection["scores"][chosen], strict=True):
            overlap = box_iou(box[None], truth)[0]
            best = int(overlap.argmax()) if len(truth) else -1
            right = best >= 0 and float(overlap[best]) >= threshold and best not in found
            if right:
                found.add(best)
            scored.append((float(score), right))
    scored.sort(key=lambda entry: -entry[0])
    hits = np.cumsum([right for _, right in scored])
    precision = hits / np.arange(1, len(scored) + 1)
    # The precision at a recall is the greatest one at that recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(sum(precision[right] for right in np.flatnonzero([r for _, r in scored])) / total)


def evaluate(model: FasterRCNN, scenes: list[Scene]) -> dict[str, float]:
    """Compute the average precision (AP) at an IoU of 0.5 for each class."""
    detections = detect(model, scenes)
    return {
        name: average_precision(detections, scenes, label)
        for label, name in enumerate(GROUPS, start=1)
    }


def picture(model: FasterRCNN, scenes: list[Scene]) -> Tensor:
    """Draw scenes at twice their size, with the detections that score 0.5 or more."""
    drawn, names = [], ["", *GROUPS]
    for scene, detection in zip(scenes, detect(model, scenes), strict=True):
        image = nn.functional.interpolate(scene.image[None], scale_factor=2)[0]
        sure = detection["scores"] >= 0.5
        labels = [names[label] for label in detection["labels"][sure]]
        boxes = detection["boxes"][sure] * 2
        image = (image * 255).byte().expand(3, -1, -1)
        drawn.append(draw_bounding_boxes(image, boxes, labels, "yellow") if labels else image)
    return make_grid(drawn, nrow=4)


def main() -> None:
    parser = argparse.ArgumentParser(description="A detector on an EMAX backbone.")
    parser.add_argument("--steps", type=int, default=45, help="of training, 8 scenes each")
    parser.add_argument("--scenes", type=int, default=48, help="to test on")
    parser.add_argument("--output", type=Path, help="folder for the weights and a picture")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    items, random = load_items("test"), np.random.default_rng(1)
    scenes = [compose(items, random, SIZE) for _ in range(arguments.scenes)]
    model = build_detector()
    untrained = evaluate(model, scenes)
    train(model, arguments.steps)
    trained = evaluate(model, scenes)
    print(f"AP at IoU 0.5 on {len(scenes)} test scenes  untrained  trained")
    for name in GROUPS:
        print(f"{name:>32}  {untrained[name]:9.3f}  {trained[name]:7.3f}")
    mean = [float(np.mean(list(result.values()))) for result in (untrained, trained)]
    print(f"{'mean':>32}  {mean[0]:9.3f}  {mean[1]:7.3f}")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(model.state_dict(), arguments.output / "detector.safetensors")
        to_pil_image(picture(model, scenes[:8])).save(arguments.output / "detections.png")


if __name__ == "__main__":
    main()
