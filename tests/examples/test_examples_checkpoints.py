"""Tests of the examples on checkpoints in Hugging Face's layout: small ones with random weights.
Their outputs are compared with torch's transformers, once and for all in REFERENCE, and live where
transformers is installed (the extra `models`).
"""

import itertools
import json
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from safetensors import safe_open
from safetensors.numpy import save_file
from test_examples import EXAMPLES, short_comparisons  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

sys.path.insert(0, str(EXAMPLES))
import _checkpoint  # noqa: E402
import _command  # noqa: E402
import bert_model  # noqa: E402
import embed  # noqa: E402
import gpt  # noqa: E402
import gpt_model  # noqa: E402
import gpt_text  # noqa: E402
import vit  # noqa: E402
import vit_model  # noqa: E402
from _checkpoint import CheckpointError  # noqa: E402
from _command import UserError  # noqa: E402

# Small checkpoints, their tensors named as in transformers


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 300,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 256,
    "bos_token_id": 256,
    "tie_word_embeddings": True,
}


def gpt2_tensors(settings):
    width, inner = settings["n_embd"], settings["n_inner"] or 4 * settings["n_embd"]
    shapes = {
        "wte.weight": (settings["vocab_size"], width),
        "wpe.weight": (settings["n_positions"], width),
        **norm("ln_f", width),
    }
    for i in range(settings["n_layer"]):
        shapes |= norm(f"h.{i}.ln_1", width) | norm(f"h.{i}.ln_2", width)
        # A Conv1D of GPT-2 is (inputs, outputs), unlike torch's Linear.
        for name, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            shapes[f"h.{i}.{name}.weight"] = (inputs, outputs)
            shapes[f"h.{i}.{name}.bias"] = (outputs,)
    return shapes


VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "id2label": {str(i): f"class {i}" for i in range(7)},
}
PREPROCESSING = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 12, "width": 12},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}


