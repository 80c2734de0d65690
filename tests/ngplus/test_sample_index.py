"""Rows that belong to samples by an index, as atoms do to molecules, against one molecule at a time."""

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from ngplus.capture.sample_index import drop_uncounted_rows, group_rows
from ngplus.curvature.second_moment import second_moment
from ngplus.factors.dense import Dense
from ngplus.factors.im2col import Patches
from ngplus.factors.pair import FactorPair
from ngplus.layers import MatrixShape
from ngplus.tuning import Tuning
from tests.ngplus import oracle
from tests.ngplus.allocations import peak_elements
from tests.ngplus.cases import seed_cpu

ATOMS = [3, 1, 4, 2]
MOLECULE = torch.arange(len(ATOMS)).repeat_interleave(torch.tensor(ATOMS))


class Network(nn.Module):
    """Atoms and pairs of atoms of several molecules in long lists, one energy a molecule."""

    def __init__(self):
        super().__init__()
        self.kind = nn.Embedding(5, 3)
        self.atom = nn.Linear(3, 6)
        self.filter = nn.Linear(2, 6)
        self.interaction = nn.Linear(6, 4)
        self.energy = nn.Linear(4, 1)

    def forward(self, kinds, pairs, features, molecule, molecules):
        atoms = self.atom(self.kind(kinds)).tanh()
        messages = atoms[pairs[1]] * self.filter(features)
        atoms = atoms.index_add(0, pairs[0], messages)
        energies = self.energy(self.interaction(atoms).tanh()).squeeze(1)
        return energies.new_zeros(molecules).index_add(0, molecule, energies)


def batch(seed=0, shuffle=False):
    generator = torch.Generator().manual_seed(seed)
    atoms = len(MOLECULE)
    molecule = MOLECULE[torch.randperm(atoms, generator=generator)] if shuffle else MOLECULE
    kinds = torch.randint(5, (atoms,), generator=generator)
    same = molecule[:, None] == molecule[None, :]
    pairs = (same & ~torch.eye(atoms, dtype=torch.bool)).nonzero().T
    features = torch.randn(pairs.shape[1], 2, generator=generator, dtype=torch.float64)
    return kinds, pairs, features, molecule, len(ATOMS)


def one_molecule(number, kinds, pairs, features, molecule, _molecules):
    atoms = (molecule == number).nonzero().squeeze(1)
    place = torch.full((len(molecule),), -1)
    place[atoms] = torch.arange(len(atoms))
    inside = molecule[pairs[0]] == number
    return kinds[atoms], place[pairs[:, inside]], features[inside], torch.zeros(len(atoms), dtype=torch.long), 1


def index_of(kinds, pairs, features, molecule, molecules):
    return {"filter": molecule[pairs[0]], "*": molecule}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("options", [{}, {"block_size": 2}, {"max_samples": 3}, {"ema": 0.5}])
def test_a_molecule_is_one_sample(options, shuffle):
    seed_cpu(0)
    model = Network().double()
    inputs = batch(shuffle=shuffle)
    losses = [lambda m, i=i: oracle.energy(m(*one_molecule(i, *inputs))) for i in range(len(ATOMS))]
    gradients = oracle.sample_gradients(model, losses)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, **options)
    assert optimizer.curvature_is_due
    optimizer.sample_index = index_of(*inputs)
    (oracle.energy(model(*inputs)) / len(ATOMS)).backward()
    optimizer.step()
    expected = oracle.directions(gradients, 0.3, options.get("block_size"), options.get("max_samples"))
    assert oracle.error(model, expected) <= 1e-10


