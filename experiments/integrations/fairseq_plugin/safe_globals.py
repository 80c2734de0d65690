"""What a checkpoint of fairseq's holds besides tensors, so that torch loads it without running what is in it.

Since torch 2.6 a checkpoint is loaded with ``weights_only=True``, under which fairseq's can be neither resumed nor
translated with: it keeps the run's settings as objects. These classes are all there is in one of this task, and
each is plain data; what else a file may hold is still refused.
"""

import argparse

import torch


def allow_checkpoints() -> None:
    """Let `torch.load` make the objects of a checkpoint's settings."""
    torch.serialization.add_safe_globals([argparse.Namespace])