def vit_tensors(settings):
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    patch, channels = settings["patch_size"], settings["num_channels"]
    patches = (settings["image_size"] // patch) ** 2
    shapes = {
        "vit.embeddings.cls_token": (1, 1, width),
        "vit.embeddings.position_embeddings": (1, patches + 1, width),
        "vit.embeddings.patch_embeddings.projection.weight": (width, channels, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": (width,),
        **norm("vit.layernorm", width),
        **linear("classifier", width, len(settings["id2label"])),
    }
    for i in range(settings["num_hidden_layers"]):
        layer = f"vit.encoder.layer.{i}"
        for name in ("attention.attention.query", "attention.attention.key"):
            shapes |= linear(f"{layer}.{name}", width, width)
        shapes |= linear(f"{layer}.attention.attention.value", width, width)
        shapes |= linear(f"{layer}.attention.output.dense", width, width)
        shapes |= linear(f"{layer}.intermediate.dense", width, inner)
        shapes |= linear(f"{layer}.output.dense", inner, width)
        shapes |= norm(f"{layer}.layernorm_before", width)
        shapes |= norm(f"{layer}.layernorm_after", width)
    return shapes


BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 300,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
}


def bert_tensors(settings):
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (settings["vocab_size"], width),
        "embeddings.position_embeddings.weight": (settings["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (settings["type_vocab_size"], width),
        **norm("embeddings.LayerNorm", width),
        **linear("pooler.dense", width, width),
    }
    for i in range(settings["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.self.{name}", width, width)
        shapes |= linear(f"{layer}.attention.output.dense", width, width)
        shapes |= norm(f"{layer}.attention.output.LayerNorm", width)
        shapes |= linear(f"{layer}.intermediate.dense", width, inner)
        shapes |= linear(f"{layer}.output.dense", inner, width)
        shapes |= norm(f"{layer}.output.LayerNorm", width)
    return shapes


KINDS = {
    "gpt2": (GPT2, gpt2_tensors),
    "vit": (VIT, vit_tensors),
    "bert": (BERT, bert_tensors),
}


def random_tensors(shapes) -> dict[str, np.ndarray]:
    """Tensors that depend on names and shapes only; large enough that attention is not uniform."""
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(list(name.encode()))
        tensor = rng.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.1)
        is_scale = re.search(r"(ln_\w|norm\w*)\.weight$", name, re.IGNORECASE)
        tensors[name] = (tensor + bool(is_scale)).astype(np.float32)
    return tensors


def byte_tokenizer(end: str | None = None, brackets: bool = False) -> Tokenizer:
    """A byte-level tokenizer without merges: 256 tokens for the bytes, then special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if end is not None:
        tokenizer.add_special_tokens([end])
    if brackets:
        tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
        tokenizer.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", None, [("[CLS]", 256), ("[SEP]", 257)]
        )
    return tokenizer


def write_checkpoint(folder, kind, *, prefix="", tensors=None, **changes):
    """Writes a small checkpoint of a kind; `changes` are made to config.json."""
    settings, shapes = KINDS[kind]
    settings = {k: v for k, v in (settings | changes).items() if v is not ...}
    if tensors is None:
        tensors = random_tensors(shapes(settings))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if kind == "vit":
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    else:
        tokenizer = byte_tokenizer("<|endoftext|>" if kind == "gpt2" else None, kind == "bert")
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    return request.param, write_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / request.param, request.param
    )


def load(kind, folder, dtype="float32"):
    return {"gpt2": gpt_model, "vit": vit_model, "bert": bert_model}[kind].load(folder, dtype)


# What they are run on

TOKENS = list(np.random.default_rng(5).integers(0, 250, 20).tolist())
# Each twice: activations of fewer than 1024 elements stay exact.
IMAGES = np.tile(np.random.default_rng(6).standard_normal((2, 12, 12, 3)), (2, 1, 1, 1))
IMAGES = IMAGES.astype(np.float32)
TEXTS = ["A first sentence.", "another", "The third is the longest: été."]


def run_model(kind, folder, order, dtype="float32") -> np.ndarray:
    """Logits after TOKENS, of IMAGES, or the vectors of TEXTS."""
    if kind == "gpt2":
        config, params, _ = load(kind, folder, dtype)
        return np.asarray(gpt_model.Generator(config, params, order).logits(TOKENS))
    if kind == "vit":
        config, _, params, _ = load(kind, folder, dtype)
        return np.asarray(vit_model.Classifier(config, params, order)(IMAGES))
    config, params = load(kind, folder, dtype)
    tokenizer = _checkpoint.load_tokenizer(folder, config.vocab_size)
    return bert_model.Encoder(config, params, tokenizer, 40, order)(TEXTS)


# The first five outputs of the last token, image or text, by transformers 4.57.6 with torch 2.13.
REFERENCE = {
    "gpt2": [0.8477219, 0.04922049, -0.5678526, -1.355803, 1.181191],
    "vit": [0.4212831, -0.857475, -0.4199294, -2.26869, 1.906226],
    "bert": [0.5324313, -0.09950663, 0.1714568, 0.2804489, 0.1937573],
}


def tolerance(expected, order) -> float:
    """Float32 rounding, or a bound of the exponential's error at an order, of the largest output.

    A weight of a softmax errs by at most twice the exponential's error, but in both directions, and
    so does a GELU; what two layers of them make of it stays below twice the error.
    """
    error = {"exact": 0, 1: 3e-2, 2: 2.7e-3, 3: 1.1e-4, 5: 2.5e-7}[order]
    return (2 * error + 30 * np.finfo(np.float32).eps) * float(np.abs(expected).max())


@pytest.mark.parametrize("order", ["exact", 1, 2, 3, 5])
def test_numbers_are_those_of_transformers(checkpoint, order):
    kind, folder = checkpoint
    outputs = run_model(kind, folder, order)
    np.testing.assert_allclose(
        outputs[-1, :5], REFERENCE[kind], rtol=0, atol=tolerance(outputs, order)
    )


def transformers_outputs(kind, folder) -> np.ndarray:
    """What `run_model` returns, computed by transformers."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install '.[bench]'")
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install '.[models]'"
    )
    with torch.no_grad():
        if kind == "gpt2":
            model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
            return model(torch.tensor([TOKENS])).logits[0].numpy()
        if kind == "vit":
            model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
            return model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).logits.numpy()
        model = transformers.BertModel.from_pretrained(folder).eval()
        tokenizer = _checkpoint.load_tokenizer(folder, 300)
        tokenizer.enable_padding()
        encodings = tokenizer.encode_batch(TEXTS)
        tokens = torch.tensor([e.ids for e in encodings])
        present = torch.tensor([e.attention_mask for e in encodings])
        hidden = model(tokens, attention_mask=present).last_hidden_state
        mean = (hidden * present[..., None]).sum(1) / present.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean).numpy()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {}),
        ("gpt2", {"prefix": "transformer."}),
        ("gpt2", {"n_inner": 32, "activation_function": "gelu", "layer_norm_epsilon": 1e-2}),
        ("gpt2", {"activation_function": "relu"}),
        ("vit", {}),
        ("vit", {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-2}),
        ("vit", {"hidden_act": "silu"}),
        ("bert", {}),
        ("bert", {"prefix": "bert.", "architectures": ["BertForMaskedLM"]}),
        ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2}),
    ],
)
def test_transformers_agrees(tmp_path, kind, options):
    folder = write_checkpoint(tmp_path, kind, **options)
    expected = transformers_outputs(kind, folder)
    for order in ("exact", 5):
        outputs = run_model(kind, folder, order)
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=tolerance(expected, order))
    if options == {}:
        np.testing.assert_allclose(REFERENCE[kind], expected[-1, :5], rtol=0, atol=2e-6)


