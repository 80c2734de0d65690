"""The records of a challenge, someone else's for the most part, checked: do its numbers follow from them?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.challenge.folder import Folder
from experiments.challenge.question import FILE, Question, make_question, read_file
from experiments.challenge.recipe_files import TRIALS
from experiments.challenge.result import Result, list_records, make_result, read_result, trial_path
from experiments.config.recipe import Recipe, load_recipe
from experiments.dataclass_io import to_table
from experiments.errors import UserError
from experiments.plugins import hash_file
from experiments.records.provenance import RECORDED
from experiments.records.run_record import RecordError, Run, read_run, record_path
from experiments.tasks import find_task


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """What is known of a challenge's folder."""

    folder: Folder
    question: Question
    result: Result
    made: Mapping[str, Any]
    data_dir: Path


def verify(path: Path, data_dir: Path) -> tuple[list[str], list[str]]:
    """Check a challenge.

    Args:
        path: its folder, or a file in it.
        data_dir: where datasets are kept, to compare hashes with.

    Returns:
        What was checked, a line each, and what does not fit, a line each, with the file it is about.

    Raises:
        UserError: there is no challenge, or its files do not follow their schema.
    """
    folder = Folder(path.parent if path.is_file() else path)
    if not folder.file.exists():
        raise UserError(f"{folder.root}: is no challenge: there is no {FILE}")
    file = read_file(folder.file)
    question = make_question(file.asked, str(folder.file))
    result = read_result(folder.result)
    known = _Checked(folder=folder, question=question, result=result, made=file.made, data_dir=data_dir)
    lines, faults = [f"{folder.file.name}, {folder.result.name}: follow their schema"], []
    for task, made in file.made.items():
        own = list(_check_task(known, task, made))
        faults += own
        lines.append(f"{task}: {len(list_records(folder, question, task, made))} records, {_describe(made)}")
        remarks, others = _check_here(known, task, made)
        lines, faults = lines + remarks, faults + others
    if not faults:  # else it was said already what does not fit
        faults += _compare(known)
    return lines, faults


def _describe(made: Mapping[str, Any]) -> str:
    searched = f"{made['trials']} trials at seed {made['tuning_seed']}" if made["trials"] else "no search"
    return f"seeds {', '.join(map(str, made['seeds']))}, {searched}"


def _check_task(known: _Checked, task: str, made: Mapping[str, Any]) -> Iterator[str]:
    question, folder = known.question, known.folder
    claimed = next((each for each in known.result.tasks if each.task == task), None)
    if claimed is None:
        if task not in known.result.problems:
            yield f"{folder.result.name}: has nothing of {task}, which {folder.file.name} has"
        return
    if question.seeds and list(question.seeds) != list(made["seeds"]):
        yield f"{folder.file.name}: {task}: seeds = {made['seeds']}, where {list(question.seeds)} were asked for"
    if made["tuning_seed"] in made["seeds"]:
        yield f"{folder.file.name}: {task}: the tuning seed {made['tuning_seed']} is one of the seeds reported"
    if question.trials is not None and made["trials"] not in (0, question.trials):
        yield f"{folder.file.name}: {task}: trials = {made['trials']}, where {question.trials} were asked for"
    runs: dict[Path, Run] = {}
    for path in list_records(folder, question, task, made):
        name = path.relative_to(folder.root).as_posix()
        if not path.exists():
            yield f"{name}: is missing"
            continue
        if claimed.records.get(name) != hash_file(path):
            yield f"{name}: is not the record that {folder.result.name} was made of: it was edited"
        try:
            runs[path] = read_run(path)
        except RecordError as error:
            yield f"{name}: {error}"
    for path, run in runs.items():
        yield from _check_record(known, path.relative_to(folder.root).as_posix(), run, task, made)
    yield from _check_recorded(known, task, made)
    yield from _check_search(known, task, made, runs)


def _check_record(known: _Checked, name: str, run: Run, task: str, made: Mapping[str, Any]) -> Iterator[str]:
    """That a record is of the run, on the split and the data that it stands for."""
    manifest, is_trial = run.manifest, name.startswith("tuning/")
    split = manifest.recipe.get("run", {}).get("report_split")
    if (manifest.task, manifest.scale) != (task, known.question.scale):
        yield f"{name}: is of {manifest.task} at scale {manifest.scale}"
    if is_trial and (manifest.seed, split) != (made["tuning_seed"], "validation"):
        yield f"{name}: is at seed {manifest.seed} on the {split} split, not at the tuning seed on validation"
    if not is_trial and split == "validation":
        yield f"{name}: reports the validation split, on which settings were chosen"
    if not is_trial and run.end is None:
        yield f"{name}: is unfinished"
    if manifest.dataset.sha256 != made["dataset_sha256"]:
        yield f"{name}: was run on other data than {task} claims: {manifest.dataset.sha256}"
    if not is_trial and manifest.epochs != made["epochs"]:
        yield f"{name}: has {manifest.epochs} epochs, where {task} claims {made['epochs']}"


