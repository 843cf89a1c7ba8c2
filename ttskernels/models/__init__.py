"""Decoder-only models: loading, score heads, and the decoder over plans and page pools."""

from ttskernels.models.calibration import calibrate
from ttskernels.models.config import DecoderConfig
from ttskernels.models.heads import HeadSpec, ScoreHead
from ttskernels.models.load import load_model
from ttskernels.models.loading import Checkpoint, load_checkpoint
from ttskernels.models.model import Model

__all__ = ["Checkpoint", "DecoderConfig", "HeadSpec", "Model", "ScoreHead", "calibrate", "load_checkpoint", "load_model"]
