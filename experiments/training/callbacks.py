"""What a person sees of a run: a progress bar on a terminal, one line an epoch elsewhere."""

import sys
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.records.run_record import End, Epoch, Manifest


class Callback(Protocol):
    """Told what happens in a run."""

    def on_start(self, manifest: Manifest, epoch: int, steps_per_epoch: int) -> None:
        """The run begins, or goes on, after `epoch` epochs."""
        ...

    def on_step(self, step_in_epoch: int) -> None:
        """A step was taken."""
        ...

    def on_epoch(self, epoch: Epoch) -> None:
        """An epoch was recorded."""
        ...

    def on_end(self, end: End) -> None:
        """The run is over."""
        ...

    def close(self) -> None:
        """Release what the callback holds, however the run left off."""
        ...


class Lines:
    """One plain line an epoch."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True, file=sys.stdout)

    def on_start(self, manifest: Manifest, epoch: int, steps_per_epoch: int) -> None:
        """Name the run and its data."""
        self._manifest = manifest
        self._name = f"{manifest.optimizer} seed {manifest.seed}"
        goes_on = f", goes on after epoch {epoch}" if epoch else ""
        where = f"{manifest.task} {manifest.scale}, {manifest.dataset.name}, {manifest.device}"
        self._console.print(f"{self._name}: {where}{goes_on}", markup=False)

    def on_step(self, step_in_epoch: int) -> None:
        """Nothing."""

    def on_epoch(self, epoch: Epoch) -> None:
        """Print the epoch."""
        self._console.print(self._line(epoch), markup=False)

    def on_end(self, end: End) -> None:
        """Print how it ended."""
        self._console.print(f"{self._name}: {end.reason} after {end.seconds:.1f} s", markup=False)

    def close(self) -> None:
        """Nothing."""

    def _line(self, epoch: Epoch) -> str:
        metric = self._manifest.metric.name
        figures = {"train loss": epoch.train_loss, "loss": epoch.eval_loss, metric: epoch.metric}
        shown = "  ".join(f"{name} {('–' if value is None else f'{value:.4g}')}" for name, value in figures.items())
        return f"{self._name}: epoch {epoch.epoch}/{self._manifest.epochs}  {shown}  {epoch.seconds:.1f} s"


class Bar(Lines):
    """The same lines, with a bar for the epoch under way below them."""

    def __init__(self) -> None:
        super().__init__()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )

    def on_start(self, manifest: Manifest, epoch: int, steps_per_epoch: int) -> None:
        """Start the bar."""
        super().on_start(manifest, epoch, steps_per_epoch)
        self._bar = self._progress.add_task(f"epoch {epoch + 1}", total=steps_per_epoch)
        self._progress.start()

    def on_step(self, step_in_epoch: int) -> None:
        """Move the bar."""
        self._progress.update(self._bar, completed=step_in_epoch)

    def on_epoch(self, epoch: Epoch) -> None:
        """Print the epoch and start the next bar."""
        super().on_epoch(epoch)
        self._progress.update(self._bar, completed=0, description=f"epoch {epoch.epoch + 1}")

    def on_end(self, end: End) -> None:
        """Take the bar away."""
        self.close()
        super().on_end(end)

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()


class TensorBoard:
    """Every figure of an epoch as a TensorBoard curve against the epoch.

    Args:
        folder: where the event files go.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports much, so only where it was asked for

        self._writer = SummaryWriter(folder)

    def on_start(self, manifest: Manifest, epoch: int, steps_per_epoch: int) -> None:
        """Nothing."""

    def on_step(self, step_in_epoch: int) -> None:
        """Nothing."""

    def on_epoch(self, epoch: Epoch) -> None:
        """Add a point to each curve."""
        own = {name: value for name, value in vars(epoch).items() if name not in ("epoch", "others")}
        for name, value in (own | dict(epoch.others)).items():
            if value is not None:
                self._writer.add_scalar(name, value, epoch.epoch)

    def on_end(self, end: End) -> None:
        """Nothing."""

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.close()


def make_terminal_callback(*, bar: bool) -> Callback:
    """Lines, with a bar on a terminal if it is wanted.

    Args:
        bar: whether a bar is wanted.

    Returns:
        What prints the run.
    """
    return Bar() if bar and sys.stdout.isatty() else Lines()
