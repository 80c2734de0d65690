"""Running compiled modules uncompiled while a forward pass is watched: compiled code calls no function to be seen.

The compiler's stance is one for the whole process, so that it is held once however many optimizers watch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C._dynamo import eval_frame

# Frames compiled so far inside of a function compiled with ``fullgraph=True``, −1 outside of one; returns what it was.
_set_frame_count = getattr(eval_frame, "set_fullgraph_compiled_frame_count", None)
_holders = 0
_stance: Any = None


def refuse_one_graph(name: str) -> None:
    """Refuse a step inside of a function compiled with ``fullgraph=True``, which runs uncompiled for the moment.

    On other steps the compiler itself refuses it, when it comes to a function that it must not trace.

    Args:
        name: of the optimizer.

    Raises:
        RuntimeError: in such a function.
    """
    if _holders and _set_frame_count is not None and (frames := _set_frame_count(-1)) >= 0:
        _set_frame_count(frames)
        raise RuntimeError(
            f"{name}.step cannot be part of a function compiled with fullgraph=True, since it runs outside of the "
            "graph: compile without fullgraph=True, or only the forward and backward pass"
        )


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
