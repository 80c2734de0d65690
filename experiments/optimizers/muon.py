"""Muon as it is meant to be used: on the matrices between input and output, AdamW on everything else."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim._muon import _adjust_lr

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_BFLOAT16 = ("avx512_bf16", "amx_bf16")
_WITH_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


class _MuonOfTensors(torch.optim.Muon):
    """`torch.optim.Muon`, for convolutions too, whose kernel is out × (in · area), and as fast on any CPU.

    `torch.optim.Muon` takes matrices only, and orthogonalises in bfloat16 where that is slower than float32 too.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        # It takes seconds to import, so only where it is wanted.
        from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5

        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, momentum = parameter.grad, state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        matrix = update.flatten(1)  # may be a copy, where the memory is in another order: only read
        direction = zero_power_via_newton_schulz_5(
            matrix, group["ns_steps"], group["eps"], weights=group["ns_coefficients"], dtype=fast_dtype(update.device)
        )
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], matrix.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.view(parameter.shape), alpha=-rate)


def fast_dtype(device: torch.device) -> torch.dtype:
    """What matrices are multiplied in the fastest: bfloat16, but float32 by a CPU without instructions for it."""
    lacks = device.type == "cpu" and not any(torch.cpu.get_capabilities().get(name) for name in _BFLOAT16)
    return torch.float32 if lacks else torch.bfloat16


class MuonAndAdamW(Optimizer):
    """Muon on the weights of linear layers, convolutions and attention; AdamW on the rest.

    Embeddings (and what is tied to them), vectors and the weights named in ``adamw`` go to AdamW; name the last
    layer there. Attention's packed projection counts as one matrix. The first parameter group is Muon's.

    Args:
        model: whose parameters are trained.
        lr: of Muon.
        adamw: names of weights that go to AdamW too, as in ``model.named_parameters()``, or patterns of them.
        adamw_lr: of AdamW; None for ``lr``, as ``adjust_lr_fn="match_rms_adamw"`` is made for.
        weight_decay: of both, decoupled.
        betas: of AdamW.
        eps: of AdamW.
        **muon_options: what else `torch.optim.Muon` takes.

    Raises:
        ValueError: a pattern that fits no weight, a model without a matrix for Muon, or one with sparse gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        adamw: Sequence[str] = (),
        adamw_lr: float | None = None,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **muon_options: Any,
    ) -> None:
        matrices = hidden_matrices(model, adamw)
        if not matrices:
            raise ValueError("the model has no matrix for Muon: all of its weights are embeddings, vectors or named")
        refuse_sparse_gradients(model, "Muon")
        chosen = {id(matrix) for matrix in matrices}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        muon = torch.optim.Muon([{"params": []}], lr=lr, weight_decay=weight_decay, **muon_options)
        rate = lr if adamw_lr is None else adamw_lr
        adam = AdamW([{"params": []}], lr=rate, weight_decay=weight_decay, betas=betas, eps=eps)
        groups = [{**muon.defaults, "params": matrices}, {**adam.defaults, "params": rest}]
        super().__init__([group for group in groups if group["params"]], {})
        self._share()

    def _share(self) -> None:
        """Give each part its group and the common state."""
        self._parts: list[Optimizer] = []
        for cls, groups in ((_MuonOfTensors, self.param_groups[:1]), (AdamW, self.param_groups[1:])):
            if groups:
                part = cls([{"params": []}], lr=1.0)
                part.param_groups, part.state = groups, self.state
                self._parts.append(part)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which go to AdamW.

        Args:
            param_group: as in `torch.optim`.
        """
        super().add_param_group(param_group)
        if "_parts" in self.__dict__:  # else it is being made
            self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def hidden_matrices(model: nn.Module, others: Iterable[str] = ()) -> list[nn.Parameter]:
    """Weights of two or more dimensions of linear layers, convolutions and attention, tied to no embedding.

    Args:
        model: whose weights.
        others: names, or patterns of names, of weights to leave out.

    Returns:
        Parameters, in the order of the modules.

    Raises:
        ValueError: where one of ``others`` fits no name.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for pattern in others:
        if not any(fnmatchcase(name, pattern) for name in names.values()):
            raise ValueError(
                f"adamw = {pattern!r}: no parameter has such a name; there are {', '.join(names.values())}"
            )
    tables = {id(module.weight) for module in model.modules() if isinstance(module, _EMBEDDINGS)}
    found = {
        id(parameter): parameter
        for module in model.modules()
        if isinstance(module, _WITH_MATRICES)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1 and parameter.requires_grad and id(parameter) not in tables
    }
    left_out = {key for key, name in names.items() if any(fnmatchcase(name, pattern) for pattern in others)}
    return [parameter for key, parameter in found.items() if key not in left_out]


def refuse_sparse_gradients(model: nn.Module, optimizer: str) -> None:
    """Raise where an embedding of the model gives sparse gradients.

    Args:
        model: that is to be trained.
        optimizer: its name, for the error.

    Raises:
        ValueError: naming the embedding and what to do.
    """
    for name, module in model.named_modules():
        if isinstance(module, _EMBEDDINGS) and module.sparse:
            raise ValueError(
                f"{optimizer} takes no sparse gradients, which {name or 'the model'} has: make it with sparse=False"
            )
