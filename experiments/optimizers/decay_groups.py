"""Weight decay for the matrices of layers alone, as language models are trained."""

from torch import nn
from torch.optim import Optimizer

from experiments.optimizers.muon import hidden_matrices


def exempt_from_decay(optimizer: Optimizer, model: nn.Module) -> None:
    """Take the decay off embeddings and what is tied to them, norms, biases and other vectors.

    Every group that decays some of these is cut in two; the new ones come behind the others.

    Args:
        optimizer: on the model's parameters, before its first step.
        model: with the weights of linear layers, convolutions and attention that are to be decayed.
    """
    decayed = {id(matrix) for matrix in hidden_matrices(model)}
    for group in [group for group in optimizer.param_groups if group.get("weight_decay")]:
        exempt = [parameter for parameter in group["params"] if id(parameter) not in decayed]
        if len(exempt) == len(group["params"]):
            group["weight_decay"] = 0.0
        elif exempt:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in decayed]
            optimizer.add_param_group({**group, "params": exempt, "weight_decay": 0.0})
