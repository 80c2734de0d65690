"""Tasks whose data are not here: the recipe's own model on made-up batches of the true shape, for cost only.

A stand-in is a `Task` that has the true number of steps an epoch and says in ``made_up`` what its batches are
made of. `Training` can take any number of steps on it; it has nothing to evaluate.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

from experiments.tasks.protocol import Task


class StandIn(Task, Protocol):
    """A task on made-up batches.

    Attributes:
        made_up: what they are made of, what the true data's size is and where that is from.
    """

    made_up: str


def _stand_in(module: str, name: str) -> Callable[..., StandIn]:
    """A function that imports the module when it is called, as `experiments.tasks` does."""

    def build(settings: Mapping[str, Any], *, scale: str) -> StandIn:
        found = import_module(f"experiments.estimate.stand_ins.{module}")
        return getattr(found, name)(settings, scale=scale)

    return build


# task -> its data setting -> the stand-in for it
STAND_INS: dict[tuple[str, str], Callable[..., StandIn]] = {
    ("dlrm-criteo", "criteo"): _stand_in("made_up_clicks", "MadeUpClicks"),
    ("gpt-text", "token-folder"): _stand_in("made_up_tokens", "MadeUpTokens"),
    ("resnet50-imagenet", "imagenet"): _stand_in("made_up_images", "MadeUpImages"),
    ("schnet-matproj", "database"): _stand_in("made_up_structures", "Supercells"),
    ("schnet-qm9", "package"): _stand_in("made_up_structures", "FewMolecules"),
    ("schnet-qm9", "database"): _stand_in("made_up_structures", "FewMolecules"),
    ("schnet-qm9", "xyz"): _stand_in("made_up_structures", "FewMolecules"),
    ("transformer-iwslt14", "iwslt14"): _stand_in("made_up_sentences", "MadeUpSentences"),
}
