#!/usr/bin/env bash
# torch 2.14.1, torch.distributed.checkpoint.state_dict: the states of SparseAdam and LBFGS can be saved but not
# loaded. `set_optimizer_state_dict` first makes a step of the fresh optimizer to have a state to fill, with dense
# gradients of zeros and without a closure; SparseAdam refuses dense gradients, and LBFGS calls the closure. The error
# comes when a run is to be resumed. Both load by their own `load_state_dict`.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

print("torch", torch.__version__)


def sparse():
    model = nn.Embedding(5, 2, sparse=True)
    return model, torch.optim.SparseAdam(model.parameters()), torch.tensor([1, 2])


def lbfgs():
    model = nn.Linear(5, 2)
    return model, torch.optim.LBFGS(model.parameters()), torch.ones(1, 5)


def adam():
    model = nn.Linear(5, 2)
    return model, torch.optim.Adam(model.parameters()), torch.ones(1, 5)


def resume(make):
    model, optimizer, x = make()

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    state = get_optimizer_state_dict(model, optimizer)
    plain = optimizer.state_dict()
    model, optimizer, _ = make()
    optimizer.load_state_dict(plain)
    model, optimizer, _ = make()
    try:
        set_optimizer_state_dict(model, optimizer, state)
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


for make, expected in ((adam, "loaded"), (sparse, "RuntimeError: SparseAdam"), (lbfgs, "TypeError: 'NoneType'")):
    result = resume(make)
    print(f"{make.__name__:6} saved, loaded by load_state_dict; by set_optimizer_state_dict: {result}")
    assert result.startswith(expected)
print("expected: loaded, three times")
EOF
venv/bin/python -W ignore check.py
