"""NG+, a multi-step matrix-product natural gradient optimizer for PyTorch."""

from ngplus.curvature import LayerState
from ngplus.online import OnlineNGPlus
from ngplus.optimizer import NGPlus
from ngplus.times import StepTimes

__version__ = "0.1.0"

__all__ = ["LayerState", "NGPlus", "OnlineNGPlus", "StepTimes", "__version__"]
