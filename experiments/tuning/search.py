"""The search: Optuna's TPE sampler and median pruner over one optimizer's space, one trial after the other.

The first trials are the recipe's own settings and points spread evenly over the space, at the same shares of its
ranges for every optimizer; then the sampler draws.
A trial may be stopped from its middle on: before that, a learning rate that pays off late looks bad.
What is drawn depends on the trials before and on the trial's number alone, and a killed trial goes on from its
checkpoint: a search that was interrupted ends with the same trials.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments.config.recipe import Recipe
from experiments.config.tuning_space import join_elements, value_at
from experiments.dataclass_io import to_table
from experiments.errors import UserError
from experiments.records.run_record import End, Epoch, Manifest, Run, read_run, record_path, select_numeric_settings
from experiments.training.run import RunOptions, run
from experiments.tuning.trial import trial_recipe

# Trials before the sampler draws, and before any trial is stopped early.
STARTUP_TRIALS = 5
# Significant digits of a value that is tried, so that what a recipe is given is what was tried.
DIGITS = 3
# Of the sequence that the first trials come from: the same for all, or else their learning rates would differ.
_DIMENSIONS = 8


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A trial that is over.

    Attributes:
        number: from 0, which had the settings that the recipe had when the search began.
        ended: ``"complete"``, ``"pruned"`` (worse than the median at its epoch), or ``"diverged"``.
        settings: the values that were tried, by dotted key.
        run: its record.
    """

    number: int
    ended: str
    settings: Mapping[str, float]
    run: Run


