"""The methods that NG+ is compared with, on the same capture and with the same handling of base and state."""

from ngplus.baselines.kfac import KFAC
from ngplus.baselines.seng import SENG
from ngplus.baselines.shampoo import Shampoo

__all__ = ["KFAC", "SENG", "Shampoo"]
