"""Classify moving items: torchvision's 3-D ResNet on clips, without and with EMAX3d.

    python examples/video.py [--seeds 3] [--steps 100] [--clips 400]

A clip shows one Fashion-MNIST item of the package on a noisy canvas. It moves left, right, up or
down, and what leaves the canvas at one side comes back at the other. The classes are the four
groups of items times the four motions. At every time the item is equally likely to be anywhere,
whatever its motion, so no single frame tells more of the motion than chance does: the same network
on single frames, whose logits are averaged over the frames of a clip, shows it.

Training clips are composed of the training items while training, test clips of the test items. All
networks are trained for the same number of steps, on the same clips for the same seed, and nothing
is chosen by the test clips.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple, VideoResNet

import emax_timm
from emax_timm.compare.statistics import paired
from emax_timm.samples.scenes import GROUPS, MEAN, STD, Items, load_items

FRAMES, SIZE, SIDE = 8, 32, 20  # of a clip, of its canvas and of its item, in pixels
SPEEDS = (1, 3)  # least and greatest, in pixels per frame
MOTIONS = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0]])  # left, right, up, down
CLASSES = len(GROUPS) * len(MOTIONS)  # class = group * number of motions + motion

Clips = tuple[Tensor, Tensor]
"""Normalised clips [n, 1, t, h, w], and their classes [n]."""


def batch(items: Items, random: np.random.Generator, count: int) -> Clips:
    """Compose random clips."""
    groups = random.integers(len(GROUPS), size=count)
    chosen = [random.choice(np.flatnonzero(items.groups == 1 + group)) for group in groups]
    motions = random.integers(len(MOTIONS), size=count)
    start = torch.from_numpy(random.integers(SIZE, size=(count, 2)))
    speed = torch.from_numpy(random.integers(*SPEEDS, size=count, endpoint=True))

    pixels = torch.from_numpy(items.pixels[chosen]).float().unsqueeze(1) / 255
    pixels = nn.functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    still = nn.functional.pad(pixels, (0, SIZE - SIDE, 0, SIZE - SIDE)).squeeze(1)  # [n, h, w]
    time = torch.arange(FRAMES)
    moved = start[:, None] + time[:, None] * (speed[:, None] * MOTIONS[motions])[:, None]
    # What leaves the canvas at one side comes back at the other.
    rows, columns = (torch.arange(SIZE) - moved[..., None]).remainder(SIZE).unbind(2)
    clip = still[torch.arange(count)[:, None, None, None], rows[..., None], columns[..., None, :]]
    noise = torch.from_numpy(random.random(clip.shape, dtype=np.float32)) * 0.375
    clips = torch.where(clip > 0, clip, noise).unsqueeze(1)  # [n, 1, t, h, w]
    return (clips - MEAN) / STD, torch.from_numpy(groups * len(MOTIONS) + motions)


class SmallVideoResNet(VideoResNet):
    """torchvision's `r3d_18` with a quarter of the channels, a block per stage and grey clips."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], self._stem, CLASSES)
        self.fc = nn.Linear(128, CLASSES)

    def _stem(self) -> nn.Module:
        self.inplanes = 16
        conv = nn.Conv3d(1, 16, (3, 5, 5), stride=2, padding=(1, 2, 2), bias=False)
        return nn.Sequential(conv, nn.BatchNorm3d(16), nn.ReLU(inplace=True))

    def _make_layer(self, block: Any, conv_builder: Any, planes: int, *args: Any, **kwargs: Any):
        return super()._make_layer(block, conv_builder, planes // 4, *args, **kwargs)


class SingleFrames(SmallVideoResNet):
    """The network on single frames: on some of each clip in training, else the mean over all."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [n, classes] of clips x [n, 1, t, h, w].

        In training they are those of a quarter of the frames, one by one: [n * t / 4, classes].
        """
        if self.training:
            x = x[:, :, torch.randperm(x.shape[2])[::4]]
        logits = super().forward(x.transpose(1, 2).flatten(0, 1).unsqueeze(2))
        return logits if self.training else logits.unflatten(0, (len(x), -1)).mean(dim=1)


def clips_with_attention() -> nn.Module:
    """Build the network with EMAX3d after the last two stages, its residual gates open."""
    options = {"gate_init": 1.0}
    return emax_timm.insert_attention(SmallVideoResNet(), stages=(2, 3), attn_kwargs=options)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "single frames": SingleFrames,
    "clips": SmallVideoResNet,
    "clips with emax": clips_with_attention,
}


def train(model: nn.Module, items: Items, random: np.random.Generator, steps: int) -> None:
    """Train on random clips, which are composed during training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    model.train()
    for _ in range(steps):
        x, classes = batch(items, random, 16)
        logits = model(x)
        classes = classes.repeat_interleave(len(logits) // len(x))  # of single frames, if any
        loss = nn.functional.cross_entropy(logits, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def accuracies(model: nn.Module, test: Clips) -> list[float]:
    """Measure the accuracy of the classes, of the items alone, and of the motions alone."""
    model.eval()
    predicted = torch.cat([model(part).argmax(dim=1) for part in test[0].split(100)])
    count = len(MOTIONS)
    items, motions = predicted // count == test[1] // count, predicted % count == test[1] % count
    return [right.double().mean().item() for right in (items & motions, items, motions)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Moving items, without and with EMAX3d.")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each network, at least 2")
    parser.add_argument("--steps", type=int, default=100, help="of training, 16 clips each")
    parser.add_argument("--clips", type=int, default=400, help="to test on")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2: the intervals are over seeds")

    items = load_items("train")
    test = batch(load_items("test"), np.random.default_rng(0), arguments.clips)
    found: dict[str, list[list[float]]] = {name: [] for name in NETWORKS}
    for seed in range(arguments.seeds):
        for name, build in NETWORKS.items():
            torch.manual_seed(seed)
            model = build()
            train(model, items, np.random.default_rng(1 + seed), arguments.steps)
            found[name].append(accuracies(model, test))
            print(f"seed {seed}, {name}: {found[name][-1][0]:.3f}", flush=True)

    print(f"test accuracy on {len(test[1])} clips of {CLASSES} classes; means of the seeds,")
    print("and half of the 95 % interval (Student's t) of the first")
    print("network          class     +-   item  motion")
    classes = {name: [run[0] for run in runs] for name, runs in found.items()}
    for name, runs in found.items():
        mean = paired(classes[name], [0.0] * len(runs))
        item, motion = np.mean(runs, axis=0)[1:]
        print(f"{name:15}  {mean.mean:.3f}  {mean.half_width:.3f}  {item:.3f}  {motion:6.3f}")
    change = paired(classes["clips with emax"], classes["clips"])
    print(f"change by emax, paired: {change.mean:+.3f} +- {change.half_width:.3f}")


if __name__ == "__main__":
    main()
