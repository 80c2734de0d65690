import numpy as np
import pytest
import torch

from experiments.data_io.checksum import DataFileError
from experiments.tasks.resnet50 import imagenet
from tests.experiments.cases.jpegs import CLASSES, write_tree


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "imagenet")


def dataset(tree, *, seed=1, epoch=0, indices=None):
    train, _ = imagenet.scan(tree)
    indices = np.arange(len(train.paths)) if indices is None else indices
    return imagenet.Images(train, indices, imagenet.train_transform(32), seed=seed, epoch=epoch)


def test_the_listing_has_every_image_with_the_position_of_its_class(tree):
    train, val = imagenet.scan(tree)
    assert train.classes == CLASSES
    assert (len(train.paths), len(val.paths)) == (24, 9)
    assert all(CLASSES[label] == path.parent.name for path, label in zip(train.paths, train.labels, strict=True))


def test_the_checksum_sees_a_renamed_and_a_changed_file(tree):
    before = imagenet.scan(tree)[0].sha256
    assert imagenet.scan(tree)[0].sha256 == before
    path = next((tree / "train" / CLASSES[0]).iterdir())
    renamed = path.rename(path.with_name("zz.JPEG"))
    after = imagenet.scan(tree)[0].sha256
    renamed.write_bytes(renamed.read_bytes() + b"\0")
    assert len({before, after, imagenet.scan(tree)[0].sha256}) == 3


def test_hidden_files_and_folders_are_left_out_and_what_is_no_file_is_named(tree):
    before = imagenet.scan(tree)
    for half in ("train", "val"):
        for name in (CLASSES[0], ".hidden"):
            (tree / half / name).mkdir(exist_ok=True)
            (tree / half / name / "._first.JPEG").write_bytes(b"\x00\x05\x16\x07")
    assert [half.sha256 for half in imagenet.scan(tree)] == [half.sha256 for half in before]
    assert imagenet.scan(tree)[0].classes == CLASSES
    (tree / "val" / CLASSES[0] / "link.JPEG").symlink_to(tree / "absent")
    with pytest.raises(
        DataFileError, match=r"link\.JPEG is a link to .*absent, where there is nothing; must be a file"
    ):
        imagenet.scan(tree)


@pytest.mark.parametrize("half", ["train", "val"])
def test_a_missing_folder_is_named(tree, half):
    (tree / half).rename(tree / "elsewhere")
    with pytest.raises(DataFileError, match=rf"imagenet/{half} is missing: ImageNet is put in place by the user"):
        imagenet.scan(tree)


def test_classes_that_differ_are_named(tree):
    (tree / "val" / CLASSES[1]).rename(tree / "val" / "n99999999")
    with pytest.raises(DataFileError, match=f"only in train: {CLASSES[1]}; only in val: n99999999"):
        imagenet.scan(tree)


def test_an_empty_class_and_an_empty_folder_are_named(tree, tmp_path):
    (tree / "train" / "n00000000").mkdir()
    with pytest.raises(DataFileError, match="n00000000 holds no JPEG file"):
        imagenet.scan(tree)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataFileError, match="holds no class folders"):
        imagenet.scan(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_jpeg_is_named(tree, workers):
    images = dataset(tree)
    broken = images.folder.paths[5]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataFileError, match=f"{broken.name} cannot be decoded as a JPEG image"):
        list(imagenet.batches(images, [np.arange(8)], workers=workers))


def test_a_file_that_is_no_image_is_named(tree):
    path = tree / "note.JPEG"
    path.write_text("not an image")
    with pytest.raises(DataFileError, match=r"note\.JPEG cannot be decoded"):
        imagenet.read_image(path)


def test_augmentation_depends_on_seed_epoch_and_image_alone(tree):
    order = [np.array([3, 1]), np.array([2, 0])]
    here = list(imagenet.batches(dataset(tree), order, workers=0))
    apart = list(imagenet.batches(dataset(tree), order, workers=2))
    for (ours, labels), (theirs, others) in zip(here, apart, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(labels, others)
    # The same image from a subset in another order.
    assert torch.equal(dataset(tree, indices=np.array([7, 3]))[1][0], here[0][0][0])
    assert not torch.equal(dataset(tree, epoch=1)[3][0], here[0][0][0])
    assert not torch.equal(dataset(tree, seed=2)[3][0], here[0][0][0])


def test_reading_leaves_the_global_generator_alone(tree):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(imagenet.batches(dataset(tree), [np.arange(4)], workers=0))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_takes_the_centre_of_the_resized_image(tree):
    path = imagenet.scan(tree)[1].paths[1]
    image = imagenet.read_image(path)
    found = imagenet.eval_transform(224)(image)
    short = min(image.size)
    width, height = (round(side * 256 / short) for side in image.size)
    resized = np.asarray(image.resize((width, height), resample=2), np.float32) / 255
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    expected = (resized[top : top + 224, left : left + 224] - imagenet.MEAN) / imagenet.STD
    # A side that is not a multiple may round the other way, by a pixel at most.
    assert found.shape == (3, 224, 224)
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).mean() < 0.1
