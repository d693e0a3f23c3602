"""Methods: what one is, parts they share, and all methods beyond those in train.py, one per file.

A user's method imports what it needs from here:

    from ffcv_ssl.methods import EMATeacher, FeatureQueue, Method, cross_entropy, unit_rows
"""

from ffcv_ssl.methods.base import Features, Loss, Method, apply_head, stack
from ffcv_ssl.methods.ema_teacher import EMATeacher
from ffcv_ssl.methods.feature_queue import FeatureQueue
from ffcv_ssl.methods.numeric import center, cross_entropy, full_precision, mean_over, unit_rows
from ffcv_ssl.training.models import make_mlp
from ffcv_ssl.training.optimizers import set_weight_decay
from ffcv_ssl.training.world import World

__all__ = [
    "EMATeacher",
    "FeatureQueue",
    "Features",
    "Loss",
    "Method",
    "World",
    "apply_head",
    "center",
    "cross_entropy",
    "full_precision",
    "make_mlp",
    "mean_over",
    "set_weight_decay",
    "stack",
    "unit_rows",
]
