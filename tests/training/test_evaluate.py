"""Metrics against a naive loop, and the same over several ranks."""

import json
import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from training_testing import image_folder

from emax_timm.training import TrainConfig
from emax_timm.training.build import _resolve
from emax_timm.training.data import evaluation_loader, open_split
from emax_timm.training.distributed import DistributedContext, open_distributed_context
from emax_timm.training.evaluate import Metrics, evaluate, half_precision

CPU = DistributedContext(torch.device("cpu"))


def model_and_images(classes: int, count: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    images = torch.randn(count, 3, 4, 4, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    linear = nn.Linear(48, classes)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(classes, 48, generator=generator))
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), linear), images, labels


def naive_metrics(model: nn.Module, images: Tensor, labels: Tensor) -> Metrics:
    model.eval()
    loss = first = fifth = 0.0
    for image, label in zip(images, labels.tolist(), strict=True):
        logits = model(image[None])[0].tolist()
        top = max(logits)
        loss += math.log(sum(math.exp(value - top) for value in logits)) + top - logits[label]
        rank = sum(value > logits[label] for value in logits)
        first += rank < 1
        fifth += rank < 5
    count = len(labels)
    return Metrics(loss / count, 100 * first / count, 100 * fifth / count)


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 6, 30])
def test_evaluate_equals_a_loop_over_single_images(classes: int) -> None:
    model, images, labels = model_and_images(classes, 203)
    expected = naive_metrics(model, images, labels)
    batches = list(zip(images.split(50), labels.split(50), strict=True))
    found = evaluate(model, batches, CPU)
    assert found.top1 == pytest.approx(expected.top1, abs=1e-9)
    assert found.top5 == pytest.approx(expected.top5, abs=1e-9)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    if classes == 30:
        assert 0 < found.top1 < found.top5 < 100
    if classes <= 5:
        assert found.top5 == 100


def test_evaluate_does_not_depend_on_the_batches() -> None:
    model, images, labels = model_and_images(10, 24)
    whole, parts = (
        evaluate(model, zip(images.split(size), labels.split(size), strict=True), CPU)
        for size in (24, 7)
    )
    assert whole[1:] == parts[1:]
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_restores_the_mode_and_the_gradients(training: bool) -> None:
    model, images, labels = model_and_images(3, 4)
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, [(images, labels)], CPU)
    assert model.training == model[1].training == training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_evaluate_takes_autocast_and_memory_format() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((images.is_contiguous(memory_format=torch.channels_last), images.shape[1]))
            return nn.functional.linear(images.flatten(1), torch.eye(48)[:6])

    _, images, labels = model_and_images(6, 8)
    plain = evaluate(Spy(), [(images, labels)], CPU)
    half = evaluate(Spy(), [(images, labels)], CPU, amp=True, amp_dtype="bfloat16")
    evaluate(Spy(), [(images, labels)], CPU, channels_last=True)
    assert [layout for layout, _ in seen] == [False, False, True]
    assert half.loss != plain.loss
    assert half.loss == pytest.approx(plain.loss, rel=0.02)


def test_metrics_are_written_with_three_decimals() -> None:
    assert str(Metrics(0.5, 83.33333, 100.0)) == "top1: 83.333 top5: 100.000"


def evaluate_share(data: str) -> tuple[DistributedContext, list[float]]:
    """Number of images, a flag that only rank 1 sets, and metrics, as this rank sees them."""
    with open_distributed_context("cpu") as context:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
        dataset = open_split(TrainConfig(data_dir=data), "validation", "RGB", False, 4)
        data_config = {"input_size": (3, 8, 8), "interpolation": "bilinear", "crop_pct": 1.0}
        data_config |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_mode": "center"}
        options = TrainConfig(workers=0)
        share = list(evaluation_loader(options, dataset, data_config, 3, context))
        images = sum(len(labels) for _, labels in share)
        flag = int(context.max(torch.tensor(context.rank == 1, dtype=torch.int64)))
        return context, [images, flag, *evaluate(model, share, context)]


def evaluate_rank(rank: int, port: int, data: str, output: str) -> None:
    """One of two processes; at module level for spawn."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    context, values = evaluate_share(data)
    assert (context.rank, context.size, context.is_primary) == (rank, 2, rank == 0)
    Path(output, str(rank)).write_text(json.dumps(values))


@pytest.mark.slow
def test_evaluate_on_two_ranks_counts_each_image_once(tmp_path: Path) -> None:
    # Nine images on two ranks: timm's sampler would count one twice.
    data = str(image_folder(tmp_path / "data", ["validation"], ["a", "b", "c"], [3]))
    context, expected = evaluate_share(data)
    assert (context.rank, context.size, context.is_primary) == (0, 1, True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(evaluate_rank, (port, data, str(tmp_path)), nprocs=2)
    ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert [expected[:2], *(values[:2] for values in ranks)] == [[9, 0], [5, 1], [4, 1]]
    assert ranks[0][2:] == ranks[1][2:]
    assert ranks[0][3:] == expected[3:]
    assert ranks[0][2] == pytest.approx(expected[2], rel=1e-6)
    assert 0 < expected[3] < 100


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("supported", [True, False])
def test_mixed_precision_is_on_where_a_gpu_trains(
    monkeypatch: pytest.MonkeyPatch, device: str, supported: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    context = DistributedContext(torch.device(device))
    expected = "float16" if device == "cuda" and not supported else "bfloat16"
    assert half_precision(context.device) == expected
    input_ = {"input_size": (3, 32, 32), "mean": (0.5,), "std": (0.5,)}
    input_ |= {"interpolation": "bicubic", "crop_pct": 1.0}
    for asked, amp in ((None, device == "cuda"), (False, False), (True, True)):
        config = _resolve(TrainConfig(amp=asked), input_, 10, context)
        assert (config.amp, config.amp_dtype) == (amp, expected)
    config = _resolve(TrainConfig(amp_dtype="float16"), input_, 10, context)
    assert config.amp_dtype == "float16"
