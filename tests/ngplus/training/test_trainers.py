"""Loops that others wrote, which only need the `Optimizer` interface: Lightning and the Trainer of transformers."""

import copy
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ngplus import NGPlus
from tests.ngplus.cases import seed_cpu
from tests.ngplus.training.problems import SETTINGS, Problem, distance, flat, perceptron

os.environ.setdefault("HF_HUB_OFFLINE", "1")
lightning = pytest.importorskip("pytorch_lightning")
lightning_fabric = pytest.importorskip("lightning_fabric")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
BATCH = 3
STEADY = {**SETTINGS, "update_every": 3, "ema": 0.5, "momentum": 0.9}


# Wrappers around the optimizer ----------------------------------------------------------------------------------------

OWNERS = torch.tensor([0, 0, 1, 2, 2, 2])
"""The sample that each row of a batch belongs to."""


def curvature_of_grouped_rows() -> Tensor:
    """(λI + R)⁻¹ of the first layer, from the mean gradient of each of three samples."""
    problem = perceptron(samples=6)
    optimizer = NGPlus(problem.model, **SETTINGS)
    optimizer.sample_index = OWNERS
    problem.loss(problem.model).backward()
    optimizer.step()
    return optimizer.curvature["0.weight"].tensors()[0]


def test_under_accelerate_a_sample_index_is_set_on_the_optimizer_inside():
    problem = perceptron(samples=6)
    accelerator = accelerate.Accelerator(cpu=True)
    model, prepared = accelerator.prepare(problem.model, NGPlus(problem.model, **SETTINGS))
    assert prepared.optimizer.curvature_is_due
    prepared.optimizer.sample_index = OWNERS
    accelerator.backward(problem.loss(model))
    prepared.step()
    [kept] = prepared.optimizer.curvature["0.weight"].tensors()
    assert torch.equal(kept, curvature_of_grouped_rows())
    plain = perceptron(samples=6)
    plain.train(optimizer := NGPlus(plain.model, **SETTINGS), 1)
    assert not torch.allclose(kept, optimizer.curvature["0.weight"].tensors()[0], rtol=0.01)


class GroupedRows(lightning.LightningModule):
    """Says of each row of a batch which sample it belongs to."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.problem = perceptron(samples=6)
        self.model = self.problem.model
        self.inside = inside
        self.automatic_optimization = False

    def training_step(self, _batch: Tensor, _index: int) -> None:
        wrapper = self.optimizers()
        assert wrapper.curvature_is_due
        (wrapper.optimizer if self.inside else wrapper).sample_index = OWNERS
        self.manual_backward(self.problem.loss(self.model))
        wrapper.step()

    def configure_optimizers(self) -> NGPlus:
        self.made = NGPlus(self.model, **SETTINGS)
        return self.made

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(1))


@pytest.mark.parametrize("inside", [False, True])
def test_under_lightning_a_sample_index_may_be_set_on_either(inside, tmp_path):
    module = GroupedRows(inside)
    fit(module, tmp_path, max_epochs=1)
    assert torch.equal(module.made.curvature["0.weight"].tensors()[0], curvature_of_grouped_rows())


def fabric_wrapper(optimizer: NGPlus) -> torch.optim.Optimizer:
    return lightning_fabric.Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


def lightning_wrapper(optimizer: NGPlus) -> torch.optim.Optimizer:
    wrapper = lightning.core.optimizer.LightningOptimizer(optimizer)
    wrapper._strategy = lightning.strategies.SingleDeviceStrategy(torch.device("cpu"))
    wrapper._strategy.optimizer_step = lambda inside, closure, **_: inside.step()
    return wrapper


def add_group(optimizer: torch.optim.Optimizer, model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3, dtype=torch.float64))
    optimizer.add_param_group({"params": list(model[-1].parameters()), "lr": 0.01})


ON_WRAPPERS = {
    "a loss reduction": lambda optimizer, _: setattr(optimizer, "loss_reduction", 2),
    "what is kept is looked at": lambda optimizer, _: len(optimizer.state),
    "a state in place of another": lambda optimizer, _: setattr(optimizer, "state", defaultdict(dict)),
    "groups in place of others": lambda optimizer, _: setattr(
        optimizer, "param_groups", [{**group, "lr": 0.01} for group in optimizer.param_groups]
    ),
    "a group more": add_group,
    "a state dict": lambda optimizer, _: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "a scheduler": lambda optimizer, _: torch.optim.lr_scheduler.StepLR(optimizer, 1),
}


@pytest.mark.parametrize("basis", [None, "eigen"])
@pytest.mark.parametrize("action", ON_WRAPPERS)
@pytest.mark.parametrize("wrap", [fabric_wrapper, lightning_wrapper])
def test_what_is_done_to_a_wrapper_reaches_the_optimizer(wrap, action, basis):
    found = []
    for wrapped in (False, True):
        problem = perceptron()
        made = NGPlus(problem.model, torch.optim.AdamW, lr=0.02, damping=0.3, update_every=1, basis=basis)
        optimizer = wrap(made) if wrapped else made
        problem.train(optimizer, 2)
        ON_WRAPPERS[action](optimizer, problem.model)
        problem.train(optimizer, 2)
        found.append(flat(problem.model))
        assert not any("ngplus" in name for entries in made.base.state.values() for name in entries)
    assert torch.equal(*found)


class Noted:
    """Has another optimizer, and an answer to every name."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.5)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class NotedNGPlus(Noted, NGPlus):
    """No wrapper, though a class that is no optimizer comes first."""


