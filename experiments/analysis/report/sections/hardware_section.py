"""What the runs of a task were made on, and with which code: from their manifests."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

from experiments.analysis.comparable_runs import Comparable
from experiments.analysis.report import rerun_commands
from experiments.analysis.report.blocks import Table
from experiments.records.run_record import Manifest, Run


def table(comparable: Comparable) -> Table:
    """A row for each set of runs that share device, threads, versions and commit.

    Args:
        comparable: the runs of a task at a scale.

    Returns:
        The table.
    """
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for run in comparable.runs:
        groups[_made_on(run.manifest)].append(run)
    first = comparable.runs[0].manifest
    return Table(
        caption="Hardware and versions",
        header=["runs", "device", "threads", "processes", "commit", "versions"],
        rows=[[_runs(runs), *map(str, made_on)] for made_on, runs in groups.items()],
        rerun=(rerun_commands.train(first.task, first.scale),),
        notes=_notes(comparable.runs),
    )


def _made_on(manifest: Manifest) -> tuple[str, int, int, str, str]:
    commit = "unknown" if manifest.git_sha is None else manifest.git_sha[:10]
    changed = " with changes that were not committed" if manifest.git_dirty else ""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    return manifest.device, manifest.threads, manifest.world_size, commit + changed, versions


def _runs(runs: Sequence[Run]) -> str:
    seeds: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        seeds[run.manifest.optimizer].append(run.manifest.seed)
    return "; ".join(f"{name} seeds {', '.join(map(str, own))}" for name, own in seeds.items())


def _notes(runs: Sequence[Run]) -> list[str]:
    """What differs among the runs of one table."""
    manifests = [run.manifest for run in runs]
    notes = []
    for what, values in (
        ("commits", {(each.git_sha, each.git_dirty) for each in manifests}),
        ("devices", {each.device for each in manifests}),
        ("numbers of threads", {each.threads for each in manifests}),
        ("sets of versions", {_made_on(each)[-1] for each in manifests}),
    ):
        if len(values) > 1:
            notes.append(f"These runs are not all alike: {len(values)} different {what}.")
    if any(each.git_dirty for each in manifests):
        notes.append("Some were made with changes that were not committed.")
    resumed = sum(bool(run.resumed) for run in runs)
    if resumed:
        notes.append(f"{resumed} of {len(runs)} were interrupted and taken up again.")
    loads = [run.end.load for run in runs if run.end and run.end.load is not None]
    if loads:
        span = f"{min(loads):.2g} to {max(loads):.2g}"
        notes.append(f"Of {len(loads)} of {len(runs)} the machine's load is known: {span} processes to a processor.")
    return notes
