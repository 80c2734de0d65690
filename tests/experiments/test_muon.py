import copy
import io

import pytest
import torch
from torch import nn

from experiments.muon import MuonAndAdamW, hidden_matrices


class Net(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, sparse=sparse)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.table.weight
        self.conv = nn.Conv2d(2, 3, 3, bias=False)
        self.hidden = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.last = nn.Linear(4, 2)

    def forward(self, images, index):
        hidden = self.hidden(self.conv(images).mean((2, 3))) + self.table(index)
        attended, _ = self.attention(hidden[:, None], hidden[:, None], hidden[:, None])
        return self.last(attended[:, 0]), self.tied(hidden)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def loss(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 2, 5, 5, generator=generator).to(net.conv.weight.dtype)
    return sum(output.square().mean() for output in net(images, torch.arange(6) % 5))


def names(net, parameters):
    known = {id(parameter): name for name, parameter in net.named_parameters()}
    return [known[id(parameter)] for parameter in parameters]


def test_muon_gets_matrices_that_are_neither_embedding_nor_named(net):
    found = names(net, hidden_matrices(net, ["last.*"]))
    assert found == ["conv.weight", "hidden.weight", "attention.in_proj_weight", "attention.out_proj.weight"]


def test_a_step_is_torchs_muon_on_flattened_kernels_and_adamw_on_the_rest(net):
    optimizer = MuonAndAdamW(net, lr=0.1, adamw=["last.weight"], adamw_lr=0.01, weight_decay=0.2)
    matrices = dict(
        zip(names(net, optimizer.param_groups[0]["params"]), optimizer.param_groups[0]["params"], strict=True)
    )
    rest = dict(zip(names(net, optimizer.param_groups[1]["params"]), optimizer.param_groups[1]["params"], strict=True))
    flat = {name: nn.Parameter(p.detach().flatten(1).clone()) for name, p in matrices.items()}
    kept = {name: nn.Parameter(p.detach().clone()) for name, p in rest.items()}
    muon = torch.optim.Muon(flat.values(), lr=0.1, weight_decay=0.2)
    adam = torch.optim.AdamW(kept.values(), lr=0.01, weight_decay=0.2)
    for step in range(3):
        net.zero_grad()
        loss(net, step).backward()
        for name, p in matrices.items():
            flat[name].grad = p.grad.flatten(1).clone()
        for name, p in rest.items():
            kept[name].grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        muon.step()
        adam.step()
    for name, p in net.named_parameters():
        expected = flat[name].view_as(p) if name in flat else kept[name]
        torch.testing.assert_close(p, expected, rtol=0.0, atol=0.0)


def test_kernels_in_channels_last_move_like_those_that_are_not(net):
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    for one in (net, other):
        optimizer = MuonAndAdamW(one, lr=0.1)
        for step in range(2):
            one.zero_grad()
            loss(one, step).backward()
            optimizer.step()
    assert not other.conv.weight.is_contiguous()
    torch.testing.assert_close(other.conv.weight, net.conv.weight, rtol=0.02, atol=0.02)  # Muon computes in bf16


def test_a_saved_state_goes_on_to_the_bit(net):
    optimizer = MuonAndAdamW(net, lr=0.1)
    loss(net, 0).backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = copy.deepcopy(net)
    resumed = MuonAndAdamW(other, lr=0.3)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for one, stepper in ((net, optimizer), (other, resumed)):
        one.zero_grad()
        loss(one, 1).backward()
        stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_schedulers_move_both_rates(net):
    optimizer = MuonAndAdamW(net, lr=0.1, adamw_lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loss(net).backward()
    optimizer.step()
    schedule.step()
    before = [p.detach().clone() for p in net.parameters()]
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_a_name_that_fits_nothing_is_refused(net):
    with pytest.raises(ValueError, match=r"adamw = 'head.*': no parameter has such a name"):
        MuonAndAdamW(net, lr=0.1, adamw=["head.*"])


def test_sparse_gradients_are_refused_by_name():
    with pytest.raises(ValueError, match="Muon takes no sparse gradients, which table has"):
        MuonAndAdamW(Net(sparse=True), lr=0.1)


def test_a_model_without_a_hidden_matrix_is_refused():
    with pytest.raises(ValueError, match="no matrix for Muon"):
        MuonAndAdamW(nn.Embedding(3, 2), lr=0.1)
