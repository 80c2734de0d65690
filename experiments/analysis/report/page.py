"""The page as a whole: what is on disk, in sections, through the template."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.analysis.report import rerun_commands, scripts
from experiments.analysis.report.blocks import Block, Section
from experiments.analysis.report.results_folder import SCALES, ResultsFolder, Study
from experiments.analysis.report.sections import (
    cost_section,
    glance_section,
    profile_charts,
    task_section,
    theory_section,
    verdict_section,
)
from experiments.errors import UserError


def build(results_dir: Path) -> Path:
    """Write ``report/index.html`` into the results, from what is recorded there and nothing else.

    The same records give the same bytes, wherever the folder is. What cannot be read is named on the page.

    Args:
        results_dir: where the records are; the page is written into it.

    Returns:
        The page.

    Raises:
        UserError: there is no such folder.
    """
    if not results_dir.is_dir():
        raise UserError(f"{results_dir}: there is no such folder; runs make it")
    page = results_dir / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    partial = page.with_suffix(".html.partial")
    partial.write_text(render(results_dir), encoding="utf-8", newline="\n")
    partial.replace(page)
    return page


def render(results_dir: Path) -> str:
    """The page."""
    results = ResultsFolder(results_dir)
    names = [*task_section.TITLES, *results.foreign_tasks(task_section.TITLES)]
    for name in names[len(task_section.TITLES) :]:
        results.warn(f"{name}: is no task of this repository")
    studies = {task: _studies(results, task) for task in names}
    judged = verdict_section.read(results)
    sections = [
        *(task_section.section(results, task, studies[task]) for task in names),
        _profiles(studies),
        cost_section.section(results),
        theory_section.section(results),
    ]
    vega, own = scripts.vega(), scripts.own()
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            policy=scripts.policy(vega, own),
            style=scripts.style(),
            scripts=(vega, own),
            verdicts=judged,
            tally=verdict_section.tally(judged),
            glance=glance_section.block(studies),
            sections=sections,
            warnings=results.warnings,
            commands=rerun_commands,
            slug=task_section.slug,
        )
    )


def _studies(results: ResultsFolder, task: str) -> dict[str, Study]:
    return {scale: study for scale in results.scales(task) if (study := results.study(task, scale)) is not None}


def _profiles(studies: dict[str, dict[str, Study]]) -> Section:
    """Over the tasks of each scale."""
    found: list[Block] = []
    for scale in SCALES:
        own = {task: each[scale] for task, each in studies.items() if scale in each}
        found += profile_charts.blocks(own, scale)
    return Section(id="profiles", title="Performance profiles", blocks=found)


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(scripts.FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