def test_a_tensor_alone_is_the_index_of_every_layer():
    seed_cpu(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    sample = torch.tensor([0, 0, 1, 2, 2, 2])
    gradients = oracle.sample_gradients(model, [lambda m, i=i: oracle.energy(m(x[sample == i])) for i in range(3)])
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    optimizer.sample_index = sample
    (oracle.energy(model(x)) / 3).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_rows_with_a_negative_index_are_no_samples():
    """As padding in a batch of sentences (T, B, C): the real tokens alone make the curvature."""
    seed_cpu(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    real = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 0]]).bool()
    packed = x[real]  # in an order of its own: a sum over samples does not mind
    gradients = oracle.row_gradients(model, lambda m: oracle.energy(m(packed)) / len(packed))
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, samples="rows", batch_dim=1)
    optimizer.sample_index = torch.where(real, 0, -1)
    (oracle.energy(model(x)[real]) / len(packed)).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_sequences_of_several_rows_of_the_batch_form_one_sample():
    """An index of shape (b,) takes all positions of an element to its sample; convolutions have it too."""
    seed_cpu(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 4, 2)).double()
    x = torch.randn(5, 2, 7, dtype=torch.float64)
    sample = torch.tensor([1, 0, 1, 2, 0])
    gradients = oracle.sample_gradients(model, [lambda m, i=i: oracle.energy(m(x[sample == i])) for i in range(3)])
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    optimizer.sample_index = {"*": sample}
    (oracle.energy(model(x)) / 3).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


