"""SILCO (Hu et al., "SILCO: Show a Few Images, Localize the Common Object", ICCV 2019): supports without any box.

An SSD whose maps of the query are enhanced, scale by scale, by what the support images have in common with it: by
their spatial similarity (paper 3.2.2), each image weighted by a graph convolutional network (3.2.3).
"""

from .config import add_config
from .detector import SILCO
from .trunk import SSDTrunk

__all__ = ["SILCO", "SSDTrunk", "add_config"]
