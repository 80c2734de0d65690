#!/usr/bin/env bash
# heavyball 3.2.1: with `storage_dtype="float32"`, its default, the moments of bfloat16 parameters are kept in float32.
# `load_state_dict` is torch's, which casts what belongs to a parameter to the parameter's dtype: after loading, the
# moments are bfloat16 and stay so, whatever `storage_dtype` says. A resumed run is another one than a run that went
# on, without an error or a warning. torch.optim's own optimizers keep their moments in the parameter's dtype from the
# start, so for them the cast changes nothing.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet heavyball==3.2.1 torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import copy
import warnings
from importlib.metadata import version

import heavyball
import torch
from torch import nn

warnings.simplefilter("ignore")
torch.set_num_threads(1)
heavyball.utils.compile_mode = None  # the same optimizer without a compiler
print("heavyball", version("heavyball"), "torch", torch.__version__)


def train(model, optimizer, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).float().pow(2).mean().backward()
        optimizer.step()


def dtypes(optimizer):
    state = optimizer.state_dict()["state"][0][0]
    return sorted({str(v.dtype) for v in state.values() if torch.is_tensor(v) and v.is_floating_point()})


def resume(dtype, put_back=False):
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64).to(dtype), torch.randn(32, 64).to(dtype)
    optimizer = heavyball.AdamW(model.parameters(), lr=0.01, storage_dtype="float32")
    train(model, optimizer, x, 5)
    resumed_model = copy.deepcopy(model)
    resumed = heavyball.AdamW(resumed_model.parameters(), lr=0.01, storage_dtype="float32")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if put_back:
        for old, new in zip(model.parameters(), resumed_model.parameters(), strict=True):
            resumed.state[new] = copy.deepcopy(optimizer.state[old])
    for run in ((model, optimizer), (resumed_model, resumed)):
        torch.manual_seed(1)  # bfloat16 weights are rounded at random
        train(*run, x, 10)
    differ = int((model.weight != resumed_model.weight).sum())
    print(f"{dtype}{', moments put back after loading' if put_back else ''}:")
    print(f"    moments {dtypes(optimizer)} in the run that went on, {dtypes(resumed)} in the resumed one;", end=" ")
    print(f"10 steps later {differ} of {model.weight.numel()} weights differ")
    return differ, dtypes(optimizer), dtypes(resumed)


assert resume(torch.float32) == (0, ["torch.float32"], ["torch.float32"])
assert resume(torch.bfloat16, put_back=True) == (0, ["torch.float32"], ["torch.float32"])
differ, *moments = resume(torch.bfloat16)
assert differ > 0 and moments == [["torch.float32"], ["torch.bfloat16"]]
print("expected: float32 moments after loading too, and the same weights")
EOF
venv/bin/python -W ignore check.py
