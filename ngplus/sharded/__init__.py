"""NG+ on models that `torch.distributed.fsdp.fully_shard` has sharded over processes."""

from ngplus.sharded.placement import placement

__all__ = ["placement"]
