"""Tables of the pages are those of the records, and no page uses a word that has another one in the field."""

import re
from dataclasses import fields

import pandas as pd
import pytest

import ngplus
import ngplus.baselines
import ngplus.sharded
from experiments.analysis import comparison, verdicts
from experiments.challenge.result import Against, Difference, Measured, Profile, Result, TaskResult
from experiments.optimizers import registry
from tests.pages import DOCS, PAGES, REPOSITORY

RESULTS = REPOSITORY / "results"
AVOIDED = re.compile(
    r"\b(renew\w*|touched|anew|mend(ed|s)?|dearer|lent|opaque|complaints?|beside|looked at|without a word|lies in)\b"
)
"""Words for which the glossary in CONTRIBUTING.md has another."""
METRICS = {
    "resnet50-imagenet": "top1",
    "schnet-qm9": "MAE",
    "schnet-matproj": "MAE",
    "transformer-iwslt14": "nll",
    "dlrm-criteo": "accuracy",
    "gpt-text": "nll",
}
OF_THE_PAPER = [task for task in METRICS if task != "gpt-text"]
SYMBOLS = {
    "update_every": "𝒯",
    "damping_rule": "λ",
    "block_size": "`block_size`",
    "sketch_size": "`sketch_size`",
    "ema": "`ema`",
}

