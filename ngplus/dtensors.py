"""Tensors that are sharded over processes, for code that also runs where `torch.distributed.tensor` was never imported.

Importing it takes a third of what importing torch takes, and where nobody has, no tensor is sharded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)  # None too while the module is being imported
    return kind is not None and isinstance(tensor, kind)


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in its own memory: its shard of a `DTensor`, and all of another."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All elements of a tensor on every process. For a `DTensor` each process of its mesh must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def find_mesh(tensor: Tensor) -> DeviceMesh:
    """The processes that a `DTensor` is distributed over."""
    assert is_sharded(tensor)
    mesh: DeviceMesh = tensor.device_mesh
    return mesh


def reshard(model: nn.Module) -> None:
    """Give the modules of a model their sharded parameters, of which an evaluation may have left whole ones."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is not None:
        for module in model.modules():
            if isinstance(module, kind):
                module.reshard()


__all__ = ["find_mesh", "is_sharded", "local_part", "reshard", "whole"]
