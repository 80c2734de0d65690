#!/usr/bin/env bash
# asdfghjkl 0.1a5 (imported as asdl): K-FAC lists nn.Embedding among the layers it supports. With the default
# configuration its first step fails there: without an average over time the inverse is computed during the backward
# pass, and the embedding has no such operation; a warning says "Skip", then the step raises. The same model trains as
# soon as `ema_decay` is set, or with two Monte Carlo samples instead of one. Indices of shape (N,) fail in every case,
# indices of shape (N, tokens) do not.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet asdfghjkl==0.1a5 torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import warnings
from importlib.metadata import version

import torch
import torch.nn.functional as F
from asdl.precondition import KfacGradientMaker, PreconditioningConfig
from torch import nn

warnings.simplefilter("ignore")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, indices):
        x = self.embedding(indices)
        return self.head(x.mean(dim=1) if x.ndim == 3 else x)


def step(shape, ema_decay=None, samples=1):
    torch.manual_seed(0)
    model = Classifier()
    config = PreconditioningConfig(data_size=8, damping=0.01, **({"ema_decay": ema_decay} if ema_decay else {}))
    maker = KfacGradientMaker(model, config, n_mc_samples=samples)
    output = maker.setup_model_call(model, torch.randint(10, shape))
    maker.setup_loss_call(F.cross_entropy, output, torch.randint(3, (8,)))
    try:
        maker.forward_and_backward()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "a step"


print("asdfghjkl", version("asdfghjkl"), "torch", torch.__version__)
default = step((8, 3))
averaged = step((8, 3), ema_decay=0.95)
sampled_twice = step((8, 3), samples=2)
one_index = step((8,), ema_decay=0.95)
print("indices (8, 3), default configuration:", default)
print("indices (8, 3), ema_decay=0.95:       ", averaged)
print("indices (8, 3), n_mc_samples=2:       ", sampled_twice)
print("indices (8,), ema_decay=0.95:         ", one_index)
assert default.startswith("ValueError") and "has not been calculated" in default
assert averaged == sampled_twice == "a step"
assert one_index.startswith("RuntimeError")
print("expected: a step in all four; whether the curvature is averaged should not decide which layers are supported")
EOF
venv/bin/python -W ignore check.py
