"""Figure 1's matrices against explicit ones, and what a seed changes."""

import numpy as np
import pytest
import torch

from experiments.theory import figure1
from experiments.theory.figure1 import accumulate, ensembles, gaussian_rows, layer_rows, verdicts


def vec(matrix):
    return matrix.mT.reshape(-1)


def test_blocks_equal_those_of_the_formed_fisher():
    ensemble = ensembles(6)[1]
    (blocks,) = accumulate(ensemble, 6, [20], seed=3)
    Z = torch.randn(20, 6, 6, generator=torch.Generator().manual_seed(3))
    G = (ensemble.rows @ Z).double()
    columns = torch.stack([vec(matrix) for matrix in G])
    fisher = columns.mT @ columns / 20
    torch.testing.assert_close(blocks.block, fisher[:6, :6], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(blocks.neighbour, fisher[:6, 6:12], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(blocks.gfim, (G @ G.mT).mean(dim=0), rtol=1e-5, atol=1e-6)


def test_chunks_do_not_change_the_sums_and_counts_are_nested():
    ensemble = ensembles(5)[0]
    nested = accumulate(ensemble, 5, [50, 100], seed=0)
    (whole,) = accumulate(ensemble, 5, [100], seed=0)
    assert [blocks.matrices for blocks in nested] == [50, 100]
    torch.testing.assert_close(nested[-1].gfim, whole.gfim)


def test_the_diagonals_differ_by_n_and_the_rest_is_sampling_error():
    ensemble = ensembles(40)[0]
    (row,) = gaussian_rows(ensemble, accumulate(ensemble, 40, [2000], seed=0))
    assert row["diagonal_ratio"] == pytest.approx(40, rel=0.02)
    assert row["difference_divided_by_n"] == pytest.approx(row["expected_sampling_error"], rel=0.1)
    assert row["difference_as_printed"] > 38


def test_what_is_missed_off_the_diagonal_blocks_equals_the_formed_difference():
    for ensemble in ensembles(5):
        A, B = (root.double() @ root.double().mT for root in (ensemble.rows, ensemble.columns))
        fisher = torch.kron(B, A)
        best = torch.kron(torch.eye(5).double(), torch.trace(B) / 5 * A)
        expected = float((fisher - best).norm() / fisher.norm())
        assert ensemble.missed() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_changes_the_draw_and_no_verdict(seed, tmp_path):
    gaussian = [
        row
        for index, ensemble in enumerate(ensembles(20))
        for row in gaussian_rows(ensemble, accumulate(ensemble, 20, [200], seed + index))
    ]
    layers = layer_rows(["schnet-qm9"], samples=20, steps=2, seed=seed, data_dir=tmp_path)
    assert [verdict.verdict for verdict in verdicts(gaussian, layers)] == ["reproduced", "not reproduced"]


def test_without_the_factor_n_or_on_layers_that_fit_the_verdicts_are_others():
    ensemble = ensembles(20)[0]
    gaussian = gaussian_rows(ensemble, accumulate(ensemble, 20, [200], 0))
    printed = [row | {"difference_divided_by_n": row["difference_as_printed"]} for row in gaussian]
    sizes = {"task": "t", "dataset": "d", "layer": "l", "m": 2, "n": 3}
    fitting = [sizes | {"method": name, "error_best_scale": 0.1, "cosine_0.1": 0.9} for name in figure1.FORMS]
    assert [verdict.verdict for verdict in verdicts(printed, fitting)] == ["not reproduced", "inconclusive"]


def test_a_small_run_leaves_its_files(tmp_path):
    sizes = {"size": 20, "matrices": 200, "samples": 20, "steps": 0}
    figure1.run(1, tmp_path, **sizes, data_dir=tmp_path, tasks=["schnet-qm9", "schnet-matproj"])
    for name in ("figure1", "matrices", "layers"):
        for suffix in (".png", ".svg"):
            assert (tmp_path / name).with_suffix(suffix).stat().st_size > 0
    rows = (tmp_path / "verdicts.csv").read_text().splitlines()
    assert ",reproduced," in rows[1]
    assert "the embedded data of 2 tasks" in rows[2]
    assert len(np.genfromtxt(tmp_path / "gaussian.csv", delimiter=",", names=True)) > 10
