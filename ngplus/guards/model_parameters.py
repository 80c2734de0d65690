"""Whether the parameters that an optimizer trains are still those of its model."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ngplus.config import check_whole
from ngplus.dtensors import is_sharded

_NAMES_SHOWN = 4


class ModelParameters:
    """The parameters of a model as they were when its optimizer was made.

    Parameters are replaced by ``model.fc = nn.Linear(…)``, ``load_state_dict(…, assign=True)``, ``to_empty``,
    ``torch.distributed.fsdp.fully_shard`` and the like. The old ones never have a gradient again, so that the optimizer
    trains nothing, silently.

    Args:
        model: of the optimizer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._record()

    def _record(self) -> None:
        self._named = dict(self._model.named_parameters())
        entries: list[tuple[dict[str, Any], str, Any]] = [
            (table, name, value)
            for module in self._model.modules()
            for table in (module._parameters, module._modules)
            if isinstance(table, dict)
            for name, value in table.items()
        ]
        self._tables = [table for table, _, _ in entries]
        self._names = [name for _, name, _ in entries]
        self._values = [value for _, _, value in entries]

    def check(self, param_groups: Iterable[Mapping[str, Any]]) -> str | None:
        """Compare the model's parameters with those of the last call.

        Where none was replaced, that costs one comparison for each parameter and module of the model.

        Args:
            param_groups: of the optimizer.

        Returns:
            A warning, once, where some were replaced and the new ones are not among the optimizer's.

        Raises:
            TypeError: where a parameter has been sharded.
            RuntimeError: where none of the optimizer's parameters is the model's any more. Both are raised by every
                call from then on.
        """
        if all(map(operator.is_, map(dict[str, Any].get, self._tables, self._names), self._values)):
            return None
        trained = {id(p) for group in param_groups for p in group["params"]}
        now = dict(self._model.named_parameters())
        present, known = set(map(id, now.values())), set(map(id, self._named.values()))
        gone = [name for name, p in self._named.items() if id(p) in trained and id(p) not in present]
        new = {name: p for name, p in now.items() if id(p) not in known and id(p) not in trained and p.requires_grad}
        check_whole(new.items())
        if sharded := [name for name, parameter in new.items() if gone and is_sharded(parameter)]:
            raise TypeError(
                f"{_listed(sharded)} became a DTensor after the optimizer was made, which trains what it was before: "
                "make the optimizer after fully_shard"
            )
        if gone and present.isdisjoint(trained):
            raise RuntimeError(
                f"none of the optimizer's parameters is the model's any more: {_listed(gone)} {_was(gone)} replaced "
                "after the optimizer was made; make it after whatever replaces them (fully_shard, to_empty, "
                "load_state_dict with assign=True, new modules)"
            )
        self._record()
        if not gone or not new:
            return None
        return (
            f"{_listed(gone)} {_was(gone)} replaced in the model after the optimizer was made, and nothing here trains "
            f"{_listed(new)}: make the optimizer again, or give the new parameters to its add_param_group"
        )


def _was(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _NAMES_SHOWN} more" if len(every) > _NAMES_SHOWN else ""
    return ", ".join(every[:_NAMES_SHOWN]) + more
