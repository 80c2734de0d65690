"""The translation task on made-up text: fairseq's batches, loss and search, and what NG+ sees of its model."""

import math

import pytest
import torch
from torch import nn

from experiments.config.recipe import load_recipe
from experiments.data_io.checksum import DataFileError
from experiments.data_io.text.fairseq_folder import write_folder
from experiments.data_io.text.fairseq_library import LabelSmoothedCrossEntropyCriterion, utils
from experiments.dataclass_io import SettingsError
from experiments.tasks.transformer import libreoffice_help
from experiments.tasks.transformer.transformer_iwslt14 import TransformerIWSLT14
from experiments.tasks.transformer.translation import SearchSettings
from ngplus import NGPlus
from tests.experiments.cases import sentences

MODEL = {"layers": 2, "dim": 8, "ffn_dim": 12, "heads": 2, "dropout": 0.0, "attention_dropout": 0.0,
         "activation_dropout": 0.0}  # fmt: skip
SETTINGS = {
    "data": "libreoffice-help-embedded",
    "max_tokens": 90,
    "corpus": {"merges": 30, "validation_size": 12, "test_size": 13},
    "model": MODEL,
    "search": {"beam": 2, "sentences": 6},
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def make(data_dir, monkeypatch):
    """The task on 100 made-up pairs, with other settings."""
    monkeypatch.setattr(libreoffice_help, "load_embedded", lambda: sentences.pairs(100))
    return lambda **changed: TransformerIWSLT14(SETTINGS | changed, scale="tiny", data_dir=data_dir)


@pytest.fixture
def task(make):
    return make()


@pytest.fixture(autouse=True)
def float64_softmax(monkeypatch):
    """Softmax in the model's own precision: fairseq makes it float32 whatever the model is."""
    for name in ("softmax", "log_softmax"):
        own = getattr(nn.functional, name)
        monkeypatch.setattr(utils, name, lambda x, dim, onnx_trace=False, own=own: own(x, dim=dim))


def model_of(task, dtype=torch.float64):
    torch.manual_seed(0)
    model = task.build_model().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first, where a wrong column would not show
            nn.init.normal_(parameter, std=0.1)
    return model


# --- batches


def ids(batches):
    return [batch["id"].tolist() for batch in batches]


def sentences_of(batches):
    return [number for batch in ids(batches) for number in batch]


def test_every_sentence_is_in_one_batch_of_at_most_max_tokens(task):
    batches = list(task.train_batches(0, seed=1))
    assert len(batches) == task.steps_per_epoch()
    assert sorted(sentences_of(batches)) == list(range(task.dataset.train_size))
    for batch in batches:
        assert batch["target"].numel() <= 90
        assert batch["net_input"]["src_tokens"].numel() <= 90
        assert batch["ntokens"] == int((batch["target"] != 1).sum())


def test_the_order_of_batches_depends_on_seed_and_epoch_alone(task, make):
    first = ids(task.train_batches(2, seed=1))
    torch.manual_seed(99)
    assert ids(make().train_batches(2, seed=1)) == first
    for epoch, seed in ((3, 1), (2, 2)):
        other = ids(task.train_batches(epoch, seed=seed))
        assert other != first
        assert sorted(other) == sorted(first)


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_ranks_share_each_batch_and_their_mean_loss_is_that_of_one_process(task, world_size):
    model = model_of(task)
    alone = [task.loss(model, batch).item() for batch in task.train_batches(0, seed=1)]
    parts = [list(task.train_batches(0, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for number, expected in enumerate(alone):
        mean = sum(task.loss(model, part[number]).item() for part in parts) / world_size
        assert mean == pytest.approx(expected, rel=1e-12)


# --- loss and evaluation


def test_the_loss_is_the_label_smoothed_mean_over_real_tokens(task):
    model = model_of(task)
    batch = next(task.train_batches(0, seed=1))
    logits, _ = model(**batch["net_input"])
    real = batch["target"] != 1
    logs = logits[real].log_softmax(-1)
    classes = logs.shape[-1]
    nll = -logs.gather(1, batch["target"][real][:, None]).squeeze(1)
    weight = 0.1 / (classes - 1)  # fairseq's: what the target itself gets of the smoothing is taken off again
    expected = ((1 - 0.1 - weight) * nll - weight * logs.sum(-1)).mean()
    assert task.loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-12)


def test_evaluation_is_a_mean_over_all_tokens_of_the_split(task):
    model = model_of(task).eval()
    criterion = LabelSmoothedCrossEntropyCriterion(task._task, sentence_avg=False, label_smoothing=0.0)
    dataset = task._task.datasets["valid"]
    with torch.no_grad():
        logs = [criterion(model, dataset.collater([dataset[i]])) for i in range(len(dataset))]
        evaluation = task.evaluate(model, "validation")
    total, tokens = sum(float(loss) for loss, *_ in logs), sum(count for _, count, _ in logs)
    assert len(dataset) == 12
    assert evaluation.metric == pytest.approx(total / tokens, rel=1e-10)
    assert evaluation.loss != pytest.approx(evaluation.metric, rel=1e-4)


def test_a_model_that_has_diverged_has_no_bleu(task):
    model = model_of(task).eval()
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(math.nan)
        evaluation = task.evaluate(model, "validation")
    assert math.isnan(evaluation.loss)
    assert set(evaluation.others) == {"BLEU", "BLEU/tokens"}
    assert all(map(math.isnan, evaluation.others.values()))


def test_an_untrained_model_knows_nothing(task):
    evaluation = task.evaluate(model_of(task, torch.float32).eval(), "test")
    assert evaluation.metric == pytest.approx(math.log(len(task._task.target_dictionary)), rel=0.3)
    assert set(evaluation.others) == {"BLEU", "BLEU/tokens"}
    assert evaluation.others["BLEU"] < 20


def test_a_trained_model_translates(make):
    task = make(model=MODEL | {"layers": 1, "dim": 32, "ffn_dim": 64})
    model = model_of(task, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = task.evaluate(model.eval(), "test")
    model.train()
    for epoch in range(25):
        for batch in task.train_batches(epoch, seed=1):
            task.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    after = task.evaluate(model.eval(), "test")
    assert after.metric < 0.6 * before.metric
    assert after.others["BLEU"] > before.others["BLEU"] + 3


def test_the_references_are_plain_text_again(task, monkeypatch):
    """A search that finds the reference itself has BLEU 100, with subwords joined and all sentences in place."""
    monkeypatch.setattr(
        "experiments.tasks.transformer.translation.SequenceGenerator.generate",
        lambda _, models, batch: [[{"tokens": row[row != 1]}] for row in batch["target"]],
    )
    others = task.evaluate(model_of(task).eval(), "test").others
    assert others == pytest.approx({"BLEU": 100.0, "BLEU/tokens": 100.0})


@pytest.mark.parametrize(("asked", "size", "chosen"), [(3, 5, [0, 2, 4]), (9, 3, [0, 1, 2]), (None, 3, [0, 1, 2])])
def test_the_sentences_to_translate_are_spread_over_the_split(asked, size, chosen):
    assert SearchSettings(sentences=asked).chosen(size).tolist() == chosen


# --- the model


def test_initial_weights_depend_on_torchs_generator_alone(task):
    first, second = model_of(task).state_dict(), model_of(task).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_papers_model_is_pre_norm_and_shares_the_decoders_embeddings(task, make):
    recipe = load_recipe("transformer-iwslt14", "paper")
    model = make(model=dict(recipe.task_settings["model"])).build_model()
    layer = model.decoder.layers[5]
    assert len(model.encoder.layers) == len(model.decoder.layers) == 6
    assert (layer.fc1.weight.shape, layer.self_attn.num_heads) == ((1024, 512), 4)
    assert layer.normalize_before
    assert model.encoder.layers[0].normalize_before
    assert (layer.dropout_module.p, layer.activation_dropout_module.p, layer.self_attn.dropout_module.p) == (
        0.3,
        0.1,
        0.1,
    )
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
    assert model.encoder.embed_tokens.weight is not model.decoder.embed_tokens.weight


# --- what NG+ sees of it


def padded_batch(task):
    """A batch with padding on both sides."""
    dataset = task._task.datasets["train"]
    lengths = dataset.tgt_sizes.argsort()
    batch = dataset.collater([dataset[int(i)] for i in (lengths[0], lengths[1], lengths[-1])])
    assert (batch["target"] == 1).any()
    assert (batch["net_input"]["src_tokens"] == 1).any()
    return batch | {"loss_scale": 1 / batch["ntokens"]}


def single_sentences(task, batch):
    dataset = task._task.datasets["train"]
    return [dataset.collater([dataset[i]]) | {"loss_scale": 1 / batch["ntokens"]} for i in batch["id"].tolist()]


def direction(model, task, batch, samples, **options):
    """The gradients that a step of NG+ leaves, by name."""
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, samples=samples, **options)
    optimizer.sample_index = task.sample_index(batch)
    scale = batch["ntokens"] if options.get("loss_reduction") == "sum" else 1
    (task.loss(model, batch) * scale).backward()
    for parameter in model.parameters():  # as fairseq's trainer does behind the backward pass
        parameter.grad /= scale
    optimizer.step()
    found = {layer.name: layer for layer in optimizer._layers}
    assert set(optimizer.curvature) == set(found)
    return {name: matrix(layer.weight, layer.bias) for name, layer in found.items()}


def matrix(weight, bias):
    return weight.grad.clone() if bias is None else torch.cat([weight.grad, bias.grad[:, None]], dim=1)


def solved(G, samples):
    """(λI + L)⁻¹G of (6), or with R, from the samples' gradients: a dense solve."""
    m, n = G.shape
    moment = sum(g @ g.T if m <= n else g.T @ g for g in samples) / len(samples)
    damped = moment + 0.3 * torch.eye(len(moment), dtype=G.dtype)
    return torch.linalg.solve(damped, G) if m <= n else torch.linalg.solve(damped, G.T).T


def assert_close(found, expected):
    assert set(found) == set(expected)
    for name, D in expected.items():
        assert (found[name] - D).norm() <= 1e-9 * D.norm(), name


@pytest.mark.parametrize("shared", [True, False])
def test_a_sentence_as_sample_is_the_gradient_of_that_sentence_alone(make, shared):
    task = make(model=MODEL | {"share_decoder_embeddings": shared})
    model, batch = model_of(task), padded_batch(task)
    layers = {layer.name: (layer.weight, layer.bias) for layer in NGPlus(model)._layers}
    samples = {name: [] for name in layers}
    for sentence in single_sentences(task, batch):
        model.zero_grad()
        (task.loss(model, sentence) * len(batch["id"])).backward()
        for name, layer in layers.items():
            samples[name].append(matrix(*layer))
    expected = {name: solved(sum(own) / len(own), own) for name, own in samples.items()}
    model.zero_grad()
    assert_close(direction(model, task, batch, "batch"), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_token_as_sample_is_one_row_of_one_sentence(make, shared, reduction):
    """Every use of a weight by a real token is a sample; of the sum of the losses, as fairseq's own trainer has it,
    its gradient is taken as it is, of their mean it is taken N times, N the number of samples of the weight.
    """
    task = make(model=MODEL | {"share_decoder_embeddings": shared})
    model, batch = model_of(task), padded_batch(task)
    layers = {id(layer.weight): layer for layer in NGPlus(model)._layers}
    rows, gradients = token_rows(task, model, batch, layers)
    expected = {}
    for name, G in gradients.items():
        scale = len(rows[name]) if reduction == "mean" else batch["ntokens"]
        expected[name] = solved(G, [scale * row for row in rows[name]])
    model.zero_grad()
    assert_close(direction(model, task, batch, "rows", loss_reduction=reduction), expected)


def token_rows(task, model, batch, layers):
    """What each row of a layer's input and output adds to the gradient, from sentences without padding.

    fairseq's attention is taken off torch's one function, so that its linear layers are called and their hooks run.
    """
    rows = {layer.name: [] for layer in layers.values()}
    calls = []
    attentions = [module for module in model.modules() if hasattr(module, "onnx_trace") and hasattr(module, "q_proj")]

    def record(module, args, output):
        if id(getattr(module, "weight", None)) not in layers:
            return output
        output.retain_grad()
        calls.append((module, args[0].detach(), output))
        return output.clone()  # attention scales its queries in place

    handles = [module.register_forward_hook(record) for module in model.modules()]
    model.zero_grad()
    for module in attentions:
        module.onnx_trace = True
    for sentence in single_sentences(task, batch):
        calls.clear()
        task.loss(model, sentence).backward()
        for module, source, output in calls:
            layer = layers[id(module.weight)]
            rows[layer.name] += list(one_row_each(module, layer, source, output.grad))
    for module in attentions:
        module.onnx_trace = False
    for handle in handles:
        handle.remove()
    return rows, {layer.name: matrix(layer.weight, layer.bias) for layer in layers.values()}


def one_row_each(module, layer, source, gradient):
    gradient = gradient.reshape(-1, gradient.shape[-1])
    if isinstance(module, nn.Embedding):
        return (
            torch.zeros_like(module.weight).index_put((index,), g).detach()
            for index, g in zip(source.flatten(), gradient, strict=True)
        )
    source = source.reshape(-1, source.shape[-1])
    if layer.bias is not None:
        source = nn.functional.pad(source, (0, 1), value=1.0)
    return (torch.outer(g, a) for g, a in zip(gradient, source, strict=True))


# --- settings and data


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0"),
        ({"corpus": None}, "corpus: must be left out for data = 'iwslt14'"),
        ({"data": "iwslt14"}, "corpus: must be left out for data = 'iwslt14'"),
        ({"model": MODEL | {"heads": 3}}, "dim = 8: must be a multiple of heads = 3"),
        ({"model": MODEL | {"dropout": 1.5}}, "dropout = 1.5"),
        ({"search": {"beam": 0}}, "beam = 0"),
        ({"search": {"sentences": 0}}, "sentences = 0"),
        ({"corpus": SETTINGS["corpus"] | {"test_size": 1000}}, "test_size = 1000: there are only 100 pairs"),
    ],
)
def test_a_setting_out_of_range_is_named(make, changed, message):
    with pytest.raises(SettingsError, match=message):
        make(**changed)


def test_a_sentence_longer_than_max_tokens_is_named(make):
    with pytest.raises(
        DataFileError, match=r"train split: \d+ sentence pairs are longer than max_tokens = 20 .*pair \d"
    ):
        make(max_tokens=20)


@pytest.fixture
def folder(tmp_path):
    """A data folder with an IWSLT14 of fairseq's, of which some sentences are empty."""
    pairs = [*sentences.translations(30), ("", "the ."), ("der .", "")]
    write_folder(dict.fromkeys(("train", "valid", "test"), pairs), tmp_path / "iwslt14", {}, codes="")
    return tmp_path


def test_a_folder_of_fairseqs_is_taken_as_it_is_and_empty_sentences_are_counted(folder):
    settings = {"data": "iwslt14", "max_tokens": 90, "model": MODEL}
    with pytest.warns(UserWarning, match="empty side: 2 of train, 2 of valid, 2 of test; training leaves them out"):
        task = TransformerIWSLT14(settings, scale="paper", data_dir=folder)
    assert task.dataset.name == "de-en folder of fairseq-preprocess, 32 pairs"
    assert task.dataset.train_size == 30
    assert not {30, 31} & set(sentences_of(task.train_batches(0, seed=1)))


def test_data_that_is_not_there_is_named_with_what_fetches_it(tmp_path):
    settings = {"data": "iwslt14", "max_tokens": 90, "model": MODEL}
    with pytest.raises(DataFileError, match="make data-iwslt14 RAW="):
        TransformerIWSLT14(settings, scale="paper", data_dir=tmp_path)
    with pytest.raises(DataFileError, match="make data-ding"):
        TransformerIWSLT14(SETTINGS | {"data": "ding"}, scale="small", data_dir=tmp_path)


def test_the_tables_name_what_was_used(task):
    assert task.dataset.name.startswith("LibreOffice help de-en, ")
    assert task.dataset.name.endswith(" embedded pairs")
    assert task.dataset.licence == "MPL-2.0"


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_recipes_are_read(scale):
    recipe = load_recipe("transformer-iwslt14", scale)
    assert recipe.run.reference == "adam"
    assert {"adam", "ngplus-adam"} <= set(recipe.optimizers)


def test_another_runs_data_is_another_checksum(make, data_dir, monkeypatch):
    first = make().dataset
    monkeypatch.setattr(libreoffice_help, "load_embedded", lambda: sentences.pairs(100, seed=1))
    second = make().dataset
    assert first.sha256 != second.sha256
    assert len(list((data_dir / "libreoffice-help-embedded").glob("fairseq-*"))) >= 2
