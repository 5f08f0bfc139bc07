"""What is measured of EMAX layers, by the reference and by hand, and that it leaves no trace."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from tiers import mostly_slow
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from training_testing import MakeTrainer, same_tensors, state_of

from emax_timm.attention import EMAX
from emax_timm.models import insert_attention
from emax_timm.ops import reference
from emax_timm.training import statistics
from emax_timm.training.statistics import first_images, layer_statistics, scalars


def images(count: int = 6, channels: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(count, channels, 1, 1, generator=generator)
    return means + torch.randn(count, channels, 5, 7, generator=generator)


def filled(layer: EMAX, seed: int = 0) -> EMAX:
    """The layer with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def saturated(gate: Tensor) -> float:
    values = gate.flatten().tolist()
    return sum(value < 0.05 or value > 0.95 for value in values) / len(values)


def test_statistics_are_those_of_the_reference() -> None:
    torch.manual_seed(0)
    first, second = filled(EMAX(16, factor=8, reduction=4)), filled(EMAX(8), 1)
    model = nn.Sequential(nn.Conv2d(8, 16, 1), first, nn.ReLU(), nn.Conv2d(16, 8, 1), second)
    found = layer_statistics(model.train(), images(40))
    model.eval()
    assert list(found) == ["1", "4"]
    x = images(40)
    for name, child in model.named_children():
        if isinstance(child, EMAX):
            with torch.no_grad():
                maps = reference.emax(x, reference.parts_of(child.weights()))[1]
            top = maps.group_probs.topk(2).values
            assert (top[:, 0] - top[:, 1]).min() > 1e-4  # else rounding could decide
            counts = maps.group_count.tolist()
            expected = {
                "group_counts": child.candidates,
                "histogram": [counts.count(candidate) for candidate in child.candidates],
                "gamma": child.gamma.item(),  # type: ignore[union-attr]
                "residual_gate": pytest.approx(child.residual_gate.abs().mean().item()),
                "spatial_saturation": pytest.approx(saturated(maps.spatial), abs=1e-3),
                "channel_saturation": pytest.approx(saturated(maps.channel), abs=1e-3),
                "global_saturation": pytest.approx(saturated(maps.global_), abs=1e-3),
            }
            assert found[name] == expected
            assert sum(choice > 0 for choice in found[name]["histogram"]) > 1
        with torch.no_grad():
            x = child(x)


@pytest.mark.parametrize("batch_vote", [False, True])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("forced", range(4))
def test_histogram_counts_the_candidate_that_is_forced(
    forced: int, warmup: float, batch_vote: bool
) -> None:
    layer = EMAX(8, batch_vote=batch_vote)
    assert layer.group_controller is not None
    layer.warmup.fill_(warmup)
    with torch.no_grad():
        # By its mean, an image takes `forced` or else the first candidate.
        layer.group_controller.weight.zero_()
        layer.group_controller.weight[forced] += 1
        layer.group_controller.bias.zero_()
    x = torch.ones(5, 8, 3, 3)
    x[:2] *= -1
    histogram = layer_statistics(layer, x)[""]["histogram"]
    first = 0 if forced else 1
    expected = [0] * 4
    expected[forced] += 3
    expected[first] += 2
    assert histogram == expected


