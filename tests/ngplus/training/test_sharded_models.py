"""Six models under `fully_shard`, in one mesh dimension and two, and under DDP: one process on the joint batch."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ngplus import NGPlus
from tests.ngplus.training.problems import SETTINGS, flat
from tests.ngplus.training.processes import preload
from tests.ngplus.training.sharding import distance, shard, whole_parameters

pytest.importorskip("transformers")
pytest.importorskip("fairseq")
MODELS_MODULE = "tests.ngplus.training.sharded_models"
preload(MODELS_MODULE)  # once for all processes, since importing fairseq is what a process would take longest for

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")]

STEPS, BATCH = 3, 8
NAMES = ("mlp", "resnet", "fairseq_transformer", "bert", "llama", "dlrm")


def train(case, through, samples, **settings):
    optimizer = NGPlus(case.model, **SETTINGS, **case.settings, **settings)
    for _ in range(STEPS):
        case.loss(through, samples).backward()
        optimizer.step()
        optimizer.zero_grad()


def build(name):
    from tests.ngplus.training import sharded_models

    return sharded_models.build(name)


@functools.cache
def trained_alone(name):
    case = build(name)
    train(case, case.model, slice(None))
    return case.model


def train_together(name, wrapping, settings):
    case, own = build(name), BATCH // dist.get_world_size()
    samples = slice(dist.get_rank() * own, (dist.get_rank() + 1) * own)
    if wrapping is None:
        train(case, DistributedDataParallel(case.model), samples)
        return flat(case.model)
    train(case, shard(case.model, **wrapping), samples, **settings)
    return whole_parameters(case.model)


def assert_equals_one_process(team, name, wrapping, settings):
    outcomes = team.run(train_together, name, wrapping, settings)
    assert all(torch.equal(each, outcomes[0]) for each in outcomes)
    assert distance(outcomes[0], trained_alone(name)) < 1e-10


@pytest.mark.parametrize(("wrapping", "settings"), [({}, {}), ({"placed": True}, {"inverses": "sharded"}), (None, {})])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one_on_the_joint_batch(team, name, wrapping, settings):
    assert_equals_one_process(team, name, wrapping, settings)


@pytest.mark.parametrize(
    ("wrapping", "settings"),
    [({}, {"inverses": "sharded"}), ({"placed": True}, {"inverses": "replicated"}), ({"replicas": 2}, {}), (None, {})],
)
@pytest.mark.parametrize("name", NAMES)
def test_four_processes_are_one_on_the_joint_batch(team_of_four, name, wrapping, settings):
    assert_equals_one_process(team_of_four, name, wrapping, settings)
