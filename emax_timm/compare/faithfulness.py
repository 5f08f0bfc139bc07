r"""Measure whether attention maps show the object: train small networks, and rate their maps.

    python -m emax_timm.compare.faithfulness --output runs/faithfulness \
        --write docs/interpretability.md

Each network classifies scenes that hold one item of Fashion-MNIST at a known place and scale, among
fragments of others on a noisy canvas. Its maps are then rated on scenes of items that it has not
seen (`compare.measures`): its attention, Grad-CAM and the magnitude of the features after the same
blocks, and baselines that do not depend on the network. What has been trained or rated is not
repeated, so that an interrupted study can be continued.
"""

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ..files import replace_file, write_text
from ..models.capture import capture_attention, heatmap
from ..models.gradcam import grad_cam
from ..runner import command
from ..samples.scenes import GROUPS, MEAN, STD, Items, compose, load_items
from ..tables import heading, marks, row, text_around, write_between
from ..training.config import AT_LEAST_1, UsageError, from_mapping, option, parse_settings
from .measures import area_under, insertion_deletion, pointing_game

__all__ = [
    "MEASURES",
    "FaithfulnessConfig",
    "Scenes",
    "faithfulness",
    "make_scenes",
    "maps_of",
    "rate",
    "report",
    "trained",
]

MARK = "faithfulness"
ATTENTIONS = ("emax", "ema", "cbam")
SIZE = 64
BATCH = 64
LAYERS = ("layer1", "layer2", "layer3", "layer4")
TEST_SEED = 10_000  # seeds the scenes that all networks are rated on
# The title of each measure's table, and the decimals of its values.
MEASURES = {
    "pointing": ("pointing game, hits (%)", 1),
    "insertion": ("insertion, area under the curve (more is better)", 3),
    "deletion": ("deletion, area under the curve (less is better)", 3),
}


@dataclass
class FaithfulnessConfig:
    """Train small networks on scenes, and rate their maps."""

    attentions: list[str] = option(
        list(ATTENTIONS), "attentions of the networks", choices=ATTENTIONS
    )
    seeds: list[int] = option(
        [0, 1, 2], "seeds to train each network with", bounds=(0, 2**32 - 1), metavar="N"
    )
    steps: int = option(1000, f"training steps, of {BATCH} scenes each", bounds=AT_LEAST_1)
    train_scenes: int = option(16_000, "scenes to train on", bounds=AT_LEAST_1)
    test_scenes: int = option(1000, "scenes to rate the maps on", bounds=AT_LEAST_1)
    curves: int = option(200, "test scenes to use for insertion and deletion", bounds=AT_LEAST_1)
    output: str = option(
        "runs/faithfulness", "folder of the trained networks and their ratings", metavar="DIR"
    )
    write: str | None = option(
        None,
        f"also put the tables between the lines {' and '.join(marks(MARK))} of FILE",
        metavar="FILE",
    )


class Scenes(NamedTuple):
    """Normalised images [n, 1, s, s], their items' classes [n], and the items' masks [n, s, s]."""

    images: Tensor
    labels: Tensor
    masks: Tensor


def make_scenes(items: Items, count: int, seed: int) -> Scenes:
    """Make scenes of one whole item each, among fragments of other items."""
    random = np.random.default_rng(seed)
    made = [
        compose(items, random, SIZE, count=(1, 1), side=(20, 36), clutter=12) for _ in range(count)
    ]
    return Scenes(
        (torch.stack([scene.image for scene in made]) - MEAN) / STD,
        torch.cat([scene.groups for scene in made]) - 1,
        torch.stack([scene.instances > 0 for scene in made]),
    )


def build(attention: str) -> nn.Module:
    """Create a network with attention in its four blocks, on maps of side 16, 8, 8 and 8."""
    return timm.create_model(
        "test_resnet_emax",
        attn_layer=attention,
        in_chans=1,
        num_classes=len(GROUPS),
        output_stride=8,
    )


