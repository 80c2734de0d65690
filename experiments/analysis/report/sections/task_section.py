"""A section a task: at each scale its table, curves, time split, tuning, sensitivity and hardware."""

import re
from urllib.parse import quote

from experiments.analysis import comparison_table
from experiments.analysis.report import rerun_commands
from experiments.analysis.report.blocks import Block, Line, Links, Section, Table, make_table
from experiments.analysis.report.results_folder import SCALES, ResultsFolder, Study
from experiments.analysis.report.sections import (
    curve_charts,
    hardware_section,
    sensitivity_section,
    time_split_section,
    tuning_section,
)

TITLES = {
    "resnet50-imagenet": "ResNet on images",
    "schnet-qm9": "SchNet on molecules",
    "schnet-matproj": "SchNet on crystals",
    "transformer-iwslt14": "Transformer, German-English",
    "dlrm-criteo": "DLRM on click logs",
    "gpt-text": "GPT on text (beyond the paper)",
}
# Those that have a place of their own on the page, and the one that `table` makes of the records.
_OWN = ("comparison", "tuning", "sensitivity")


def section(results: ResultsFolder, task: str, studies: dict[str, Study]) -> Section:
    """Everything of a task.

    Args:
        results: the results.
        task: its name.
        studies: its runs, by scale.

    Returns:
        A part for each scale.
    """
    found = results.scales(task)
    missing = [scale for scale in SCALES if scale not in found]
    blocks: list[Block] = [
        Line(text=f"Scale {scale}: nothing is recorded here.", rerun=(rerun_commands.train(task, scale),))
        for scale in missing
    ]
    return Section(
        id=slug(task),
        title=f"{TITLES.get(task, 'A task of another repository')}: {task}",
        blocks=blocks,
        parts=[_at_scale(results, task, scale, studies.get(scale)) for scale in found],
    )


def slug(*parts: str) -> str:
    """An id for the page: letters, digits and hyphens.

    Args:
        *parts: words, which are joined.

    Returns:
        The id.
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _at_scale(results: ResultsFolder, task: str, scale: str, study: Study | None) -> Section:
    id = slug(task, scale)
    higher = study.comparable.runs[0].manifest.metric.higher_is_better if study else None
    parts = [
        Section(id=f"{id}-comparison", title="Comparison", blocks=_comparison(task, scale, study, id)),
        Section(
            id=f"{id}-time",
            title="Time split",
            blocks=time_split_section.blocks(study, f"{id}-split") if study else _none(),
        ),
        Section(id=f"{id}-tuning", title="Tuning", blocks=tuning_section.blocks(results, task, scale, f"{id}-trials")),
        Section(
            id=f"{id}-sensitivity",
            title="Sensitivity",
            blocks=sensitivity_section.blocks(results, task, scale, f"{id}-grid", higher_is_better=higher),
        ),
        *_further(results, task, scale, id),
        Section(id=f"{id}-hardware", title="Hardware", blocks=_hardware(study)),
    ]
    data = study.comparable.runs[0].manifest.dataset.name if study else "no finished runs"
    return Section(id=id, title=f"Scale {scale}: {data}", parts=parts)


def _comparison(task: str, scale: str, study: Study | None, id: str) -> list[Block]:
    if study is None:
        return [Line(text="There is no finished run to compare here.", rerun=(rerun_commands.train(task, scale),))]
    header, rows = comparison_table.cells(study.frame)
    compared = Table(
        caption=comparison_table.title(study.frame),
        header=header,
        rows=rows,
        rerun=(rerun_commands.train(task, scale), rerun_commands.table(task, scale)),
        notes=[note for note in comparison_table.notes(study.frame) if not note.startswith("Left out: ")],
    )
    return [compared, curve_charts.figure(study.comparable, f"{id}-curves")]


def _none() -> list[Block]:
    return [Line(text="There is no finished run here.")]


def _hardware(study: Study | None) -> list[Block]:
    if study is None:
        return _none()
    names = [run.path.name for run in study.comparable.runs]
    place = study.comparable.folder.relative_to(study.comparable.folder.parents[1])
    files = [(name, quote(f"../{place.as_posix()}/runs/{name}")) for name in names]
    return [hardware_section.table(study.comparable), Links(text="The records", files=files)]


def _further(results: ResultsFolder, task: str, scale: str, id: str) -> list[Section]:
    """What else was measured at this scale."""
    stems = sorted(path.stem for path in (results.root / task / scale).glob("*.csv") if path.stem not in _OWN)
    tables = {stem: frame for stem in stems if (frame := results.csv(f"{task}/{scale}/{stem}.csv")) is not None}
    if not tables:
        return []
    blocks: list[Block] = [
        make_table(frame, f"{task}/{scale}/{stem}.csv", (), folded=True) for stem, frame in tables.items()
    ]
    return [Section(id=f"{id}-further", title="Further measurements", blocks=blocks)]