def test_transformers_generates_the_same_tokens(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install '.[bench]'")
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install '.[models]'"
    )
    folder = write_checkpoint(tmp_path, "gpt2", eos_token_id=299)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens = torch.tensor([TOKENS])
    expected = model.generate(
        tokens,
        # Without it, transformers takes any token that equals the padding's for padding.
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=299,
    )
    config, params, _ = gpt_model.load(folder)
    stream = gpt_model.Generator(config, params, 5).stream(TOKENS, gpt_model.Sampling(0), seed=0)
    assert TOKENS + list(itertools.islice(stream, 12)) == expected[0].tolist()


def test_transformers_preprocesses_images_alike(tmp_path):
    pytest.importorskip("torch", reason="needs torch: pip install '.[bench]'")
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install '.[models]'"
    )
    image = random_image(31, 17)
    for changes in ({}, {"resample": 3}, {"do_normalize": False}, {"do_rescale": False}):
        folder = write_checkpoint(tmp_path, "vit")
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING | changes))
        processor = transformers.ViTImageProcessor.from_pretrained(folder)
        expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        config, *_ = vit_model.load(folder)
        actual = vit_model.load_preprocessing(folder, config)(image)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


# Loading


def test_kernels_are_in_the_programs(checkpoint):
    kind, folder = checkpoint
    config, params = load(kind, folder)[0], parameters(kind, folder)

    def program(order):
        if kind == "gpt2":
            model = gpt_model.Generator(config, params, order)
            return str(jax.make_jaxpr(lambda t: model._full(t))(jnp.array([TOKENS])))
        if kind == "vit":
            model = vit_model.Classifier(config, params, order)
            return str(jax.make_jaxpr(lambda x: model(x))(IMAGES))
        tokenizer = _checkpoint.load_tokenizer(folder, config.vocab_size)
        model = bert_model.Encoder(config, params, tokenizer, 40, order)
        tokens = jnp.array([TOKENS, TOKENS])
        return str(jax.make_jaxpr(lambda t: model._embed(t, t >= 0))(tokens))

    assert "quake" not in program("exact")
    fast = program(3)
    assert fast.count("= quake_dot_product_attention") == fast.count("= quake_bias_gelu") == 2
    assert "reduce_max" not in fast and " tanh " not in fast and " erfc " not in fast


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_loads_other_dtypes(tmp_path, checkpoint, stored):
    kind, folder = checkpoint
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    dtype = np.dtype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, kind, tensors=tensors)
    rounded = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    (tmp_path / "rounded").mkdir()
    write_checkpoint(tmp_path / "rounded", kind, tensors=rounded)
    jax.tree.map(
        np.testing.assert_array_equal,
        parameters(kind, tmp_path),
        parameters(kind, tmp_path / "rounded"),
    )


