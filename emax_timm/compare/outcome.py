"""What is measured of a run that has ended: accuracy on the test set, by slice, and speed."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..training import checkpoint
from ..training.config import TrainConfig
from ..training.data import evaluation_loader, hold_out, image_mode, open_split
from ..training.data.subset import Subset
from ..training.distributed import DistributedContext
from ..training.evaluate import autocast, evaluate
from ..training.trainer import Trainer

__all__ = ["outcomes", "results", "seconds_of", "seconds_of_pass", "slices_of"]

TIMED = 10  # forward passes whose fastest gives the images per second of inference


def results(trainer: Trainer, loader: Any) -> dict[str, Any]:
    """Test the best weights: metrics, top-1 accuracy by slice and in training, and speed.

    A run that diverged before its first weights were saved is tested with those that it has.
    """
    model, config = trainer.model, trainer.config
    best = trainer.folder / checkpoint.BEST
    if best.exists():
        checkpoint.load_weights(model, best)
    found: dict[str, Any] = {"test": None, "slices": {}, "training_top1": None}
    if loader is None:
        return found
    metrics, right = outcomes(trainer, loader)
    found["test"] = metrics
    for name, indices in slices_of(loader.dataset).items():
        chosen = right[torch.from_numpy(indices)]
        found["slices"][name] = {
            "images": len(chosen),
            "top1": 100 * chosen.double().mean().item(),
        }
    training = _unaugmented(config, trainer.data_config, len(right), trainer.context)
    if training is not None:
        found["training_top1"] = outcomes(trainer, training)[0]["top1"]
    found["inference_images_per_second"] = round(speed(trainer, next(iter(loader))[0]), 1)
    return found


def outcomes(trainer: Trainer, loader: Any) -> tuple[dict[str, float], Tensor]:
    """Evaluate the model; returns the metrics, and for each image whether it is right [n]."""
    config, right = trainer.config, []

    def batches():
        for images, labels in loader:
            right.append(labels)
            yield images, labels

    def compare(_: nn.Module, __: Any, logits: Tensor) -> None:
        right[-1] = logits.argmax(1).cpu() == right[-1].cpu()

    handle = trainer.model.register_forward_hook(compare)
    try:
        amp, kind, last = bool(config.amp), config.amp_dtype, config.channels_last
        metrics = evaluate(trainer.model, batches(), trainer.context, amp, kind, last)
    finally:
        handle.remove()
    return metrics._asdict(), torch.cat(right)


def slices_of(dataset: Any) -> dict[str, Any]:
    """Return the indices of each slice of a data set; it has none unless it says so."""
    while dataset is not None and not isinstance(dataset, Subset):  # which has other indices
        if slices := getattr(dataset, "slices", None):
            return slices
        dataset = getattr(dataset, "dataset", None)
    return {}


def _unaugmented(
    config: TrainConfig, data_config: dict[str, Any], count: int, context: DistributedContext
) -> Any:
    """Return a loader of about `count` training images, without augmentation; None for a stream."""
    dataset = open_split(
        config,
        config.train_split,
        input_img_mode=image_mode(config),
        training=False,
        must_exist=True,
        batch_size=config.batch_size,
        num_samples=config.train_num_samples,
        seed=config.seed,
    )
    if isinstance(dataset, IterableDataset):
        return None
    if config.val_fraction:
        dataset, _ = hold_out(dataset, config.val_fraction)
    step = max(1, -(-len(dataset) // count))  # spread, for folders are sorted by class
    dataset = Subset(dataset, range(0, len(dataset), step))
    size = config.validation_batch_size or config.batch_size
    return evaluation_loader(config, dataset, data_config, size, context)


def speed(trainer: Trainer, images: Tensor) -> float:
    """Measure images per second of the fastest of some forward passes of images [b, c, h, w]."""
    return len(images) / min(seconds_of_pass(trainer, images) for _ in range(TIMED))


@torch.inference_mode()
def seconds_of_pass(trainer: Trainer, images: Tensor) -> float:
    """Measure a forward pass of images [b, c, h, w], in the layout and the dtype of the tests."""
    config, device = trainer.config, trainer.context.device
    images = images.to(device)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    trainer.model.eval()
    with autocast(trainer.context, bool(config.amp), config.amp_dtype):
        return seconds_of(lambda: trainer.model(images), device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Measure a call, until its work on a GPU has ended."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
