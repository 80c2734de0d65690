#!/usr/bin/env bash
# torch 2.14.1: a tensor hook on a linear layer's output is the usual way to see its gradient where an in-place activation
# follows, which module backward hooks refuse. Whether it runs depends on the layer's bias: with one, and a contiguous
# input of three dimensions, the output is a view of a product of matrices, whose node the activation replaces, and the
# hook is never called, without a word. Without a bias, or with an input of two dimensions, it is called.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 || { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import torch
from torch import nn


def count_calls(bias, shape, in_place):
    """How often a hook on the layer's output is called in one backward pass."""
    calls = []
    output = nn.Linear(4, 3, bias=bias)(torch.randn(shape))
    output.register_hook(lambda gradient: calls.append(gradient))
    (output.tanh_() if in_place else output.tanh()).sum().backward()
    return len(calls)


print("torch", torch.__version__)
found = {}
for bias in (True, False):
    for shape in ((5, 2, 4), (10, 4)):
        found[bias, len(shape)] = count_calls(bias, shape, in_place=True)
        assert count_calls(bias, shape, in_place=False) == 1
        print(f"bias={bias}, input of {len(shape)} dimensions, tanh_: the hook ran {found[bias, len(shape)]} time(s)")
print("expected: once in each, as with tanh")
assert found == {(True, 3): 0, (True, 2): 1, (False, 3): 1, (False, 2): 1}
EOF
venv/bin/python check.py