def parameters(kind, folder):
    return load(kind, folder)[2 if kind == "vit" else 1]


def test_computes_in_bfloat16(checkpoint):
    """Close to float32 by bfloat16's 8 bits, not equal to it, at every order."""
    kind, folder = checkpoint
    exact = run_model(kind, folder, "exact")
    for order in ("exact", None):
        outputs = run_model(kind, folder, order, dtype="bfloat16")
        assert outputs.dtype == np.float32
        difference = np.abs(outputs - exact).max() / np.abs(exact).max()
        assert 1e-4 < difference < 0.1


def test_loads_a_checkpoint_in_several_files(tmp_path, checkpoint):
    kind, folder = checkpoint
    write_checkpoint(tmp_path, kind)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    names = sorted(tensors)
    weight_map = {}
    for part in range(2):
        chosen = names[part::2]
        save_file({n: tensors[n] for n in chosen}, tmp_path / f"model-{part}.safetensors")
        weight_map |= dict.fromkeys(chosen, f"model-{part}.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(
        np.testing.assert_array_equal, parameters(kind, tmp_path), parameters(kind, folder)
    )
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: no such file"):
        load(kind, tmp_path)


def test_loads_old_names_and_leaves_out_what_is_not_needed(tmp_path):
    tensors = random_tensors(bert_tensors(BERT))
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {
        re.sub(r"LayerNorm\.\w+$", lambda found: names[found[0]], name): tensor
        for name, tensor in tensors.items()
    }
    old["embeddings.position_ids"] = np.arange(40)[None]
    old["cls.predictions.bias"] = np.zeros(300, np.float32)
    write_checkpoint(tmp_path, "bert", tensors=old, prefix="bert.")
    jax.tree.map(
        np.testing.assert_array_equal,
        parameters("bert", tmp_path),
        parameters("bert", write_checkpoint(tmp_path / "new", "bert", tensors=tensors)),
    )
    tensors = random_tensors(gpt2_tensors(GPT2))
    tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.uint8)
    tensors["h.1.attn.masked_bias"] = np.full((), -1e4, np.float32)
    tensors["lm_head.weight"] = tensors["wte.weight"].copy()
    load("gpt2", write_checkpoint(tmp_path / "gpt2", "gpt2", tensors=tensors))


FIRST_QUERY = {
    "gpt2": "h.0.attn.c_attn.weight",
    "vit": "vit.encoder.layer.0.attention.attention.query.weight",
    "bert": "encoder.layer.0.attention.self.query.weight",
}


def test_wrong_tensors_are_named(tmp_path, checkpoint):
    kind, _ = checkpoint
    name = FIRST_QUERY[kind]
    tensors = random_tensors(KINDS[kind][1](KINDS[kind][0]))
    shape = tensors[name].shape
    cases = [
        ({name: None}, f"no tensor {name}"),
        (
            {name: np.zeros((5, 7), np.float32)},
            f"{name} has shape (5, 7); expected {shape}",
        ),
        ({name: tensors[name].reshape(-1)}, f"{name} has shape ({shape[0] * shape[1]},)"),
        ({name: np.zeros(shape, np.int8)}, f"{name} has dtype int8; expected float32"),
        ({"head.weight": np.zeros(3, np.float32)}, "holds the tensor head.weight, which"),
    ]
    for changes, message in cases:
        changed = {n: t for n, t in (tensors | changes).items() if t is not None}
        write_checkpoint(tmp_path, kind, tensors=changed)
        with pytest.raises(CheckpointError, match=re.escape(message)) as error:
            load(kind, tmp_path)
        assert str(error.value).startswith(str(tmp_path / "model.safetensors"))


LAYERS = {"gpt2": "n_layer", "vit": "num_hidden_layers", "bert": "num_hidden_layers"}
HEADS = {"gpt2": "n_head", "vit": "num_attention_heads", "bert": "num_attention_heads"}


