"""A challenge from its question to its page: probe, search, run, compare; the same command goes on where it stopped."""

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.challenge import challenge_page, result
from experiments.challenge.folder import Folder
from experiments.challenge.probe import Probe, Probed, read_probed
from experiments.challenge.question import ChallengeFile, Question, make_question, read_file, write_file
from experiments.challenge.recipe_files import describe_space, load_challenger, write_recipe
from experiments.challenge.works import Attempt, Train, Tuning, find_finished, list_first_trials
from experiments.config.recipe import Recipe, load_recipe
from experiments.dataclass_io import to_table
from experiments.errors import UserError
from experiments.launch.jobs import Job
from experiments.launch.local import describe_seconds, run_in_processes
from experiments.optimizers.outside import OutsideOptimizer
from experiments.plugins import PluginError, hash_file
from experiments.records.provenance import RECORDED, versions
from experiments.records.run_record import record_path
from experiments.training.run import RunOptions
from experiments.tuning.search import STARTUP_TRIALS

if TYPE_CHECKING:
    from experiments.launch.slurm import Resources

# Seconds that a process takes before it trains: importing torch and the task, reading the data.
_START_S = 6.0
# Of a question, what may change from one call to the next: it asks for more or fewer runs, and changes none.
_FREE = ("tasks", "seeds", "baselines", "rerun_baselines")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How and where to run; nothing that changes a number.

    Attributes:
        workers: processes at a time.
        data_dir: where datasets are kept.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        cluster: what each run gets on a SLURM cluster; ``None`` for processes on this machine.
    """

    workers: int = 1
    data_dir: Path = Path("data")
    device: str = "auto"
    cluster: "Resources | None" = None


@dataclass(kw_only=True)
class _Entry:
    """One task of a challenge, and why it cannot go on if it cannot."""

    asked: str
    recipe: Recipe
    probed: Probed
    problem: str | None
    recorded: list[str]

    @property
    def trials(self) -> int:
        tuning = self.recipe.tuning
        return tuning.trials if tuning else 0


def conduct(question: Question, folder: Folder, options: Options, file: ChallengeFile) -> list[str]:
    """Do what is left of a challenge, and write its result and its page.

    Args:
        question: what is asked.
        folder: of the challenge.
        options: how and where.
        file: what it was read from: its code, and the versions it was made with.

    Returns:
        Why a task could not be done, a text each.

    Raises:
        UserError: the optimizer cannot be had, a setting is not its own, the folder is another challenge's or in use.
    """
    is_new = not folder.root.exists()
    with folder.locked():
        before = read_file(folder.file) if folder.file.exists() else None
        code = _place_code(question, folder, file, before)
        challenger = _load_challenger(question, folder, is_new=is_new)
        if before:
            _check_same(question, before, folder)
        here = versions() | dict(challenger.plugin.versions)
        _warn_of_versions(before or file, here)
        recipes = {task: write_recipe(question, task, challenger, folder) for task in question.tasks}
        _write(question, folder, code, here, before.made if before else {})
        entries = _probe(question, folder, options, recipes)
        _say_what_is_left(question, folder, options, entries)
        _search(question, folder, options, entries)
        _run(question, folder, options, entries)
        made = {entry.recipe.task: _describe(question, entry) for entry in entries if not entry.problem}
        _write(question, folder, code, here, made)
        problems = {entry.recipe.task: entry.problem for entry in entries if entry.problem}
        found = result.make_result(folder, problems)
        result.write_result(folder.result, found)
        challenge_page.write_page(folder, found)
        return [f"{task}: {problem}" for task, problem in problems.items()]


def _load_challenger(question: Question, folder: Folder, *, is_new: bool) -> OutsideOptimizer:
    """The optimizer; of a challenge that cannot begin no folder is left."""
    try:
        return load_challenger(question, folder.root)
    except PluginError as error:
        if is_new:
            shutil.rmtree(folder.root)
        raise PluginError(str(error).replace(f"{folder.root}/", "")) from None


def _place_code(
    question: Question, folder: Folder, file: ChallengeFile, before: ChallengeFile | None
) -> dict[str, str]:
    """Put the optimizer's file, if it is one, into the folder; a file that changed is another optimizer."""
    for name, text in file.code.items():
        if before and before.code.get(name) != text:
            raise UserError(
                f"{name}: is not what this challenge began with, which is in {folder.root}: "
                "give this one another --name, or remove that folder"
            )
        (folder.root / name).write_text(text, encoding="utf-8")
    return dict(file.code or (before.code if before else {}))


