"""How big the model is and what it is made of."""

from dataclasses import dataclass, replace
from math import inf

from models.dispatch import PATHS
from models.experts import ACTIVATIONS

NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "rotary")
PLACEMENTS = ("replace", "insert")
SIDES = ("decoder", "encoder")


@dataclass
class ModelSettings:
    """Sizes and parts of the model; each option is explained in conf/model/transformer.yaml."""

    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    norm: str
    positions: str
    activation: str
    sparse_layers: list[int]
    placement: str  # replace the FFN of the sparse layers, or insert a layer of experts alone after them
    dispatch: str
    depth_factor: int = 1  # times num_layers; what the factors give is in scaled()
    width_factor: float = 1.0  # times d_model and num_heads
    ff_factor: float = 1.0  # times d_ff
    encoder_layers: int = 0  # 0: decoder-only
    sparse_in: str = "decoder"  # whose layers sparse_layers names
    biases: bool = False
    num_positions: int | None = None  # rows of each table of learned positions

    def scaled(self) -> "ModelSettings":
        """The sizes with their factors applied, which are 1 then. Raises ValueError if a size is no longer whole."""
        factors = {"num_layers": "depth_factor", "d_model": "width_factor", "d_ff": "ff_factor"}
        factors["num_heads"] = "width_factor"
        sizes = {}
        for name, factor in factors.items():
            size, by = getattr(self, name), getattr(self, factor)
            scaled = size * by
            if not (0 < by < inf) or abs(scaled - round(scaled)) > 1e-9 * scaled:  # 640 * 1.1 is whole but for rounding
                raise ValueError(f"model.{name} times model.{factor} must be a whole number above 0; got {size} * {by}")
            sizes[name] = round(scaled)
        ones = {"depth_factor": 1, "width_factor": 1.0, "ff_factor": 1.0}
        return replace(self, **sizes, **ones)

    def check(self) -> None:
        """Raises ValueError for sizes and parts that do not fit."""
        for name, least in (("num_layers", 1), ("d_model", 1), ("d_ff", 1), ("num_heads", 1), ("encoder_layers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"model.{name} must be at least {least}; got {getattr(self, name)}")
        choices = {"norm": NORMS, "positions": POSITIONS, "activation": ACTIVATIONS, "dispatch": PATHS}
        choices |= {"placement": PLACEMENTS, "sparse_in": SIDES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name} must be one of {', '.join(known)}; got {getattr(self, name)}")
        if self.d_model % (self.num_heads * (2 if self.positions == "rotary" else 1)):
            rule = "must be divisible by model.num_heads, to an even width of each head with rotary positions"
            raise ValueError(f"model.d_model {rule}; got {self.d_model} and {self.num_heads}")
        if self.d_model % 8 or self.d_ff % 8:
            raise ValueError(f"model.d_model and model.d_ff must be multiples of 8; got {self.d_model} and {self.d_ff}")
        if self.num_positions is not None and (self.positions != "learned" or self.num_positions < 1):
            rule = "must be at least 1 with model.positions=learned, and null with rotary"
            raise ValueError(f"model.num_positions {rule}; got {self.num_positions} with {self.positions}")
        self._check_sparse_layers()

    def _check_sparse_layers(self) -> None:
        if self.sparse_in == "encoder" and self.encoder_layers == 0:
            raise ValueError("model.sparse_in=encoder needs model.encoder_layers of at least 1; got 0")
        count = "encoder_layers" if self.sparse_in == "encoder" else "num_layers"
        layers = getattr(self, count)
        unused = set(range(layers)) - set(self.sparse_layers)
        if len(unused) + len(self.sparse_layers) != layers:
            rule = f"must be different layers in 0..{layers - 1} (model.{count} - 1)"
            raise ValueError(f"model.sparse_layers {rule}; got {self.sparse_layers}")
