"""A step whose passes are replayed is bit for bit that of the trainer.

Without a GPU the operators of the passes are recorded, and run once more on the same tensors, while
the host's part of a step is not done again. Operators that no graph can have are refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_semantics import one_hot_as_on_a_gpu
from study_testing import study_on, trainer_of
from tiers import mostly_slow
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from emax_timm.compare.graphs import WARM_UP, GraphedPasses, graphed_passes
from emax_timm.training.distributed import DistributedContext
from emax_timm.training.trainer import Trainer

# The host would wait for the device.
FORBIDDEN = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select"}


@pytest.fixture(autouse=True)
def _one_hot_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    one_hot_as_on_a_gpu(monkeypatch)


class Recorder(TorchDispatchMode):
    """The operators that run, their arguments and their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::")
        assert name not in FORBIDDEN
        # Values from a list of the host; a number alone becomes a constant of a kernel.
        assert name != "lift_fresh" or args[0].dim() == 0
        inputs = _views((args, kwargs or {}))
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, inputs, _views(found)))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for func, inputs, outputs in self.calls:
            args, kwargs = _views(inputs)
            found = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(outputs), found, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _views(values: Any) -> Any:
    # Operators such as unsqueeze_ change the shape of the tensor object that they get.
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, values)


def recording(trainer: Trainer, replays: list[int]) -> Callable[[Any], Callable[[], None]]:
    """A capture that leaves buffers and generators as they were, as that of a GPU does."""

    def capture(function: Callable[[], None]) -> Callable[[], None]:
        before = [buffer.clone() for buffer in trainer.model.buffers()]
        with torch.random.fork_rng(devices=[]), Recorder() as recorder:
            function()
        for buffer, value in zip(trainer.model.buffers(), before, strict=True):
            buffer.copy_(value)

        def replay() -> None:
            replays.append(trainer.step)
            recorder.replay()

        return replay

    return capture


OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {
        **{"drop": 0.1, "drop_path": 0.1, "clip_grad": 1.0, "model_ema": True, "smoothing": 0.1},
        **{
            "channels_last": True,
            "grouping_warmup": [0.0, 1.0],
            "grouping_temperature": [2.0, 0.5],
        },
    },
    "bfloat16": {"amp": True, "amp_dtype": "bfloat16"},
    "accumulated": {"grad_accum_steps": 3},  # three batches, and the one that is left
}
METHODS: dict[str, dict[str, Any]] = {
    name: {"attention": name} for name in ("se", "eca", "cbam", "coord", "ema", "msa")
}
METHODS |= {"none": {}, "wide": {"like": "emax", "experiment": "wide_controller"}}


@pytest.mark.parametrize("name", mostly_slow(OPTIONS, 0))
def test_replayed_steps_are_those_of_the_trainer(name: str, images: Path, tmp_path: Path) -> None:
    options = {"sched_on_updates": True, "epochs": 4, **OPTIONS[name]}
    study = study_on(images, tmp_path, **options)
    plain, graphed = (trainer_of(study, "emax", 1, tmp_path / kind) for kind in ("a", "b"))
    replays: list[int] = []
    graphed.backward = GraphedPasses(graphed, recording(graphed, replays))
    for trainer in (plain, graphed):
        trainer.asynchronous = True  # as on a GPU, a step's loss is read in the next one
        trainer.run()
    batches = -(-plain.step // options["epochs"])
    steps = range(WARM_UP, plain.step)
    if name == "accumulated":
        assert batches == 2
        steps = [step for step in steps if step % 2 == 0]
    assert replays == list(steps)
    assert len(replays) >= 2
    same_in_all_bits(plain, graphed)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_steps_of_every_method_can_be_replayed(name: str, images: Path, tmp_path: Path) -> None:
    study = study_on(images, tmp_path, lambda s: s["methods"].update({name: METHODS[name]}))
    plain, graphed = (trainer_of(study, name, 1, tmp_path / kind) for kind in ("a", "b"))
    graphed.backward = GraphedPasses(graphed, recording(graphed, []))
    for trainer in (plain, graphed):
        trainer.run()
    same_in_all_bits(plain, graphed)


def test_loss_of_a_step_stays_when_the_next_is_replayed(images: Path, tmp_path: Path) -> None:
    trainer = trainer_of(study_on(images, tmp_path), "none", 1, tmp_path)
    trainer.network.train()
    passes, losses = GraphedPasses(trainer, recording(trainer, [])), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(WARM_UP + 3):
        # Not constant images, which batch norm makes 0.
        batch = torch.rand(8, 3, 32, 32, generator=generator), torch.arange(8) % 2
        losses.append(passes([batch]))
        trainer.model.zero_grad()
    assert len({loss.item() for loss in losses}) == len(losses)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIONS)
def test_gpu_replays_the_steps_of_the_trainer(name: str, images: Path, tmp_path: Path) -> None:
    options = {"sched_on_updates": True, "epochs": 8, "device": "cuda", **OPTIONS[name]}
    study, gpu = study_on(images, tmp_path, **options), DistributedContext(torch.device("cuda"))
    trainers = [trainer_of(study, "emax", 1, tmp_path / kind, gpu) for kind in ("a", "b")]
    trainers[0].run()
    with graphed_passes(trainers[1]):
        trainers[1].run()
    passes: Any = trainers[1].backward
    assert passes.graph is not None
    same_in_all_bits(*trainers)


def same_in_all_bits(first: Trainer, second: Trainer) -> None:
    losses = [[row["train_loss"] for row in trainer.rows] for trainer in (first, second)]
    assert losses[0] == losses[1]
    states = [trainer.published.state_dict() for trainer in (first, second)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
