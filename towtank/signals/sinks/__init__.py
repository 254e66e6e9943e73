"""Where readings and alarms go: the folder of the run, and the trackers people use.

Keys keep their slashes everywhere ("train/loss", "grad/norm"): every tracker makes groups of them. A tracker's library is
imported when its sink is made, and comes with the extra of the same name: `towtank[wandb]`.
"""

from towtank.signals.sinks.jsonl import JSONL
from towtank.signals.sinks.mlflow import MLflow
from towtank.signals.sinks.sink import Sink, Sinks
from towtank.signals.sinks.tensorboard import TensorBoard
from towtank.signals.sinks.trackio import Trackio
from towtank.signals.sinks.wandb import WandB

__all__ = ["JSONL", "MLflow", "Sink", "Sinks", "TensorBoard", "Trackio", "WandB"]
