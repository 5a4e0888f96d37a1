"""Operators and modules that turn a dense model into a mixture of experts, train it, and balance modalities.

The operators are ``torch.ops.mmbal.*``; importing this package registers them.
"""

from mmbal import (  # noqa: F401  (the operators register themselves)
    alignment,
    attribution,
    btw,
    divergence,
    expert_mlp,
    integrations,
    mcl,
    mutual_info,
    retrieval,
    router_loss,
    routing,
    sampling,
    significance,
    units,
)
from mmbal._core import version as __version__
from mmbal.altmoe.alternation import StepInfo, alternate
from mmbal.altmoe.connector import MoEConnector
from mmbal.altmoe.loss import AlignLoss
from mmbal.altmoe.parts import ConnectorOut, TargetOut
from mmbal.altmoe.sampler import ResumableBatchSampler
from mmbal.altmoe.schedule import DirectionSchedule
from mmbal.altmoe.store import VectorStore
from mmbal.altmoe.trainer import AlternatingTrainer
from mmbal.checkpoints import load_clip_moe, save_clip_moe
from mmbal.methods.amss import AMSS
from mmbal.methods.attribution import AttributionInfo, AttributionRegularizer
from mmbal.methods.attribution_monitor import AttributionMonitor, attribution_shares
from mmbal.methods.btw import BTW
from mmbal.methods.embedding_tap import EmbeddingTap
from mmbal.methods.unit_spec import UnitSpec
from mmbal.moe import (
    Experts,
    MoEMLP,
    RouterLosses,
    RouterRecord,
    collect_router,
    freeze_except_router,
    router_losses,
)
from mmbal.packing import pack
from mmbal.upcycling import upcycle

__all__ = [
    "AMSS",
    "BTW",
    "AlignLoss",
    "AlternatingTrainer",
    "AttributionInfo",
    "AttributionMonitor",
    "AttributionRegularizer",
    "ConnectorOut",
    "DirectionSchedule",
    "EmbeddingTap",
    "Experts",
    "MoEConnector",
    "MoEMLP",
    "ResumableBatchSampler",
    "RouterLosses",
    "RouterRecord",
    "StepInfo",
    "TargetOut",
    "UnitSpec",
    "VectorStore",
    "__version__",
    "alternate",
    "attribution_shares",
    "collect_router",
    "freeze_except_router",
    "integrations",
    "load_clip_moe",
    "mcl",
    "pack",
    "router_losses",
    "save_clip_moe",
    "upcycle",
]