@pytest.mark.parametrize("limit", [1, 500, 2**30])
@pytest.mark.parametrize("per", ["element", "position"])
@pytest.mark.parametrize("rows", [4, 60])
def test_convolutions_are_grouped_without_storing_their_patches(rows, per, limit):
    tuning = Tuning(curvature_chunk_cpu=limit)
    seed_cpu(0)
    patches = Patches(torch.randn(5, 4, 9, 7, dtype=torch.float64), (3, 3), (2, 1), (1, 1), ((1, 1), (1, 0)), 2, 1.0)
    shape = MatrixShape(groups=2, rows=rows // 2, columns=19)
    kappa = patches.positions
    part = FactorPair(Dense(torch.randn(5, 2, rows // 2, kappa, dtype=torch.float64)), patches)
    index = torch.tensor([2, 0, -1, 2, 1]) if per == "element" else torch.randint(-1, 3, (5, kappa))
    numbers = index.repeat_interleave(kappa) if per == "element" else index.flatten()
    left, right = (f.dense().permute(0, 3, 1, 2).flatten(0, 1) for f in part[:2])  # (b·κ, groups, ·)
    each = torch.einsum("igm,ign->igmn", left, right)
    short_first = each if shape.side == "left" else each.mT
    grouped = torch.stack([short_first[numbers == sample].sum(dim=0) for sample in range(3)])
    (by_sample,) = second_moment(shape, [group_rows(part, index, 0, 3, "layer")], tuning)
    torch.testing.assert_close(by_sample, (grouped @ grouped.mT).sum(dim=0), rtol=1e-12, atol=1e-10)
    counted = drop_uncounted_rows(part, index, 0, "layer")
    assert counted.rows.samples == int((numbers >= 0).sum())
    (alone,) = second_moment(shape, [counted], tuning)
    kept = short_first[numbers >= 0]
    torch.testing.assert_close(alone, (kept @ kept.mT).sum(dim=0), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("group", [lambda *args: group_rows(*args[:3], 3, args[3]), drop_uncounted_rows])
def test_grouping_a_convolution_takes_a_few_chunks_and_indices(group):
    """Unfolded whole it would be 70 elements for each index."""
    limit = 2**13
    tuning = Tuning(curvature_chunk_cpu=limit)
    patches = Patches(torch.randn(2, 8, 81, 79), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1, 1.0)
    part = FactorPair(Dense(torch.randn(2, 1, 8, patches.positions)), patches)
    index = torch.randint(-1, 3, (2, patches.positions))
    shape = MatrixShape(groups=1, rows=8, columns=73)
    peak = peak_elements(lambda: second_moment(shape, [group(part, index, 0, "layer")], tuning))
    assert peak <= 6 * limit + 20 * index.numel()


def test_layers_that_no_pattern_fits_keep_their_batch_dimension():
    seed_cpu(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    optimizer.sample_index = {"1": torch.zeros(1, dtype=torch.long)}
    (oracle.energy(model(x)) / 6).backward()
    gradients = oracle.sample_gradients(model, oracle.sample_losses(x))
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10
    optimizer.sample_index = None
    assert optimizer.sample_index is None


def test_an_index_that_does_not_fit_names_the_layer_and_both_sizes():
    model = nn.Sequential(nn.Linear(3, 5))
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    optimizer.sample_index = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"0\.weight has shape \(4,\), but .* 6 elements of 1 positions"):
        model(torch.randn(6, 3)).sum().backward()


@pytest.mark.parametrize("wrong", [[0, 1], torch.zeros(3), {"*": [0]}, {0: torch.zeros(3, dtype=torch.long)}])
def test_a_sample_index_of_another_type_is_refused(wrong):
    optimizer = NGPlus(nn.Linear(3, 5), lr=1e-9, damping=0.3, update_every=1)
    with pytest.raises(TypeError, match="sample_index"):
        optimizer.sample_index = wrong


def test_bags_cannot_be_grouped():
    model = nn.EmbeddingBag(4, 3, mode="sum")
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    optimizer.sample_index = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="embedding bag"):
        model(torch.tensor([[0, 1], [2, 3]])).sum().backward()


class Attention(nn.Module):
    """Attention over (T, B, C) by linear layers of its own, called as fairseq does; rows of padding give zero."""

    def __init__(self):
        super().__init__()
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x, padding):
        output, _ = nn.functional.multi_head_attention_forward(
            x, x, x, 4, 2, None, torch.cat([self.query.bias, self.key.bias, self.value.bias]), None, None, False, 0.0,
            self.out.weight, self.out.bias, key_padding_mask=padding, use_separate_proj_weight=True,
            q_proj_weight=self.query.weight, k_proj_weight=self.key.weight, v_proj_weight=self.value.weight,
        )  # fmt: skip
        return output.masked_fill(padding.T.unsqueeze(-1), 0)


@pytest.mark.parametrize("samples", ["rows", "batch"])
def test_padding_inside_attention_is_no_sample(samples):
    seed_cpu(0)
    model = Attention().double()
    x = torch.randn(4, 2, 4, dtype=torch.float64)
    padding = torch.tensor([[False, False, False, False], [False, False, True, True]])  # (B, T)
    short = [(x[:, :1], padding[:1]), (x[:2, 1:], padding[1:, :2])]
    gradients = {
        "rows": lambda: one_token_at_a_time(model, [sentence.squeeze(1) for sentence, _ in short]),
        "batch": lambda: oracle.sample_gradients(model, [lambda m, s=s: oracle.energy(m(*s)) for s in short]),
    }[samples]()
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, samples=samples)
    optimizer.sample_index = torch.where(padding, -1, torch.arange(2)[:, None]).T  # (T, B)
    oracle.energy(model(x, padding)).div({"rows": 6, "batch": 2}[samples]).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def one_token_at_a_time(model, sentences):
    """The gradient of each token's row of each layer: the attention of single sentences (T, C) written out."""
    rows = {matrix: [] for matrix in oracle.matrices(model)}
    for x in sentences:
        outputs = {name: getattr(model, name)(x) for name in ("query", "key", "value")}
        q, k, v = (output.view(-1, 2, 2).transpose(0, 1) for output in outputs.values())  # (heads, T, d)
        mixed = ((q @ k.mT / 2**0.5).softmax(-1) @ v).transpose(0, 1).reshape(-1, 4)
        outputs["out"] = model.out(mixed)
        gradients = torch.autograd.grad(oracle.energy(outputs["out"]), list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            (matrix,) = [matrix for matrix in rows if matrix.weight == f"{name}.weight"]
            inputs = nn.functional.pad((mixed if name == "out" else x).detach(), (0, 1), value=1.0)  # a 1 for the bias
            rows[matrix] += [torch.outer(g, a)[None] for g, a in zip(gradient, inputs, strict=True)]
    return rows


class CutUp(nn.Module):
    """A model that cuts its batch into two equal pieces, and numbers their samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()
        self.optimizer = None

    def forward(self, x):
        number, out = 0, []
        for piece in x.chunk(2):
            if self.optimizer is not None:
                self.optimizer.sample_index = torch.arange(number, number + len(piece))
            number += len(piece)
            out.append(self.layer(piece).tanh())
        return torch.cat(out)


def test_a_batch_that_a_model_cuts_up_inside_of_one_call_can_be_numbered():
    """Without numbers it goes to the base, see `test_model_calls`."""
    model, x = CutUp(), torch.randn(6, 4, dtype=torch.float64)
    expected = oracle.directions(oracle.sample_gradients(model, oracle.sample_losses(x)), 0.3)
    model.optimizer = optimizer = NGPlus(model, lr=1e-12, damping=0.3, update_every=1, loss_reduction=6)
    oracle.batch_loss(x)(model).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-9
