import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch.nn.functional import cross_entropy

from experiments.config.recipe import list_scales, load_recipe
from experiments.dataclass_io import SettingsError
from experiments.errors import UserError
from experiments.tasks import TASKS
from experiments.tasks.resnet50.image_sources import crop_and_flip
from tests.experiments.cases.jpegs import write_tree

TINY = {
    "data": "fashion-mnist-embedded",
    "model": "resnet10",
    "batch_size": 20,
    "validation_size": 600,
    "stem": {"kernel": 3, "stride": 2},
}


def task(data_dir=Path("nowhere"), **changes):
    return TASKS["resnet50-imagenet"](TINY | changes, scale="tiny", data_dir=data_dir)


@pytest.fixture
def imagenet_dir(tmp_path):
    write_tree(tmp_path / "imagenet")
    return tmp_path


def imagenet_task(data_dir, **changes):
    settings = {
        "data": "imagenet",
        "model": "resnet50",
        "batch_size": 4,
        "validation_size": 3,
        "image_size": 64,
        "workers": 0,
        "label_smoothing": 0.1,
        "zero_gamma": True,
    }
    return TASKS["resnet50-imagenet"](settings | changes, scale="paper", data_dir=data_dir)


def test_the_three_splits_are_balanced_and_apart():
    made = task(train_size=200)
    source = made._source
    train, validation, test = source.train, source.held_out["validation"], source.held_out["test"]
    assert [np.bincount(part.labels).tolist() for part in (train, validation, test)] == [
        [20] * 10,
        [60] * 10,
        [100] * 10,
    ]
    pixels = [{image.tobytes() for image in part.pixels} for part in (train, validation, test)]
    assert not pixels[0] & pixels[1]
    assert not (pixels[0] | pixels[1]) & pixels[2]
    assert (made.dataset.train_size, made.dataset.eval_size, made.dataset.licence) == (200, 1000, "MIT")
    assert made.dataset.name == "Fashion-MNIST, 200 embedded images"


def test_an_epoch_is_every_image_once_up_to_the_incomplete_batch():
    made = task(train_size=110, crop_padding=0, flip=False)
    batches = list(made.train_batches(0, seed=1))
    assert len(batches) == made.steps_per_epoch() == 5
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (100, 1, 28, 28)
    assert images.dtype == torch.float32
    assert len({image.numpy().tobytes() for image in images}) == 100
    known = {image.tobytes() for image in made._source.train.pixels}
    restored = ((images * 0.3530 + 0.2860) * 255).round().to(torch.uint8)
    assert all(image.numpy().tobytes() in known for image in restored)


def test_batches_depend_on_seed_and_epoch_alone():
    made = task(train_size=100)

    def epoch(number, seed):
        return torch.cat([images for images, _ in made.train_batches(number, seed)])

    torch.manual_seed(0)
    first = epoch(0, 1)
    torch.manual_seed(99)
    assert torch.equal(epoch(0, 1), first)
    assert not torch.equal(epoch(1, 1), first)
    assert not torch.equal(epoch(0, 2), first)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_joint_batch_augmentation_included(world_size):
    made = task(train_size=100)
    joint = list(made.train_batches(3, 7))
    ranks = [list(made.train_batches(3, 7, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for (images, labels), *parts in zip(joint, *ranks, strict=True):
        assert torch.equal(torch.cat([part for part, _ in parts]), images)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)


def test_crop_and_flip_against_one_image_at_a_time():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (6, 5, 7), dtype=np.uint8)
    offsets, flips = generator.integers(0, 5, (6, 2)), np.arange(6) % 2 == 1
    found = crop_and_flip(pixels, offsets, flips, padding=2)
    for image, (top, left), flip, out in zip(pixels, offsets, flips, found, strict=True):
        crop = np.pad(image, 2)[top : top + 5, left : left + 7]
        assert out.tolist() == (crop[:, ::-1] if flip else crop).tolist()


def test_the_initial_weights_depend_on_the_global_generator_only():
    made = task()
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(torch.nn.utils.parameters_to_vector(made.build_model().parameters()))
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


def test_the_loss_is_the_smoothed_mean_and_has_a_graph():
    made = task(label_smoothing=0.2)
    model = made.build_model()
    batch = next(made.train_batches(0, 1))
    logits = torch.log_softmax(model(batch[0]), dim=1)
    target = torch.full_like(logits, 0.02).scatter(1, batch[1][:, None], 0.82)
    loss = made.loss(model, batch)
    assert loss.item() == pytest.approx(-(target * logits).sum(1).mean().item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("split", "size"), [("validation", 600), ("test", 1000)])
def test_evaluation_is_over_the_whole_split_without_smoothing(split, size):
    made = task(label_smoothing=0.2)
    torch.manual_seed(0)
    model = made.build_model().eval()
    with torch.no_grad():
        found = made.evaluate(model, split)
        part = made._source.held_out[split]
        images = ((torch.from_numpy(part.pixels).float() / 255 - 0.2860) / 0.3530).unsqueeze(1)
        logits, labels = model(images), torch.from_numpy(part.labels)
    assert len(labels) == size
    assert found.loss == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
    assert found.metric == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1 / size)


