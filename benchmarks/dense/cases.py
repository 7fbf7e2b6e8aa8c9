"""Which dense layers are measured, in which forms and formats, and the work that each one needs."""

from dataclasses import dataclass

# "bias": x·W + bias. "gelu": GELU of that. "all": LayerNorm before it and a residual after it too.
FORMS = ("bias", "gelu", "all")
ROWS = (1, 4, 8, 16, 32, 128, 197, 1024, 3072)
# GPT-2 and BERT-base, MiniLM, ViT-Ti, Llama-1B, 7B.
BASE = ((768, 768), (768, 2304), (768, 3072), (3072, 768))
LAYERS = (*BASE, (384, 1536), (192, 768), (2048, 5632), (4096, 4096), (4096, 11008))
FEW_ROWS = 16  # up to so many, weights come from memory: they walk through copies
MOST_COPIES = 64  # XLA takes seconds to compile a choice between as many
# Weights that are constants of the program, which XLA takes seconds to fold, have bars here alone.
CONSTANT_ROWS = (1, 8)
DECODED_ROWS = 128  # up to so many, weights alone are quantised: to read less of them
GELU_ROWS = 8  # from so many on, GELU is measured

# Ours, by the arguments of pack_weight.
FORMATS: dict[str, dict] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 of bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "int4/32": {"dtype": "int4", "group_size": 32},
    "int4/128": {"dtype": "int4", "group_size": 128},
    "int8 weights": {"dtype": "int8", "activations": None},
    "int4/32 weights": {"dtype": "int4", "group_size": 32, "activations": None},
}
# What x and the result are where they are not float32, which is the name of their precision too.
X_DTYPES = {"bfloat16 of bfloat16": "bfloat16"}
# Others by name: which of ours has the same precision.
XLA = {
    "XLA float32": "float32",
    "XLA bfloat16": "bfloat16",
    "XLA bfloat16 → float32": "bfloat16",
    "XLA float32 constants": "float32",
    "XLA bfloat16 → float32 constants": "bfloat16",
}
PEERS = {
    "torch float32": "float32",
    "torch bfloat16": "bfloat16",
    "torch int8": "int8",
    "onnxruntime float32": "float32",
    "onnxruntime int8": "int8",
    "onnxruntime 8 bits/32": "int8",
    "onnxruntime 4 bits/32": "int4/32",
    "onnxruntime 4 bits/128": "int4/128",
    "OpenVINO float32": "float32",
    "OpenVINO bfloat16": "bfloat16",
    "OpenVINO int8": "int8",
    "OpenVINO 8 bits/32": "int8",
    "OpenVINO 4 bits/32": "int4/32",
    "OpenVINO 4 bits/128": "int4/128",
}

ROUNDS, FEWEST_ROUNDS = 9, 2
ROUNDS_FLOPS = 3e10  # work of the rounds of one contestant, where that leaves these numbers
LONG_FLOPS = 1e9  # above this much work one call is a reading
GELU_FLOPS = 2e10  # above this much work GELU is next to nothing
MOST_FLOPS = 1e11  # above this much work nothing is new
MOST_GFLOPS = 3000  # no core is faster: gives the shortest time that a call can take


@dataclass(frozen=True)
class Shape:
    """x is (m, k), the weight (k, n)."""

    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.m}, {self.k}→{self.n}"

    @property
    def flops(self) -> float:
        """Additions and multiplications of the product."""
        return 2.0 * self.m * self.k * self.n

    @property
    def walks(self) -> bool:
        """Whether weights are read from memory."""
        return self.m <= FEW_ROWS


SHAPES = [s for k, n in LAYERS for m in ROWS if (s := Shape(m, k, n)).flops <= MOST_FLOPS]
QUICK_SHAPES = [Shape(1, 192, 768), Shape(32, 192, 768)]
FUSED = Shape(1024, 768, 3072)
SCALED = (Shape(128, 768, 768), FUSED)
# The weights of GPT-2 small, 124 million: how many of which shape.
GPT2 = {**dict.fromkeys(BASE, 12), (768, 50257): 1}
PACKED = ("float32", "bfloat16", "int8", "int4/32")
# What norms are measured at fills the second-level cache of any core.
NORM_SHAPE = (64, 768)
NORMS = ("layer_norm", "rms_norm")
NORM_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One layer in one form."""

    shape: Shape
    form: str

    def __str__(self) -> str:
        return f"{self.shape} {self.form}"


def bytes_of(format_: str) -> float:
    """Bytes of a weight, scales of groups included."""
    group = FORMATS[format_].get("group_size")
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[FORMATS[format_]["dtype"]]
    return bits / 8 + (2 / group if group else 0)


def fits(format_: str, shape: Shape) -> bool:
    """Whether a format is measured: groups divide the columns, weights that are quantised alone
    have few rows, and another dtype of x many, since few rows wait for weights.
    """
    described = FORMATS[format_]
    decoded = "activations" in described and shape.m > DECODED_ROWS
    waits = format_ in X_DTYPES and shape.walks
    return shape.k % described.get("group_size", 1) == 0 and not decoded and not waits


def precision(format_: str) -> str:
    """What a format is called among others of the same precision."""
    return X_DTYPES.get(format_, format_)


def choose(shape: Shape, wanted: list[str] | None) -> list[Case]:
    """The cases of one shape, which are measured in the same rounds."""
    gelu = shape.m >= GELU_ROWS and shape.flops <= GELU_FLOPS
    chosen = wanted or (FORMS if shape == FUSED else FORMS[: 1 + gelu])
    return [Case(shape, form) for form in FORMS if form in chosen]


def rounds(shape: Shape) -> int:
    """The number of interleaved rounds by default."""
    return max(FEWEST_ROUNDS, min(ROUNDS, round(ROUNDS_FLOPS / shape.flops)))
