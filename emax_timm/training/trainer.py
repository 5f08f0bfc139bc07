"""The training loop: epochs, their steps, validation and checkpoints."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from ..files import writing_to
from . import checkpoint, resume
from .curves import draw_at_end
from .data import corrupt_images, start_epoch
from .data.decoding import CorruptImageError
from .data.sampling import seed_step
from .distributed import share_statistics
from .evaluate import Metrics, autocast, evaluate, improves
from .grouping import schedule_grouping
from .guard import Agreement, BadStepError, Step, agree
from .journal import RunLog, closing_line, open_log, record_epoch, write_summary
from .progress import Progress, Timing
from .run import Run
from .signals import Stopped, until_signal

__all__ = ["Trainer"]

# Images [b, c, h, w] and labels [b]; labels [b, classes] after mixup.
Batch = tuple[Tensor, Tensor]


@dataclass
class Trainer(Run):
    """The training loop of a run; `build.build_trainer` makes one from a configuration."""

    def run(self) -> None:
        """Train from the run's current step to its end, then test the best weights.

        Raises:
            BadStepError: If the loss or a gradient is not finite, or the loss is a spike, and the
                policy is to stop; a checkpoint of the last good step has been written.
            CorruptImageError: If a validation image or too many training images are corrupt; a
                checkpoint has been written, unless only another rank than 0 found such an image.
            Stopped: If a signal asked for it; a checkpoint has been written.
        """
        with ExitStack() as stack:
            log = open_log(self, stack)
            try:
                while self.epoch < self.epochs:
                    self._run_epoch(log)
                self.finish()
            except (BadStepError, CorruptImageError):
                self._save_checkpoint()
                raise

    def _run_epoch(self, log: RunLog | None) -> None:
        start = time.monotonic() - self.timing.seconds  # the time before a resume counts too
        loss = self.train_epoch()
        due = (self.epoch + 1) % self.config.val_interval == 0 or self.epoch + 1 == self.epochs
        metrics = self.validate() if due and self.val_loader is not None else None
        self.epoch += 1
        lr = self.optimizer.param_groups[0]["lr"]
        if self.scheduler is not None:
            self.scheduler.step(self.epoch, getattr(metrics, self.config.eval_metric, None))
        seconds = time.monotonic() - start
        self.seconds += seconds
        record_epoch(self, log, loss, metrics, lr, seconds)
        self.losses, self.timing, self.guard.corrupt = [], Timing(), 0
        self.save(metrics)

    def train_epoch(self) -> float:
        """Train to the end of the epoch, from its start or its middle; returns the mean loss.

        Raises:
            BadStepError: On every rank, as `train_step` raises it.
            CorruptImageError: On every rank, if too many images are corrupt.
            Stopped: On every rank, if any rank has received a signal.
        """
        first = self.step - self.epoch * self.steps_per_epoch
        if first < self.steps_per_epoch:
            # A stream's workers draw their seeds from the generators that this seeds.
            seed_step(self.config.seed, self.step, self.context.rank)
            start_epoch(self.train_loader, self.epoch, first * self.config.grad_accum_steps)
            self._train_steps(first)
            self.step = (self.epoch + 1) * self.steps_per_epoch  # a stream may have fewer
            share_statistics(self.context, self.config, self.model, self.averaged)
        self._stop_if_asked()
        return sum(self.losses) / max(1, len(self.losses))

    def _train_steps(self, first: int) -> None:
        """Make the steps of the epoch from its step `first` on."""
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
            enabled=self.context.is_primary,
            done=first,
        )
        try:
            # A resumed stream starts again at its first batch, and would yield too many.
            groups = _groups(self.train_loader, self.config.grad_accum_steps)
            groups = islice(groups, self.steps_per_epoch - first)
            for batches in self.timing.waiting(groups):
                images = sum(len(labels) for _, labels in batches)
                with self.timing.computing(images * self.context.size):
                    loss = self.train_step(batches)
                speed = {
                    "images/s": self.timing.images_per_second,
                    "data wait %": 100 * self.timing.data_wait,
                }
                progress.step(loss=loss, lr=self.optimizer.param_groups[0]["lr"], **speed)
                if self.step < (self.epoch + 1) * self.steps_per_epoch:
                    # After the last step, the checkpoint is written at the end of the epoch.
                    self._stop_if_asked()
                    self._save_if_due()
        finally:
            progress.close()

    def train_step(self, batches: list[Batch]) -> float:
        """Make one optimizer step on the mean loss of `batches`; returns this loss over all ranks.

        Raises:
            BadStepError: On every rank, before the step, if the loss or a gradient of any rank is
                not finite or the loss is a spike, and the policy for that is to stop.
            CorruptImageError: On every rank, before the step, if it brings the epoch's corrupt
                images above the allowed fraction.
        """
        self.guard.keep()
        self._make_buckets(*batches[0])
        seed_step(self.config.seed, self.step, self.context.rank)
        self._set_grouping(self.model)
        loss = self._backward(batches)
        norm = self._gradient_norm()
        agreed = self._agree(loss, norm)
        good = self.guard.judge(self._place(), loss, agreed)
        if good:
            self._clip(norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.losses.append(agreed.loss)
        self.optimizer.zero_grad()
        self.step += 1
        if self.averaged is not None and good:
            self.averaged.update(self.model, step=self.step)
            self._set_grouping(self.averaged.module)  # the schedule must not be averaged
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        return agreed.loss

    def _backward(self, batches: list[Batch]) -> Tensor:
        """Accumulate the gradients of the mean loss of `batches`; returns this loss, []."""
        loss = torch.zeros((), device=self.context.device)
        for index, (images, labels) in enumerate(batches):
            more = index + 1 < len(batches)
            distributed = isinstance(self.network, DistributedDataParallel)
            # Gradients are reduced over the ranks in the last backward pass only.
            with self.network.no_sync() if more and distributed else nullcontext():  # type: ignore
                part = self._loss(images, labels) / len(batches)
                self.scaler.scale(part).backward()
            loss += part.detach()
        return loss

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        # Without the prefetcher the batches are still on the host.
        images = images.to(self.context.device, non_blocking=True)
        labels = labels.to(self.context.device, non_blocking=True)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.context, bool(self.config.amp), self.config.amp_dtype):
            return self.criterion(self.network(images), labels)

    def _make_buckets(self, images: Tensor, labels: Tensor) -> None:
        """Run one backward pass and discard it, so that all steps sum gradients in the same order.

        DistributedDataParallel sorts its buckets after the first backward pass of a process. Over
        more than two ranks, the place in a bucket decides the order of a sum and so its last bits.
        """
        if not self.has_buckets:
            self._loss(images.clone(), labels).backward()  # mixup works in place
            self.guard.undo()
            self.has_buckets = True

    def _gradient_norm(self) -> Tensor | None:
        """Return the norm of all gradients, []; None with a gradient scaler.

        The scaler itself looks for infinite gradients and skips their step.
        """
        if self.scaler.is_enabled():
            return None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _agree(self, loss: Tensor, norm: Tensor | None) -> Agreement:
        """Combine the ranks' results of the step; here the host waits for the device."""
        corrupt = corrupt_images(self.train_loader, self._place().batches)
        agreed = agree(self.context, loss, norm, corrupt, self.stop.number)
        self.stopping = agreed.signal
        return agreed

    def _place(self) -> Step:
        size = self.config.grad_accum_steps
        first = (self.step - self.epoch * self.steps_per_epoch) * size
        batches = range(first, min(first + size, len(self.train_loader)))
        return Step(self.step, self.epoch, batches)

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

    def _set_grouping(self, model: nn.Module) -> None:
        schedule_grouping(model, self.step / (self.epochs * self.steps_per_epoch), self.config)

    def validate(self) -> Metrics:
        """Return validation metrics, of the averaged weights if there are any."""
        try:
            return self._evaluate(self.published, self.val_loader)
        except Stopped:
            self._save_checkpoint()
            raise

    def _evaluate(self, model: nn.Module, loader: Any) -> Metrics:
        config = self.config
        progress = Progress("validation", len(loader), config.log_interval, self.context.is_primary)
        stream = isinstance(loader.dataset, IterableDataset)  # its length is unknown
        batches = progress.track(
            loader if stream else until_signal(loader, self.context, self.stop)
        )
        amp = bool(config.amp)
        return evaluate(model, batches, self.context, amp, config.amp_dtype, config.channels_last)

    def save(self, metrics: Metrics | None) -> None:
        """Write a checkpoint, and the best weights if `metrics` improve or nothing is validated."""
        better = metrics is None and self.val_loader is None
        if metrics is not None and improves(metrics, self.best, self.config.eval_metric):
            better, self.best, self.best_epoch = True, metrics, self.epoch
        if better and self.context.is_primary:
            with writing_to(self.folder):
                checkpoint.save_best(self.published, self.folder)
        self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        self.saved_at = time.monotonic()
        if self.context.is_primary:
            with writing_to(self.folder):
                keep = self.config.checkpoint_hist
                checkpoint.save_checkpoint(self.folder, resume.snapshot(self), keep)

    def _save_if_due(self) -> None:
        steps, minutes = self.config.recovery_interval, self.config.recovery_minutes
        due = steps and self.step % steps == 0
        if due or (minutes and time.monotonic() - self.saved_at >= 60 * minutes):
            self._save_checkpoint()

    def _stop_if_asked(self) -> None:
        if self.stopping:
            self._save_checkpoint()
            raise Stopped(self.stopping)

    def finish(self) -> None:
        """Test the best weights if there is a test split; write and print the run's result."""
        test = None
        if self.test_loader is not None:
            best = self.folder / checkpoint.BEST
            if self.context.is_primary and best.exists():
                checkpoint.load_weights(self.model, best)
            self.context.broadcast(self.model.state_dict().values())
            test = self._evaluate(self.model, self.test_loader)
        if self.context.is_primary:
            write_summary(self, test)
            draw_at_end(self.folder)
            print(closing_line(self, test), flush=True)


def _groups(batches: Any, size: int) -> Iterator[list[Batch]]:
    """Yield lists of `size` batches; the last list has those that are left."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group