class Search:
    """The search for the settings of one optimizer; everything it keeps is in one folder.

    Args:
        recipe: has a ``[tuning]`` table.
        optimizer: which one is tuned.
        options: how to run; where records and checkpoints of trials go is up to the search.
        folder: of all searches.

    Raises:
        UserError: the recipe has no space for the optimizer.
    """

    def __init__(self, recipe: Recipe, optimizer: str, options: RunOptions, folder: Path) -> None:
        if recipe.tuning is None or not recipe.tuning.spaces.get(optimizer):
            raise UserError(f"{recipe.path}: there is no space to tune {optimizer} in; see [tuning.spaces]")
        self.recipe, self.optimizer, self.seed = recipe, optimizer, recipe.run.tuning_seed
        self.space = recipe.tuning.spaces[optimizer]
        self.folder = folder / recipe.task / recipe.scale / optimizer
        self.options = replace(options, force=False)

    def run(self, trials: int) -> list[Tried]:
        """Run trials until there are `trials`, and return all that there are, by number.

        Args:
            trials: how many there are to be in the end.

        Returns:
            The trials that are over.

        Raises:
            UserError: the folder has trials with other settings, or another process is at work there.
        """
        with self._locked():
            study = self._study()
            while len(over := _list_over(study)) < trials:
                self._run_next(study, len(over))
            return [self._tried(number, trial) for number, trial in enumerate(over)]

    def run_ahead(self, number: int) -> None:
        """Run one of the first trials before its turn; the search then finds it finished, and goes as it would have.

        They depend on no other trial, and none of them is stopped early, so that several can be run at once.

        Args:
            number: under `STARTUP_TRIALS`.
        """
        with suppress(FloatingPointError):
            self._run_trial(number, self._values(self._drawn(self._first(number))), ())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "lock", timeout=0):
                yield
        except Timeout:
            raise UserError(f"{self.folder}: another process is tuning {self.optimizer} here") from None

    def _study(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=f"sqlite:///{self.folder.resolve() / 'study.db'}",
            study_name=self.optimizer,
            load_if_exists=True,
            pruner=MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=max(1, self.recipe.tuning.epochs // 2)),
        )
        self._check_question(study)
        return study

    def _check_question(self, study: optuna.Study) -> None:
        """The trials of a study answer one question: all settings but the tuned ones are alike."""
        settings = select_numeric_settings(
            trial_recipe(self.recipe, self.optimizer, {}).manifest_settings(self.optimizer)
        )
        tuned = {
            f"optimizer.{key}" for key in join_elements(self.recipe.optimizers[self.optimizer].table, self._current())
        }
        question = {key: value for key, value in settings.items() if key not in tuned}
        question |= {f"tuning.{key}": to_table(where) for key, where in self.space.items()}
        asked = json.loads(json.dumps(question))
        before = study.user_attrs.get("question", asked)
        study.set_user_attr("question", before)
        different = [key for key in sorted({*before, *asked}) if before.get(key) != asked.get(key)]
        if different:
            raise UserError(
                f"{self.folder}: has trials with other settings: {', '.join(different)}; remove it to begin again"
            )

    def _run_next(self, study: optuna.Study, number: int) -> None:
        trial = self._ask(study, number)
        values = self._values({key: self._suggest(trial, key) for key in self.space})
        shown = ", ".join(f"{key} {value:g}" for key, value in values.items())
        print(f"{self.optimizer} trial {number}: {shown}", flush=True)
        callback = _PruningCallback(trial)
        try:
            callback.catch_up(self._record(number))
            finished = self._run_trial(number, values, (callback,))
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
            shutil.rmtree(self._checkpoints(number), ignore_errors=True)
            return
        except FloatingPointError:
            finished = None
        if finished is None or finished.end.reason == "diverged" or math.isnan(finished.best_metric):
            trial.set_user_attr("ended", "diverged")
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, _to_loss(finished.manifest, finished.best_metric))
        shutil.rmtree(self._checkpoints(number), ignore_errors=True)

    def _ask(self, study: optuna.Study, number: int) -> Trial:
        """The next trial: one that a killed process left, or the recipe's own settings, or a new draw."""
        left = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        known = next((trial.params for trial in left if trial.params.keys() == self.space.keys()), None)
        if known is None and number < STARTUP_TRIALS:
            known = self._drawn(self._first(number))
        if known and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.enqueue_trial(known)
        for trial in left:
            study.tell(trial.number, state=TrialState.FAIL)
        # A seed of the trial's own: when this process was started does not matter.
        study.sampler = TPESampler(seed=1000 * self.seed + number, n_startup_trials=STARTUP_TRIALS)
        return study.ask()

    def _first(self, number: int) -> dict[str, float]:
        """What one of the first trials tries."""
        return self._spread(number) if number else self._current()

    def _current(self) -> dict[str, float]:
        settings = self.recipe.optimizers[self.optimizer].table
        return {key: where.clip(value_at(settings, key)) for key, where in self.space.items()}

    def _spread(self, number: int) -> dict[str, float]:
        """Point `number` of a Sobol sequence, from 1; its first four have one in each quarter of every range."""
        from scipy.stats.qmc import Sobol  # imports for half as long as torch, and most processes draw nothing

        points = Sobol(max(_DIMENSIONS, len(self.space)), seed=self.seed).random_base2(3)
        return {
            key: where.interpolate(share)
            for (key, where), share in zip(self.space.items(), points[number - 1], strict=False)
        }

    def _drawn(self, values: Mapping[str, float]) -> dict[str, float]:
        """What stands for these values in the study."""
        return {key: self.space[key].to_drawn(value) for key, value in values.items()}

    def _suggest(self, trial: Trial, key: str) -> float:
        where = self.space[key].drawn
        return trial.suggest_float(key, where.low, where.high, log=where.log)

    def _values(self, drawn: Mapping[str, float]) -> dict[str, float]:
        """The settings that are tried."""
        return {key: self.space[key].to_drawn(_round(each)) for key, each in drawn.items()}

    def _run_trial(self, number: int, values: Mapping[str, float], callbacks: Sequence["_PruningCallback"]) -> Run:
        recipe = trial_recipe(self.recipe, self.optimizer, values)
        options = replace(self.options, results_dir=self._results(number), checkpoint_dir=self._checkpoints(number))
        return run(recipe, self.optimizer, self.seed, options, callbacks=callbacks)

    def _checkpoints(self, number: int) -> Path:
        return self.folder / "checkpoints" / f"{number:03d}"

    def _results(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:03d}"

    def _record(self, number: int) -> Path:
        return record_path(self._results(number), self.recipe.task, self.recipe.scale, self.optimizer, self.seed)

    def _tried(self, number: int, trial: FrozenTrial) -> Tried:
        record = read_run(self._record(number))
        ended = trial.user_attrs.get("ended", trial.state.name.lower())
        return Tried(number=number, ended=ended, settings=self._values(trial.params), run=record)


class _PruningCallback:
    """Reports a trial's epochs to the pruner, and ends a trial that is worse than the median."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._reported: set[int] = set()

    def catch_up(self, record: Path) -> None:
        """Report the epochs that were recorded before an interruption."""
        if not record.exists() or b"\n" not in record.read_bytes():
            return
        before = read_run(record)
        self.on_start(before.manifest, 0, 0)
        for epoch in before.epochs:
            self.on_epoch(epoch)

    def on_start(self, manifest: Manifest, epoch: int, steps_per_epoch: int) -> None:
        self._manifest = manifest

    def on_step(self, step_in_epoch: int) -> None:
        pass

    def on_epoch(self, epoch: Epoch) -> None:
        if epoch.epoch == 0 or epoch.metric is None or epoch.epoch in self._reported:
            return
        self._reported.add(epoch.epoch)
        self._trial.report(_to_loss(self._manifest, epoch.metric), epoch.epoch)
        if self._trial.should_prune():
            raise optuna.TrialPruned

    def on_end(self, end: End) -> None:
        pass

    def close(self) -> None:
        pass


def _round(value: float) -> float:
    """To `DIGITS`."""
    return float(f"{value:.{DIGITS}g}")


def _list_over(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _to_loss(manifest: Manifest, metric: float) -> float:
    """The metric as Optuna minimises it."""
    return -metric if manifest.metric.higher_is_better else metric