def test_wrong_settings_are_named(tmp_path, checkpoint):
    kind, _ = checkpoint
    layers, heads = LAYERS[kind], HEADS[kind]
    tensors = random_tensors(KINDS[kind][1](KINDS[kind][0]))
    act = "activation_function" if kind == "gpt2" else "hidden_act"
    cases = [
        ({"model_type": "llama"}, f"model_type is 'llama'; expected '{kind}'"),
        ({"model_type": ...}, f"model_type is None; expected '{kind}'"),
        ({layers: ...}, f"has no setting {layers}"),
        ({layers: "two"}, f"{layers} is 'two'; expected a whole number"),
        ({layers: 0}, f"{layers} is 0; expected a whole number from 1 up"),
        ({layers: True}, f"{layers} is True; expected"),
        ({heads: 5}, f"is 24; expected a multiple of {heads}, 5"),
        ({act: "xielu"}, f"{act} is 'xielu'; expected 'gelu"),
    ]
    cases += {
        "gpt2": [
            ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
            ({"tie_word_embeddings": False}, "tie_word_embeddings is False; expected True"),
        ],
        "vit": [
            ({"id2label": {"0": "a", "2": "b"}}, "id2label is not"),
            ({"patch_size": 5}, "image_size is 12; expected a multiple of patch_size, 5"),
            ({"num_channels": 4}, "num_channels is 4; expected 1 or 3"),
            ({"qkv_bias": False}, "qkv_bias is False; expected True"),
        ],
        "bert": [
            ({"position_embedding_type": "relative_key"}, "position_embedding_type is"),
            ({"is_decoder": True}, "is_decoder is True; expected False"),
        ],
    }[kind]
    for changes, message in cases:
        write_checkpoint(tmp_path, kind, tensors=tensors, **changes)
        with pytest.raises(CheckpointError, match=re.escape(message)) as error:
            load(kind, tmp_path)
        assert str(error.value).startswith(str(tmp_path / "config.json"))
    # More layers in the file than config.json says.
    write_checkpoint(tmp_path, kind, tensors=tensors, **{layers: 1})
    with pytest.raises(CheckpointError, match=r"holds the tensor .*\.1\."):
        load(kind, tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path, checkpoint):
    kind, _ = checkpoint
    write_checkpoint(tmp_path, kind)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for name, content, message in (
        ("model.safetensors", weights[: len(weights) // 2], "cannot be read"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "cannot be read"),
        ("model.safetensors", b"", "cannot be read"),
        ("model.safetensors", None, "no such file"),
        ("config.json", b"{", "cannot be read"),
        ("config.json", b"[]", "holds no JSON object"),
        ("config.json", b"\xff\xfe", "cannot be read"),
        ("config.json", None, "no such file"),
    ):
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            load(kind, tmp_path)
        assert str(error.value).startswith(f"{tmp_path / name}: {message}")
        write_checkpoint(tmp_path, kind)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin: save it as safetensors"):
        load(kind, tmp_path)


def test_wrong_tokenizers_are_named(tmp_path):
    file = tmp_path / "tokenizer.json"
    for prepare, message in (
        (lambda: None, "no such file"),
        (lambda: file.write_text("{}"), "cannot be read"),
        (lambda: byte_tokenizer("end").save(str(file)), "has the token 256; expected numbers"),
    ):
        prepare()
        with pytest.raises(CheckpointError) as error:
            _checkpoint.load_tokenizer(tmp_path, 256)
        assert str(error.value).startswith(f"{file}: {message}")
    assert _checkpoint.load_tokenizer(tmp_path, 257).get_vocab_size() == 257


def test_ids_of_the_hub_are_downloaded(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert _checkpoint.find(tmp_path) == tmp_path and not asked
    assert _checkpoint.find("someone/gpt2-x", files=["tokenizer.json"]) == tmp_path
    ((repo_id, patterns),) = asked
    assert repo_id == "someone/gpt2-x"
    assert {"config.json", "model*.safetensors", "tokenizer.json"} <= set(patterns)

    def refuse(repo_id, allow_patterns):
        raise OSError("no network\nand much more")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"^nobody/x: no such folder, and .*: no network$"):
        _checkpoint.find("nobody/x")
    with pytest.raises(CheckpointError, match=r"^a/b/c: no such folder$"):
        _checkpoint.find("a/b/c")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; expected a folder with config.json"):
        _checkpoint.find(tmp_path / "file")


def test_what_is_saved_is_what_torch_reads(tmp_path, checkpoint):
    """Saving undoes loading: names, shapes and values, in float16."""
    kind, folder = checkpoint
    if kind == "bert":
        pytest.skip("the BERT example does not save")
    if kind == "gpt2":
        config, params, metadata = load(kind, folder)
        gpt_model.save(tmp_path, config, params, metadata)
    else:
        config, labels, params, metadata = load(kind, folder)
        vit_model.save(tmp_path, config, labels, params, metadata)
        assert load(kind, tmp_path)[1] == labels
    assert load(kind, tmp_path)[0] == config
    with (
        safe_open(folder / "model.safetensors", framework="numpy") as before,
        safe_open(tmp_path / "model.safetensors", framework="numpy") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        for name in before.keys():
            np.testing.assert_array_equal(
                before.get_tensor(name).astype(np.float16), after.get_tensor(name)
            )


# The command lines


@pytest.fixture
def two_orders(monkeypatch):
    """A table of fewer rows, which take long to compile."""
    monkeypatch.setattr(_command, "COMPARED_ORDERS", ("exact", 2))


def test_gpt_continues_with_a_checkpoint(tmp_path, capsys, two_orders):
    folder = str(write_checkpoint(tmp_path, "gpt2"))
    common = ["--checkpoint", folder, "--prompt", "Hi"]
    assert gpt.run([*common, "--tokens", "40", "--temperature", "0", "--order", "exact"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Hi") and len(out) > 5 and "perplexity" not in out
    sampled = ["--top-k", "5", "--top-p", "0.9", "--dtype", "bfloat16", "--tokens", "5"]
    assert gpt.run([*common, *sampled, "--compare", "--eval-tokens", "64"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"64 held-out\s+tokens, bfloat16", out)
    assert re.findall(r"^ +(exact|\d) .*%", out, re.MULTILINE) == ["exact", "2"]


def test_gpt_stops_at_the_end_of_text(tmp_path, capsys):
    tensors = random_tensors(gpt2_tensors(GPT2))
    # Greedy decoding finds the end after any token.
    tensors["ln_f.weight"] = np.zeros_like(tensors["ln_f.weight"])
    tensors["ln_f.bias"] = tensors["wte.weight"][256] * 10
    folder = write_checkpoint(tmp_path, "gpt2", tensors=tensors)
    assert gpt.run(["--checkpoint", str(folder), "--prompt", "Hi", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "Hi\n"
    write_checkpoint(tmp_path, "gpt2", tensors=tensors, eos_token_id=...)
    assert gpt.run(["--checkpoint", str(folder), "--prompt", "Hi", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "Hi\n"


def test_gpt_refuses_a_tokenizer_that_is_not_byte_level(tmp_path):
    folder = write_checkpoint(tmp_path, "gpt2")
    Tokenizer(models.WordLevel({"Hi": 0}, "Hi")).save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json: expected a byte-level tokenizer"):
        gpt.run(["--checkpoint", str(folder)])


def test_stream_decoder_knows_tokens_outside_the_bytes():
    tokenizer = byte_tokenizer("<|endoftext|>")
    tokenizer.add_tokens(["two words"])
    decoder = gpt_text.StreamDecoder(tokenizer)
    half = tokenizer.encode("é").ids[0]
    assert [decoder.feed(i) for i in (257, 256, 299)] == ["two words", "", "\ufffd"]
    assert [decoder.feed(i) for i in (half, 257)] == ["", "\ufffdtwo words"]


def random_image(width, height):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install '.[examples]'")
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return image.fromarray(pixels)


def test_vit_classifies_image_files(tmp_path, capsys, two_orders):
    folder = write_checkpoint(tmp_path / "vit", "vit")
    random_image(40, 30).save(tmp_path / "a.png")
    random_image(9, 50).convert("RGBA").save(tmp_path / "b.png")
    names = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert vit.run(["--checkpoint", str(folder), *names, "--order", "exact"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[6]] == names and len(lines) == 12
    shares = [float(re.match(r" +([\d.]+)%  class \d$", line)[1]) for line in lines[1:6]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.1
    # The same by hand.
    config, labels, params, _ = vit_model.load(folder)
    images = vit.read_images(names, vit_model.load_preprocessing(folder, config))
    logits = vit_model.Classifier(config, params, "exact")(images)
    assert lines[1].endswith(labels[int(logits[0].argmax())])
    # And through the kernels, with a table.
    assert vit.run(["--checkpoint", str(folder), *names, "--compare", "--dtype", "bfloat16"]) == 0
    assert re.search(r"2\s+images,\s+bfloat16", capsys.readouterr().out)


def test_vit_names_bad_images(tmp_path):
    folder = str(write_checkpoint(tmp_path / "vit", "vit"))
    random_image(9, 9)
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            vit.run(["--checkpoint", folder, str(tmp_path / name)])
    with pytest.raises(UserError, match="at least one is needed with this checkpoint"):
        vit.run(["--checkpoint", folder])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 224}, "size is 224; expected a height and a width of image_size, 12"),
        ({"size": {"shortest_edge": 12}}, "size is {'shortest_edge': 12}; expected"),
        ({"do_center_crop": True}, "do_center_crop is True; expected false"),
        ({"image_mean": [0.5]}, r"image_mean is [0.5]; expected 3 numbers"),
        ({"image_std": 0.5}, "image_std is 0.5; expected 3 numbers"),
        ({"do_resize": False}, "do_resize is False; expected true"),
        ({"resample": "bilinear"}, "resample is 'bilinear'; expected"),
        ({"rescale_factor": None}, "rescale_factor is None; expected a number"),
    ],
)
def test_vit_names_wrong_preprocessing(tmp_path, changes, message):
    file = tmp_path / "preprocessor_config.json"
    config = vit_model.Config(12, 4, 3, 24, 2, 3, 40)
    with pytest.raises(CheckpointError, match=re.escape(f"{file}: {message}")):
        vit_model.preprocessing_of(PREPROCESSING | changes, config, file)


def test_embed_searches_the_documentation(tmp_path, capsys, two_orders):
    folder = str(write_checkpoint(tmp_path, "bert"))
    assert embed.run(["--checkpoint", folder, "the for statement", "--top", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "the for statement" and len(out) == 4
    assert all(re.match(r"  -?[01]\.\d{3}  \S+: \S", line) for line in out[2:])
    options = ["--compare", "--eval-sections", "8", "--dtype", "bfloat16", "--order", "1"]
    options += ["--weights", "bfloat16"]
    assert embed.run(["--checkpoint", folder, *options, "x"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"8 sections,\s+bfloat16", out)
    rows = re.findall(r"^ +(exact|\d|bfloat16) .*%", out, re.MULTILINE)
    assert rows == ["exact", "2", "bfloat16"]


def test_embedding_depends_on_the_text_alone(tmp_path):
    """Not on the batch, its order or its padding; and long texts are cut."""
    folder = write_checkpoint(tmp_path, "bert")
    config, params = bert_model.load(folder)
    tokenizer = _checkpoint.load_tokenizer(folder, config.vocab_size)
    tokenizer.enable_padding(length=40)  # as some checkpoints' tokenizer.json says
    encode = bert_model.Encoder(config, params, tokenizer, 40, order=5)
    texts = ["short", "a somewhat longer text", "x" * 500, "x" * 600, ""]
    together = encode(texts, batch=3)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(together[2], together[3])
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(encode([text])[0], vector, rtol=0, atol=1e-5)


def test_embed_reads_the_pooling(tmp_path):
    folder = write_checkpoint(tmp_path, "bert")
    config, _ = bert_model.load(folder)
    assert bert_model.max_length(folder, config) == 40
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    (folder / "1_Pooling").mkdir()
    file = folder / "1_Pooling" / "config.json"
    file.write_text('{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}')
    assert bert_model.max_length(folder, config) == 16
    file.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    with pytest.raises(CheckpointError, match=re.escape(f"{file}: pools by pooling_mode_cls_tok")):
        bert_model.max_length(folder, config)