class WatchedNGPlus(Noted, NGPlus):
    """Sets its attributes itself."""

    seen: ClassVar[list[str]] = []

    def __setattr__(self, name: str, value: object) -> None:
        self.seen.append(name)
        super().__setattr__(name, value)


@pytest.mark.parametrize("kind", [NotedNGPlus, WatchedNGPlus])
def test_a_subclass_with_another_class_in_front_keeps_what_it_sets(kind):
    problem = perceptron()
    optimizer = kind(problem.model, **SETTINGS)
    problem.train(optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.loss_reduction = "sum"
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer._optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.loss_reduction == "sum"
    assert kind is NotedNGPlus or "loss_reduction" in WatchedNGPlus.seen


def test_a_wrapper_has_attributes_of_its_own():
    made = NGPlus(perceptron().model, **SETTINGS)
    wrapper = fabric_wrapper(made)
    wrapper.note = "the wrapper's"
    assert not hasattr(made, "note")


# Lightning ------------------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    """A perceptron trained by NG+."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.problem = perceptron(torch.float32, samples=12)
        self.model = self.problem.model
        self.settings = {name: each for name, each in {**STEADY, **settings}.items() if each is not None}

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        inputs, targets = batch
        return Problem(self.model, inputs, targets).loss(self.model)

    def configure_optimizers(self) -> dict:
        optimizer = NGPlus(self.model, **self.settings)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.problem.inputs, self.problem.targets), batch_size=BATCH)


def fit(module: Module, folder, resume: str | None = None, **options) -> lightning.Trainer:
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
        trainer.fit(module, ckpt_path=resume)
    return trainer


def by_hand(epochs: int, accumulate: int = 1, clip: float | None = None) -> nn.Module:
    """The loop that `fit` is to be equal to."""
    module = Module()
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]
    for _ in range(epochs):
        for number, batch in enumerate(module.train_dataloader(), 1):
            (module.training_step(batch, 0) / accumulate).backward()
            if number % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    return module.model


@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, {}),
        ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, {"accumulate": 2, "clip": 0.05}),
    ],
)
def test_lightning_trains_like_a_plain_loop(options, loop, tmp_path):
    module = Module()
    fit(module, tmp_path, **options)
    assert distance(module.model, by_hand(2, **loop)) < 1e-6


class TwoViews(lightning.LightningModule):
    """Calls its encoder twice, on samples of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.problem = perceptron()
        self.net = self.problem.model

    def training_step(self, shift: float) -> Tensor:
        inputs = self.problem.inputs
        return self.net(inputs).square().sum(1).mean() + self.net(inputs * shift).exp().sum(1).mean()


class Parallel(nn.parallel.DistributedDataParallel):
    """It, without processes."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *inputs: float) -> Tensor:
        return self.module(*inputs)


Step = Callable[[float], Tensor]


def redirected_by_lightning(module: TwoViews) -> tuple[nn.Module, Step]:
    redirect, around = lightning.strategies.strategy._ForwardRedirection(), Parallel(module)
    return around, lambda shift: redirect(around, module, "training_step", shift)


