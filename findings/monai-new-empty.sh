#!/usr/bin/env bash
# monai 1.6.1: its transforms and loaders give batches as MetaTensor, a subclass of torch.Tensor that is passed on by every
# layer. Its new_empty takes the sizes as one argument alone: x.new_empty(2, 3), with a dtype or without, is a TypeError,
# where every other tensor takes it, and where MetaTensor's own new_zeros and new_ones do.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet monai==1.6.1 torch==2.14.1 >pip.log 2>&1 || { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")

import torch
from monai.data import MetaTensor

print("monai", version("monai"), "torch", torch.__version__)
plain, meta = torch.zeros(2), MetaTensor(torch.zeros(2))
layer = torch.nn.Linear(2, 3)
assert isinstance(layer(meta), MetaTensor)


def ask(tensor, function, *sizes, **options):
    """The shape that comes, or the error."""
    try:
        return tuple(getattr(tensor, function)(*sizes, **options).shape)
    except TypeError as error:
        return f"TypeError: {error}"


found = {}
for function in ("new_empty", "new_zeros", "new_ones"):
    for options in ({}, {"dtype": torch.float64}):
        assert ask(plain, function, 2, 3, **options) == (2, 3)
        found[function, bool(options)] = ask(meta, function, 2, 3, **options)
        print(f"MetaTensor.{function}(2, 3{', dtype=torch.float64' if options else ''}):", found[function, bool(options)])
print("expected: (2, 3) from each, as of a torch.Tensor")
assert {key for key, value in found.items() if value != (2, 3)} == {("new_empty", False), ("new_empty", True)}
EOF
venv/bin/python check.py
