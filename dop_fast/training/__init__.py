"""Training with the pruned weights held at zero, and accuracy."""

from dop_fast.precision import computes_in_bf16
from dop_fast.training.accuracy import Accuracy, evaluate
from dop_fast.training.holding import hold
from dop_fast.training.loop import Epoch, Fitted, TrainData, fit, learning_rate

__all__ = [
    "Accuracy",
    "Epoch",
    "Fitted",
    "TrainData",
    "computes_in_bf16",
    "evaluate",
    "fit",
    "hold",
    "learning_rate",
]
