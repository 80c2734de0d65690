import copy
import io

import pytest
import torch
from torch import nn

from experiments.optimizers import muon as muon_module
from experiments.optimizers.muon import MuonAndAdamW, hidden_matrices


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


def test_a_step_is_torchs_muon_on_flattened_kernels_and_adamw_on_the_rest(net, monkeypatch):
    monkeypatch.setattr(muon_module, "fast_dtype", lambda device: torch.bfloat16)
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


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}])
def test_in_float32_a_step_is_the_formula_in_float64(monkeypatch, options):
    """The quintic polynomial of Muon, applied to the singular values."""
    monkeypatch.setattr(muon_module, "fast_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    net = nn.Linear(5, 3, bias=False)
    optimizer = MuonAndAdamW(net, lr=0.1, weight_decay=0.2, **options)
    expected, momentum = net.weight.detach().double(), torch.zeros(3, 5).double()
    for _ in range(3):
        net.weight.grad = torch.randn(3, 5)
        optimizer.step()
        gradient = net.weight.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = 0.05 * gradient + 0.95 * momentum if options.get("nesterov", True) else momentum
        U, s, Vh = torch.linalg.svd(update / update.norm(), full_matrices=False)
        for _ in range(options.get("ns_steps", 5)):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        rate = 0.1 * (0.2 * 5**0.5 if "adjust_lr_fn" in options else 1.0)  # the other rule: √max(1, 3/5)
        expected = (1 - 0.1 * 0.2) * expected - rate * U @ s.diag() @ Vh
    torch.testing.assert_close(net.weight.double(), expected, rtol=0, atol=2e-5)


def test_bfloat16_only_where_the_cpu_multiplies_in_it(monkeypatch):
    for capabilities, dtype in [({"amx_bf16": True}, torch.bfloat16), ({"avx512_bf16": False}, torch.float32)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert muon_module.fast_dtype(torch.device("cpu")) == dtype
    assert muon_module.fast_dtype(torch.device("cuda")) == torch.bfloat16


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


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
def test_momentum_goes_on_where_weights_change_their_memory_format_in_the_middle_of_training(
    net, monkeypatch, first, nesterov
):
    monkeypatch.setattr(muon_module, "fast_dtype", lambda device: torch.float64)
    net.double()
    other = copy.deepcopy(net).to(memory_format=first)
    steppers = [(one, MuonAndAdamW(one, lr=0.1, nesterov=nesterov)) for one in (net, other)]
    formats = {2: torch.channels_last, 4: torch.contiguous_format}
    for step in range(6):
        if step in formats:
            other.to(memory_format=formats[step])
        for one, optimizer in steppers:
            optimizer.zero_grad()
            loss(one, step).backward()
            optimizer.step()
        for ours, expected in zip(other.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours, expected)
        pairs = zip(*(optimizer.param_groups[0]["params"] for _, optimizer in steppers), strict=True)
        for expected, ours in pairs:
            buffers = (
                optimizer.state[p]["momentum_buffer"]
                for p, (_, optimizer) in zip((expected, ours), steppers, strict=True)
            )
            torch.testing.assert_close(*buffers)


def test_a_weight_with_gaps_in_its_memory_is_moved(net, monkeypatch):
    monkeypatch.setattr(muon_module, "fast_dtype", lambda device: torch.float64)
    net.double()
    other = copy.deepcopy(net)
    wide = torch.zeros(3, 2, 3, 6, dtype=torch.float64)
    wide[..., :3] = other.conv.weight.detach()
    other.conv.weight = nn.Parameter(wide[..., :3])
    for one in (net, other):
        optimizer = MuonAndAdamW(one, lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            loss(one, step).backward()
            optimizer.step()
    torch.testing.assert_close(other.conv.weight, net.conv.weight)


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