BENCHES = {
    "ResNet50 224², batch 8": "resnet50",
    "batch 32": "resnet50-32",
    "SchNet, 100 molecules": "schnet",
    "Transformer, 160 × 25 tokens": "transformer",
    "DLRM, batch 128": "dlrm",
}
STEPS = {
    "NG+ on SGD": "ngplus",
    "NG+ on Adam": "ngplus-adam",
    "NG+ on AdaGrad": "ngplus-adagrad",
    "NG+ in its eigenbasis, one side": "ngplus-eigen-short",
    "NG+ in its eigenbasis, both sides": "ngplus-eigen",
    "Adam": "adam",
    "AdaGrad": "adagrad",
    "Muon": "muon",
    "K-FAC (`ngplus.baselines`)": "kfac (ngplus.baselines)",
    "K-FAC (asdfghjkl)": "kfac (asdfghjkl)",
    "SOAP": "soap (pytorch-optimizer)",
    "Shampoo (pytorch-optimizer)": "shampoo (pytorch-optimizer)",
}
GPT_STEPS = {
    "NG+ on AdamW, tokens as samples": "ngplus-adamw",
    "NG+ on AdamW, sequences as samples": "ngplus-adamw-batch",
    "K-FAC (`ngplus.baselines`)": "kfac (ngplus.baselines)",
    "Muon": "muon",
    "SOAP": "soap (pytorch-optimizer)",
    "Shampoo (pytorch-optimizer)": "shampoo (pytorch-optimizer)",
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def spread(deviation: float) -> str:
    """The standard deviation over seeds, where there are several."""
    return "" if pd.isna(deviation) else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{deviation:.2g}"


def comparison_table(task: str) -> str:
    """Optimizers from the best to the worst, by the best value of the metric."""
    frame = pd.read_csv(RESULTS / task / "small" / "comparison.csv")
    rows = [
        [
            f"`{row.optimizer}`",
            f"{row.best_metric:.3g}{spread(row.best_metric_std)}",
            "missed" if row.epochs_to_target == float("inf") else f"{row.epochs_to_target:g}",
            f"{row.reached} of {row.seeds}",
            f"{row.time_per_epoch_s:.3g}",
        ]
        for row in frame.sort_values("best_metric", ascending=METRICS[task] in ("MAE", "nll")).itertuples()
    ]
    return markdown(["optimizer", "best", "epochs to the target", "runs that reach it", "s an epoch"], rows)


def cell(row: pd.Series, metric: str) -> str:
    """The best of a run; what it ends with in brackets where that is more than 5 % apart."""
    last, best = row[metric], row[f"best_{metric}"]
    return f"{best:.3g}" if abs(last - best) <= 0.05 * best else f"{best:.3g} (ends at {last:.3g})"


def grids(task: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / task / "small" / "sensitivity.csv")


def lr_damping_table(task: str) -> str:
    frame = grids(task).query("grid == 'lr-damping'")
    dampings = sorted(frame.damping.unique())
    rows = [
        [
            f"{lr:g}",
            *(
                cell(frame[(frame.lr == lr) & (frame.damping == damping)].iloc[0], METRICS[task])
                for damping in dampings
            ),
        ]
        for lr in sorted(frame.lr.unique())
    ]
    return markdown(["learning rate", *(f"λ = {damping:g}" for damping in dampings)], rows)


def other_settings_table(task: str) -> str:
    frame, rows = grids(task), []
    for grid, name in SYMBOLS.items():
        if grid == "damping_rule":
            for rule in ("paper", "released"):
                own = frame[(frame.grid == grid) & (frame.damping_rule == rule)]
                rows.append([f"λ, {rule} rule", *joined(own, "damping", METRICS[task])])
        elif grid in frame:
            rows.append([name, *joined(frame[frame.grid == grid].dropna(subset=grid), grid, METRICS[task])])
    return markdown(["setting", "values", "best"], rows)


def joined(frame: pd.DataFrame, setting: str, metric: str) -> list[str]:
    return [
        " · ".join(f"{value:g}" for value in frame[setting]),
        " · ".join(cell(row, metric) for _, row in frame.iterrows()),
    ]


@pytest.mark.parametrize("task", METRICS)
def test_the_comparison_of_the_results_is_that_of_the_records(task):
    assert comparison_table(task) in (DOCS / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", OF_THE_PAPER)
@pytest.mark.parametrize("table", [lr_damping_table, other_settings_table], ids=lambda table: table.__name__)
def test_a_table_of_settings_is_that_of_the_records(task, table):
    assert table(task) in (DOCS / "results.md").read_text(encoding="utf-8")


def costs_table() -> str:
    """A step over one of SGD: with updates every 10 steps / at the usual interval."""
    benches = [
        pd.read_csv(RESULTS / "bench" / f"steps-{name}-cpu.csv").set_index("optimizer") for name in BENCHES.values()
    ]
    rows = []
    for name, optimizer in STEPS.items():
        found = [bench.loc[optimizer] if optimizer in bench.index else None for bench in benches]
        cells = [
            ""
            if row is None or pd.isna(row.every_10_over_sgd)
            else f"{row.every_10_over_sgd:.2f}\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}{row.usual_over_sgd:.2f}"
            for row in found
        ]
        rows.append([name, *cells])
    return markdown(["", *BENCHES], rows)


def gpt_costs_table() -> str:
    """A step over one of AdamW: with updates every 10 steps and every 200."""
    bench = pd.read_csv(RESULTS / "bench" / "steps-gpt-cpu.csv").set_index("optimizer")
    rows = [
        [name, f"{row.every_10_over_adamw:.2f}", f"{row.usual_over_adamw:.2f}"]
        for name, row in ((name, bench.loc[optimizer]) for name, optimizer in GPT_STEPS.items())
    ]
    return markdown(["", "every 10 steps", "every 200"], rows)


def test_the_costs_on_the_decoder_are_those_of_the_bench():
    assert gpt_costs_table() in (DOCS / "costs.md").read_text(encoding="utf-8")


def test_the_costs_are_those_of_the_bench():
    assert costs_table() in (DOCS / "costs.md").read_text(encoding="utf-8")


def sharded_table(part: str) -> str:
    """GiB a process of each optimizer, in addition to what `fully_shard` itself has."""
    frame = pd.read_csv(RESULTS / "theory" / "sharded" / "transformer-7b.csv")
    cells = (frame.pivot_table(part, "processes", "optimizer") / 2**30)[frame.optimizer.unique()]
    own = frame.groupby("processes")[f"fully_shard_{part}"].first() / 2**30
    rows = [[str(gpus), *(f"{each:.2f}" for each in [*row, own[gpus]])] for gpus, row in cells.iterrows()]
    return markdown(["GPUs", *cells.columns, "`fully_shard` itself"], rows)


@pytest.mark.parametrize("part", ["sent", "kept"])
def test_the_costs_of_a_sharded_model_are_those_of_the_table(part):
    assert sharded_table(part) in (DOCS / "sharded.md").read_text(encoding="utf-8")


def test_the_costs_on_the_front_page_are_those_of_the_bench():
    small, large = (
        pd.read_csv(RESULTS / "bench" / f"steps-{name}-cpu.csv").set_index("optimizer").round(2)
        for name in ("resnet50", "resnet50-32")
    )
    soap = small.loc["soap (pytorch-optimizer)"]
    sentence = (
        f"on ResNet50 at batch 32 a step is {large.usual_over_sgd.ngplus} of SGD's with 𝒯 = 500, and "
        f"{large.every_10_over_sgd.ngplus} updated every 10 steps; at batch 8 {small.usual_over_sgd.ngplus} and "
        f"{small.every_10_over_sgd.ngplus}, where SOAP is at {soap.usual_over_sgd} and {soap.every_10_over_sgd}"
    )
    assert sentence in " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize("module", [ngplus, ngplus.baselines, ngplus.sharded], ids=lambda module: module.__name__)
def test_every_exported_name_is_on_the_page_of_the_api(module):
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    names = [name for name in module.__all__ if not name.startswith("_")]
    kinds = {name: "autoclass" if isinstance(getattr(module, name), type) else "autofunction" for name in names}
    assert not [name for name, kind in kinds.items() if f".. {kind}:: {module.__name__}.{name}\n" not in page]


def test_every_public_member_of_the_optimizer_is_on_the_page_of_the_api():
    """Base classes of the package's own define most of them, so that autodoc has to be told their names."""
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"autoclass:: ngplus\.NGPlus\n\s+:members:([\w\s,]+)\n\n", page)
    classes = [each for each in ngplus.NGPlus.__mro__ if each.__module__.startswith("ngplus.")]
    members = {name for each in classes for name in vars(each) if not name.startswith("_")}
    of_subclasses = {"key", "takes_parameters", "takes_shards", "title", "tuning"}
    of_join = {"join_device", "join_hook", "join_process_group"}
    assert set(re.findall(r"\w+", listed)) == members - of_subclasses - of_join


def columns_of(name: str) -> set[str]:
    """Of all files of this name under the results."""
    return {column for path in RESULTS.rglob(name) for column in pd.read_csv(path, nrows=1).columns}


SETTINGS = {name for entry in registry.OPTIMIZERS.values() for name in entry.settings.__dataclass_fields__}


@pytest.mark.parametrize(
    "columns",
    [
        set(comparison.COLUMNS),
        set(verdicts.COLUMNS),
        columns_of("tuning.csv") - SETTINGS - {f"best_{metric}" for metric in METRICS.values()},
        columns_of("sensitivity.csv") - SETTINGS - {f"best_{metric}" for metric in METRICS.values()},
    ],
    ids=["comparison", "verdicts", "tuning", "sensitivity"],
)
def test_every_column_is_on_the_page_of_the_report(columns):
    page, named = (DOCS / "report.md").read_text(encoding="utf-8"), set()
    for line in page.splitlines():
        words = re.findall(r"`([\w.]+)`", line.partition(" | ")[0])
        suffixes = [word for word in words if word.startswith("_")]
        named |= {*words, *(word + suffix for word in words for suffix in suffixes)}
    assert len(columns) > 5
    assert columns <= named


@pytest.mark.parametrize("part", [Result, TaskResult, Measured, Against, Difference, Profile])
def test_every_field_of_a_challenges_result_is_on_its_page(part):
    page = (DOCS / "challenge.md").read_text(encoding="utf-8")
    schema = page[page.index("## `result.json`") : page.index("## A task of your own")]
    assert [
        each.name for each in fields(part) if f"`{each.name}`" not in schema and f".{each.name}`" not in schema
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_uses_the_words_of_the_glossary(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not [match[0] for match in AVOIDED.finditer(prose)]


def block(page: str, name: str) -> str:
    """What is on a page between two comments of this name."""
    text = (DOCS / page).read_text(encoding="utf-8")
    (shown,) = re.findall(rf"<!-- {name} -->\n(.*?)\n?<!-- end of {name} -->", text, flags=re.DOTALL)
    return shown


def suggested_starts_table() -> str:
    """A row a task and what `suggest` was told."""
    frame = pd.read_csv(RESULTS / "suggested-start.csv")
    rows = []
    for row in frame.sort_values(["task", "told"], key=lambda each: each.map(rank)).itertuples():
        settings = f"{row.lr:g}", f"{row.damping:g}", str(row.update_every)
        values = [f"{value:.4g}" for value in (row.start, row.tuned_reference, row.tuned_ngplus)]
        better = "higher" if row.higher_is_better else "lower"
        rows.append([row.task, row.told, *settings, f"{row.metric}, {better}", *values])
    header = ["task", "told", "learning rate", "λ", "𝒯", "metric", "start", "reference, tuned", "NG+, tuned"]
    return markdown(header, rows)


def rank(value: str) -> int:
    return [*METRICS, "base and lr", "base"].index(value)


def learning_rates_table() -> str:
    """Trials of AdamW and NG+ on text that have the same learning rate and were not cut short."""
    trials = pd.read_csv(RESULTS / "gpt-text" / "small" / "tuning.csv").query("ended == 'complete'").set_index("lr")
    plain, around = (trials.best_nll[trials.optimizer == name].sort_index() for name in ("adamw", "ngplus-adamw-batch"))
    rows = [
        [f"{lr:g}", f"{plain[lr]:.2f}", f"{around[lr]:.2f}", f"{plain[lr] - around[lr]:.2f}"]
        for lr in plain.index.intersection(around.index)
        if lr <= 0.0036
    ]
    return markdown(["learning rate", "AdamW, nats", "NG+ around it", "gain"], rows)


def test_the_suggested_starts_are_those_of_the_record():
    assert block("five_minutes.md", "suggested starts") == suggested_starts_table()


def test_the_learning_rates_are_those_of_the_trials():
    assert block("five_minutes.md", "learning rates") == learning_rates_table()


def test_the_intervals_are_those_of_the_grids():
    page, results = ((DOCS / name).read_text(encoding="utf-8") for name in ("five_minutes.md", "results.md"))
    rows = re.findall(
        r"^\| [a-z]+, [\d,]+ steps \| (.*?) \| (.*?)(?:, higher is better)? \|$", page, flags=re.MULTILINE
    )
    assert len(rows) == 5
    assert not [row for row in rows if f"| 𝒯 | {row[0]} | {row[1]} |" not in results]
