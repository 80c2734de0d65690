"""Sums with and without embeddings, and the verdicts on the paper's sentences."""

import pandas as pd
import pytest

from experiments.theory.costs import method_costs
from experiments.theory.costs.operations import LayerShape


def layer(name, m, n, kappa=1, **other):
    return LayerShape(name=name, m=m, n=n, kappa=kappa, **other)


WIDE = [layer("filter_network", 8, 40), layer("table", 4, 10**6, lookups=1)]


def test_embeddings_are_left_out_where_there_are_any():
    totals = method_costs.total_rows("dlrm", WIDE, 2) + method_costs.total_rows("resnet50", [WIDE[0]], 2)
    assert [(row["model"], row["embeddings"], row["layers"]) for row in totals] == [
        ("dlrm", "with", 2),
        ("dlrm", "without", 1),
        ("resnet50", "with", 1),
    ]
    rest = method_costs.without_embeddings(totals)
    assert [row["kfac_store"] for row in rest] == [8**2 + 40**2] * 2
    assert method_costs.ratios(totals[:1], "store")["dlrm"] > 1e9


def test_verdicts_follow_the_counts():
    def outcomes(layers, seconds):
        return [
            each.verdict for each in method_costs.verdicts(layers, method_costs.total_rows("dlrm", layers, 2), seconds)
        ]

    assert outcomes(WIDE, 4.0) == ["reproduced"] * 4
    square = [layer("filter_network", 8, 8, kappa=300)]  # exactly twice, and a build with many positions
    assert outcomes(square, 1.5) == ["not reproduced", "not reproduced", "reproduced", "not reproduced"]


def test_a_run_leaves_its_files(tmp_path, monkeypatch):
    shapes = {"resnet50": [WIDE[0]], "dlrm": WIDE}
    monkeypatch.setattr(method_costs, "PAPER_MODELS", shapes)
    monkeypatch.setattr(method_costs, "paper_layers", lambda name: (shapes[name], 2))
    method_costs.run(tmp_path, quick=True)
    for name in ("resnet50.csv", "totals.csv", "roots.csv", "costs.png", "costs.svg"):
        assert (tmp_path / name).stat().st_size > 0
    measured = pd.read_csv(tmp_path / "measured.csv")
    assert len(measured) == 2 * 3 * 3  # a layer a model, three methods, three parts
    assert measured.gflops.to_numpy() == pytest.approx((measured.operations / measured.cpu_s / 1e9).to_numpy())
    assert list(pd.read_csv(tmp_path / "verdicts.csv").claim.str[:4]) == ["2.4:"] * 4
