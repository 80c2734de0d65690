#!/usr/bin/env bash
# transformers 5.23.0: training a ViT goes on from a checkpoint of `Trainer` with most of its weights new. The checkpoint
# is written under the names of older versions (vit.encoder.layer.0.attention.attention.key.weight), and Trainer loads
# it without the renaming that `from_pretrained` does, so that the weights of all layers stay as they were initialised.
# The step count, the optimizer's state and the schedule are those of the checkpoint. Nothing is raised: "missing keys"
# are logged as a warning. `from_pretrained` of the same folder has every weight.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 transformers==5.23.0 accelerate==1.15.0 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import os

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

generator = torch.Generator().manual_seed(0)
rows = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 3} for i in range(8)]


def make(seed):
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8,
            patch_size=4, num_labels=3,
        )
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Watched(Trainer):
    first = None

    def training_step(self, model, *args, **options):
        self.first = self.first or weights(model)
        return super().training_step(model, *args, **options)


def train(model, steps, resume):
    settings = TrainingArguments(
        "out", max_steps=steps, save_strategy="steps", save_steps=2, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="no",
    )
    trainer = Watched(model, settings, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.first


print("transformers", transformers.__version__, "torch", torch.__version__)
saved = make(0)
train(saved, 2, None)
saved = weights(saved)
fresh = make(1)
start = weights(fresh)
resumed = train(fresh, 3, True)
loaded = weights(ViTForImageClassification.from_pretrained("out/checkpoint-2"))
restored = [name for name in saved if torch.equal(resumed[name], saved[name])]
untouched = [name for name in saved if torch.equal(resumed[name], start[name]) and name not in restored]
print(f"of {len(saved)} parameters, on the first step after resuming")
print(f"  {len(restored)} are those of the checkpoint")
print(f"  {len(untouched)} are those of the new model, as {untouched[0]}")
print(f"by from_pretrained {sum(torch.equal(loaded[name], saved[name]) for name in saved)} are those of the checkpoint")
print("expected: all of them after resuming too")
assert len(restored) + len(untouched) == len(saved)
assert len(untouched) > len(saved) // 2
assert all(torch.equal(loaded[name], saved[name]) for name in saved)
EOF
venv/bin/python -W ignore check.py 2>errors.log || { cat errors.log; exit 1; }
grep -m 1 -i "missing keys" errors.log | cut -c 1-120
