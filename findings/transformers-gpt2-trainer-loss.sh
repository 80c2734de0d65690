#!/usr/bin/env bash
# transformers 5.23.0: the loss that `Trainer` trains GPT-2 with, labels of T tokens a sequence and none ignored, is
# (T − 1)/T of the mean that the same model returns when it is called with the same batch; of Llama it is that mean.
# The models shift the labels inside, so that T − 1 of them count. Trainer counts the items of a step before, and takes
# the shift into account only where the class names its kind of loss: GPT2LMHeadModel names none.
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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

TOKENS = 7
tokens = torch.randint(3, 32, (4, TOKENS), generator=torch.Generator().manual_seed(0))
rows = [{"input_ids": row, "labels": row} for row in tokens]


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            bos_token_id=0, eos_token_id=0,
        )
    )


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=24, max_position_embeddings=16,
        )
    )


def ratio(make):
    torch.manual_seed(0)
    model = make()
    own = model(input_ids=tokens, labels=tokens).loss.item()
    seen = []

    class Watched(Trainer):
        def training_step(self, *args, **options):
            loss = super().training_step(*args, **options)
            seen.append(loss.item())
            return loss

    settings = TrainingArguments(
        "out", max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_strategy="no",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Watched(model, settings, train_dataset=rows, optimizers=(optimizer, None)).train()
    print(f"{make.__name__:6} the model's loss {own:.4f}, the Trainer's {seen[0]:.4f}: {seen[0] / own:.4f} of it")
    return seen[0] / own


print("transformers", transformers.__version__, "torch", torch.__version__)
assert abs(ratio(llama) - 1) < 1e-5
assert abs(ratio(gpt2) - (TOKENS - 1) / TOKENS) < 1e-5
print("expected: 1.0000 of it for both")
EOF
venv/bin/python -W ignore check.py 2>errors.log || { cat errors.log; exit 1; }
