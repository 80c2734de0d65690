from experiments.bench.rows import compare


def test_both_tables_are_measured_under_both_optimizers():
    frame = compare(rounds=1, device="cpu", rows=(50, 100))
    assert list(frame.optimizer) == ["adagrad", "ngplus-adagrad"]
    assert (frame.large_over_small > 0).all()
    assert (frame.small_rows == 50).all()
