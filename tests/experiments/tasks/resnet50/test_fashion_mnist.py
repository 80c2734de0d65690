import gzip
import hashlib
import http.server
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from experiments.data_io import packages
from experiments.data_io.checksum import DataFileError
from experiments.records.provenance import REPOSITORY
from experiments.tasks.datasets import PREPARE
from experiments.tasks.resnet50 import fashion_mnist

FULL = REPOSITORY / "data"


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def files(monkeypatch):
    """Four small files in the official format, with the code's checksums set to theirs."""
    generator = np.random.default_rng(0)
    content = {}
    for stem, count in (("train", 30), ("t10k", 20)):
        content[f"{stem}-images-idx3-ubyte"] = idx(generator.integers(0, 256, (count, 28, 28)))
        content[f"{stem}-labels-idx1-ubyte"] = idx(np.arange(count) % 10)
    digests = {name: hashlib.sha256(raw).hexdigest() for name, raw in content.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", digests)
    return content


@pytest.fixture
def installed(files, tmp_path, monkeypatch):
    """The package's folder."""
    folder = tmp_path / "installed"
    folder.mkdir()
    for name, raw in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
    monkeypatch.setattr(fashion_mnist, "INSTALLED", folder)
    return folder


@pytest.fixture
def no_source(monkeypatch):
    """Every source fails: whatever works now works without one."""

    def broken(scratch):
        raise DataFileError("no network")

    for name in ("_installed_package", "_downloaded_package", "_official_site"):
        monkeypatch.setattr(fashion_mnist, name, partial(broken))
        getattr(fashion_mnist, name).__name__ = name


def test_prepare_unpacks_the_package_and_load_reads_it(files, installed, tmp_path):
    folder = PREPARE["fashion-mnist"](tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    train, test = (fashion_mnist.load(tmp_path, part) for part in ("train", "test"))
    assert (len(train), len(test)) == (30, 20)
    assert train.pixels.tobytes() == files["train-images-idx3-ubyte"][16:]
    assert train.labels.tolist() == [i % 10 for i in range(30)]


def test_prepare_again_needs_no_source(files, installed, tmp_path, no_source, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_installed_package", lambda scratch: installed)
    fashion_mnist.prepare(tmp_path)
    monkeypatch.setattr(fashion_mnist, "_installed_package", fashion_mnist._official_site)
    assert sorted(path.name for path in fashion_mnist.prepare(tmp_path).iterdir()) == sorted(files)


def test_prepare_replaces_a_damaged_file_only(files, installed, tmp_path):
    folder = fashion_mnist.prepare(tmp_path)
    whole, damaged = folder / "t10k-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    before = whole.stat().st_ino
    damaged.write_bytes(damaged.read_bytes()[:-1])
    fashion_mnist.prepare(tmp_path)
    assert whole.stat().st_ino == before
    assert damaged.read_bytes() == files[damaged.name]


def test_a_damaged_package_is_not_taken_and_the_error_names_every_source(files, installed, tmp_path, monkeypatch):
    archive = installed / "t10k-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:100])
    monkeypatch.setattr(packages, "run_in", _fail)
    monkeypatch.setattr(fashion_mnist, "_first_that_works", _fail)
    with pytest.raises(DataFileError) as caught:
        fashion_mnist.prepare(tmp_path)
    for source in ("installed package", "downloaded package", "official site"):
        assert f"{source}: " in str(caught.value)
    assert not (tmp_path / "fashion-mnist" / archive.stem).exists()


def _fail(*arguments):
    raise DataFileError("not here")


def test_a_missing_file_is_named_with_its_checksum(files, tmp_path):
    digest = fashion_mnist.SHA256["train-images-idx3-ubyte"]
    with pytest.raises(DataFileError, match=rf"train-images-idx3-ubyte is missing \(expected SHA-256 {digest}"):
        fashion_mnist.load(tmp_path, "train")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-5], lambda raw: raw[:-1] + b"\x07", lambda raw: b""])
