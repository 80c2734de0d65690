"""The language-modelling task on made-up texts: its sequences, its losses, what NG+ sees, data that are not right."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.config.recipe import load_recipe
from experiments.data_io.checksum import DataFileError
from experiments.data_io.text.documents import Document
from experiments.dataclass_io import SettingsError
from experiments.errors import UserError
from experiments.tasks.gpt import django_docs
from experiments.tasks.gpt.gpt_text import GPTText
from experiments.training.run import RunOptions, run
from ngplus import NGPlus

MODEL = {"layers": 2, "dim": 8, "heads": 2}
SETTINGS = {
    "data": "django-docs-embedded",
    "vocabulary": 280,
    "context": 12,
    "batch_size": 4,
    "validation_share": 0.1,
    "test_share": 0.2,
    "model": MODEL,
}
WORDS = ("query", "model", "field", "the", "of", "returns", "a", "view", "ü", "\n")


def pages(count=20, seed=0):
    generator = np.random.default_rng(seed)
    return [Document(f"page {n}", " ".join(generator.choice(WORDS, 80 + 5 * n))) for n in range(count)]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """The task on twenty made-up pages, with other settings."""
    monkeypatch.setattr(django_docs, "load_embedded", pages)
    return lambda **changed: GPTText(SETTINGS | changed, scale="tiny", data_dir=tmp_path)


@pytest.fixture
def task(make):
    return make()


def model_of(task):
    torch.manual_seed(0)
    model = task.build_model().double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first, where a wrong column would not show
            torch.nn.init.normal_(parameter, std=0.1)
    return model


# --- sequences


def test_a_pass_holds_each_window_once_in_a_new_order_from_a_new_place(make, token_folder):
    np.arange(1000, dtype=np.uint16).tofile(token_folder / "train.bin")  # a token says where it is
    task = make(data="token-folder", vocabulary=1000)
    passes = []
    for epoch in range(3):
        batches = list(task.train_batches(epoch, seed=1))
        assert len(batches) == task.steps_per_epoch() == (1000 - 12) // 12 // 4
        for inputs, targets in batches:
            assert inputs.shape == (4, 12)
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(12))
            assert torch.equal(targets, inputs + 1)
        passes.append([start for inputs, _ in batches for start in inputs[:, 0].tolist()])
    for found in passes:
        assert len(set(found)) == len(found)
        assert {start % 12 for start in found} == {found[0] % 12}
        assert found != sorted(found)
    assert len({found[0] % 12 for found in passes}) > 1


def test_the_order_depends_on_seed_and_epoch_alone(task, make):
    first = [inputs for inputs, _ in task.train_batches(1, seed=1)]
    torch.manual_seed(99)
    again = [inputs for inputs, _ in make().train_batches(1, seed=1)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for epoch, seed in ((2, 1), (1, 2)):
        assert not torch.equal(first[0], next(task.train_batches(epoch, seed=seed))[0])


@pytest.mark.parametrize("steps", [5, 7, 10_000])
def test_recorded_epochs_are_the_passes_cut_elsewhere(task, make, steps):
    """One after the other they hold what the passes hold, wherever one ends, and one may be longer than a pass."""
    whole = task.steps_per_epoch()
    passes = [inputs for epoch in range(4) for inputs, _ in task.train_batches(epoch, seed=3)]
    cut = make(epoch_steps=min(steps, 2 * whole - 1))
    length = cut.steps_per_epoch()
    count = len(passes) // length
    found = [inputs for epoch in range(count) for inputs, _ in cut.train_batches(epoch, seed=3)]
    assert len(found) == count * length
    assert all(torch.equal(a, b) for a, b in zip(found, passes, strict=False))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_batch_and_their_mean_loss_is_that_of_one_process(task, world_size):
    model = model_of(task)
    alone = [task.loss(model, batch).item() for batch in task.train_batches(0, seed=1)]
    parts = [list(task.train_batches(0, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for number, expected in enumerate(alone):
        mean = sum(task.loss(model, part[number]).item() for part in parts) / world_size
        assert mean == pytest.approx(expected, rel=1e-12)


# --- loss and evaluation


def test_the_loss_is_the_mean_over_all_tokens(task):
    model, (inputs, targets) = model_of(task), next(task.train_batches(0, seed=1))
    logs = model(inputs).log_softmax(-1)
    each = [-logs[b, t, targets[b, t]] for b in range(4) for t in range(12)]
    assert task.loss(model, (inputs, targets)).item() == pytest.approx(sum(each).item() / 48, rel=1e-12)


@pytest.mark.parametrize(("split", "file"), [("validation", "val"), ("test", "test")])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_evaluation_predicts_each_token_once_from_its_own_window(make, split, file, batch_size):
    task = make(batch_size=batch_size)
    model = model_of(task).eval()
    stream = torch.from_numpy(task._tokens[file].astype(np.int64))
    nats, count = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(stream) - 1, 12):
            window = stream[first : first + 13]
            logs = model(window[None, :-1])[0].log_softmax(-1)
            nats -= logs.gather(1, window[1:, None]).sum().item()
            count += len(window) - 1
        evaluation = task.evaluate(model, split)
    assert count == len(stream) - 1
    assert evaluation.loss == evaluation.metric == pytest.approx(nats / count, rel=1e-10)
    split_pages = [page.text for page in pages() if page.name in names_of(task, file)]
    text_bytes = sum(len(text.encode()) for text in split_pages)
    assert evaluation.others == {"bits/byte": pytest.approx(nats / math.log(2) / text_bytes, rel=1e-10)}


def names_of(task, file):
    """The pages of a split, found by decoding its tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(task._folder.path / "tokenizer.json"))
    tokens = task._tokens[file]
    begins = [*np.flatnonzero(tokens == 0).tolist(), len(tokens)]
    texts = {tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(begins)}
    return {page.name for page in pages() if page.text in texts}


