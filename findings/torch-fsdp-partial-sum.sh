#!/usr/bin/env bash
# torch 2.14.1: with set_requires_all_reduce(False), by which accumulation on a mesh of replicas and shards (HSDP) saves
# all-reduces, fully_shard keeps a micro-batch's gradient to itself: .grad stays None, and zero_grad() of the model or
# the optimizer does not reach what is kept. A step that is skipped after such a micro-batch, with zero_grad() to begin
# again, still adds it to the next step's gradient. With set_requires_gradient_sync(False) the same is so; in
# DistributedDataParallel, with no_sync(), zero_grad() forgets it.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 || { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
first, second = torch.full((1, 2), 10.0), torch.full((1, 2), 1.0)


def make():
    torch.manual_seed(0)
    return nn.Linear(2, 2, bias=False)


def gradient(model, skip):
    """Of the second batch, after a first one that is thrown away."""
    skip(lambda: model(first).sum().backward())
    held = next(model.parameters()).grad
    model.zero_grad()
    model(second).sum().backward()
    grad = next(model.parameters()).grad
    return held, (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).max().item()


def sharded(setter):
    model = fully_shard(make(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")))

    def skip(run):
        getattr(model, setter)(False)
        run()
        getattr(model, setter)(True)

    return gradient(model, skip)


def replicated():
    model = DistributedDataParallel(make())

    def skip(run):
        with model.no_sync():
            run()

    return gradient(model, skip)


found = {name: sharded(name) for name in ("set_requires_all_reduce", "set_requires_gradient_sync")}
found["no_sync"] = replicated()
if dist.get_rank() == 0:
    print("torch", torch.__version__)
    for name, (held, value) in found.items():
        where = "None" if held is None else "there"
        print(f"{name}: .grad is {where} after the first batch, the second's gradient is {value:g}")
    print("expected: 1 from all three, as zero_grad() was called in between")
assert found["set_requires_all_reduce"][0] is None
assert found["set_requires_all_reduce"][1] == found["set_requires_gradient_sync"][1] == 11
assert found["no_sync"][1] == 1
dist.destroy_process_group()
EOF
OMP_NUM_THREADS=1 venv/bin/torchrun --nproc-per-node 2 check.py 2>&1 | grep -v Warning
