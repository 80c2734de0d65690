#!/usr/bin/env bash
# pytorch-lightning 2.6.6, manual optimization: `self.optimizers().load_state_dict(...)` loads the state into the wrapper
# that `optimizers()` returns, not into the optimizer that makes the steps, which goes on with none. Nothing is raised,
# and what is read from the wrapper (`state`, `param_groups`) looks as loaded. Its docstring says that the wrapper's
# attributes are not kept in sync; `lightning_fabric`'s wrapper hands the state on.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 pytorch-lightning==2.6.6 >pip.log 2>&1 || { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import logging

import pytorch_lightning
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def stepped():
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


class Manual(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 2)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        wrapper = self.optimizers()
        wrapper.load_state_dict(stepped())
        self.found = len(wrapper.state), len(wrapper.optimizer.state)
        self.rates = wrapper.param_groups[0]["lr"], wrapper.optimizer.param_groups[0]["lr"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.zeros(1), batch_size=1)


module = Manual()
pytorch_lightning.Trainer(
    accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
).fit(module)
inside = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=0.1)
Fabric(accelerator="cpu", devices=1).setup_optimizers(inside).load_state_dict(stepped())
print("pytorch-lightning", pytorch_lightning.__version__, "torch", torch.__version__)
print("parameters with a state, learning rate, after load_state_dict on the wrapper:")
print(f"  Lightning's wrapper        {module.found[0]}, {module.rates[0]}")
print(f"  the optimizer that it has  {module.found[1]}, {module.rates[1]}")
print(f"  the one inside Fabric's    {len(inside.state)}, {inside.param_groups[0]['lr']}")
print("expected: 2, 0.5 in all three lines")
assert (module.found, module.rates) == ((2, 0), (0.5, 0.1))
assert (len(inside.state), inside.param_groups[0]["lr"]) == (2, 0.5)
EOF
venv/bin/python -W ignore check.py 2>errors.log || { cat errors.log; exit 1; }
