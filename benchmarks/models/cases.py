"""Which models are measured, at which sizes and inputs, and with which systems.

All sizes are those of the published models; their weights are random, which changes no time.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.harness.peers import ONNXRUNTIME, OPENVINO, TORCH

DTYPES = ("float32", "bfloat16")

FLAX, PARTS, ACCELERATE, INTERCEPTOR = "flax", "softmax-gelu", "accelerate", "interceptor"
FLAX_BFLOAT16 = "flax-bfloat16"
CEILING = "ceiling"
WEIGHTS = ("float32", "bfloat16", "int8", "int4")
# The formats of weights, by the names of the systems that pack them.
CALIBRATED = "pack-int8-calibrated"
INT8_ATTENTION, INT4_ATTENTION = "pack-int8-attention", "pack-int4-attention"
PACKED = {f"pack-{weights}": weights for weights in WEIGHTS}
PACKED |= {CALIBRATED: "int8", INT8_ATTENTION: "int8", INT4_ATTENTION: "int4"}
# What attention multiplies and caches, if not the model's dtype; so does OpenVINO's bfloat16.
ATTENTION = {"pack-bfloat16": "bfloat16", INT8_ATTENTION: "int8", INT4_ATTENTION: "int8"}
# Others by name: which of ours has the same precision. The first part is the library.
PEERS = {
    TORCH: "float32",
    "torch-compiled": "float32",
    ONNXRUNTIME: "float32",
    OPENVINO: "float32",
    FLAX_BFLOAT16: "bfloat16",
    "torch-bfloat16": "bfloat16",
    "torch-bfloat16-compiled": "bfloat16",
    "zentorch-bfloat16": "bfloat16",
    "openvino-bfloat16": "bfloat16",
    "onnxruntime-int8": "int8",
    "openvino-int8": "int8",
    "openvino-int8-static": "int8",
    "onnxruntime-int4": "int4",
    "openvino-int4": "int4",
}
STATIC = "openvino-int8-static"
_OURS = (FLAX, PARTS, ACCELERATE, INTERCEPTOR, *PACKED, CEILING)
SYSTEMS = (*_OURS, *PEERS)
# Of the weights of each system.
PRECISIONS = dict.fromkeys(_OURS, "float32") | PACKED | PEERS
SUBJECT = ACCELERATE
_COMPRESSED = "its weights in {} by NNCF"
MEANING = {
    FLAX: "the jitted model as it is, the others' weights and inputs are its own",
    PARTS: 'accelerate(model, only={"softmax", "gelu"}), without fused attention',
    ACCELERATE: "jax.jit(quake_jax.accelerate(model))",
    INTERCEPTOR: "the model called under quake_jax.linen.substitute()",
    **{
        name: f'quake_jax.pack(model, …, weights="{w}"), packed before'
        for name, w in PACKED.items()
    },
    **{
        name: f'pack(…, weights="{PACKED[name]}", attention="{dtype}"), and a cache of {dtype}'
        for name, dtype in ATTENTION.items()
    },
    CALIBRATED: 'weights="int8" with ranges of activations from the inputs (calibrate=)',
    CEILING: "not a model: attention is query + key + value, and GELU is left out",
    TORCH: "eager, scaled_dot_product_attention, query, key and value from one product",
    "torch-compiled": "torch.compile with frozen weights",
    ONNXRUNTIME: "the graph of its optimizer for Transformers",
    OPENVINO: "converted from torch, a float32 cache",
    FLAX_BFLOAT16: "the jitted model with weights and activations in bfloat16",
    "torch-bfloat16": "eager, all in bfloat16",
    "torch-bfloat16-compiled": "the same by torch.compile with frozen weights",
    "zentorch-bfloat16": "the same by its backend",
    "openvino-bfloat16": "inference precision bf16, the cache as well",
    "onnxruntime-int8": "quantize_dynamic, weights by column and activations as a whole",
    "openvino-int8": f"{_COMPRESSED.format('8 bits')}, activations quantised in groups of 64 where "
    "the CPU has VNNI",
    STATIC: "weights and activations quantised before, by NNCF from the inputs",
    "onnxruntime-int4": "MatMulNBits, groups of 32, the last layer in 8 bits",
    "openvino-int4": f"{_COMPRESSED.format('4 bits')} in groups of 32, activations in 8",
}

ROUNDS = 5


def label(system: str) -> str:
    """What tables and pictures call a system."""
    return f"{system} (not a model)" if system == CEILING else system


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Transformer; the hidden layer of its MLPs has four times the width."""

    layers: int
    width: int
    heads: int
    # Of texts:
    vocabulary: int = 0
    positions: int = 0
    # Of images:
    image: int = 0
    patch: int = 0
    classes: int = 0

    @property
    def tokens(self) -> int:
        """Patches of an image and the class token."""
        return (self.image // self.patch) ** 2 + 1


EPSILON = {"gpt2": 1e-5, "bert": 1e-12, "vit": 1e-6}  # of the norms of a family
GPT2_SMALL = Sizes(layers=12, width=768, heads=12, vocabulary=50257, positions=1024)
BERT_BASE = Sizes(layers=12, width=768, heads=12, vocabulary=30522, positions=512)
MINILM_L6 = Sizes(layers=6, width=384, heads=12, vocabulary=30522, positions=512)
VIT_B16 = Sizes(layers=12, width=768, heads=12, image=224, patch=16, classes=1000)
VIT_TI16 = dataclasses.replace(VIT_B16, width=192, heads=3)


@dataclass(frozen=True)
class Case:
    """One model with one shape of input."""

    name: str  # on the command line
    title: str  # in tables
    family: str  # "gpt2", "bert" or "vit"
    sizes: Sizes
    batch: int  # texts or images
    length: int = 0  # tokens of a text; 0 for images
    decodes: bool = False  # one token more after `length - 1` in the cache
    pools: bool = False  # the result is one normalised vector for each text
    dtype: str = "float32"  # of weights and activations

    def __str__(self) -> str:
        return self.title

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"

    @property
    def lengths(self) -> list[int]:
        """How many tokens each text of a padded batch has: from half of them to all."""
        full, batch = self.length, self.batch
        if batch == 1:
            return [full]
        return [full // 2 + (full - full // 2) * b // (batch - 1) for b in range(batch)]


def _gpt2(name: str, title: str, length: int, decodes: bool = False) -> Case:
    return Case(name, f"GPT-2 small, {title}", "gpt2", GPT2_SMALL, 1, length, decodes)


def _vit(name: str, title: str, sizes: Sizes, batch: int) -> Case:
    return Case(f"{name}-{batch}", f"{title}, batch {batch}", "vit", sizes, batch)


_ALL = (
    _gpt2("gpt2-prefill-1024", "prefill 1024", 1024),
    _gpt2("gpt2-prefill-128", "prefill 128", 128),
    _gpt2("gpt2-decode-1024", "a token after 1023", 1024, decodes=True),
    Case("bert-8x384", "BERT-base, 8×384", "bert", BERT_BASE, 8, 384),
    Case("bert-1x128", "BERT-base, 1×128", "bert", BERT_BASE, 1, 128),
    Case("bert-8x128", "BERT-base, 8×128", "bert", BERT_BASE, 8, 128),
    Case("minilm-32x128", "MiniLM-L6, 32×128", "bert", MINILM_L6, 32, 128, pools=True),
    _vit("vit-b16", "ViT-B/16", VIT_B16, 8),
    _vit("vit-b16", "ViT-B/16", VIT_B16, 1),
    _vit("vit-ti16", "ViT-Ti/16", VIT_TI16, 8),
    _vit("vit-ti16", "ViT-Ti/16", VIT_TI16, 1),
)
CASES = {case.name: case for case in _ALL}


def systems(wanted: Iterable[str] | None, weights: Iterable[str] | None) -> list[str]:
    """The systems with these names, or whose weights have one of these formats; and `FLAX`."""
    of = [name for name in SYSTEMS if PRECISIONS[name] in (weights or WEIGHTS)]
    return [name for name in SYSTEMS if name in {FLAX, *(wanted or of)}]


def not_for(name: str, case: Case) -> str | None:
    """Why a system takes no part in a case, if so."""
    if name == STATIC and case.decodes:
        return "a cache that grows has no range beforehand"
    if name == "onnxruntime-int4" and not case.decodes:
        return "its fused attention has no 4 bits"
    return None


def choose(names: Iterable[str], dtype: str, quick: bool) -> list[Case]:
    """The cases with these names, in the order of `CASES`; quick, the models are shrunk."""
    cases = [dataclasses.replace(CASES[name], dtype=dtype) for name in CASES if name in names]
    return [_shrunk(case) for case in cases] if quick else cases


def _shrunk(case: Case) -> Case:
    """The same kind of model with two layers of width 32, too small to tell anything of speed."""
    of_family = {"image": 64, "classes": 10}
    if case.family != "vit":
        of_family = {"vocabulary": 100, "positions": 32}
    sizes = dataclasses.replace(case.sizes, layers=2, width=32, heads=2, **of_family)
    batch, length, title = min(case.batch, 2), min(case.length, 32), f"{case.title} (shrunk)"
    return dataclasses.replace(case, title=title, sizes=sizes, batch=batch, length=length)
