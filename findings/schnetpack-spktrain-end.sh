#!/usr/bin/env bash
# schnetpack 2.2.0 with torch 2.14.1 and pytorch-lightning 2.6.6, which its requirements admit: every `spktrain` run
# ends in an error. Training runs to its last epoch; then the command loads its own best checkpoint, which contains the
# model object, and torch's loader refuses that class, so there is no test result and the exit status is 1. Starting
# the command again, which is its way to resume, is refused in the same way. Nothing is said before or during training.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet schnetpack==2.2.0 pytorch-lightning==2.6.6 torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

warnings.simplefilter("ignore")
import numpy as np  # noqa: E402
from ase import Atoms  # noqa: E402
from schnetpack.data import ASEAtomsData  # noqa: E402

for package in ("schnetpack", "pytorch-lightning", "torch"):
    print(package, version(package), end=" ")
print()
rng = np.random.default_rng(0)
water = [Atoms("H2O", np.eye(3) + 0.1 * rng.normal(size=(3, 3))) for _ in range(20)]
data = ASEAtomsData.create("water.db", distance_unit="Ang", property_unit_dict={"energy": "eV"})
data.add_systems([{"energy": np.array([float(i)])} for i in range(20)], water)
spktrain = str(Path(sys.executable).parent / "spktrain")
command = [spktrain, "experiment=water", f"data.datapath={Path('water.db').resolve()}"]


def run(epochs):
    options = [f"run.path={Path('runs').resolve()}", f"run.data_dir={Path.cwd()}", f"trainer.max_epochs={epochs}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    output = done.stdout + done.stderr
    trained = f"`max_epochs={epochs}` reached" in output
    error = next((line for line in output.splitlines() if line.startswith("_pickle.")), "none")
    print(f"spktrain to epoch {epochs}: trained {trained}, exit status {done.returncode}, error {error[:51]}")
    return trained, done.returncode, error.split(":")[0]


first = run(1)
print("checkpoints on disk:", sorted(p.name for p in Path("runs").rglob("*.ckpt")))
second = run(2)
assert first == (True, 1, "_pickle.UnpicklingError")
assert second == (False, 1, "_pickle.UnpicklingError")
print("expected: a test result and exit status 0; then a second epoch")
EOF
mkdir experiment
cat >experiment/water.yaml <<'EOF'
# @package _global_
defaults:
  - override /model: nnp
  - override /model/representation: schnet
  - override /logger: csv
print_config: False
run: {experiment: water, id: water}
globals: {cutoff: 5.0, lr: 1e-3}
trainer: {accelerator: cpu}
data:
  num_train: 10
  num_val: 5
  num_test: 5
  num_workers: 0
  transforms:
    - {_target_: schnetpack.transform.MatScipyNeighborList, cutoff: 5.0}
    - {_target_: schnetpack.transform.CastTo32}
model:
  representation: {n_atom_basis: 16}
  output_modules:
    - {_target_: schnetpack.atomistic.Atomwise, output_key: energy, n_in: 16}
task:
  outputs:
    - {_target_: schnetpack.task.ModelOutput, name: energy, loss_fn: {_target_: torch.nn.MSELoss}, metrics: {}}
EOF
venv/bin/python -W ignore check.py 2>&1