def _check_same(question: Question, before: ChallengeFile, folder: Folder) -> None:
    there, here = to_table(make_question(before.asked, str(folder.file))), to_table(question)
    different = [
        f"{key} was {there[key]!r} and is {here[key]!r}" for key in here if key not in _FREE and there[key] != here[key]
    ]
    if different:
        raise UserError(
            f"{folder.root}: is of another challenge: {'; '.join(different)}: "
            "give this one another --name, or remove that folder"
        )


def _warn_of_versions(before: ChallengeFile, here: Mapping[str, str]) -> None:
    other = [
        f"{name} {version} there, {here.get(name, 'none')} here"
        for name, version in before.versions.items()
        if here.get(name) != version
    ]
    if other:
        print(f"warning: numbers may differ, as versions do: {'; '.join(other)}", file=sys.stderr)


def _write(
    question: Question, folder: Folder, code: Mapping[str, str], here: Mapping[str, str], made: Mapping[str, Any]
) -> None:
    write_file(folder.file, question, ChallengeFile(asked={}, code=code, versions=here, made=made))


def _probe(question: Question, folder: Folder, options: Options, recipes: Mapping[str, Recipe]) -> list[_Entry]:
    works = {
        task: Probe(
            task=task,
            scale=question.scale,
            recipes=folder.recipes,
            challenger=question.name,
            out=folder.probe(recipe.task),
            data_dir=options.data_dir,
            device=options.device,
        )
        for task, recipe in recipes.items()
    }
    # What failed is tried again: the data may be there by now.
    waiting = [work for work in works.values() if (read_probed(work.out) or Probed(problem="not yet")).problem]
    for work in waiting:
        work.out.unlink(missing_ok=True)
    if waiting:
        print(f"{question.name}: first steps on {', '.join(work.task for work in waiting)}", flush=True)
    failed = _start(waiting, question, folder, options)
    entries = []
    for task, recipe in recipes.items():
        found = read_probed(works[task].out) or Probed(problem=failed.get(works[task].name, "was not probed"))
        entries.append(_Entry(asked=task, recipe=recipe, probed=found, problem=found.problem, recorded=[]))
        _say_probed(question, entries[-1])
    return entries


def _say_probed(question: Question, entry: _Entry) -> None:
    name, task = question.name, entry.recipe.task
    if entry.problem:
        print(f"{task}: {name} cannot be trained: {entry.problem}", file=sys.stderr, flush=True)
        return
    if not entry.probed.finite:
        print(f"{task}: {name} gives no numbers after a few steps at its first settings", file=sys.stderr)
    if not entry.probed.resumes:
        print(f"{task}: {name} does not go on from its state dict to the bit: interrupted runs begin again", flush=True)
    if question.trials != 0:
        space = describe_space(entry.recipe, name)
        print(f"{task}: {entry.trials} trials search {space or 'nothing: there is no --search'}", flush=True)


def _options(entry: _Entry, folder: Folder, options: Options) -> RunOptions:
    return RunOptions(
        device=options.device,
        data_dir=options.data_dir,
        results_dir=folder.results,
        bar=False,
        checkpoints=entry.probed.resumes,
    )


def _tuning(question: Question, folder: Folder, options: Options, entry: _Entry) -> Tuning:
    return Tuning(
        task=entry.asked,
        scale=question.scale,
        recipes=folder.recipes,
        challenger=question.name,
        folder=folder.tuning,
        options=_options(entry, folder, options),
    )


def _searches(question: Question, entries: Iterable[_Entry]) -> list[_Entry]:
    """The tasks on which something is searched."""
    tuned = [] if question.trials == 0 else [entry for entry in entries if not entry.problem and entry.recipe.tuning]
    return [entry for entry in tuned if entry.recipe.tuning.spaces.get(question.name)]


def _attempt(folder: Folder, work: Any) -> Attempt:
    return Attempt(work=work, failure=folder.root / "failures" / f"{work.name.replace('/', '-')}.txt")


def _start(works: Sequence[Any], question: Question, folder: Folder, options: Options) -> dict[str, str]:
    """Do it all in processes here or on the cluster; why it failed, by name."""
    if options.cluster is None:
        return run_in_processes(works, workers=options.workers, threads=question.threads)
    from experiments.launch.slurm import run_on_cluster  # needs submitit, which only a cluster needs

    return run_on_cluster(works, options.cluster, folder.root / "slurm")


