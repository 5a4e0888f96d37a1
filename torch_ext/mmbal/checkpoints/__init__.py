"""CLIP checkpoints of OpenAI, transformers and open_clip, dense and as mixtures, read and written tensor by tensor."""

from .architecture import CLIPArchitecture, Mixture, TextTower, VisionTower
from .checkpoint import Checkpoint, Counts, LazyTensor, count_parameters
from .models import from_model, load_clip, load_clip_moe, save_clip_moe, to_model
from .reading import open_checkpoint
from .upcycling import extract_expert, stretch_positions, upcycle_checkpoint
from .writing import write_checkpoint

__all__ = [
    "CLIPArchitecture",
    "Checkpoint",
    "Counts",
    "LazyTensor",
    "Mixture",
    "TextTower",
    "VisionTower",
    "count_parameters",
    "extract_expert",
    "from_model",
    "load_clip",
    "load_clip_moe",
    "open_checkpoint",
    "save_clip_moe",
    "stretch_positions",
    "to_model",
    "upcycle_checkpoint",
    "write_checkpoint",
]
