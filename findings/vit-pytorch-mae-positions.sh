#!/usr/bin/env bash
# vit-pytorch 1.26.14: a ViT keeps its table of positions as (n, d). Its masked autoencoders, MAE and SimMIM, still take the
# positions of the patches as pos_embedding[:, 1:n + 1] of a table (1, n, d), which now cuts columns off: their examples end
# in an error for every image size, where the same ViT classifies.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet vit-pytorch==1.26.14 torch==2.14.1 torchvision==0.29.1 numpy==2.3.5 >pip.log 2>&1 ||
    { cat pip.log; exit 2; }

cat >check.py <<'EOF'
from importlib.metadata import version

import torch
from vit_pytorch import MAE, ViT
from vit_pytorch.simmim import SimMIM

images = torch.randn(2, 3, 256, 256)


def make_vit():
    return ViT(image_size=256, patch_size=32, num_classes=10, dim=32, depth=1, heads=2, mlp_dim=32)


print("vit-pytorch", version("vit-pytorch"), "torch", torch.__version__)
vit = make_vit()
print("table of positions:", tuple(vit.pos_embedding.shape), "classes:", tuple(vit(images).shape))
assert vit.pos_embedding.dim() == 2
for name, make in {
    "MAE": lambda: MAE(encoder=make_vit(), masking_ratio=0.75, decoder_dim=16, decoder_depth=1),
    "SimMIM": lambda: SimMIM(encoder=make_vit(), masking_ratio=0.5),
}.items():
    try:
        make()(images)
    except RuntimeError as error:
        print(f"{name}: RuntimeError: {error}")
    else:
        raise SystemExit(f"{name} gave a loss")
print("expected: a loss from each")
EOF
venv/bin/python check.py