def test_training_on_real_images_finds_what_they_show():
    made = task(train_size=500)
    torch.manual_seed(0)
    model = made.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(3):
        for batch in made.train_batches(epoch, 1):
            optimizer.zero_grad()
            made.loss(model, batch).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        assert made.evaluate(model, "validation").metric > 0.4  # 0.1 by chance


def test_three_steps_on_a_miniature_imagenet(imagenet_dir):
    made = imagenet_task(imagenet_dir)
    torch.manual_seed(0)
    model = made.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for batch in islice(made.train_batches(0, 1), 3):
        optimizer.zero_grad()
        loss = made.loss(model, batch)
        loss.backward()
        optimizer.step()
        assert batch[0].shape == (4, 3, 64, 64)
        assert torch.isfinite(loss)
    model.eval()
    with torch.no_grad():
        for split in ("validation", "test"):
            assert 0 <= made.evaluate(model, split).metric <= 1


def test_a_miniature_tree_is_not_called_imagenet(imagenet_dir):
    made = imagenet_task(imagenet_dir)
    assert made.dataset.name == "JPEG folder, 3 classes, 21 images"
    assert (made.dataset.train_size, made.dataset.eval_size, made.steps_per_epoch()) == (21, 9, 5)


def test_ranks_share_the_joint_batch_of_jpegs(imagenet_dir):
    made = imagenet_task(imagenet_dir)
    joint = next(made.train_batches(1, 2))
    parts = [next(made.train_batches(1, 2, rank=rank, world_size=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([images for images, _ in parts]), joint[0])
    assert torch.equal(torch.cat([labels for _, labels in parts]), joint[1])


def test_the_paper_model_is_torchvisions_resnet50(imagenet_dir):
    made = imagenet_task(imagenet_dir)
    torch.manual_seed(3)
    ours = made.build_model()
    torch.manual_seed(3)
    theirs = torchvision.models.resnet50(num_classes=3, zero_init_residual=True)
    for (name, ours_), (other, theirs_) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours_, theirs_)


def test_zero_gamma_starts_the_residual_branches_at_zero():
    scales = [task(zero_gamma=flag).build_model().layer1[0].bn2.weight.abs().sum().item() for flag in (True, False)]
    assert scales == [0, 64]


def test_a_split_that_is_empty_is_named():
    made = task(validation_size=0)
    with pytest.raises(SettingsError, match="the validation split is empty"), torch.no_grad():
        made.evaluate(made.build_model().eval(), "validation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "mnist"}, "data = 'mnist': must be one of"),
        ({"model": "vit"}, "model = 'vit': must be one of"),
        ({"bath_size": 3}, "bath_size = 3: unknown key"),
        ({"batch_size": "20"}, "batch_size = '20': must be an integer"),
        ({"batch_size": 1}, "batch_size = 1: must be at least 2"),
        ({"label_smoothing": 1.0}, r"label_smoothing = 1.0: must be in \[0, 1\)"),
        ({"validation_size": -10}, "validation_size = -10: must be at least 0"),
        ({"validation_size": 601}, "validation_size = 601: must be a multiple of the number of classes, 10"),
        ({"train_size": 10}, "train_size = 10: must hold one batch of 20"),
        ({"train_size": 4200}, "train_size = 4200: 420 samples of class 0 asked for, there are 360"),
        ({"batch_size": 4000}, "batch_size = 4000: must not exceed the 3600 training images"),
        ({"stem": {"kernel": 4}}, "kernel = 4: must be odd and positive"),
        ({"stem": {"stride": 0}}, "stride = 0: must be at least 1"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(changes, message):
    with pytest.raises(SettingsError, match=message):
        task(**changes)


def test_missing_data_is_an_error_that_a_user_can_mend(tmp_path):
    with pytest.raises(UserError, match="run `make data-fashion-mnist`"):
        task(tmp_path, data="fashion-mnist")
    with pytest.raises(UserError, match="imagenet/train is missing"):
        imagenet_task(tmp_path)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.resnet", None)
    monkeypatch.delitem(sys.modules, "experiments.tasks.resnet50.resnet50_imagenet", raising=False)
    with pytest.raises(UserError, match=r"is not installed: this task needs the extra 'vision'"):
        task()


@pytest.mark.parametrize("scale", ["tiny", "small", "paper", "paper-2048", "paper-4096"])
def test_every_recipe_fits_its_task(scale, imagenet_dir, monkeypatch):
    from experiments.tasks.resnet50 import resnet50_imagenet

    assert scale in list_scales("resnet50-imagenet")
    recipe = load_recipe("resnet50-imagenet", scale)
    read = []
    monkeypatch.setattr(resnet50_imagenet, "_source", lambda settings, _: read.append(settings) or _Data())
    made = TASKS["resnet50-imagenet"](recipe.task_settings, scale=scale, data_dir=imagenet_dir)
    made.build_model()
    assert read[0].batch_size * recipe.run.accumulate == {"paper": 256, "paper-2048": 2048, "paper-4096": 4096}.get(
        scale, read[0].batch_size
    )
    assert recipe.run.report_split == "test"
    assert {"tiny", "small"}.isdisjoint({scale}) or read[0].validation_size > 0


class _Data:
    from experiments.tasks.protocol import DatasetInfo

    info = DatasetInfo(name="any", sha256="", licence="", train_size=10_000, eval_size=1)
    channels, classes = 3, 10
