"""Running compiled modules uncompiled while a forward pass is recorded: compiled code makes no function calls.

The compiler's stance is one for the whole process, so that it is set once however many optimizers record.
"""

from __future__ import annotations

from typing import Any

import torch

from ngplus._torch_internals import is_in_fullgraph

_holders = 0
_stance: Any = None


def refuse_fullgraph(name: str) -> None:
    """Refuse a step inside of a function compiled with ``fullgraph=True``, which runs uncompiled for the moment.

    On other steps the compiler itself refuses it, when it comes to a function that it must not trace.

    Args:
        name: of the optimizer.

    Raises:
        RuntimeError: in such a function.
    """
    if _holders and is_in_fullgraph():
        raise RuntimeError(
            f"{name}.step cannot be part of a function compiled with fullgraph=True, since it runs outside of the "
            "graph: compile without fullgraph=True, or only the forward and backward pass"
        )


def hold_eager() -> None:
    """Run compiled modules uncompiled until `release_eager`."""
    global _holders, _stance
    if _holders == 0:
        _stance = torch.compiler.set_stance("force_eager")
    _holders += 1


def release_eager() -> None:
    """Take one `hold_eager` back; with the last, the stance is again what it was before the first."""
    global _holders, _stance
    _holders -= 1
    if _holders == 0:
        _stance.__exit__(None, None, None)
        _stance = None


__all__ = ["hold_eager", "refuse_fullgraph", "release_eager"]
