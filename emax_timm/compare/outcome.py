"""What is measured of a run that has ended: accuracy on the test set, by slice, and speed."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..training import checkpoint
from ..training.config import TrainConfig
from ..training.data import evaluation_loader, image_mode, open_split
from ..training.data.subset import Subset
from ..training.distributed import DistributedContext
from ..training.evaluate import evaluate
from ..training.trainer import Trainer

__all__ = ["outcomes", "results", "slices_of"]

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
    images = next(iter(loader))[0].to(trainer.context.device)
    found["inference_images_per_second"] = round(speed(model, images), 1)
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
    )
    if isinstance(dataset, IterableDataset):
        return None
    step = max(1, -(-len(dataset) // count))  # spread, for folders are sorted by class
    dataset = Subset(dataset, range(0, len(dataset), step))
    size = config.validation_batch_size or config.batch_size
    return evaluation_loader(config, dataset, data_config, size, context)


@torch.inference_mode()
def speed(model: nn.Module, images: Tensor) -> float:
    """Measure images per second of the fastest of some forward passes of images [b, c, h, w]."""
    model.eval()
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        seconds.append(time.perf_counter() - start)
    return len(images) / min(seconds)