def test_bits_a_byte_do_not_depend_on_how_text_is_cut_into_tokens(make):
    """A model that gives each of 257 tokens, bytes and the separator, the same chance has log₂ 257 bits a byte."""
    task = make(vocabulary=257)
    model = model_of(task).eval()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.zero_()
        evaluation = task.evaluate(model, "test")
    assert evaluation.loss == pytest.approx(math.log(257))
    separators = len(names_of(task, "test")) - 1
    text_bytes = task._folder.text_bytes["test"]
    assert evaluation.others["bits/byte"] == pytest.approx(math.log2(257) * (text_bytes + separators) / text_bytes)


def test_a_trained_model_predicts_what_it_has_not_seen(make):
    task = make(model=MODEL | {"dim": 32})
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = task.evaluate(model.eval(), "test")
    for epoch in range(3):
        for batch in task.train_batches(epoch, seed=1):
            task.loss(model.train(), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    after = task.evaluate(model.eval(), "test")
    assert before.metric == pytest.approx(math.log(task._folder.vocabulary), rel=0.05)
    assert after.metric < 0.6 * before.metric
    assert after.others["bits/byte"] < 0.6 * before.others["bits/byte"]


# --- what NG+ sees of it


def solved(G, samples, damping):
    """(λI + L)⁻¹G of (6), or with R, from the samples' gradients: a dense solve."""
    m, n = G.shape
    moment = sum(g @ g.T if m <= n else g.T @ g for g in samples) / len(samples)
    damped = moment + damping * torch.eye(len(moment), dtype=G.dtype)
    return torch.linalg.solve(damped, G) if m <= n else torch.linalg.solve(damped, G.T).T


def matrix(layer):
    weight, bias = layer.weight.grad, layer.bias
    return weight.clone() if bias is None else torch.cat([weight, bias.grad[:, None]], dim=1)


def test_a_sequence_as_sample_is_the_gradient_of_that_sequence_alone(task):
    model, (inputs, targets) = model_of(task), next(task.train_batches(0, seed=1))
    optimizer = NGPlus(model, lr=1e-9, damping=0.01, update_every=1)
    samples = {layer.name: [] for layer in optimizer._layers}
    assert len(samples) == 2 + 4 * 2  # the tied table and the positions, and four matrices a block
    for row in range(len(inputs)):
        model.zero_grad()
        F.cross_entropy(model(inputs[row : row + 1])[0], targets[row]).backward()
        for layer in optimizer._layers:
            samples[layer.name].append(matrix(layer))
    model.zero_grad()
    optimizer = NGPlus(model, lr=1e-9, damping=0.01, update_every=1)
    task.loss(model, (inputs, targets)).backward()
    optimizer.step()
    for layer in optimizer._layers:
        own = samples[layer.name]
        expected = solved(sum(own) / len(own), own, 0.01)
        torch.testing.assert_close(matrix(layer), expected, rtol=1e-8, atol=1e-12)


# --- settings and data


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocabulary": 256}, "vocabulary = 256: must be from 257"),
        ({"vocabulary": 65537}, "vocabulary = 65537: must be from 257"),
        ({"context": 0}, "context = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"epoch_steps": 0}, "epoch_steps = 0"),
        ({"test_share": 0.0}, "test_share = 0.0: must be between 0 and 0.5"),
        ({"validation_share": 0.5}, "validation_share = 0.5"),
        ({"model": MODEL | {"heads": 3}}, "dim = 8: must be a multiple of heads = 3"),
        ({"batch_size": 1000}, r"batch_size = 1000: a pass has only \d+ sequences of 12 tokens"),
        ({"data": "novel"}, "data = 'novel': must be one of django-docs"),
        ({"length": 3}, "length = 3: unknown key"),
    ],
)
def test_a_setting_out_of_range_is_named(make, changed, message):
    with pytest.raises(SettingsError, match=rf"gpt-text/tiny, \[task\]:.*{message}"):
        make(**changed)


