"""NG+, a multi-step matrix-product natural gradient optimizer for PyTorch."""

from ngplus.curvature.layer_state import LayerState
from ngplus.online import OnlineNGPlus
from ngplus.optimizer import NGPlus
from ngplus.profiling import StepTimes

__version__ = "0.1.0"

__all__ = ["LayerState", "NGPlus", "OnlineNGPlus", "StepTimes", "__version__"]
