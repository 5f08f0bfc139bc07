"""The training loop."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from timm.models import model_parameters
from timm.scheduler.scheduler import Scheduler
from timm.utils import (
    ModelEmaV3,
    dispatch_clip_grad,
    distribute_bn,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from .. import __version__
from ..attention import set_grouping
from ..files import lock_folder, remove_partial, replace_file, writing_to
from . import checkpoint
from .checkpoint import Checkpoint
from .config import UsageError, to_yaml
from .curves import draw_at_end
from .data import broken_images, sample_names, start_epoch
from .distributed import World
from .evaluate import Metrics, autocast, evaluate
from .images import BrokenImageError
from .options import TrainConfig
from .runlog import Progress, RunLog, Timing
from .sampling import seed_step
from .signals import Stop, Stopped
from .statistics import first_images, has_emax, layer_statistics
from .trackers import open_trackers

__all__ = ["BadStepError", "Trainer", "grouping_course"]

Batch = tuple[Tensor, Tensor]


class BadStepError(RuntimeError):
    """A step was not to be made; the weights are those of the last good one."""

    exit_code = 1


@dataclass
class Trainer:
    """A run: what it consists of, how far it has come, and how it goes on.

    `build.build_trainer` makes one from a configuration. `model` is the bare model, `network` the
    same in what the training step calls (compiled, distributed), `averaged` its moving average.
    """

    config: TrainConfig
    world: World
    folder: Path
    model: Any
    network: nn.Module
    averaged: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    criterion: nn.Module
    train_loader: Any
    val_loader: Any
    test_loader: Any
    mixup: Any
    epochs: int
    steps_per_epoch: int
    data_config: dict[str, Any]
    classes: list[str] | None

    epoch: int = 0
    step: int = 0
    best: Metrics | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    # Of the steps of this epoch, the mean over ranks.
    losses: list[float] = field(default_factory=list)
    # Of the last steps, across epochs; a spike is one against their median.
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    # Of the log, an epoch each.
    rows: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)
    # Of the steps of this epoch, over all ranks: samples whose image could not be read.
    broken: int = 0
    stop: Stop = field(default_factory=Stop)
    # The signal that the ranks have agreed on; another may have come to one of them since.
    stopping: int = 0
    scaler: torch.amp.GradScaler = field(init=False)
    # The same in every epoch: what the layers' statistics are taken of.
    _images: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        half = bool(self.config.amp) and self.config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=half)
        self._saved_at = time.monotonic()
        # What a forward pass changes, and where it is kept until the gradients are known to be
        # finite; copied by dtype, in a kernel or two instead of one for each buffer.
        groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.model.buffers():
            groups.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(own, [buffer.clone() for buffer in own]) for own in groups.values()]
        self._has_buckets = False

    def run(self) -> None:
        """Train from where the run stands to its end, then test the best weights.

        Raises:
            BadStepError: If the loss or a gradient is not finite; a checkpoint of the last good
                step has been written.
            BrokenImageError: If an image for validation cannot be read, or too many for training;
                a checkpoint of the last step has been written, if it was the first rank's image.
            Stopped: If a signal has asked for it; a checkpoint has been written.
        """
        with ExitStack() as stack:
            log = self._open_folder(stack)
            try:
                self._run(log)
            except (BadStepError, BrokenImageError):
                self._save_checkpoint()
                raise

    def _run(self, log: RunLog | None) -> None:
        while self.epoch < self.epochs:
            start = time.monotonic() - self.timing.seconds  # of an earlier process
            loss = self.train_epoch()
            due = (self.epoch + 1) % self.config.val_interval == 0
            due = due or self.epoch + 1 == self.epochs
            metrics = self.validate() if due and self.val_loader is not None else None
            self.epoch += 1
            lr = self.optimizer.param_groups[0]["lr"]
            if self.scheduler is not None:
                metric = getattr(metrics, self.config.eval_metric, None)
                self.scheduler.step(self.epoch, metric)
            seconds = time.monotonic() - start
            self.seconds += seconds
            self._log(log, loss, metrics, lr, seconds)
            self.losses, self.broken, self.timing = [], 0, Timing()
            self.save(metrics)
        self.finish()

    def train_epoch(self) -> float:
        """Train to the end of the epoch, from its start or its middle; returns the mean loss.

        Raises:
            BadStepError: On every rank, if the loss or a gradient of any is not finite.
            BrokenImageError: On every rank, if more images are broken than may be.
            Stopped: On every rank, if any has had a signal.
        """
        first = self.step - self.epoch * self.steps_per_epoch
        if first < self.steps_per_epoch:
            # A stream's workers draw their seeds from the generator that this seeds.
            seed_step(self.config.seed, self.step, self.world.rank)
            start_epoch(self.train_loader, self.epoch, first * self.config.grad_accum_steps)
            self._train_steps(first)
            self.step = (self.epoch + 1) * self.steps_per_epoch  # a stream may have had fewer
            self._share_statistics()
        self._stop_if_asked()
        return sum(self.losses) / max(1, len(self.losses))

    def _train_steps(self, first: int) -> None:
        """The steps of the epoch from its step `first` on."""
        if 0 < self.config.mixup_off_epoch <= self.epoch:
            self.train_loader.mixup_enabled = False
            if self.mixup is not None:
                self.mixup.mixup_enabled = False
        self.network.train()
        self.optimizer.zero_grad()
        progress = Progress(
            f"epoch {self.epoch + 1}/{self.epochs}",
            self.steps_per_epoch,
            self.config.log_interval,
            enabled=self.world.is_primary,
            done=first,
        )
        try:
            # A stream begins anew when it goes on, and would have too many.
            groups = _groups(self.train_loader, self.config.grad_accum_steps)
            groups = islice(groups, self.steps_per_epoch - first)
            for batches in self.timing.waiting(groups):
                images = sum(len(labels) for _, labels in batches)
                with self.timing.computing(images * self.world.size):
                    loss = self.train_step(batches)
                speed = {
                    "images/s": self.timing.images_per_second,
                    "data wait %": 100 * self.timing.data_wait,
                }
                progress.step(loss=loss, lr=self.optimizer.param_groups[0]["lr"], **speed)
                if self.step < (self.epoch + 1) * self.steps_per_epoch:
                    # The last step's checkpoint is that of the epoch.
                    self._stop_if_asked()
                    self._save_if_due()
        finally:
            progress.close()

    def train_step(self, batches: list[Batch]) -> float:
        """One optimizer step on the mean loss of `batches`, which is returned.

        Raises:
            BadStepError: On every rank, before the step, if the loss or a gradient of any is not
                finite, or if the loss is a spike, and the policy for that is to stop.
            BrokenImageError: On every rank, before the step, if it makes the broken images of the
                epoch more than may be.
        """
        for own, kept in self._buffers:
            torch._foreach_copy_(kept, own)
        if isinstance(self.network, DistributedDataParallel) and not self._has_buckets:
            self._make_buckets(*batches[0])
        seed_step(self.config.seed, self.step, self.world.rank)
        self._set_grouping(self.model)
        loss = torch.zeros((), device=self.world.device)
        for index, (images, labels) in enumerate(batches):
            more = index + 1 < len(batches)
            distributed = isinstance(self.network, DistributedDataParallel)
            # Gradients are summed over the ranks in the last backward pass only.
            with self.network.no_sync() if more and distributed else nullcontext():  # type: ignore
                part = self._loss(images, labels) / len(batches)
                self.scaler.scale(part).backward()
            loss += part.detach()
        norm = self._gradient_norm()
        mean, broken, bad = self._agree(loss, norm)
        policy = self._policy(mean, bad)
        too_many = self._too_many(self.broken + broken)
        if policy in ("skip", "stop") or too_many:
            self._restore_buffers()
        if too_many:
            self.optimizer.zero_grad()
            raise BrokenImageError(too_many)
        if policy != "step":
            self._report(policy, bad, self.world.rank in bad or self._is_spike(loss.item()))
        if policy != "skip":
            self._clip(norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.losses.append(mean)
            self.recent.append(mean)
        self.optimizer.zero_grad()
        self.step += 1
        self.broken += broken
        if self.averaged is not None and policy != "skip":
            self.averaged.update(self.model, step=self.step)
            self._set_grouping(self.averaged.module)  # a schedule is not to be averaged
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        return mean

    def _make_buckets(self, images: Tensor, labels: Tensor) -> None:
        """Run a step in vain, for the first one of a process sums gradients in another order.

        DistributedDataParallel sorts its buckets by what the first backward pass does. The place in
        a bucket decides the order of the sum over more than two ranks, and so its last bits.
        """
        self._loss(images.clone(), labels).backward()  # mixup works in place
        self.optimizer.zero_grad()
        self._restore_buffers()
        self._has_buckets = True

    def _restore_buffers(self) -> None:
        """Undo what the step's forward passes did to the batch norms' statistics."""
        for own, kept in self._buffers:
            torch._foreach_copy_(own, kept)

    def _gradient_norm(self) -> Tensor | None:
        """The norm of all gradients; None of scaled ones, as their scaler looks for infinite ones
        itself, and skips them.
        """
        if self.scaler.is_enabled():
            return None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _agree(self, loss: Tensor, norm: Tensor | None) -> tuple[float, int, list[int]]:
        """What the ranks' parts in the step come to.

        The mean loss, the number of broken images, and the ranks whose loss or gradients are not
        finite. The one synchronisation point of a step; ranks also tell each other of signals here.
        (With float16 torch's scaler has its own: it reads whether it has to skip the step.)
        """
        flag = 2 * ~loss.isfinite()
        if norm is not None:
            flag = flag + ~norm.isfinite()
        size = self.world.size
        values = torch.zeros(2 + 2 * size, dtype=torch.float64, device=self.world.device)
        values[0] = loss
        values[1] = broken_images(self.train_loader, self._batches_of_step())
        values[2 + self.world.rank] = flag
        values[2 + size + self.world.rank] = self.stop.number
        # Here the host waits for the device.
        total, broken, *of_ranks = self.world.sum(values).tolist()
        flags, signals = of_ranks[:size], of_ranks[size:]
        self.stopping = int(max(signals))
        # A gradient is that of all ranks, so a rank whose loss is not finite spoils it for all.
        worst = max(flags)
        bad = [rank for rank, flag in enumerate(flags) if flag == worst > 0]
        return total / size, int(broken), bad

    def _batches_of_step(self) -> range:
        """Numbers of the step's batches in the epoch."""
        size = self.config.grad_accum_steps
        first = (self.step - self.epoch * self.steps_per_epoch) * size
        return range(first, min(first + size, len(self.train_loader)))

    def _too_many(self, broken: int) -> str:
        """What is wrong if the epoch has so many broken images, empty if that may be."""
        fraction = self.config.max_broken_fraction
        if not broken or broken <= fraction * len(self.train_loader.dataset):
            return ""
        return (
            f"{broken} of {len(self.train_loader.dataset)} training images are broken by step "
            f"{self.step + 1} of epoch {self.epoch + 1}, more than --max-broken-fraction {fraction}"
        )

    def _policy(self, mean: float, bad: list[int]) -> str:
        """What becomes of a step, on every rank the same: step, warn (and step), skip or stop."""
        if bad:
            return self.config.nonfinite
        return self.config.on_spike if self._is_spike(mean) else "step"

    def _is_spike(self, loss: float) -> bool:
        if not self.config.loss_spike or len(self.recent) < 10:
            return False
        return loss > self.config.loss_spike * median(self.recent)

    def _report(self, policy: str, bad: list[int], named: bool) -> None:
        """Say what is wrong with a step and, where `named`, in which samples; raise if to stop."""
        where = f"at step {self.step + 1} of epoch {self.epoch + 1}"
        problem, hint = f"the loss is a spike {where}", "lower --lr, or choose another --on-spike"
        if bad:
            problem = f"the loss or a gradient is not finite {where} on rank {_list(bad)}"
            hint = (
                "lower --lr, clip with --clip-grad, or leave such steps out with --nonfinite skip"
            )
        if named:
            batches = self._batches_of_step()
            names = [name for batch in batches for name in sample_names(self.train_loader, batch)]
            text = f"samples {where} on rank {self.world.rank}: {_list(names)}"
            print(text, file=sys.stderr, flush=True)
        if policy == "stop":
            self.optimizer.zero_grad()
            raise BadStepError(f"{problem}; {hint}")
        self.world.warn(f"{problem}{': the step is left out' if policy == 'skip' else ''}")

    def _share_statistics(self) -> None:
        """Give the ranks the same batch norm statistics, as validation and checkpoints need."""
        if self.world.size == 1 or self.config.sync_bn or not self.config.dist_bn:
            return
        distribute_bn(self.model, self.world.size, self.config.dist_bn == "reduce")
        if self.averaged is not None:
            # A checkpoint in mid-epoch holds those of rank 0 alone; so theirs are published.
            distribute_bn(self.averaged, self.world.size, reduce=False)

    def _stop_if_asked(self) -> None:
        if self.stopping:
            self._save_checkpoint()
            raise Stopped(self.stopping)

    def _save_if_due(self) -> None:
        steps, minutes = self.config.recovery_interval, self.config.recovery_minutes
        due = steps and self.step % steps == 0
        if due or (minutes and time.monotonic() - self._saved_at >= 60 * minutes):
            self._save_checkpoint()

    def _interruptible(self, loader: Any, save: bool) -> Iterator[Batch]:
        """The batches of a loader, until a signal; ranks agree on it before each (one all-reduce).

        Their numbers of batches may differ by one.
        """
        rounds = int(self.world.max(torch.tensor(len(loader), device=self.world.device)))
        batches = iter(loader)
        for _ in range(rounds):
            number = self.world.max(torch.tensor(self.stop.number, device=self.world.device))
            if number:
                if save:
                    self._save_checkpoint()
                raise Stopped(int(number))
            if (batch := next(batches, None)) is not None:
                yield batch

    def validate(self) -> Metrics:
        """Metrics of the averaged weights, if there are any, else of the model's."""
        return self._evaluate(self._published(), self.val_loader)

    def save(self, metrics: Metrics | None) -> None:
        """Write the run's last checkpoint, and the best if `metrics` are or there are none."""
        better = metrics is None and self.val_loader is None
        if metrics is not None and self._improves(metrics):
            better, self.best, self.best_epoch = True, metrics, self.epoch
        if not self.world.is_primary:
            return
        if better:
            with writing_to(self.folder):
                checkpoint.save_best(self._published(), self.folder)
        self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        self._saved_at = time.monotonic()
        if self.world.is_primary:
            with writing_to(self.folder):
                keep = self.config.checkpoint_hist
                checkpoint.save_checkpoint(self.folder, self.checkpoint(), keep)

    def checkpoint(self) -> Checkpoint:
        """All that `restore` needs for the run to go on at the next step."""
        averaged = None if self.averaged is None else self.averaged.module.state_dict()
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "losses": self.losses,
            "recent": list(self.recent),
            "timing": asdict(self.timing),
            "broken": self.broken,
            "best": self.best and tuple(self.best),
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "rows": self.rows,
            "layers": self.layers,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "plateau": self._plateau and self._plateau.state_dict(),
            "lr_without_noise": getattr(self.scheduler, "restore_lr", None),  # plateau's too
            "environment": self._environment(),
        }
        return Checkpoint(self.model.state_dict(), averaged, state)

    def restore(self, saved: Checkpoint) -> None:
        """Go on where the run that `saved` is of stood.

        Raises:
            UsageError: If it is of a run with another model or optimizer, or stands in the middle
                of an epoch of another length.
        """
        state = saved.state
        try:
            self.model.load_state_dict(saved.model)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.averaged is not None:
                if saved.averaged is None:
                    raise ValueError("it has no averaged weights")
                self.averaged.module.load_state_dict(saved.averaged)
            if self._plateau is not None:
                self._plateau.load_state_dict(state["plateau"])
                self.scheduler.restore_lr = state["lr_without_noise"]  # type: ignore
            self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
            self.best = Metrics(*state["best"]) if state["best"] else None
            self.best_epoch = state["best_epoch"]
            self.losses, self.rows = state["losses"], state["rows"]
            self.broken, self.timing = state["broken"], Timing(**state["timing"])
            self.recent.extend(state["recent"])
            self.layers = state["layers"]
            steps, environment = state["steps_per_epoch"], state["environment"]
            changes = [
                f"{name} was {environment[name]} and is {value}"
                for name, value in self._environment().items()
                if environment[name] != value
            ]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(f"the run was made with other options: {error}") from None
        if steps != self.steps_per_epoch:
            if self.step != self.epoch * steps:
                raise UsageError(
                    f"the run stands in the middle of an epoch of {steps} steps, which now has "
                    f"{self.steps_per_epoch}: give the same data and, with --batch-size and "
                    "--grad-accum-steps, the same global batch"
                )
            self.step = self.epoch * self.steps_per_epoch
        in_epoch = self.step - self.epoch * self.steps_per_epoch
        if changes:
            self.world.warn(f"not to the bit as it would have gone on: {'; '.join(changes)}")
        if in_epoch and isinstance(self.train_loader.dataset, IterableDataset):
            self.world.warn("the data are a stream: the epoch goes on with its first images again")
        if in_epoch and self.world.size > 1 and self.config.no_ddp_bb and not self.config.sync_bn:
            self.world.warn("--no-ddp-bb: all ranks go on with the batch norm statistics of rank 0")
        if self.scheduler is not None:
            if self.epoch and self._plateau is None:
                self.scheduler.step(self.epoch)
            self.scheduler.step_update(self.step)

    @property
    def _plateau(self) -> Any:
        """The one schedule whose state is not a function of the step."""
        return getattr(self.scheduler, "lr_scheduler", None)

    def _environment(self) -> dict[str, Any]:
        """What the bits of a result depend on, apart from the configuration's numbers."""
        cuda = self.world.device.type == "cuda"
        device = torch.cuda.get_device_name(self.world.device) if cuda else self.world.device.type
        return {
            "the number of ranks": self.world.size,
            "the device": device,
            "the number of CPU threads": None if cuda else torch.get_num_threads(),
            "--torchcompile": self.config.torchcompile,
            "mixed precision": self.config.amp_dtype if self.config.amp else None,
            "--channels-last": self.config.channels_last,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "emax_timm": __version__,
        }

    def finish(self) -> None:
        """Test the best weights if there is a test split, and print and write the result."""
        path = self.folder / checkpoint.BEST
        test = None
        if self.test_loader is not None:
            if self.world.is_primary and path.exists():
                checkpoint.load_weights(self.model, path)
            self.world.broadcast(self.model.state_dict().values())
            test = self._evaluate(self.model, self.test_loader, save=False)
        if not self.world.is_primary:
            return
        summary = {
            "model": self.config.model,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "epochs": self.epoch,
            "best_epoch": self.best_epoch,
            "validation": self.best and self.best._asdict(),
            "test": test and test._asdict(),
            "seconds": round(self.seconds, 1),
        }
        with writing_to(self.folder):
            replace_file(
                self.folder / "summary.json",
                lambda file: file.write_text(json.dumps(summary, indent=2) + "\n"),
            )
        draw_at_end(self.folder)
        parts = [f"{path}  {self.seconds:.0f} s"]
        if self.best is not None:
            parts.append(f"validation (epoch {self.best_epoch}) {self.best}")
        if test is not None:
            parts.append(f"test {test}")
        print("  ".join(parts), flush=True)

    def _open_folder(self, stack: ExitStack) -> RunLog | None:
        """Make the run's folder and lock it; the log, on the primary rank."""
        if not self.world.is_primary:
            return None
        columns = [
            *("epoch", "step", "lr", "train_loss", "broken", "val_loss", "val_top1", "val_top5"),
            *("seconds", "images_per_second", "data_wait"),
        ]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(lock_folder(self.folder)):
                raise UsageError(f"another process is training in {self.folder}")
            for folder in (self.folder, self.folder / checkpoint.CHECKPOINTS):
                remove_partial(folder)
            replace_file(
                self.folder / checkpoint.CONFIG,
                lambda file: file.write_text(to_yaml(self.config)),
            )
            checkpoint.save_model_config(
                self.model,
                self.folder / checkpoint.MODEL_CONFIG,
                self.config.model_kwargs,
                self.data_config,
                self.classes,
            )
            track = open_trackers(self.config.log_to, self.folder, asdict(self.config), self.epoch)
            track = stack.enter_context(track)
            return RunLog(self.folder, columns, self.rows, self.layers, track)
        except OSError as error:
            raise UsageError(f"cannot write to {self.folder}: {error.strerror}") from None

    def _log(
        self, log: RunLog | None, loss: float, metrics: Metrics | None, lr: float, seconds: float
    ) -> None:
        values = metrics._asdict() if metrics is not None else {}
        row = {
            "epoch": self.epoch - 1,
            "step": self.step,
            "lr": lr,
            "train_loss": loss,
            "broken": self.broken,
            **{f"val_{name}": values.get(name) for name in Metrics._fields},
            "seconds": round(seconds, 3),
            "images_per_second": round(self.timing.images_per_second, 1),
            "data_wait": round(self.timing.data_wait, 3),
        }
        self.rows.append(row)
        if log is None:
            return
        layers = self._layer_statistics()
        if layers:
            self.layers.append({"epoch": self.epoch - 1, **layers})
        with writing_to(self.folder):
            log.write(row, self.layers[-1] if layers else {})
        parts = [f"epoch {self.epoch}/{self.epochs}", f"loss: {loss:.4f}"]
        if self.broken:
            parts.append(f"broken images: {self.broken}")
        if metrics:
            parts.append(f"validation loss: {metrics.loss:.4f} {metrics}")
        print("  ".join([*parts, f"{seconds:.1f} s"]), flush=True)

    def _layer_statistics(self) -> dict[str, dict[str, Any]]:
        """Of the weights that are validated, on rank 0's first validation images."""
        model = self._published()
        if self.val_loader is None or not has_emax(model):
            return {}
        if self._images is None:
            images = first_images(self.val_loader).to(self.world.device)
            if self.config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            self._images = images
        with autocast(self.world, bool(self.config.amp), self.config.amp_dtype):
            return layer_statistics(model, self._images)

    def _set_grouping(self, model: nn.Module) -> None:
        progress = self.step / (self.epochs * self.steps_per_epoch)
        warmup, temperature = grouping_course(
            progress, self.config.grouping_warmup, self.config.grouping_temperature
        )
        set_grouping(model, warmup=warmup, temperature=temperature)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        # Without the prefetcher they are still on the host.
        images = images.to(self.world.device, non_blocking=True)
        labels = labels.to(self.world.device, non_blocking=True)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.world, bool(self.config.amp), self.config.amp_dtype):
            return self.criterion(self.network(images), labels)

    def _clip(self, norm: Tensor | None) -> None:
        if self.config.clip_grad is None:
            return
        if norm is not None and self.config.clip_mode == "norm":
            parameters = self.model.parameters()
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
            return
        self.scaler.unscale_(self.optimizer)
        without_head = self.config.clip_mode == "agc"
        parameters = model_parameters(self.model, exclude_head=without_head)
        dispatch_clip_grad(parameters, self.config.clip_grad, mode=self.config.clip_mode)

    def _published(self) -> nn.Module:
        return self.model if self.averaged is None else self.averaged.module

    def _evaluate(self, model: nn.Module, loader: Any, save: bool = True) -> Metrics:
        config = self.config
        progress = Progress("validation", len(loader), config.log_interval, self.world.is_primary)
        stream = isinstance(loader.dataset, IterableDataset)  # of unknown length
        batches = loader if stream else self._interruptible(loader, save)
        return evaluate(
            model,
            progress.track(batches),
            self.world,
            bool(config.amp),
            config.amp_dtype,
            config.channels_last,
        )

    def _improves(self, metrics: Metrics) -> bool:
        new = getattr(metrics, self.config.eval_metric)
        # The loss tells of logits that are not finite; an accuracy can be had from them.
        finite = math.isfinite(new) and math.isfinite(metrics.loss)
        if self.best is None or not finite:
            return finite
        old = getattr(self.best, self.config.eval_metric)
        return new < old if self.config.eval_metric == "loss" else new > old


def grouping_course(
    progress: float, warmup: list[float], temperature: list[float]
) -> tuple[float, float]:
    """EMAX's s and tau at a fraction of the training steps.

    Args:
        progress: Steps done over steps in all, in [0, 1].
        warmup: Fractions between which s rises linearly from 0 to 1.
        temperature: tau at 0 and at 1, linear between.
    """
    start, end = warmup
    rise = (progress - start) / (end - start) if end > start else float(progress >= end)
    first, last = temperature
    return min(1.0, max(0.0, rise)), first + (last - first) * progress


def _groups(batches: Any, size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches, the last one of what is left."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def _list(items: list[Any]) -> str:
    return ", ".join(map(str, items))