def _do(works: Sequence[Attempt], question: Question, folder: Folder, options: Options, what: str) -> dict[str, str]:
    """Do it all; why it failed, by name."""
    if not works:
        return {}
    print(f"{question.name}: {what}", flush=True)
    failed = _start(works, question, folder, options)
    files = {work.name: work.failure for work in works}
    return {
        name: files[name].read_text(encoding="utf-8") if files[name].exists() else reason
        for name, reason in failed.items()
    }


def _search(question: Question, folder: Folder, options: Options, entries: Sequence[_Entry]) -> None:
    """All searches and, on the processors that are left, the baselines."""
    searched = _searches(question, entries)
    searches = {entry.recipe.task: _tuning(question, folder, options, entry) for entry in searched}
    first = [
        _attempt(folder, trial)
        for entry in searched
        for trial in list_first_trials(searches[entry.recipe.task], entry.trials)
        if not _trial_is_over(folder, question, entry, trial.number)
    ]
    baselines = [
        (entry, _attempt(folder, Train(job=job)))
        for entry in entries
        if not entry.problem
        for job in _baseline_jobs(question, folder, options, entry)
    ]
    idle = -len(first) % options.workers if options.cluster is None else 0  # processors while the last of them run
    ahead, others = ([work for _, work in part] for part in (baselines[:idle], baselines[idle:]))
    what = f"the first trials of each search: {len(first)}, runs of baselines: {len(ahead)}"
    failed = _do([*first, *ahead], question, folder, options, what)
    works = {entry.recipe.task: _attempt(folder, searches[entry.recipe.task]) for entry in searched}
    what = f"searches: {len(works)}, runs of baselines: {len(others)}"
    failed |= _do([*works.values(), *others], question, folder, options, what)
    for entry in searched:
        if reason := failed.get(works[entry.recipe.task].name):
            entry.problem = f"the search failed: {reason}"
    for entry, work in baselines:
        if reason := failed.get(work.name):
            entry.problem = entry.problem or f"{work.name} failed: {reason}"


def _trial_is_over(folder: Folder, question: Question, entry: _Entry, number: int) -> bool:
    """Whether a trial came to its end, or was stopped and the next one begun."""
    return _has_ended(_trial_path(folder, question, entry, number)) or (
        number >= STARTUP_TRIALS and _trial_path(folder, question, entry, number + 1).exists()
    )


def _trial_path(folder: Folder, question: Question, entry: _Entry, number: int) -> Path:
    return result.trial_path(folder, question, entry.recipe.task, number, entry.recipe.run.tuning_seed)


def _has_ended(record: Path) -> bool:
    return record.exists() and b'\n{"event": "end"' in record.read_bytes()


def _run(question: Question, folder: Folder, options: Options, entries: Sequence[_Entry]) -> None:
    jobs = [
        (entry, _attempt(folder, Train(job=_job(question, folder, options, entry, question.name, seed))))
        for seed in sorted({seed for entry in entries for seed in entry.recipe.run.seeds})
        for entry in entries
        if not entry.problem and seed in entry.recipe.run.seeds
    ]
    waiting = [(entry, work) for entry, work in jobs if not _is_finished(entry, work.work.job)]
    failed = _do([work for _, work in waiting], question, folder, options, f"{len(waiting)} runs of {question.name}")
    for entry, work in waiting:
        if reason := failed.get(work.name):
            entry.problem = entry.problem or f"{work.name} failed: {reason}"


def _job(question: Question, folder: Folder, options: Options, entry: _Entry, name: str, seed: int) -> Job:
    return Job(
        task=entry.asked,
        scale=question.scale,
        overrides=(),
        optimizer=name,
        seed=seed,
        options=replace(_options(entry, folder, options), checkpoints=name != question.name or entry.probed.resumes),
        recipes=folder.recipes,
    )


def _is_finished(entry: _Entry, job: Job) -> bool:
    return find_finished(job.recipe, job.optimizer, job.seed, job.options) is not None


