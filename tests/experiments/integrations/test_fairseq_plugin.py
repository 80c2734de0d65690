"""NG+ in fairseq's own commands: trained, resumed and translated with for real, on made-up text."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq.optim.amp_optimizer import AMPOptimizer
from torch import nn

from experiments.data_io.text.text_corpus import CorpusSettings, corpus_folder
from experiments.integrations.fairseq_plugin import TranslationWithNGPlus
from experiments.integrations.fairseq_plugin import fairseq_optimizer as plugin
from experiments.records.provenance import REPOSITORY
from tests.experiments.cases import sentences

BINARIES = Path(sys.executable).parent
PLUGIN = f"--user-dir={REPOSITORY / 'experiments' / 'integrations' / 'fairseq_plugin'}"
NGPLUS = ["--optimizer=ngplus", "--ngplus-update-every=5", "--ngplus-damping=0.2", "--ngplus-damping-rate=0.5",
          "--ngplus-damping-epochs=2"]  # fmt: skip
TRAINING = ["--task=translation_ngplus", "--arch=transformer_tiny", "--share-decoder-input-output-embed",
            "--criterion=label_smoothed_cross_entropy", "--label-smoothing=0.1", "--lr=5e-3", "--max-tokens=300",
            "--lr-scheduler=inverse_sqrt", "--warmup-updates=10", "--cpu", "--num-workers=0", "--clip-norm=5",
            "--log-format=simple", "--required-batch-size-multiple=1", "--no-epoch-checkpoints"]  # fmt: skip


def run(command, *arguments, elsewhere):
    """What a fairseq command printed; it is run outside of the repository, as its users do."""
    done = subprocess.run(
        [BINARIES / command, *arguments], cwd=elsewhere, capture_output=True, text=True, check=False, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


def losses(log):
    """The training loss after each epoch."""
    found = re.findall(r"train \| epoch (\d+) \| loss ([0-9.]+)", log)
    return {int(epoch): float(loss) for epoch, loss in found}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs: its folder, its command and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    settings = CorpusSettings(merges=30, validation_size=11, test_size=13)
    corpus = corpus_folder(sentences.pairs(300), settings, folder).path
    command = [corpus, PLUGIN, *TRAINING, *NGPLUS, f"--save-dir={folder / 'saved'}"]
    status, log = run("fairseq-train", *command, "--max-epoch=2", elsewhere=folder)
    assert status == 0, log[-3000:]
    return folder, command, log


@pytest.mark.slow
def test_another_architectures_checkpoint_is_refused(trained):
    folder, command, _ = trained
    status, log = run("fairseq-train", *command, "--max-epoch=3", "--encoder-layers=1", elsewhere=folder)
    assert status != 0
    assert "please ensure that the architectures match" in log


@pytest.mark.slow
def test_training_resuming_and_translating(trained):
    folder, command, log = trained
    status, resumed = run("fairseq-train", *command, "--max-epoch=4", elsewhere=folder)
    assert status == 0, resumed[-3000:]
    assert re.search(r"Loaded checkpoint .*checkpoint_last\.pt \(epoch 3 @ \d+ updates\)", resumed)
    assert list(losses(log) | losses(resumed)) == [1, 2, 3, 4]
    assert losses(resumed)[4] < losses(resumed)[3] < losses(log)[2] < losses(log)[1]
    last = folder / "saved" / "checkpoint_last.pt"
    check_state(torch_load(last))

    translate = [command[0], PLUGIN, f"--path={last}", "--beam=2", "--remove-bpe", "--scoring=sacrebleu", "--cpu"]
    status, log = run("fairseq-generate", *translate, "--required-batch-size-multiple=1", elsewhere=folder)
    assert status == 0, log[-3000:]
    assert re.search(r"Translated 13 sentences", log)
    assert re.search(r"^Generate test with beam=2: BLEU = \d", log, re.MULTILINE)


def torch_load(path):
    """A checkpoint, nothing of it run: what the plugin allows is all that it needs."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def check_state(checkpoint):
    """The optimizer went on where it was: its steps are all counted, its damping is that of the last curvature."""
    state = checkpoint["last_optimizer_state"]
    updates = checkpoint["optimizer_history"][-1]["num_updates"]
    group = state["param_groups"][0]
    assert group["ngplus"]["steps"] == updates
    assert group["damping"] == pytest.approx(0.2 * 0.5 ** (3 / 2))
    layers = [entries for entries in state["state"].values() if "ngplus_matrix" in entries]
    weights = checkpoint["model"]
    for name, bias in (("decoder.embed_tokens.weight", 0), ("encoder.layers.0.self_attn.q_proj.weight", 1)):
        rows, columns = weights[name].shape
        assert [1, rows, columns + bias, 0] in [entries["ngplus_matrix"].tolist() for entries in layers], name
    assert {entries["ngplus_updates"] for entries in layers} == {-(-updates // 5)}


@pytest.mark.slow
def test_a_task_that_hides_the_model_is_refused_with_what_to_change(tmp_path):
    settings = CorpusSettings(merges=30, validation_size=8, test_size=8)
    corpus = corpus_folder(sentences.pairs(60), settings, tmp_path).path
    save = f"--save-dir={tmp_path / 'saved'}"
    status, log = run(
        "fairseq-train", corpus, PLUGIN, *TRAINING, *NGPLUS, save, "--task=translation", elsewhere=tmp_path
    )
    assert status != 0
    assert "use --task translation_ngplus" in log


@pytest.mark.filterwarnings("ignore:.*GradScaler")  # deprecated, and of no use without a GPU, says torch of fairseq's
def test_a_scaled_loss_is_refused(model):
    made = plugin.FairseqNGPlus(config(), model.parameters())
    common = argparse.Namespace(fp16_init_scale=4, min_loss_scale=1e-4)
    scaled = AMPOptimizer(argparse.Namespace(common=common, optimizer=None), list(model.parameters()), made)
    with pytest.raises(ValueError, match="leave out --fp16, --bf16 and --amp"):
        TranslationWithNGPlus.train_step(None, {}, model, None, scaled, 0)


def config(**changed):
    return plugin.NGPlusConfig(lr=[0.01], **changed)


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    plugin.remember(model)
    return model


@pytest.mark.parametrize(
    ("base", "kind", "options"),
    [
        ("adam", torch.optim.AdamW, {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 1e-4}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-4}),
    ],
)
def test_the_base_is_what_the_arguments_say(model, base, kind, options):
    made = plugin.FairseqNGPlus(config(ngplus_base=base), model.parameters())
    assert type(made.optimizer.base) is kind
    group = made.param_groups[0]
    assert {name: group[name] for name in options} == options
    assert (group["lr"], group["damping"]) == (0.01, 0.3)


def test_the_damping_falls_from_epoch_to_epoch(model):
    made = plugin.FairseqNGPlus(config(), model.parameters())
    dampings = []
    for epoch in (1, 2, 11):
        made.begin_epoch(epoch)
        dampings.append(made.param_groups[0]["damping"])
    assert dampings == pytest.approx([0.3, 0.3 * 0.87**0.1, 0.3 * 0.87])


@pytest.mark.parametrize("samples", ["token", "sentence"])
def test_gradients_divided_behind_the_backward_pass_leave_the_curvature_that_of_the_sum(model, samples):
    settings = config(ngplus_base="sgd", ngplus_momentum=0.0, weight_decay=0.0, ngplus_samples=samples)
    made = plugin.FairseqNGPlus(settings, model.parameters())
    sentence = torch.tensor([0, 0, 1, 0, 1, 1])
    made.optimizer.sample_index = {"*": sentence}
    layer, x, y = model[2], torch.randn(6, 3), torch.randn(6, 2)
    inputs = torch.cat([model[1](model[0](x)), torch.ones(6, 1)], dim=1).detach()
    output = model(x)
    (gradient,) = torch.autograd.grad((output - y).square().sum(), output, retain_graph=True)
    tokens = torch.stack([torch.outer(g, a) for g, a in zip(gradient, inputs, strict=True)])
    parts = tokens if samples == "token" else torch.stack([tokens[sentence == 0].sum(0), tokens[sentence == 1].sum(0)])
    made.backward((output - y).square().sum())
    made.multiply_grads(1 / 6)
    before = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().clone()
    made.step()
    moved = before - torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
    L = sum(part @ part.T for part in parts) / len(parts)
    expected = 0.01 * torch.linalg.solve(L + 0.3 * torch.eye(2), tokens.sum(0) / 6)
    assert torch.allclose(moved, expected, rtol=1e-4, atol=1e-7)


def test_parameters_of_no_model_are_refused():
    with pytest.raises(ValueError, match="use --task translation_ngplus"):
        plugin.recall_model([nn.Parameter(torch.zeros(2))])
