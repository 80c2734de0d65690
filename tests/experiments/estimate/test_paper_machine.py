import pytest

from experiments.estimate import paper_machine


def test_the_rate_is_sgds_operations_over_its_epoch_of_table_1():
    # 6.22 TFLOP to a forward and backward of 256 images, counted apart from this (docs/errata.md), 517 s an epoch.
    assert paper_machine.rate() == pytest.approx(1_281_167 / 256 * 6.22e12 / 517, rel=0.01)


def test_operations_alone_do_not_explain_the_papers_epochs():
    for epoch in paper_machine.epochs():
        assert 517 < epoch.predicted_s < 0.9 * epoch.paper_s