def test_a_damaged_file_is_named_with_both_checksums(files, installed, tmp_path, damage):
    path = fashion_mnist.prepare(tmp_path) / "t10k-images-idx3-ubyte"
    broken = damage(path.read_bytes())
    path.write_bytes(broken)
    with pytest.raises(DataFileError) as caught:
        fashion_mnist.load(tmp_path, "test")
    for part in (str(path), fashion_mnist.SHA256[path.name], hashlib.sha256(broken).hexdigest(), "make data-"):
        assert part in str(caught.value)


# --- downloads


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, and breaks off after `limit` bytes while it is set."""

    limit: int | None = None
    ranges: list[str | None] = []  # noqa: RUF012

    def do_GET(self):
        content = Path(self.translate_path(self.path)).read_bytes()
        asked = self.headers["Range"]
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.limit])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    RangeHandler.limit, RangeHandler.ranges = None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_broken_download_goes_on_where_it_stopped(site, tmp_path):
    folder, url = site
    content = np.random.default_rng(0).bytes(5000)
    (folder / "file.gz").write_bytes(content)
    target = tmp_path / "file.gz"
    RangeHandler.limit = 2000
    with pytest.raises(OSError, match=r"got 2,000 of 5,000 bytes|IncompleteRead"):
        fashion_mnist.download(f"{url}file.gz", target)
    assert not target.exists()
    RangeHandler.limit = None
    fashion_mnist.download(f"{url}file.gz", target)
    assert target.read_bytes() == content
    assert RangeHandler.ranges == [None, "bytes=2000-"]
    assert not target.with_name("file.gz.part").exists()


def test_prepare_takes_the_official_site_when_there_is_no_package(files, site, tmp_path, monkeypatch):
    folder, url = site
    for name, raw in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", ["http://127.0.0.1:9/", url])
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "nowhere")
    monkeypatch.setattr(packages, "run_in", _fail)
    prepared = fashion_mnist.prepare(tmp_path)
    assert {path.name: path.read_bytes() for path in prepared.iterdir()} == files


# --- the embedded sample


def test_the_embedded_sample_is_whole_small_and_balanced():
    assert fashion_mnist.EMBEDDED.stat().st_size <= 2_000_000
    for part, count in (("train", 420), ("test", 100)):
        images = fashion_mnist.load_embedded(part)
        assert np.bincount(images.labels).tolist() == [count] * 10
        assert images.pixels.max() == 255


def test_a_damaged_embedded_sample_is_named(tmp_path, monkeypatch):
    copy = tmp_path / "fashion_mnist.npz"
    copy.write_bytes(fashion_mnist.EMBEDDED.read_bytes()[:-1])
    monkeypatch.setattr(fashion_mnist, "EMBEDDED", copy)
    with pytest.raises(DataFileError, match=r"fashion_mnist\.npz is truncated or damaged"):
        fashion_mnist.load_embedded("train")


def test_the_embedded_sample_can_be_packed_again_to_the_byte(tmp_path):
    parts = {part: fashion_mnist.load_embedded(part) for part in ("train", "test")}
    assert fashion_mnist.write_embedded(parts, tmp_path / "again.npz") == fashion_mnist.EMBEDDED_SHA256


@pytest.mark.skipif(not (FULL / "fashion-mnist").is_dir(), reason="needs `make data-fashion-mnist`")
def test_the_embedded_sample_is_drawn_from_the_full_set():
    drawn = fashion_mnist.draw_embedded(FULL)
    for part in ("train", "test"):
        kept = fashion_mnist.load_embedded(part)
        assert drawn[part].pixels.tobytes() == kept.pixels.tobytes()
        assert drawn[part].labels.tolist() == kept.labels.tolist()


def test_pixels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"pixels must be uint8 of shape \(3, 28, 28\)"):
        fashion_mnist.Images(pixels=np.zeros((3, 28, 27), np.uint8), labels=np.zeros(3, np.int64))