def train(model: nn.Module, scenes: Scenes, steps: int, seed: int) -> None:
    """Train on the scenes and their mirror images, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in tqdm(range(steps), leave=False, disable=None):
        chosen = torch.randint(len(scenes.labels), (BATCH,), generator=generator)
        images = scenes.images[chosen]
        if torch.rand((), generator=generator) < 0.5:
            images = images.flip(3)
        loss = cross_entropy(model(images), scenes.labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def run_name(attention: str, seed: int, steps: int, scenes: int) -> str:
    """Name the file of a trained network after everything that determines it."""
    return f"{attention}-seed{seed}-{steps}x{BATCH}-of-{scenes}"


def trained(attention: str, seed: int, steps: int, scenes: int, folder: Path) -> nn.Module:
    """Return a trained network in eval mode; if the folder has its weights, they are loaded.

    Args:
        attention: One of `ATTENTIONS`.
        seed: The seed of the initial weights, the scenes and their order.
        steps: The number of training steps.
        scenes: The number of training scenes.
        folder: Where the weights are kept.
    """
    torch.manual_seed(seed)
    model = build(attention)
    path = folder / f"{run_name(attention, seed, steps, scenes)}.safetensors"
    if path.exists():
        model.load_state_dict(safetensors.torch.load_file(path))
    else:
        train(model, make_scenes(load_items("train"), scenes, seed), steps, seed)
        state = model.state_dict()
        replace_file(path, lambda file: safetensors.torch.save_file(state, file))
    return model.eval()


def maps_of(model: Any, scenes: Scenes) -> dict[str, Tensor]:
    """Compute the maps to rate, [n, s, s] each, by name.

    The network's are named `KIND, LAYER`; the others are baselines that do not depend on it.
    """
    n, size = len(scenes.labels), (SIZE, SIZE)
    with torch.no_grad(), capture_attention(model) as captured:
        features = model.forward_intermediates(scenes.images, intermediates_only=True)
    maps: dict[str, Tensor] = {}
    for layer, found in zip(LAYERS, captured.values(), strict=True):
        assert found.spatial is not None
        maps[f"attention, {layer}"] = heatmap(found.spatial, size)
    for layer in LAYERS:
        parts = zip(scenes.images.split(100), scenes.labels.split(100), strict=True)
        cams = [grad_cam(model, images, layer, labels) for images, labels in parts]
        maps[f"Grad-CAM, {layer}"] = torch.cat(cams)
    for layer, feature in zip(LAYERS, features[1:], strict=True):  # the first one is the stem's
        maps[f"features, {layer}"] = heatmap(feature.abs(), size)
    maps["constant"] = torch.zeros(n, SIZE, SIZE)
    # The random maps are as coarse as those of the last layers, and equal for all networks.
    coarse = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    maps["random"] = heatmap(coarse, size)
    along = torch.linspace(-1, 1, SIZE)
    maps["centre prior"] = -(along[:, None] ** 2 + along**2).expand(n, -1, -1)
    maps["the object itself"] = scenes.masks.float()
    return maps


def rate(model: nn.Module, scenes: Scenes, curves: int) -> dict[str, Any]:
    """Compute the network's accuracy in percent, and the mean of each of `MEASURES` for each map.

    Args:
        model: The network, in eval mode.
        scenes: The scenes for the accuracy and the pointing game.
        curves: How many of them, from the first, are used for insertion and deletion.
    """
    with torch.no_grad():
        right = model(scenes.images).argmax(1) == scenes.labels
    found: dict[str, Any] = {"accuracy": 100 * _mean(right)}
    some = Scenes(*(values[:curves] for values in scenes))
    for name, heat in tqdm(maps_of(model, scenes).items(), leave=False, disable=None):
        insertion, deletion = insertion_deletion(model, some.images, heat[:curves], some.labels)
        found[name] = {
            "pointing": 100 * _mean(pointing_game(heat, scenes.masks)),
            "insertion": _mean(area_under(insertion)),
            "deletion": _mean(area_under(deletion)),
        }
    return found


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def report(results: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Format the results as Markdown, with a table for each measure.

    Args:
        results: The results of `rate` by attention and seed.
    """
    attentions = list(dict.fromkeys(attention for attention, _ in results))

    def cells(digits: int, *keys: str) -> list[str]:
        made = []
        for attention in attentions:
            values: list[Any] = [found for (name, _), found in results.items() if name == attention]
            for key in keys:
                values = [value[key] for value in values]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            made.append(f"{statistics.mean(values):.{digits}f}{spread}")
        return made

    columns = [f"{attention.upper()} network" for attention in attentions]
    lines = [*heading(["", *columns]), row(["test accuracy (%)", *cells(1, "accuracy")])]
    maps = [name for name in next(iter(results.values())) if name != "accuracy"]
    for measure, (title, digits) in MEASURES.items():
        lines += ["", *heading([title, *columns])]
        lines += [row([name, *cells(digits, name, measure)]) for name in maps]
    return "\n".join(lines)


@command("python -m emax_timm.compare.faithfulness")
def faithfulness(argv: Sequence[str], prog: str) -> int:
    """Train and rate the networks, print the tables, and return the exit status."""
    settings = parse_settings(FaithfulnessConfig, argv, prog)
    config = from_mapping(FaithfulnessConfig, settings, "the command line")
    page = Path(config.write) if config.write else None
    if page is not None:
        text_around(page, MARK)  # refuses a bad file before anything is trained
    try:
        results = _results(config, Path(config.output))
    except (ImportError, OSError) as error:
        raise UsageError(str(error)) from error
    tables = report(results)
    if page is not None:
        made_by = shlex.join([*prog.split(), *argv])
        write_between(page, MARK, f"Made by `{made_by}`:\n\n{tables}\n")
    print(tables)
    return 0


def _results(config: FaithfulnessConfig, folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    test = make_scenes(load_items("test"), config.test_scenes, TEST_SEED)
    for seed in config.seeds:  # outermost, so that a stop treats all networks alike
        for attention in config.attentions:
            model = trained(attention, seed, config.steps, config.train_scenes, folder)
            name = run_name(attention, seed, config.steps, config.train_scenes)
            path = folder / f"{name}-on-{config.test_scenes}-{config.curves}.json"
            if not path.exists():
                write_text(path, json.dumps(rate(model, test, config.curves), indent=1))
            results[attention, seed] = json.loads(path.read_text())
    return results


if __name__ == "__main__":
    sys.exit(faithfulness())