@pytest.mark.parametrize(
    ("logit", "expected"), [(-20.0, 1.0), (-2.9, 0.0), (0.0, 0.0), (2.9, 0.0), (3.0, 1.0)]
)
def test_saturation_is_beyond_a_twentieth(logit: float, expected: float) -> None:
    layer = EMAX(8, reduction=2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.conv3x3.bias.fill_(logit)  # type: ignore[union-attr]
        for gate in (layer.channel_gate, layer.global_attn):
            gate[3].bias[:6].fill_(logit)  # type: ignore[index, union-attr]
    found = layer_statistics(layer, images())[""]
    assert found["spatial_saturation"] == expected
    assert found["channel_saturation"] == found["global_saturation"] == 0.75 * expected


def test_gates_are_told_by_their_size() -> None:
    layer = EMAX(4)
    with torch.no_grad():
        layer.residual_gate.copy_(torch.tensor([-1.0, 0.0, 0.5, 2.5]))
        layer.gamma.fill_(-0.25)  # type: ignore[union-attr]
    found = layer_statistics(layer, images(channels=4))[""]
    assert (found["residual_gate"], found["gamma"]) == (1.0, -0.25)


def test_parts_that_a_layer_lacks_are_left_out() -> None:
    layer = EMAX(8, group_counts="finest", channel_gate=False, global_gate=False)
    found = layer_statistics(layer, images())[""]
    assert found.keys() == {"group_counts", "histogram", "residual_gate", "spatial_saturation"}
    assert (found["group_counts"], found["histogram"]) == ([8], [6])


def small_model(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t_emax", channels=[8, 8, 8, 8], num_classes=2, **kwargs)


def held_by(model: nn.Module) -> list[dict[str, Any]]:
    """Everything that the modules hold, hooks and modes too."""
    hidden = ("_parameters", "_buffers", "_modules")
    return [
        {k: copy.copy(v) for k, v in vars(module).items() if k not in hidden}
        for module in model.modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_state_are_left_as_they_were(fails: bool) -> None:
    model = small_model(drop_rate=0.5, drop_path_rate=0.5).train()
    model.layer2.eval()  # type: ignore[operator, union-attr]
    x = torch.randn(3, 5 if fails else 3, 32, 32)
    before, tensors = held_by(model), copy.deepcopy(model.state_dict())
    random_state = torch.random.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            layer_statistics(model, x)
    else:
        assert len(layer_statistics(model, x)) == 4
    assert held_by(model) == before
    assert same_tensors(model.state_dict(), tensors)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_statistics_are_found_in_every_kind_of_model() -> None:
    model, x = small_model(), torch.randn(4, 3, 32, 32)
    found = layer_statistics(model, x)
    assert layer_statistics(ModelEmaV3(model).module, x) == found
    last = layer_statistics(
        model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        x.contiguous(memory_format=torch.channels_last),
    )
    assert scalars(last) == pytest.approx(scalars(found), abs=1e-3)
    assert layer_statistics(timm.create_model("resnet10t"), x) == {}
    inserted = insert_attention(timm.create_model("resnet10t"), "emax")
    assert len(layer_statistics(inserted, x)) == 4


def test_scalars_have_the_histogram_as_shares() -> None:
    layer = {"group_counts": [1, 4], "histogram": [1, 3], "gamma": 0.5}
    assert scalars({"a.b": layer}) == {
        **{"a.b/groups_1": 0.25, "a.b/groups_4": 0.75, "a.b/gamma": 0.5}
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "layers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    mostly_slow(
        [
            {},
            {"model_ema": True, "model_ema_decay": 0.5, "channels_last": True},
            {"val_interval": 3, "workers": 1, "amp": True, "amp_dtype": "bfloat16"},
            {"no_prefetcher": True},
        ],
        1,
    ),
)
def test_run_writes_a_row_per_epoch(trainer_for: MakeTrainer, options: dict[str, Any]) -> None:
    trainer = trainer_for(epochs=3, **options)
    trainer.run()
    rows = rows_of(trainer.folder)
    assert [row.pop("epoch") for row in rows] == [0, 1, 2]
    assert rows[0] != rows[1] != rows[2]
    model = trainer.model if trainer.averaged is None else trainer.averaged.module
    batch, _ = next(iter(trainer.val_loader))
    assert len(batch) == 8
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.config.amp):
        expected = layer_statistics(model, batch)
    assert scalars(rows[2]) == pytest.approx(scalars(expected))
    assert [sum(values["histogram"]) for values in rows[2].values()] == [8] * 4


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"val_split": ""}, {"model": "resnet10t"}])
def test_run_without_images_or_layers_has_no_rows(
    trainer_for: MakeTrainer, options: dict[str, Any]
) -> None:
    trainer = trainer_for(epochs=1, **options)
    trainer.run()
    assert not (trainer.folder / "layers.jsonl").exists()


@pytest.mark.slow
def test_statistics_do_not_change_the_run(
    trainer_for: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model_ema": True, "drop": 0.2, "mixup": 0.5, "workers": 1, "epochs": 3}
    states = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(statistics, "layer_statistics", lambda *_: {})
            monkeypatch.setattr(statistics, "first_images", lambda _: torch.zeros(1))
        trainer = trainer_for(name, **options)
        trainer.run()
        state = state_of(trainer.folder)
        state |= safetensors.torch.load_file(trainer.folder / "last.safetensors")
        for part in ("seconds", "timing", "rows", "layers"):
            del state[part]
        states.append(state)
    assert same_tensors(*states)


@pytest.mark.parametrize("count", [3, 100])
def test_first_images_are_the_loaders(trainer_for: MakeTrainer, count: int) -> None:
    loader = trainer_for().val_loader
    before = torch.random.get_rng_state()
    found = first_images(loader, count)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(found, next(iter(loader))[0][:count])
    assert len(found) == min(count, 8)