def _baseline_jobs(question: Question, folder: Folder, options: Options, entry: _Entry) -> list[Job]:
    """What of the baselines is neither recorded nor run; recorded runs are put next to the challenger's."""
    jobs = []
    for name in _choose_baselines(question, entry):
        for seed in entry.recipe.run.seeds:
            job = _job(question, folder, options, entry, name, seed)
            if question.rerun_baselines:
                _drop_recorded(folder, entry, name, seed)
            if not question.rerun_baselines and _take_recorded(folder, entry, name, seed):
                entry.recorded.append(f"{name}-seed{seed}.jsonl")
            elif not _is_finished(entry, job):
                jobs.append(job)
    return jobs


def _choose_baselines(question: Question, entry: _Entry) -> list[str]:
    """The recipe's optimizers, or those of them that are recorded; the reference in any case, which sets the target."""
    recipe = entry.recipe
    names = [name for name in recipe.optimizers if name != question.name]
    if question.baselines:
        names = [name for name in names if name in question.baselines or name == recipe.run.reference]
    elif not question.rerun_baselines:
        names = [name for name in names if any(_recorded(entry, name, seed) for seed in recipe.run.seeds)] or names
    return names if recipe.run.reference in names else [*names, str(recipe.run.reference)]


def _recorded(entry: _Entry, name: str, seed: int) -> Path | None:
    """A recorded run of the same recipe on the same data."""
    if RECORDED is None:
        return None
    found = find_finished(entry.recipe, name, seed, RunOptions(results_dir=RECORDED))
    same = found is not None and found.manifest.dataset.sha256 == entry.probed.dataset_sha256
    return found.path if same else None


def _take_recorded(folder: Folder, entry: _Entry, name: str, seed: int) -> bool:
    source = _recorded(entry, name, seed)
    target = record_path(folder.results, entry.recipe.task, entry.recipe.scale, name, seed)
    if source is None:
        return False
    if not target.exists() or hash_file(target) != hash_file(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        shutil.copyfile(source, partial)
        partial.replace(target)
    return True


def _drop_recorded(folder: Folder, entry: _Entry, name: str, seed: int) -> None:
    """Remove a recorded run that an earlier call put there: it is to be run here."""
    source = _recorded(entry, name, seed)
    target = record_path(folder.results, entry.recipe.task, entry.recipe.scale, name, seed)
    if source is not None and target.exists() and hash_file(target) == hash_file(source):
        target.unlink()


def _say_what_is_left(question: Question, folder: Folder, options: Options, entries: Sequence[_Entry]) -> None:
    """About how long it takes, from the steps that were probed."""
    seconds, trials, runs = 0.0, 0, 0
    searched = {entry.recipe.task for entry in _searches(question, entries)}
    for entry in entries:
        if entry.problem:
            continue
        recipe, jobs = entry.recipe, _baseline_jobs(question, folder, options, entry)
        own = [record_path(folder.results, recipe.task, recipe.scale, question.name, seed) for seed in recipe.run.seeds]
        waiting = [path for path in own if not _has_ended(path)]
        count = 0
        if recipe.task in searched:
            count = sum(not _trial_is_over(folder, question, entry, number) for number in range(entry.trials))
            seconds += count * _seconds(entry, recipe.tuning.epochs)
        runs += len(jobs) + len(waiting)
        trials += count
        seconds += (len(jobs) + len(waiting)) * (_seconds(entry, recipe.run.epochs) + _START_S)
        entry.recorded.clear()
    if trials or runs:
        print(
            f"{question.name}: {trials} trials and {runs} runs are left, {options.workers} at a time: "
            f"about {describe_seconds(seconds / options.workers)}",
            flush=True,
        )


def _seconds(entry: _Entry, epochs: int) -> float:
    found = entry.probed
    return epochs * found.steps * found.seconds_per_step + (epochs + 1) * found.seconds_per_evaluation


def _describe(question: Question, entry: _Entry) -> dict[str, Any]:
    """What the recipe of a task came to."""
    recipe = entry.recipe
    return {
        "trials": entry.trials if _searches(question, [entry]) else 0,
        "tuning_seed": recipe.run.tuning_seed,
        "seeds": list(recipe.run.seeds),
        "epochs": recipe.run.epochs,
        "baselines": _choose_baselines(question, entry),
        "recorded": sorted(entry.recorded),
        "dataset_sha256": entry.probed.dataset_sha256,
        "recipe_sha256": hash_file(load_recipe(entry.asked, question.scale).path),
        "resumes": entry.probed.resumes,
    }
