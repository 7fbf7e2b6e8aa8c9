"""Tiny models of other libraries with random weights, as data: `CASES`, by name.

A case is made by a function without arguments; it returns a function of (parameters, *inputs), the
parameters and the inputs, and skips the test where its library is missing.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import key, values_of, variables_of

from quake_jax._core.constants import MAX_REL_ERROR

LENGTH, WIDTH, HEADS, VOCABULARY = 16, 32, 4, 100
CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))

# A result, or its gradient, is off by no more than the sum of the errors of two kernels at order 5.
TOLERANCE = 2 * max(errors[5] for errors in MAX_REL_ERROR.values())


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[[], tuple]
    is_linen: bool  # runs under quake_jax.linen.substitute too
    tolerance: float  # of outputs, relative to the largest


CASES: dict[str, Case] = {}


def case(name: str, is_linen: bool = False, tolerance: float = TOLERANCE):
    def add(make):
        CASES[name] = Case(make, is_linen, tolerance)
        return make

    return add


def library(name: str, *parts: str):
    """The package, some of its modules imported too."""
    package = pytest.importorskip(name, reason=f"needs {name}: pip install '.[models]'")
    for part in parts:
        pytest.importorskip(part, reason=f"this version of {name} has no {part}")
    return package


def values(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def tokens(*shape: int) -> jax.Array:
    # Not 0 to 3, which are padding and other special tokens.
    return jnp.asarray(np.random.default_rng(0).integers(4, VOCABULARY, shape), jnp.int32)


# The Flax models of transformers: class, what its configuration overrides, inputs.

# As most configurations name them, those of decoders, and those of encoders with decoders.
SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "vocab_size": VOCABULARY,
}
GPT_SIZES = {"n_layer": 1, "n_embd": WIDTH, "n_head": HEADS, "vocab_size": VOCABULARY}
IMAGES = {**SIZES, "image_size": 64}
ENCODER_DECODER = {
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 2 * WIDTH for side in ("encoder", "decoder")},
    "d_model": WIDTH,
    "vocab_size": VOCABULARY,
}

IDS = tokens(2, LENGTH)
PADDING_RIGHT = jnp.ones((2, LENGTH), jnp.int32).at[1, 11:].set(0)
# The first queries of a causal model see no key then.
PADDING_LEFT = PADDING_RIGHT[:, ::-1]
TEXT = {"input_ids": IDS, "attention_mask": PADDING_RIGHT}
TEXT_LEFT = {"input_ids": IDS, "attention_mask": PADDING_LEFT}
TRANSLATION = {**TEXT, "decoder_input_ids": IDS[:, ::-1]}
PIXELS = {"pixel_values": values(2, 3, 64, 64)}

# Not here: resnet and regnet, which have nothing to replace; t5, mt5 and longt5, which call
# jnp.clip(a_max=...): jax 0.10 has no such argument.
TRANSFORMERS = {
    "albert": ("AlbertModel", {**SIZES, "embedding_size": 16}, TEXT),
    "bart": ("BartModel", ENCODER_DECODER, TRANSLATION),
    "beit": ("BeitModel", IMAGES, PIXELS),
    "bert": ("BertModel", SIZES, TEXT),
    "big_bird": ("BigBirdModel", {**SIZES, "attention_type": "original_full"}, TEXT),
    "big_bird sparse": (
        "BigBirdModel",
        {**SIZES, "block_size": 4, "num_random_blocks": 1},
        {"input_ids": tokens(2, 64), "attention_mask": jnp.ones((2, 64), jnp.int32)},
    ),
    "blenderbot": ("BlenderbotModel", ENCODER_DECODER, TRANSLATION),
    "blenderbot_small": ("BlenderbotSmallModel", ENCODER_DECODER, TRANSLATION),
    "bloom": ("BloomModel", {**SIZES, "n_layer": 1, "n_head": HEADS}, TEXT),
    "clip": (
        "CLIPModel",
        {
            "text_config": SIZES,
            "vision_config": {**IMAGES, "patch_size": 16},
            "projection_dim": WIDTH,
        },
        {"input_ids": IDS, **PIXELS, "attention_mask": PADDING_RIGHT},
    ),
    "dinov2": ("Dinov2Model", IMAGES, PIXELS),
    "distilbert": (
        "DistilBertModel",
        {"n_layers": 1, "n_heads": HEADS, "dim": WIDTH, "hidden_dim": 2 * WIDTH},
        TEXT,
    ),
    "electra": ("ElectraModel", {**SIZES, "embedding_size": 16}, TEXT),
    "gemma": ("GemmaModel", {**SIZES, "num_key_value_heads": 2, "head_dim": 8}, TEXT),
    "gpt2": ("GPT2Model", GPT_SIZES, TEXT),
    "gpt2 left padding": ("GPT2Model", GPT_SIZES, TEXT_LEFT),
    "gpt_neo": (
        "GPTNeoModel",
        {
            "num_layers": 2,
            "num_heads": HEADS,
            "hidden_size": WIDTH,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        TEXT,
    ),
    "gptj": ("GPTJModel", {**GPT_SIZES, "rotary_dim": 4}, TEXT),
    "llama": ("LlamaModel", {**SIZES, "num_key_value_heads": HEADS}, TEXT),
    "marian": ("MarianModel", {**ENCODER_DECODER, "pad_token_id": 1}, TRANSLATION),
    "mbart": ("MBartModel", ENCODER_DECODER, TRANSLATION),
    "mistral": ("MistralModel", {**SIZES, "num_key_value_heads": 2}, TEXT),
    "mistral left padding": ("MistralModel", {**SIZES, "num_key_value_heads": 2}, TEXT_LEFT),
    "opt": ("OPTModel", {**SIZES, "ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH}, TEXT),
    "pegasus": ("PegasusModel", ENCODER_DECODER, TRANSLATION),
    "roberta": ("RobertaModel", SIZES, TEXT),
    "roberta_prelayernorm": ("RobertaPreLayerNormModel", SIZES, TEXT),
    "roformer": ("RoFormerModel", {**SIZES, "embedding_size": WIDTH}, TEXT),
    "vit": ("ViTModel", IMAGES, PIXELS),
    "wav2vec2": (
        "Wav2Vec2Model",
        {**SIZES, "conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4)}
        | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        {"input_values": values(2, 640)},
    ),
    "whisper": (
        "WhisperModel",
        {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": LENGTH},
        {"input_features": values(2, 8, 2 * LENGTH), "decoder_input_ids": IDS},
    ),
    "xglm": (
        "XGLMModel",
        {"num_layers": 1, "attention_heads": HEADS, "d_model": WIDTH, "ffn_dim": 2 * WIDTH},
        TEXT,
    ),
    "xlm_roberta": ("XLMRobertaModel", SIZES, TEXT),
}


def transformers_case(name: str, overrides: dict, inputs: dict):
    transformers = library("transformers", "flax")
    if not hasattr(transformers, "FlaxBertModel"):
        pytest.skip("this version of transformers has no Flax models: 4.57 is the last")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_class = getattr(transformers, f"Flax{name}")
        config = model_class.config_class(**overrides)
        model = model_class(config, _do_init=False)
    shapes = jax.eval_shape(
        functools.partial(model.init_weights, input_shape=model.input_shape), jax.random.key(0)
    )

    def fun(parameters, inputs):
        return model(**inputs, params=parameters)[0]

    return fun, values_of(shapes), inputs


for family, row in TRANSFORMERS.items():
    case(f"transformers {family}", is_linen=True)(functools.partial(transformers_case, *row))


@case("diffusers unet", is_linen=True)
def diffusers_unet():
    library("diffusers", "flax")
    unet = pytest.importorskip(
        "diffusers.models.unets.unet_2d_condition_flax",
        reason="this version of diffusers has no Flax models: 0.35 is the last",
    )
    model = unet.FlaxUNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=HEADS,
    )
    variables = {"params": variables_of(model.init_weights, jax.random.key(0))}

    def fun(variables, sample, context):
        return model.apply(variables, sample, jnp.ones((1,)), context).sample

    return fun, variables, values(1, 3, 16, 16), values(1, LENGTH, WIDTH)


@case("equinox")
def equinox_transformer():
    equinox = library("equinox")
    keys = jax.random.split(key(0), 2)
    model = (
        equinox.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0]),
        equinox.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, jax.nn.gelu, key=keys[1]),
    )
    parameters, rest = equinox.partition(model, equinox.is_array)

    def fun(parameters, x):
        attention, mlp = equinox.combine(parameters, rest)
        x = x + jax.vmap(lambda y: attention(y, y, y, mask=CAUSAL))(x)
        return x + jax.vmap(jax.vmap(mlp))(x)

    return fun, parameters, values(2, LENGTH, WIDTH)


@case("equimo vit")
def equimo_vit():
    equinox = library("equinox")
    library("equimo")
    vit = pytest.importorskip("equimo.models.vit", reason="needs equimo 1.1")
    build = functools.partial(
        vit.VisionTransformer,
        img_size=64,
        in_channels=3,
        dim=WIDTH,
        patch_size=16,
        num_heads=HEADS,
        depths=[1],
        num_classes=8,
    )
    model = equinox.filter_eval_shape(build, key=jax.random.key(0))
    shapes, rest = equinox.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    parameters = values_of(shapes)

    def fun(parameters, images):
        model = equinox.combine(parameters, rest)
        return jax.vmap(lambda x: model(x, inference=True, key=jax.random.key(0)))(images)

    return fun, parameters, values(2, 3, 64, 64)


@case("haiku")
def haiku_transformer():
    haiku = library("haiku")

    def norm(x):
        return haiku.LayerNorm(-1, create_scale=True, create_offset=True)(x)

    def transformer(x):
        init = haiku.initializers.VarianceScaling(0.5)
        for _ in range(2):
            y = norm(x)
            attention = haiku.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init)
            x = x + attention(y, y, y, mask=CAUSAL[None, None])
            x = x + haiku.Linear(WIDTH)(jax.nn.gelu(haiku.Linear(4 * WIDTH)(norm(x))))
        return norm(x)

    model = haiku.without_apply_rng(haiku.transform(transformer))
    x = values(2, LENGTH, WIDTH)
    return model.apply, variables_of(model.init, jax.random.key(0), x), x


@case("keras")
def keras_transformer():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = library("keras")
    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras's backend is {keras.backend.backend()}, not jax")
    x = inputs = keras.Input((LENGTH, WIDTH))
    for activation in ("gelu", "silu"):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y, use_causal_mask=True)
        x = keras.layers.Add()([x, y])
        y = keras.layers.Dense(2 * WIDTH, activation)(keras.layers.LayerNormalization()(x))
        x = keras.layers.Add()([x, keras.layers.Dense(WIDTH)(y)])
    model = keras.Model(inputs, keras.layers.Softmax()(x))
    rest = [v.value for v in model.non_trainable_variables]

    def fun(parameters, x):
        return model.stateless_call(parameters, rest, x)[0]

    parameters = values_of([v.value for v in model.trainable_variables])
    return fun, parameters, values(2, LENGTH, WIDTH)


def penzai_case(variant: str, kind: str, **sizes):
    library("penzai")
    module = pytest.importorskip(f"penzai.models.transformer.variants.{variant}")
    from penzai import pz

    config = getattr(module, f"{kind}TransformerConfig")(
        embedding_dim=WIDTH,
        projection_dim=WIDTH // HEADS,
        mlp_hidden_dim=2 * WIDTH,
        num_decoder_blocks=1,
        vocab_size=VOCABULARY,
        parameter_dtype=jnp.float32,
        activation_dtype=jnp.float32,
        **sizes,
    )
    build = getattr(module, f"build_{variant.removesuffix('_common')}_transformer")
    model, variables = pz.unbind_params(build(config, jax.random.key(0)), freeze=True)

    def fun(variables, ids):
        bound = pz.bind_variables(model, variables, unfreeze_as_copy=True)
        return bound(pz.nx.wrap(ids, "batch", "seq")).unwrap("batch", "seq", "vocabulary")

    return fun, variables, IDS


case("penzai gpt_neox")(
    functools.partial(
        penzai_case,
        "gpt_neox",
        "GPTNeoX",
        num_attention_heads=HEADS,
        activation_fn="gelu_exact",
        rope_subset_size=4,
        rope_wavelength=10_000.0,
        layernorm_epsilon=1e-5,
    )
)
case("penzai gemma")(
    functools.partial(
        penzai_case,
        "llamalike_common",
        "Llamalike",
        num_kv_heads=2,
        query_head_multiplier=2,
        mlp_variant="geglu_approx",
        tie_embedder_and_logits=True,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
    )
)


def linen_block(**keywords):
    """A transformer block of Linen, whose products are `keywords["dot_general_cls"]`, if given."""
    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            names = ("qkv_dot_general_cls", "out_dot_general_cls")
            products = {name: keywords["dot_general_cls"] for name in names if keywords}
            x = x + nn.MultiHeadDotProductAttention(HEADS, **products)(x, mask=CAUSAL)
            y = nn.gelu(nn.Dense(2 * WIDTH, **keywords)(nn.LayerNorm()(x)))
            return x + nn.Dense(WIDTH, **keywords)(y)

    return Block()


# One step of 8 bits: where the models differ by a rounding, a value may be quantised to the next.
STEP_OF_8_BITS = 2 / 127


@case("qwix int8", is_linen=True, tolerance=STEP_OF_8_BITS)
def qwix_int8():
    qwix = library("qwix")
    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8")
    model = qwix.quantize_model(linen_block(), qwix.QtProvider([rule]))
    x = values(2, LENGTH, WIDTH)
    return model.apply, variables_of(model.init, jax.random.key(0), x), x


@case("aqt int8", is_linen=True, tolerance=STEP_OF_8_BITS)
def aqt_int8():
    library("aqt")
    config = pytest.importorskip("aqt.jax.v2.config")
    aqt = pytest.importorskip("aqt.jax.v2.flax.aqt_flax")
    int8 = config.fully_quantized(fwd_bits=8, bwd_bits=8, use_stochastic_rounding=False)
    model = linen_block(dot_general_cls=functools.partial(aqt.AqtDotGeneral, int8))
    x = values(2, LENGTH, WIDTH)

    def fun(variables, x):
        return model.apply(variables, x, rngs={"params": jax.random.key(0)})

    return fun, variables_of(model.init, jax.random.key(0), x), x


@case("gemma", is_linen=True)
def gemma_transformer():
    config = library("gemma", "gemma.gm.nn.config").gm.nn.config
    kinds = config.AttentionType
    model = library("gemma").gm.nn.Transformer(
        config=config.TransformerConfig(
            num_embed=VOCABULARY,
            embed_dim=WIDTH,
            hidden_dim=2 * WIDTH,
            num_heads=HEADS,
            head_dim=WIDTH // HEADS,
            num_kv_heads=2,
            final_logit_softcap=30.0,
            attn_logits_soft_cap=50.0,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            use_qk_norm=True,
            attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
            sliding_window_size=4,
        ),
        dtype=jnp.float32,
    )

    def fun(variables, ids):
        return model.apply(variables, ids).logits

    return fun, variables_of(model.init, jax.random.key(0), IDS), IDS


@case("optax losses")
def optax_losses():
    optax = library("optax")
    logits = values(64, 64)

    def fun(logits, labels):
        return (
            optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 64)),
            optax.softmax_cross_entropy_with_integer_labels(logits, labels),
            optax.sigmoid_binary_cross_entropy(logits, jnp.eye(64)),
            optax.sigmoid_focal_loss(logits, jnp.eye(64)),
            optax.losses.ntxent(logits, labels // 2),
            optax.log_cosh(logits),
        )

    return fun, logits, jnp.arange(64)


@case("ott sinkhorn")
def ott_sinkhorn():
    library("ott")
    geometry = pytest.importorskip("ott.geometry.pointcloud")
    linear = pytest.importorskip("ott.solvers.linear")

    def fun(x, y):
        # A fixed number of steps, so that no rounding decides when to stop. Differentiated step by
        # step: the implicit equation is singular, since potentials have a free constant.
        cloud = geometry.PointCloud(x, y, epsilon=0.1)
        result = linear.solve(cloud, min_iterations=20, max_iterations=20, implicit_diff=None)
        return result.reg_ot_cost, result.f, result.g

    x = values(64, 2)
    return fun, x, x[::-1] * 0.5 + 1
