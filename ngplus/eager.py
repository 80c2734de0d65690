"""Running compiled modules uncompiled while a forward pass is watched: compiled code calls no function to be seen.

The compiler's stance is one for the whole process, so that it is held once however many optimizers watch.
"""

from __future__ import annotations

from typing import Any

import torch

_holders = 0
_stance: Any = None


def hold() -> None:
    """Run compiled modules uncompiled until `release`."""
    global _holders, _stance
    if _holders == 0:
        _stance = torch.compiler.set_stance("force_eager")
    _holders += 1


def release() -> None:
    """Take one `hold` back; with the last, the stance is again what it was before the first."""
    global _holders, _stance
    _holders -= 1
    if _holders == 0:
        _stance.__exit__(None, None, None)
        _stance = None
