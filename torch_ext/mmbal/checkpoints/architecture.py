"""What a CLIP checkpoint is, apart from its weights: the sizes of its towers and the mixtures in them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from mmbal.dense import ACTIVATIONS
from mmbal.expert_init import TOWERS

__all__ = ["TOWERS", "CLIPArchitecture", "Mixture", "TextTower", "VisionTower"]


@dataclass(frozen=True)
class VisionTower:
    """A ViT over image_size x image_size pixels: 1 + (image_size / patch_size)^2 tokens."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    activation: str
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class TextTower:
    """A causal transformer over context_length tokens, pooled at eos_token_id.

    kept_positions: the published CLIP-MoE layout has two tables of positions; rows below kept_positions (20,
    Long-CLIP's) are taken from the first and the others from the second. None where there is one table.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    context_length: int
    vocab_size: int
    activation: str
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406  # of CLIP's vocabulary of 49,408, as the next two
    eos_token_id: int = 49407
    pad_token_id: int = 1
    kept_positions: int | None = None


@dataclass(frozen=True)
class Mixture:
    """Which layers of a tower are mixtures, and the options of :class:`mmbal.MoEMLP` that they share."""

    layers: tuple[int, ...]
    num_experts: int
    top_k: int = 2
    activation: str = "quick_gelu"
    normalize: bool = True
    dropout: float = 0.0
    output_dropout: float = 0.0
    router_bias: bool = False
    shared_expert: bool = False
    shared_weight: float = 0.5

    @property
    def stacked_experts(self) -> int:
        """How many experts a layer stores: the routed ones and the shared one, which is the last."""
        return self.num_experts + self.shared_expert

    def options(self) -> dict:
        """What MoEMLP takes besides its sizes."""
        return {name: value for name, value in asdict(self).items() if name != "layers"}

    @classmethod
    def of(cls, layers, layer) -> Mixture:
        """With the options of ``layer``, a :class:`mmbal.MoEMLP` that stands for all ``layers``."""
        names = [f.name for f in fields(cls) if f.name not in ("layers", "router_bias")]
        options = {name: getattr(layer, name) for name in names}
        return cls(tuple(layers), router_bias=layer.router.bias is not None, **options)

    def to_json(self) -> dict:
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_json(cls, value, where: str) -> Mixture:
        """Raises a ValueError that says what is wrong with the description found at ``where``."""
        known = {f.name: f for f in fields(cls)}
        if not isinstance(value, dict) or not {"layers", "num_experts"} <= set(value) or set(value) - set(known):
            raise ValueError(f"{where} must have layers, num_experts and other options of a mixture only")
        for name, given in value.items():
            wanted = {"layers": list, "activation": str}.get(name) or type(known[name].default)
            wanted = int if name == "num_experts" else wanted
            right = isinstance(given, (int, float) if wanted is float else wanted)
            if not right or (isinstance(given, bool) and wanted is not bool):
                raise ValueError(f"{where}: {name} must be {wanted.__name__}, got {type(given).__name__}")
        layers = value["layers"]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers) or not layers:
            raise ValueError(f"{where}: layers must be indices of layers, at least one")
        mixture = cls(**value | {"layers": tuple(sorted(set(layers)))})
        if not 1 <= mixture.top_k <= mixture.num_experts:
            limit = mixture.num_experts
            raise ValueError(f"{where}: top_k must be from 1 to num_experts = {limit}, got {mixture.top_k}")
        if mixture.activation not in ACTIVATIONS:
            raise ValueError(f"{where}: activation must be one of {', '.join(ACTIVATIONS)}")
        for name in ("dropout", "output_dropout", "shared_weight"):
            if not 0 <= getattr(mixture, name) < 1:
                raise ValueError(f"{where}: {name} must be in [0, 1), got {getattr(mixture, name)}")
        return mixture


@dataclass(frozen=True)
class CLIPArchitecture:
    """Towers that share an embedding of ``embed_dim``; a tower that a file does not hold is None.

    ``mixtures`` has an entry for each tower ("text", "vision") with mixture layers.
    """

    embed_dim: int | None
    vision: VisionTower | None
    text: TextTower | None
    mixtures: dict[str, Mixture] = field(default_factory=dict)

    def tower(self, name: str) -> VisionTower | TextTower | None:
        return getattr(self, name)

    def mixtures_to_json(self) -> dict:
        return {tower: mixture.to_json() for tower, mixture in self.mixtures.items()}

    def is_mixture(self, tower: str, layer: int) -> bool:
        return tower in self.mixtures and layer in self.mixtures[tower].layers
