#!/usr/bin/env bash
# torch 2.14.1, torch.distributed.checkpoint.state_dict: a flattened optimizer state is keyed by the parameters' names.
# It cannot be loaded into an optimizer that was given `named_parameters()` if it was saved from one that was given
# `parameters()`: loading asks for the names as a saved value of each group. Both the other way round and the state
# that is not flattened load.
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

print("torch", torch.__version__)


def make(named):
    model = nn.Linear(3, 2)
    return model, torch.optim.Adam(model.named_parameters() if named else model.parameters())


def transfer(saved_named, loaded_named, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = make(saved_named)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = get_optimizer_state_dict(model, optimizer, options=options)
    model, optimizer = make(loaded_named)
    try:
        set_optimizer_state_dict(model, optimizer, state, options=options)
    except KeyError as error:
        return f"KeyError {error}"
    return "loaded"


results = {}
for flatten in (False, True):
    for saved in (False, True):
        for loaded in (False, True):
            results[flatten, saved, loaded] = result = transfer(saved, loaded, flatten)
            print(f"flattened {flatten!s:5} saved with names {saved!s:5} loaded with names {loaded!s:5}: {result}")
failed = results.pop((True, False, True))
assert "param_names" in failed and set(results.values()) == {"loaded"}
print("expected: loaded, in all eight cases")
EOF
venv/bin/python -W ignore check.py
