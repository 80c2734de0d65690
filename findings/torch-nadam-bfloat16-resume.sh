#!/usr/bin/env bash
# torch 2.14.1: NAdam keeps `mu_product`, a scalar that only its bias correction uses, in float32. `load_state_dict`
# casts every floating-point value of a parameter's state but `step` to the parameter's dtype, so after loading
# `mu_product` is bfloat16 for bfloat16 parameters, and stays so: a run saved early and resumed goes another way than
# one that went on. Adam resumes to the bit.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import copy

import torch
from torch import nn

print("torch", torch.__version__)
torch.set_num_threads(1)


def resume(make, steps=50):
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64).bfloat16(), torch.randn(128, 64).bfloat16()

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x).float() - 1).square().mean().backward()
            optimizer.step()

    optimizer = make(model.parameters(), lr=0.01)
    train(model, optimizer, 1)
    resumed_model = copy.deepcopy(model)
    resumed = make(resumed_model.parameters(), lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, steps)
    train(resumed_model, resumed, steps)
    states = (o.state_dict()["state"][0] for o in (optimizer, resumed))
    kept, loaded = ({k: str(v.dtype).removeprefix("torch.") for k, v in state.items()} for state in states)
    changed = {k: (kept[k], loaded[k]) for k in kept if kept[k] != loaded[k]}
    differ = int((model.weight != resumed_model.weight).sum())
    print(f"{make.__name__:5} resumed after 1 step, 50 steps later: {differ} of 4096 weights differ; dtypes: {changed}")
    return differ, changed


assert resume(torch.optim.Adam) == (0, {})
differ, changed = resume(torch.optim.NAdam)
assert differ > 0 and changed == {"mu_product": ("float32", "bfloat16")}
print("expected: no weight differs, as the scalar was saved in float32")
EOF
venv/bin/python -W ignore check.py