def _check_recorded(known: _Checked, task: str, made: Mapping[str, Any]) -> Iterator[str]:
    """That recorded runs are those that this repository recorded."""
    if RECORDED is None:
        return
    for name in made["recorded"]:
        optimizer, _, seed = name.removesuffix(".jsonl").rpartition("-seed")
        own = record_path(known.folder.results, task, known.question.scale, optimizer, int(seed))
        theirs = record_path(RECORDED, task, known.question.scale, optimizer, int(seed))
        if own.exists() and theirs.exists() and hash_file(own) != hash_file(theirs):
            yield f"{own.relative_to(known.folder.root).as_posix()}: is not the recorded run that it is said to be"


def _check_search(known: _Checked, task: str, made: Mapping[str, Any], runs: Mapping[Path, Run]) -> Iterator[str]:
    """That there are as many trials as claimed, and the runs have the settings of the best."""
    if not made["trials"]:
        return
    folder, question = known.folder, known.question
    paths = [trial_path(folder, question, task, number, made["tuning_seed"]) for number in range(made["trials"])]
    extra = trial_path(folder, question, task, made["trials"], made["tuning_seed"])
    if extra.exists():
        yield f"{extra.relative_to(folder.root).as_posix()}: is one trial more than the {made['trials']} claimed"
    done = [runs[path] for path in paths if path in runs and runs[path].end and runs[path].end.reason == "finished"]
    if not done:
        yield f"{task}: no trial came to its end"
        return
    sign = -1 if done[0].manifest.metric.higher_is_better else 1
    best = min(done, key=lambda run: sign * run.best_metric).manifest.recipe["optimizer"]
    for seed in made["seeds"]:
        path = record_path(folder.results, task, question.scale, question.name, seed)
        if path in runs:
            own = runs[path].manifest.recipe["optimizer"]
            other = [key for key in own if key not in ("schedule", "damping_schedule") and own[key] != best.get(key)]
            if other:
                name = path.relative_to(folder.root).as_posix()
                yield f"{name}: {', '.join(other)} is not what the best of the trials has"


def _load_recipe(known: _Checked, task: str) -> Recipe | str:
    """The task's recipe as it is here, or why there is none."""
    try:
        asked = next(each for each in known.question.tasks if find_task(each).name == task)
        return load_recipe(asked, known.question.scale)
    except UserError as error:
        return str(error)
    except StopIteration:
        return "the task is not one that was asked for"


def _check_recipe(known: _Checked, recipe: Recipe, made: Mapping[str, Any]) -> Iterator[str]:
    """That seeds and trials are those of the recipe, where nobody asked for others."""
    tuning, name = recipe.tuning, f"{FILE}: {recipe.task}"
    own = {"seeds": list(recipe.run.seeds), "epochs": recipe.run.epochs, "tuning_seed": recipe.run.tuning_seed}
    if known.question.seeds:
        del own["seeds"]
    if known.question.trials is None and made["trials"]:
        own["trials"] = tuning.trials if tuning else TRIALS
    for key, value in own.items():
        if made[key] != value:
            yield f"{name}: {key} = {made[key]}, where the recipe has {value}"


def _check_here(known: _Checked, task: str, made: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Remarks and faults in comparison with the recipe and the data that are here."""
    recipe = _load_recipe(known, task)
    if isinstance(recipe, str):
        return [f"{task}: not compared with the recipe and the data: {recipe}"], []
    faults, lines = [], []
    if hash_file(recipe.path) == made["recipe_sha256"]:
        faults += _check_recipe(known, recipe, made)
        lines.append(f"{task}: the recipe is the one that is here")
    else:
        lines.append(f"{task}: the recipe here is another one, of another version perhaps, and was not compared")
    try:
        here = recipe.build_task(known.data_dir).dataset.sha256
    except UserError as error:
        return [*lines, f"{task}: the data are not here to compare with: {error}"], faults
    if here == made["dataset_sha256"]:
        return [*lines, f"{task}: the data are those that are here"], faults
    other = f"{FILE}: {task}: the data here have the SHA-256 {here}, which is not {made['dataset_sha256']}"
    return lines, [*faults, other]


def _compare(known: _Checked) -> list[str]:
    """That the result follows from the records."""
    again = to_table(make_result(known.folder, known.result.problems))
    return [
        f"{known.folder.result.name}: {place} is {there!r}, where the records give {here!r}"
        for place, there, here in _differences(to_table(known.result), again, "")
    ]


def _differences(there: Any, here: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            yield from _differences(there.get(key), here.get(key), f"{place}.{key}".lstrip("."))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (one, other) in enumerate(zip(there, here, strict=True)):
            yield from _differences(one, other, f"{place}[{number}]")
    elif there != here:
        yield place, there, here
