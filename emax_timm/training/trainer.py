"""The training loop: epochs, their steps, validation and checkpoints."""

import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from ..files import WriteError, writing_to
from . import checkpoint, resume
from .conditional import Refusal
from .curves import draw_at_end
from .data import corrupt_images, grouped, start_epoch
from .data.decoding import CorruptImageError
from .data.sampling import seed_step
from .distributed import share_statistics
from .evaluate import Metrics, autocast, evaluate, improves
from .guard import BadStepError
from .journal import RunLog, closing_line, open_log, record_epoch, write_summary
from .progress import Progress, Timing
from .run import Run
from .signals import Stopped, until_signal
from .verdict import Report, Step, Verdict

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
            except (BadStepError, CorruptImageError) as error:
                try:
                    self._save_checkpoint()
                except WriteError:  # which must not hide the reason
                    self.context.warn(str(error))
                    raise
                raise

    def _run_epoch(self, log: RunLog | None) -> None:
        # The time before a resume counts too, and that of other runs in this process does not.
        start = time.monotonic() - self.timing.seconds - self.timing.elsewhere
        loss = self.train_epoch()
        due = (self.epoch + 1) % self.config.val_interval == 0 or self.epoch + 1 == self.epochs
        metrics = self.validate() if due and self.val_loader is not None else None
        self.epoch += 1
        lr = self.optimizer.param_groups[0]["lr"]
        if self.scheduler is not None:
            self.scheduler.step(self.epoch, getattr(metrics, self.config.eval_metric, None))
        seconds = time.monotonic() - self.timing.elsewhere - start
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
            groups = grouped(self.train_loader, self.config.grad_accum_steps)
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
            self.settle()

    def train_step(self, batches: list[Batch]) -> float:
        """Make one optimizer step on the mean loss of `batches`.

        If `late`, the host does not wait for it: the device itself leaves out a bad step, and the
        host learns of that within the next step or in `settle`.

        Returns:
            The loss over all ranks of the last step that the host knows of.

        Raises:
            BadStepError: On every rank, with the weights of the step before, if the loss or a
                gradient of any rank is not finite or the loss a spike, and the policy is to stop.
            CorruptImageError: Likewise, if too many of the epoch's images are corrupt.
        """
        self._make_buckets(*batches[0])
        self.groupings[0].set(self.step)
        self.guard.keep()
        seed_step(self.config.seed, self.step, self.context.rank)
        loss = self.backward(batches)
        norm, overflow = self.update.check()
        self.settle(self.guard.kept)  # of the step before; the device is busy with this one
        verdict = self.guard.ask(self._place(), self._report(loss, norm, overflow))
        refused = Refusal(verdict.refused) if self.late else not self._judge(verdict)
        self.update.make(norm, overflow, refused)
        self.guard.undo_if(refused)
        self.step, self.unsettled = self.step + 1, verdict
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        if not self.late:
            self.settle()
        self.late = self.asynchronous  # the first step of a process builds the optimizer's state
        return self.loss

    def settle(self, kept: Mapping[Tensor, Tensor] | None = None) -> None:
        """Learn whether the last step was made, and count it if so; what is known stays.

        Args:
            kept: The buffers after that step, if a forward pass has changed them since.

        Raises:
            BadStepError, CorruptImageError: As `train_step` raises them.
        """
        verdict, self.unsettled = self.unsettled, None
        if verdict is None:
            return
        made = self._judge(verdict)
        if not made or verdict.agreement.overflow:
            self.update.revert()
        if made:
            self.losses.append(self.loss)
        if made and self.averaged is not None:
            self.averaged.follow(verdict.step.number + 1, kept)
            self.groupings[1].set(verdict.step.number + 1)  # the schedule must not be averaged

    def _judge(self, verdict: Verdict) -> bool:
        """Return whether a step is made; before an error is raised, go back to where it began."""
        agreed = verdict.agreement  # the host waits for it
        self.loss, self.stopping, self.saving = agreed.loss, agreed.signal, agreed.save
        try:
            return self.guard.judge(verdict)
        except (BadStepError, CorruptImageError):
            resume.rewind(self, verdict.step.number)
            raise

    def backward(self, batches: list[Batch]) -> Tensor:
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
            self.guard.keep()
            self._loss(images.clone(), labels).backward()  # mixup works in place
            self.guard.undo()
            self.has_buckets = True

    def _report(self, loss: Tensor, norm: Tensor | None, overflow: Tensor | None) -> Report:
        corrupt = corrupt_images(self.train_loader, self._place().batches)
        seconds = 60 * self.config.recovery_minutes
        save = bool(seconds) and time.monotonic() - self.saved_at >= seconds
        return Report(loss, norm, overflow, corrupt, self.stop.number, save)

    def _place(self) -> Step:
        size = self.config.grad_accum_steps
        first = (self.step - self.epoch * self.steps_per_epoch) * size
        batches = range(first, min(first + size, len(self.train_loader)))
        return Step(self.step, self.epoch, batches)

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
        self.settle()
        self.saved_at, self.saving = time.monotonic(), False
        if self.context.is_primary:
            with writing_to(self.folder):
                keep = self.config.checkpoint_hist
                checkpoint.save_checkpoint(self.folder, resume.snapshot(self), keep)

    def _save_if_due(self) -> None:
        steps = self.config.recovery_interval
        if self.saving or (steps and self.step % steps == 0):
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
