"""What `quality` measures a model on: handwritten digits, held-out text, and search by meaning.

Each task runs one of the examples' models on checkpoints that are trained, and compares what comes
out of it with what a reference model gives.
"""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.environment import ROOT
from benchmarks.quality.command import ATTENTION, CALIBRATED, LEAVE, WEIGHTS
from benchmarks.quality.statistics import bootstrap, rank_correlations, wilson

# The models are those of the examples, which are scripts of one folder.
sys.path.append(str(ROOT / "examples"))

NEIGHBOURS = 10
SAMPLES = 32  # images, windows or sections, from which the ranges of activations are taken

# An order; or, with the default orders, a format of packed weights, and maybe which are left.
Variant = int | str
Outputs = dict[str, np.ndarray]


def _options(variant: Variant, samples: Any) -> dict[str, Any]:
    """What makes a variant of an example's model; calibration takes some of the samples."""
    weights, _, left = str(variant).partition(LEAVE)
    if weights not in WEIGHTS:
        return {"order": variant}
    options: dict[str, Any] = {"weights": weights}
    if weights in ATTENTION:
        options = {"weights": "float32", "attention": ATTENTION[weights]}
    if weights == CALIBRATED:
        some = samples[:: max(1, len(samples) // SAMPLES)][:SAMPLES]
        options = {"weights": "int8", "calibrate": some}
    return options | ({"rules": [(left, None)]} if left else {})


class Digits:
    """Classification: scikit-learn's handwritten digits that the shipped ViT was not trained on.

    So many copies of each are also shifted, turned, scaled and sheared, as in training: 450 digits
    alone cannot show a tenth of a point.
    """

    name = "digits"

    def __init__(self, copies: int):
        import jax
        import train_vit
        import vit
        import vit_digits
        import vit_model

        self._folder = vit.FOLDER
        config, *_ = vit_model.load(self._folder)
        digits, self._truth = vit_digits.load(held_out=True)
        normalize = vit_model.load_preprocessing(self._folder, config).normalize
        images, self._seen = normalize(digits), normalize(vit_digits.load(held_out=False)[0])
        repeated = np.concatenate([images] * copies)
        distorted = np.asarray(jax.jit(train_vit.distorted)(repeated, jax.random.key(1)))
        self._images = np.concatenate([images, distorted])
        self.sets = {"digits": len(images), "distorted digits": len(distorted)}

    def outputs(self, dtype: str, variant: Variant, reference: Outputs | None) -> Outputs:
        """Return the predictions (1 + copies, digits): of the digits, then of their copies."""
        import vit
        import vit_model

        config, _, params, _ = vit_model.load(self._folder, dtype)
        model = vit_model.Classifier(config, params, **_options(variant, self._seen))
        logits = vit.logits_of(model, self._images)
        return {"predictions": logits.argmax(-1).reshape(-1, len(self._truth))}

    def figures(self, found: Outputs, reference: Outputs | None) -> dict[str, Any]:
        """Return accuracy and, where there is a reference, what changed against it."""
        predictions = found["predictions"]
        right = predictions == self._truth
        figures = {
            "accuracy": wilson(int(right[0].sum()), right.shape[1]),
            "distorted_accuracy": bootstrap(100 * right[1:].mean(axis=0)),
        }
        if reference is None:
            return figures
        changed = predictions != reference["predictions"]
        gain = 100.0 * (right.astype(int) - (reference["predictions"] == self._truth))
        return figures | {
            "changed": int(changed[0].sum()),
            "accuracy_change": float(gain[0].mean()),
            "distorted_changed": int(changed[1:].sum()),
            "distorted_accuracy_change": bootstrap(gain[1:].mean(axis=0)),
        }


class Text:
    """Language modelling: the shipped GPT on topics of Python's documentation that were held out,
    in so many windows of the model's context, None for all.

    So many texts as there are generations are continued greedily, by so many tokens; each prompt is
    half a context. Beyond the context, the latest half of it is read again.
    """

    name = "text"

    def __init__(self, windows: int | None, generations: int, tokens: int):
        import _checkpoint
        import gpt
        import gpt_model
        import gpt_text

        self._folder, self._tokens = gpt.FOLDER, tokens
        config, _, metadata = gpt_model.load(self._folder)
        tokenizer = _checkpoint.load_tokenizer(self._folder, config.vocab_size)
        ids = gpt_text.encode_documents(tokenizer, gpt_text.held_out_documents())
        self._windows = gpt_text.windows(ids, config.n_positions)[:windows]
        seen = gpt_text.encode_documents(tokenizer, gpt_text.training_documents())
        self._seen = gpt_text.windows(seen, config.n_positions)[:, :-1]
        chosen = np.linspace(0, len(self._windows) - 1, generations).astype(int)
        self._prompts = self._windows[chosen, : config.n_positions // 2].tolist()
        self.sets = {
            "windows": len(self._windows),
            "tokens per window": config.n_positions,
            "generations": generations,
            "tokens per generation": tokens,
            "text of training": metadata["text_sha256"] == gpt_text.text_digest(),
        }

    def outputs(self, dtype: str, variant: Variant, reference: Outputs | None) -> Outputs:
        """Return each window's mean loss, the likeliest tokens, and the greedy continuations.

        A continuation ends, filled with -1, where it differs from the reference's: what comes after
        is another text.
        """
        import gpt_model

        config, params, _ = gpt_model.load(self._folder, dtype)
        generator = gpt_model.Generator(config, params, **_options(variant, self._seen))
        losses, likeliest = [], []
        for window in self._windows:
            logits = np.asarray(generator.logits(window[:-1]), np.float64)
            likeliest.append(logits.argmax(-1))
            largest = logits.max(-1)
            sums = np.exp(logits - largest[:, None]).sum(-1)
            chosen = np.take_along_axis(logits, window[1:, None], -1)[:, 0]
            losses.append((largest + np.log(sums) - chosen).mean())
        continuations = np.full((len(self._prompts), self._tokens), -1)
        for row, prompt in enumerate(self._prompts):
            stream = generator.stream(prompt, gpt_model.Sampling(temperature=0), seed=0)
            for i, token in enumerate(itertools.islice(stream, self._tokens)):
                continuations[row, i] = token
                if reference is not None and token != reference["continuations"][row, i]:
                    break
        found = {"losses": np.array(losses), "likeliest": np.array(likeliest)}
        return found | {"continuations": continuations}

    def figures(self, found: Outputs, reference: Outputs | None) -> dict[str, Any]:
        """Return the perplexity and, where there is a reference, the agreement with it."""
        figures: dict[str, Any] = {"perplexity": bootstrap(found["losses"], math.exp)}
        if reference is None:
            return figures
        change = found["losses"] - reference["losses"]
        figures["perplexity_change"] = bootstrap(change, lambda mean: 100 * math.expm1(mean))
        same = (found["likeliest"] == reference["likeliest"]).mean(axis=1)
        figures["same_greedy"] = bootstrap(100 * same)
        alike = found["continuations"] == reference["continuations"]
        if len(alike):
            figures["same_continuations"] = wilson(int(alike.all(axis=1).sum()), len(alike))
            # What comes after the first difference does not count.
            until = np.logical_and.accumulate(alike, axis=1).sum(axis=1)
            figures["tokens_alike"] = bootstrap(until)
        return figures


class Search:
    """Search by meaning: the nearest of the other sections of Python's documentation, for each of
    so many, evenly spread, None for all; the checkpoint is a folder or hub id of a BERT that embeds
    sentences.
    """

    name = "search"

    def __init__(self, checkpoint: str | Path, sections: int | None):
        import _checkpoint
        import bert_model
        import doc_sections

        files = [_checkpoint.TOKENIZER, str(bert_model.POOLING), bert_model.SENTENCES]
        self._folder = _checkpoint.find(checkpoint, files)
        texts = [section.text for section in doc_sections.sections()]
        count = len(texts) if sections is None else sections
        self._texts = [texts[i * len(texts) // count] for i in range(count)]
        config, _ = bert_model.load(self._folder)
        self._length = bert_model.max_length(self._folder, config)
        self.sets = {"sections": count, "tokens per section": self._length}

    def outputs(self, dtype: str, variant: Variant, reference: Outputs | None) -> Outputs:
        """Return the sections' unit vectors (sections, size)."""
        import _checkpoint
        import bert_model

        config, params = bert_model.load(self._folder, dtype)
        tokenizer = _checkpoint.load_tokenizer(self._folder, config.vocab_size)
        options = _options(variant, self._texts)
        encode = bert_model.Encoder(config, params, tokenizer, self._length, **options)
        return {"vectors": encode(self._texts)}

    def figures(self, found: Outputs, reference: Outputs | None) -> dict[str, Any]:
        """Return how near the vectors, and what they find, are to the reference's."""
        if reference is None:
            return {}
        vectors, expected = found["vectors"], reference["vectors"]
        cosines = (vectors.astype(np.float64) * expected).sum(axis=1)
        similarities, wanted = _to_others(vectors), _to_others(expected)
        nearest, wanted_nearest = ((-s).argsort(axis=1) for s in (similarities, wanted))
        count = min(NEIGHBOURS, nearest.shape[1])
        common = [
            100 * len({*a} & {*b}) / count
            for a, b in zip(nearest[:, :count], wanted_nearest[:, :count], strict=True)
        ]
        same = int((nearest[:, 0] == wanted_nearest[:, 0]).sum())
        return {
            "cosine": float(cosines.mean()),
            "least_cosine": float(cosines.min()),
            "same_nearest": wilson(same, len(nearest)),
            "common_nearest": bootstrap(np.array(common)),
            "rank_correlation": bootstrap(rank_correlations(similarities, wanted)),
        }


def _to_others(vectors: np.ndarray) -> np.ndarray:
    """Return the cosines (n, n - 1) of each unit vector with all others."""
    cosines = vectors.astype(np.float64) @ vectors.T
    return cosines[~np.eye(len(vectors), dtype=bool)].reshape(len(vectors), -1)
