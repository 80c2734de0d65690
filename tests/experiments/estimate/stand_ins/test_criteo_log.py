from collections import Counter

import numpy as np

from experiments.estimate.stand_ins import criteo_log
from experiments.estimate.stand_ins.criteo_log import VALUES, write_log, zipf
from experiments.tasks.dlrm.criteo_lines import parse


def test_the_made_log_is_in_the_exact_format(tmp_path, monkeypatch):
    monkeypatch.setattr(criteo_log, "BLOCK", 800)
    write_log(tmp_path / "train.txt", 2_000)
    text = (tmp_path / "train.txt").read_bytes()
    fields = [line.split(b"\t") for line in text.decode().encode().splitlines()]
    assert {len(line) for line in fields} == {40}
    assert {len(field) for line in fields for field in line[14:]} == {0, 8}
    found = parse(text)
    assert len(found.labels) == 2_000
    assert 0.2 < found.labels.mean() < 0.3
    assert any(field.startswith(b"-") for line in fields for field in line[1:14])


def test_a_category_has_as_many_values_as_it_should_and_they_follow_zipf():
    ranks = zipf(np.random.default_rng(0), 24, 100_000)
    counts = Counter(ranks.tolist())
    assert set(counts) == set(range(24))
    for rank, count in counts.items():
        share = np.log((rank + 2) / (rank + 1)) / np.log(25)
        assert abs(count - 100_000 * share) < 5 * (100_000 * share) ** 0.5


def test_columns_share_no_value(tmp_path):
    write_log(tmp_path / "train.txt", 500)
    found = parse((tmp_path / "train.txt").read_bytes())
    values = [set(column.tolist()) - {0} for column in found.categories]
    assert len(set.union(*values)) == sum(map(len, values))
    assert all(len(own) <= size for own, size in zip(values, VALUES, strict=True))
