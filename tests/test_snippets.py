"""The Python of every page runs, block after block; what is shown with its output is a doctest already."""

from dataclasses import asdict, dataclass
from textwrap import dedent

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from experiments.dataclass_io import read_settings
from experiments.optimizers import registry
from experiments.tasks.protocol import DatasetInfo, Metric
from ngplus import suggest
from tests.pages import DOCS, PAGES, find_code

ELSEWHERE = {
    "schnetpack": "tests/experiments/integrations/test_schnetpack_task.py",
    "sharded": "tests/ngplus/training/test_sharded_saving.py",
}
"""Pages whose snippets need what other tests have."""


def run(page, names):
    """Run the blocks of a page in order, in one namespace."""
    names.setdefault("__name__", page)
    for number, code in enumerate(find_code(DOCS / f"{page}.md", "python")):
        exec(compile(dedent(code), f"{page}.md, block {number}", "exec"), names)
    return names


def train(names, features=8):
    """One step of the optimizer that a page made."""
    model, optimizer = names["model"], names["optimizer"]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.randn(4, features)).square().mean().backward()
    optimizer.step()
    return any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("page", ["index", "eigenbasis"])
def test_an_optimizer_is_made_as_the_page_says(page):
    torch.manual_seed(0)
    assert train(run(page, {"model": nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))}))


def test_what_is_added_by_the_page_is_there(monkeypatch):
    monkeypatch.setattr(registry, "OPTIMIZERS", dict(registry.OPTIMIZERS))
    names = vars(registry) | {"OPTIMIZERS": registry.OPTIMIZERS, "asdict": asdict, "dataclass": dataclass}
    run("adding", names | {"Metric": Metric, "DatasetInfo": DatasetInfo, "read_settings": read_settings})
    entry = registry.find_entry("lion")
    model = nn.Linear(2, 1)
    optimizer = entry.build(model, entry.settings(lr=0.1))
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight, before - 0.1)


def test_a_start_is_suggested_before_a_model_is_sharded_and_not_after(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = fully_shard(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)))
        with pytest.raises(TypeError, match="is a DTensor: call suggest before the model is sharded"):
            suggest(model, lambda: model(torch.randn(4, 8)).square().mean())
    finally:
        dist.destroy_process_group()


def test_every_page_with_python_is_run():
    with_python = {page.stem for page in PAGES if find_code(page, "python")}
    assert with_python == {"index", "eigenbasis", "adding", *ELSEWHERE}
