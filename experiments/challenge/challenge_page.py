"""The page of a challenge: where it wins, where it does not, how sure. One file that needs no network."""

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.analysis.comparison_table import number
from experiments.analysis.figures import curves
from experiments.analysis.pairs import LEVEL, MIN_SEEDS
from experiments.analysis.report import scripts
from experiments.challenge.folder import Folder
from experiments.challenge.question import make_question, read_file
from experiments.challenge.result import REFERENCE, Against, Difference, Result, Study, TaskResult, load_studies

HEADER = ("task", "against", "seeds", "epochs to target", "p Holm", "best metric", "p Holm", "verdict")
_SHOWN = ("wins", "loses")


def write_page(folder: Folder, result: Result) -> None:
    """Write ``index.html`` into the folder.

    Args:
        folder: of the challenge.
        result: what it came to.
    """
    file = read_file(folder.file)
    question = make_question(file.asked, str(folder.file))
    studies, _ = load_studies(folder, question, file.made)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("challenge.html.j2").render(
        style=scripts.style(),
        result=result,
        question=question,
        summary=summarise(result),
        header=HEADER,
        rows=list_comparisons(result),
        tasks=[(task, list_optimizers(task), _draw(studies[task.task], task)) for task in result.tasks],
        profile=list_profile(result),
        optimizer_header=OPTIMIZER_HEADER,
        profile_header=PROFILE_HEADER,
        levels=(MIN_SEEDS, LEVEL),
        settings={task.task: describe_settings(task) for task in result.tasks},
    )
    partial = folder.page.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(folder.page)


def summarise(result: Result) -> list[str]:
    """Where it wins, where it does not, and what is not shown, against each task's reference.

    Args:
        result: of a challenge.

    Returns:
        A sentence each.
    """
    first = [each for each in result.against if each.is_reference]
    words = {"wins": [], "loses": [], "open": []}
    for each in first:
        verdicts = {part.verdict for part in (each.epochs, each.best_metric) if part}
        named = f"{each.task} (against {each.optimizer})"
        if "wins" in verdicts and "loses" not in verdicts:
            words["wins"].append(named)
        elif "loses" in verdicts and "wins" not in verdicts:
            words["loses"].append(named)
        else:
            words["open"].append(named)
    lines = [
        f"{title}: {', '.join(words[key])}."
        for key, title in (
            ("wins", f"{result.name} wins"),
            ("loses", f"{result.name} loses"),
            ("open", "No difference is shown"),
        )
        if words[key]
    ]
    few = sorted({each.seeds for each in result.against if each.seeds < MIN_SEEDS})
    if few:
        lines.append(
            f"A difference counts from {MIN_SEEDS} seeds on; some tasks have {' or '.join(map(str, few))} here: "
            "--seeds asks for more."
        )
    return lines


def list_comparisons(result: Result) -> list[list[str]]:
    """A row a baseline and task, in words, under `HEADER`.

    Args:
        result: of a challenge.

    Returns:
        Cells.
    """
    return [
        [
            each.task,
            f"{each.optimizer}{' (reference)' if each.is_reference else ''}",
            str(each.seeds),
            _gap(each.epochs),
            _number(each.epochs.p_holm, 2) if each.epochs else "–",
            _gap(each.best_metric),
            _number(each.best_metric.p_holm, 2),
            _verdict(each),
        ]
        for each in result.against
    ]


def _verdict(each: Against) -> str:
    """Both measures in words; what is not shown says so."""
    parts = {"epochs": each.epochs, "best": each.best_metric}
    if each.epochs and each.epochs.verdict == each.best_metric.verdict:
        parts = {"both": each.best_metric}
    said = [
        f"{name}: {part.verdict}{'' if part.verdict in (*_SHOWN, 'tied') else ', not shown'}"
        for name, part in parts.items()
        if part
    ]
    return "; ".join(said)


def _gap(part: Difference | None) -> str:
    if part is None or part.mean is None:
        return "–"
    ends = "" if part.low is None or part.high is None else f" [{number(part.low)}, {number(part.high)}]"
    return f"{'+' if part.mean > 0 else ''}{number(part.mean)}{ends}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else number(value, digits=digits)


OPTIMIZER_HEADER = (
    "optimizer",
    "seeds",
    "reached",
    "diverged",
    "epochs to target",
    "best metric",
    "s/epoch",
    "s to target",
)


def list_optimizers(task: TaskResult) -> list[list[str]]:
    """A row an optimizer, in words, under `OPTIMIZER_HEADER`.

    Args:
        task: its result.

    Returns:
        Cells.
    """
    return [
        [
            each.optimizer,
            str(each.seeds),
            str(each.reached),
            str(each.diverged),
            "missed" if each.epochs_to_target is None and task.target is not None else _number(each.epochs_to_target),
            f"{_number(each.best_metric, 4)}{'' if each.best_metric_std is None else f' ± {each.best_metric_std:.2g}'}",
            _number(each.seconds_per_epoch),
            _number(each.seconds_to_target),
        ]
        for each in task.optimizers
    ]


PROFILE_HEADER = ("optimizer", "tasks reached", "profile score")


def list_profile(result: Result) -> list[list[str]]:
    """A row an optimizer, in words, under `PROFILE_HEADER`; best first.

    Args:
        result: of a challenge.

    Returns:
        Cells.
    """
    ordered = sorted(result.profile, key=lambda each: -(each.score or 0.0))
    return [
        [
            "each task's reference" if each.optimizer == REFERENCE else each.optimizer,
            f"{each.tasks_reached}/{each.tasks}",
            _number(each.score),
        ]
        for each in ordered
    ]


def describe_settings(task: TaskResult) -> str:
    """The challenger's settings on a task, in one line.

    Args:
        task: its result.

    Returns:
        ``name = value``, and the like.
    """
    shown = {key: value for key, value in task.settings.items() if value is not None and key != "kind"}
    return ", ".join(f"{key} = {_plain(value)}" for key, value in shown.items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_plain(each)}" for key, each in value.items() if each is not None) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _draw(study: Study, task: TaskResult) -> str:
    """The curves as the address of a picture inside the page."""
    with mpl.rc_context(curves.STYLE):
        made = curves.figure(study.comparable, seconds=task.same_machine)
        buffer = BytesIO()
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{b64encode(buffer.getvalue()).decode()}"


def tables(result: Result) -> Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    """The tables of a challenge: caption, header, rows.

    Args:
        result: of a challenge.

    Returns:
        The comparisons, the optimizers of each task, the profile.
    """
    named = [
        (f"{task.task}: {task.dataset}; best {task.metric}", OPTIMIZER_HEADER, list_optimizers(task))
        for task in result.tasks
    ]
    title = f"{result.name}, scale {result.scale}"
    return [
        (f"{title}: less the other; paired over seeds", HEADER, list_comparisons(result)),
        *named,
        (f"{title}: performance profile in epochs", PROFILE_HEADER, list_profile(result)),
    ]
