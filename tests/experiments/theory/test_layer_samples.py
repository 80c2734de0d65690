"""Gradients of single samples of the five tasks, against those of whole batches and against their own factors."""

import pytest
import torch
from torch import nn

from experiments.config.recipe import load_recipe
from experiments.tasks import TASKS
from experiments.theory.layer_samples import (
    SCALE,
    SUBJECTS,
    factors,
    gather,
    get_parameters,
    load_task,
    next_matrix,
    split_batch,
    take,
    to_double,
    train,
)
from experiments.theory.weight_uses import record_uses

# fairseq's softmax is float32 whatever the model is.
TOLERANCE = {"transformer-iwslt14": 1e-5}
# Subwords of fewer sentences are learnt sooner.
CORPUS = {"merges": 200, "train_size": 300, "validation_size": 20, "test_size": 20}
SMALLER = {"transformer-iwslt14": [f"task.corpus.{key}={value}" for key, value in CORPUS.items()]}


@pytest.fixture(scope="module", params=SUBJECTS)
def trained(request, tmp_path_factory):
    settings = load_recipe(request.param, SCALE, overrides=SMALLER.get(request.param, ())).task_settings
    task = TASKS[request.param](settings, scale=SCALE, data_dir=tmp_path_factory.mktemp("data"))
    return task, train(task, steps=2, seed=0).double()


def close(actual, expected, tolerance):
    return float((actual - expected).norm()) <= tolerance * float(expected.norm())


def test_single_samples_average_to_the_batch_and_equal_their_factors(trained):
    task, model = trained
    subject, tolerance = SUBJECTS[task.name], TOLERANCE.get(task.name, 1e-9)
    batch = next(task.train_batches(0, 3))
    size = subject.size(batch)
    samples = [take(task, model, part, subject.layers) for part in split_batch(task, 0, size, 3)]
    whole = iter(torch.autograd.grad(task.loss(model, to_double(batch)), get_parameters(model, subject.layers)))
    assert len(samples) == size > 5
    for layer in subject.layers:
        gradients = torch.stack([sample[layer].gradient for sample in samples])
        assert close(gradients.mean(dim=0), next_matrix(model, layer, whole), tolerance), layer
        assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm(), layer  # not the same one twice
        for sample in samples[:6]:
            assert close(sample[layer].g.mT @ sample[layer].a, sample[layer].gradient, tolerance), layer


def test_the_others_are_other_samples_of_the_same_epoch(tmp_path):
    task = load_task("schnet-qm9", tmp_path)  # batches of 25
    model = train(task, steps=2, seed=0)
    pairs = gather(task, model, samples=30, seed=4)
    layer = "output_modules.0.outnet.0"
    batches = [
        take(task, model, part, [layer])[layer] for index in (0, 1, 2) for part in split_batch(task, index, 25, 4)
    ]
    samples, others = pairs[-1]
    assert samples.name == layer
    torch.testing.assert_close(samples.gradients, torch.stack([each.gradient for each in batches[:30]]))
    torch.testing.assert_close(others, torch.stack([each.gradient for each in batches[30:60]]))
    torch.testing.assert_close(samples.outputs, sum(each.g.mT @ each.g for each in batches[:30]) / 30)
    assert samples.kappa == sum(len(each.a) for each in batches[:30]) / 30


def test_a_bag_gives_its_gradient_to_each_of_its_rows():
    bag = nn.EmbeddingBag(5, 3, mode="sum").double()
    with record_uses(bag) as uses:
        out = bag(torch.tensor([[1, 4, 4]]))
    g, a = factors(uses[0], torch.ones_like(out))
    (weight,) = torch.autograd.grad(out.sum(), [bag.weight])
    torch.testing.assert_close(g.mT @ a, weight.mT)


def test_a_strided_convolution_without_bias_has_the_factors_of_its_gradient():
    convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).double()
    with record_uses(convolution) as uses:
        out = convolution(torch.randn(1, 2, 5, 5, dtype=torch.float64))
    gradient = torch.randn_like(out)
    g, a = factors(uses[0], gradient)
    (weight,) = torch.autograd.grad((out * gradient).sum(), [convolution.weight])
    torch.testing.assert_close(g.mT @ a, weight.flatten(1))


def test_a_grouped_convolution_is_refused():
    convolution = nn.Conv2d(2, 2, 3, groups=2)
    with record_uses(convolution) as uses:
        out = convolution(torch.randn(1, 2, 5, 5))
    with pytest.raises(ValueError, match=r"conv2d with module\.groups=2"):
        factors(uses[0], out)
