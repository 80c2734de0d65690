"""NG+, a multi-step matrix-product natural gradient optimizer for PyTorch."""

from ngplus.base_rules import BaseRule, register_base
from ngplus.curvature.layer_state import LayerState
from ngplus.online import OnlineNGPlus
from ngplus.optimizer import NGPlus
from ngplus.profiling import StepTimes

__version__ = "0.1.0"

__all__ = ["BaseRule", "LayerState", "NGPlus", "OnlineNGPlus", "StepTimes", "__version__", "register_base"]
