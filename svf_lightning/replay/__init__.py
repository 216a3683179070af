"""What evaluates: checkpoints of real language models, replayed through the callbacks that measure the toy model."""

import sys

from svf_lightning import CallablePackage
from svf_lightning.errors import CheckpointError
from svf_lightning.replay.checkpoints import FolderCheckpoints, GGUFCheckpoint, ModelCheckpoints
from svf_lightning.replay.data import ReplayData
from svf_lightning.replay.decompose import HeadSpace, decompose_attention
from svf_lightning.replay.hub import HubCheckpoints
from svf_lightning.replay.model import CheckpointReplay
from svf_lightning.replay.nanogpt import NanoGPTCheckpoint
from svf_lightning.replay.prompts import Prompt, ioi_prompts, read_prompts
from svf_lightning.replay.source import CheckpointSource
from svf_lightning.replay.tiny_suite import TinySuite

__all__ = [
    "CheckpointError",
    "CheckpointReplay",
    "CheckpointSource",
    "FolderCheckpoints",
    "GGUFCheckpoint",
    "HeadSpace",
    "HubCheckpoints",
    "ModelCheckpoints",
    "NanoGPTCheckpoint",
    "Prompt",
    "ReplayData",
    "TinySuite",
    "decompose_attention",
    "ioi_prompts",
    "read_prompts",
]

sys.modules[__name__].__class__ = CallablePackage