def redirected_by_fabric(module: TwoViews) -> tuple[nn.Module, Step]:
    strategy = lightning_fabric.Fabric(accelerator="cpu", devices=1).strategy
    around = lightning_fabric.wrappers._FabricModule(Parallel(module), strategy, module)
    return around, lambda shift: around.training_step(shift)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("redirect", [redirected_by_lightning, redirected_by_fabric])
def test_calls_in_a_training_step_are_calls_of_their_own_where_it_is_run_as_forward(redirect, outer):
    trained = []
    for redirects in (False, True):
        module = TwoViews()
        around, step = redirect(module) if redirects else (module, module.training_step)
        optimizer = NGPlus(around if outer else module, **SETTINGS)
        for _ in range(3):
            step(1.5).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(module)
    assert torch.equal(*map(flat, trained))


def test_lightning_in_mixed_precision_moves_like_full_precision(tmp_path):
    start, mixed, full = Module().model, Module(), Module()
    fit(mixed, tmp_path, max_epochs=1, precision="bf16-mixed")
    fit(full, tmp_path, max_epochs=1)
    assert 0 < distance(mixed.model, full.model, start) < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"base": torch.optim.Adam, "momentum": None, "block_size": 3},
        {"solver": "low_rank", "ema": 0.0},
        {"solver": "sketched", "sketch_size": 2, "ema": 0.0},
    ],
    ids=str,
)
def test_lightning_resumes_from_its_checkpoint_to_the_bit(settings, tmp_path):
    whole, first, second = Module(**settings), Module(**settings), Module(**settings)
    fit(whole, tmp_path, max_epochs=3)
    path = tmp_path / "last.ckpt"
    fit(first, tmp_path, max_epochs=2).save_checkpoint(path)
    trainer = fit(second, tmp_path, resume=str(path), max_epochs=3)
    assert torch.equal(flat(second.model), flat(whole.model))
    assert not torch.equal(flat(first.model), flat(whole.model))
    assert trainer.optimizers[0].state_dict()["param_groups"][0]["ngplus"]["steps"] == 12


# The Trainer of transformers ------------------------------------------------------------------------------------------


def tiny_bert() -> nn.Module:
    seed_cpu(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    # Its loss is a mean over a micro-batch whatever `Trainer` passes to it: without this, `Trainer` does not divide
    # the losses of accumulated micro-batches by their number, so that their sum is no mean.
    model.accepts_loss_kwargs = False
    return model


def sentences() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(32, (12, 6), generator=generator), torch.randint(3, (12,), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(tokens, labels, strict=True)
    ]


def run_trainer(folder, resume: bool = False, **options) -> tuple[nn.Module, NGPlus]:
    model = tiny_bert()
    optimizer = NGPlus(model, **STEADY)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        lr_scheduler_type="constant",
        logging_strategy="no",
        **{"max_steps": 6, "save_strategy": "no", **options},
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=sentences(), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume or None)
    return model, optimizer


def test_the_trainer_of_transformers_trains_every_layer(tmp_path):
    start = tiny_bert()
    model, optimizer = run_trainer(tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not torch.equal(flat(model), flat(start))
    assert {"bert.embeddings.word_embeddings.weight", "classifier.weight"} < set(optimizer.curvature)
    assert len(optimizer.curvature) == 11
    assert optimizer.state_dict()["param_groups"][0]["ngplus"]["steps"] == 6


def test_the_trainer_of_transformers_accumulates_and_clips_like_a_plain_loop(tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "max_steps": 2}
    model, _ = run_trainer(tmp_path, train_sampling_strategy="sequential", **options)
    expected = tiny_bert()
    optimizer = NGPlus(expected, **STEADY)
    for number, batch in enumerate(DataLoader(sentences(), batch_size=BATCH), 1):
        (expected(**batch).loss / 2).backward()
        if number % 2 == 0:
            nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    assert distance(model, expected, tiny_bert()) < 1e-4


def test_the_trainer_of_transformers_resumes_from_its_checkpoint_to_the_bit(tmp_path):
    whole, _ = run_trainer(tmp_path / "whole")
    cut, _ = run_trainer(tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=4)
    resumed, optimizer = run_trainer(tmp_path / "cut", resume=True)
    assert torch.equal(flat(resumed), flat(whole))
    assert not torch.equal(flat(cut), flat(whole))
    assert optimizer.state_dict()["param_groups"][0]["ngplus"]["steps"] == 6
