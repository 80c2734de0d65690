"""NG+, a multi-step matrix-product natural gradient optimizer for PyTorch."""

from ngplus.base_rules import BaseRule, register_base
from ngplus.curvature.layer_state import LayerState
from ngplus.online import OnlineNGPlus
from ngplus.optimizer import NGPlus
from ngplus.profiling import StepTimes
from ngplus.starting.measurement import MeasuredLayer
from ngplus.starting.suggestion import Suggestion, suggest

__version__ = "0.1.0"

__all__ = [
    "BaseRule",
    "LayerState",
    "MeasuredLayer",
    "NGPlus",
    "OnlineNGPlus",
    "StepTimes",
    "Suggestion",
    "__version__",
    "register_base",
    "suggest",
]