def test_a_context_longer_than_every_document_to_train_on_is_refused(make):
    longest = make()._folder.longest["train"]
    assert make(context=longest, batch_size=1).steps_per_epoch() > 0
    said = rf"context = {longest + 1}: the longest document to train on, in \S+, has {longest} tokens"
    with pytest.raises(SettingsError, match=said):
        make(context=longest + 1, batch_size=1)


def test_missing_data_is_named_with_its_remedy(make, tmp_path):
    with pytest.raises(DataFileError, match="make data-django-docs"):
        make(data="django-docs")
    with pytest.raises(DataFileError, match=r"text is missing: put the text there, a file \*\.txt a document"):
        make(data="text-folder")
    with pytest.raises(DataFileError, match=r"train\.bin is missing: put nanoGPT's train\.bin and val\.bin there"):
        make(data="token-folder")


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name, text in pages():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def test_a_folder_of_texts_is_a_document_a_file(make, text_folder):
    task = make(data="text-folder")
    assert task.dataset.name == f"text folder, 20 documents, {len(task._tokens['train']):,} tokens"
    (text_folder / "page 3.txt").write_text("another text " * 50)
    assert make(data="text-folder").dataset.sha256 != task.dataset.sha256


def test_a_folder_without_texts_with_one_or_with_bytes_that_are_no_text_is_refused(make, text_folder):
    (text_folder / "page 3.txt").write_bytes(b"\nna\xefve")
    with pytest.raises(DataFileError, match=r"page 3\.txt, line 2: not UTF-8: byte 0xef"):
        make(data="text-folder")
    for path in sorted(text_folder.iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataFileError, match=r"text folder: 1 document: there must be 3 at least"):
        make(data="text-folder")
    next(text_folder.iterdir()).unlink()
    with pytest.raises(DataFileError, match=r"has no file \*\.txt"):
        make(data="text-folder")


@pytest.fixture
def token_folder(tmp_path):
    """As nanoGPT leaves one: no test split, no tokenizer."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("train", 3000), ("val", 100)):
        generator.integers(280, size=size).astype(np.uint16).tofile(folder / f"{name}.bin")
    return folder


def test_nanogpts_files_are_trained_on_as_they_are(make, token_folder):
    task = make(data="token-folder")
    assert task.dataset.name == "token files, 3,000 tokens"
    assert task.build_model().tokens.num_embeddings == 280
    evaluation = task.evaluate(model_of(task).eval(), "validation")
    assert evaluation.metric == pytest.approx(math.log(280), rel=0.1)
    assert evaluation.others == {}  # nobody says how many bytes a token stands for


def test_a_split_that_is_not_there_is_named_with_its_remedy(make, token_folder):
    task = make(data="token-folder")
    with pytest.raises(SettingsError, match=r"has no test\.bin: set run\.report_split to validation"):
        task.evaluate(model_of(task).eval(), "test")


def test_token_files_of_another_vocabulary_or_dtype_are_refused(make, token_folder):
    with pytest.raises(DataFileError, match=r"train\.bin: token \d+ at place \d+ is not of a vocabulary of 260"):
        make(data="token-folder", vocabulary=260)
    tokens = np.fromfile(token_folder / "train.bin", np.uint16)
    tokens.astype(np.uint32).tofile(token_folder / "train.bin")
    with pytest.raises(DataFileError, match=r"train\.bin: every second number is 0"):
        make(data="token-folder")


def test_token_files_shorter_than_the_context_are_refused(make, token_folder):
    with pytest.raises(SettingsError, match=r"context = 3000: the stream to train on, in \S+tokens, has 2,999 tokens"):
        make(data="token-folder", context=3000)


def test_a_split_shorter_than_the_context_is_evaluated_whole(make, token_folder):
    task = make(data="token-folder", context=150)
    model = model_of(task).eval()
    stream = torch.from_numpy(task._tokens["val"].astype(np.int64))
    with torch.no_grad():
        expected = F.cross_entropy(model(stream[None, :-1])[0], stream[1:]).item()
        assert task.evaluate(model, "validation").metric == pytest.approx(expected, rel=1e-12)


def test_a_checkpoint_of_another_vocabulary_is_refused_and_stays(tmp_path, make):
    """The run that it belongs to goes on from it as if nothing had been."""
    options = RunOptions(device="cpu", data_dir=tmp_path, results_dir=tmp_path / "results", bar=False)

    def recipe(vocabulary):
        own = {key: value for key, value in SETTINGS.items() if key != "model"} | {"vocabulary": vocabulary}
        changes = {f"task.{key}": value for key, value in own.items()} | {
            f"task.model.{k}": v for k, v in MODEL.items()
        }
        return load_recipe("gpt-text", "tiny").override(changes | {"run.epochs": 2, "task.epoch_steps": 4})

    class Killed(Exception):  # noqa: N818
        pass

    class Kill:
        def __getattr__(self, name):
            return lambda *_: None

        def on_epoch(self, epoch):
            if epoch.epoch == 2:
                raise Killed

    with pytest.raises(Killed):
        run(recipe(280), "adamw", 1, options, [Kill()])
    (checkpoint,) = (tmp_path / "results").rglob("*.pt")
    before = checkpoint.read_bytes()
    with pytest.raises(
        UserError, match=r"is unfinished, begun with other settings: .*task\.vocabulary was 280 and is 300"
    ):
        run(recipe(300), "adamw", 1, options)
    assert checkpoint.read_bytes() == before
    resumed = run(recipe(280), "adamw", 1, options)
    fresh = run(recipe(280), "adamw", 1, replace(options, results_dir=tmp_path / "fresh"))
    assert [epoch.metric for epoch in resumed.epochs] == [epoch.metric for epoch in fresh.epochs]


def test_the_tables_name_what_was_used(make):
    task = make(epoch_steps=5)
    tokens = len(task._tokens["train"])
    assert task.dataset.name == f"Django's documentation, 20 embedded pages, {tokens:,} tokens; an epoch is 5 batches"
    assert task.dataset.licence == "BSD-3-Clause"


def test_another_text_or_vocabulary_is_another_folder_and_checksum(make, tmp_path, monkeypatch):
    sums = {make(vocabulary=vocabulary).dataset.sha256 for vocabulary in (280, 281, 280)}
    monkeypatch.setattr(django_docs, "load_embedded", lambda: pages(seed=1))
    sums.add(make().dataset.sha256)
    assert len(sums) == len(list((tmp_path / "django-docs-embedded").glob("tokens-*"))) == 3


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_recipes_are_read(scale):
    recipe = load_recipe("gpt-text", scale)
    assert recipe.run.reference == "adamw"
    assert (recipe.run.clip_norm, recipe.run.decay) == (1.0, "matrices")
    assert {"adamw", "ngplus-adamw"} <= set(recipe.optimizers)


def test_the_papers_scale_is_gpt2_small_as_nanogpt_trains_it():
    recipe = load_recipe("gpt-text", "paper")
    chosen = recipe.task_settings
    assert chosen["context"] * chosen["batch_size"] * recipe.run.accumulate == 491_520
    assert recipe.run.epochs * chosen["epoch_steps"] / recipe.run.accumulate == 600_000
    assert recipe.optimizers["adamw"].schedule.warmup_epochs * chosen["epoch_steps"] / recipe.run.accumulate == 2_000
