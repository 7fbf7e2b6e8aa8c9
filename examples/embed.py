"""Searches the sections of Python's own documentation by meaning, with the sentence embeddings of
a BERT checkpoint in Hugging Face's layout (such as all-MiniLM-L6-v2) on QuAKE's kernels.
"""

import argparse
import sys
from functools import partial

import _command

QUERIES = (
    "How do I make sure that a file is closed when an error occurs?",
    "Which operator binds more tightly than multiplication?",
    "changing a variable of the enclosing function",
)
EVAL_SECTIONS = 64
NEIGHBOURS = 10


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _command.Parser(prog="embed.py", description=__doc__)
    parser.add_argument("query", nargs="*", help="what to search for (default: three examples)")
    _command.add_model_options(
        parser,
        checkpoint="folder with config.json, model.safetensors and tokenizer.json of a BERT that "
        "embeds sentences, or an id on the Hugging Face hub; required",
        compare="print the table exact against QuAKE (default: no)",
    )
    parser.add_argument(
        "--top", type=_command.parse_count, default=3, help="sections (default: %(default)s)"
    )
    parser.add_argument(
        "--eval-sections",
        type=_command.parse_count,
        default=EVAL_SECTIONS,
        help="sections that the table is measured on (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        parser.error(
            "argument --checkpoint: required; such as a download of "
            "sentence-transformers/all-MiniLM-L6-v2"
        )
    if not all(query.strip() for query in args.query):
        parser.error("argument query: a query is empty")
    return args


def search(encoder, sections, vectors, queries, top: int) -> None:
    """Prints the sections nearest to each query, by the cosine of their vectors."""
    for query, similarities in zip(queries, encoder(queries) @ vectors.T, strict=True):
        print(f"\n{query}")
        for i in (-similarities).argsort()[:top]:
            print(f"  {similarities[i]:.3f}  {sections[i].topic}: {sections[i].heading}")


def measure_quality(encoders: dict, texts) -> dict:
    """Embeds the texts with all models.

    Returns:
        For each order: the smallest cosine between a text's vector and the exact one, the share of
        texts with the same nearest other text, and the share of the nearest NEIGHBOURS in common.
    """
    import numpy as np

    def nearest(vectors):
        similarities = vectors @ vectors.T
        np.fill_diagonal(similarities, -np.inf)
        return (-similarities).argsort(axis=1, kind="stable")

    exact = encoders["exact"](texts)
    exact_nearest = nearest(exact)
    count = min(NEIGHBOURS, len(texts) - 1)
    results = {}
    for order, encoder in encoders.items():
        vectors = encoder(texts)
        found = nearest(vectors)
        common = [
            len(set(a[:count]) & set(b[:count])) / count
            for a, b in zip(found, exact_nearest, strict=True)
        ]
        results[order] = (
            float((vectors * exact).sum(axis=1).min()),
            float((found[:, 0] == exact_nearest[:, 0]).mean()),
            float(np.mean(common)),
        )
    return results


def print_comparison(encoders: dict, texts, dtype: str) -> None:
    """Measures all models and prints the table."""
    quality = measure_quality(encoders, texts)
    batch = texts[: min(len(texts), 32)]
    times, rounds = _command.interleaved_medians(
        {
            order: partial(lambda encoder: [_command.timed(encoder, batch)[0]], encoder)
            for order, encoder in encoders.items()
        }
    )
    exact = times["exact"][0]
    _command.print_table(
        f"Exact model against QuAKE, {len(texts)} sections, {dtype}, {_command.kernels_note()}",
        ("order", "min cosine", "same nearest", f"of nearest {NEIGHBOURS}", "speed", "MB"),
        [
            (
                order,
                f"{cosine:.7f}",
                f"{same:.2%}",
                f"{common:.2%}",
                f"{exact / times[order][0]:.2f}x",
                _command.megabytes(encoders[order]),
            )
            for order, (cosine, same, common) in quality.items()
        ],
        f"Nearest other sections. Speed: exact time / time, medians of {rounds} interleaved runs. "
        f"Exact: {len(batch)} sections {exact * 1e3:.1f} ms.",
    )


def run(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # Imported only now, so that --help and bad values answer at once.
    import _checkpoint
    import bert_model
    import doc_sections
    import rich  # noqa: F401

    sys.stdout.reconfigure(errors="replace")
    files = [_checkpoint.TOKENIZER, str(bert_model.POOLING), bert_model.SENTENCES]
    folder = _checkpoint.find(args.checkpoint, files)
    config, params = bert_model.load(folder, args.dtype)
    tokenizer = _checkpoint.load_tokenizer(folder, config.vocab_size)
    length = bert_model.max_length(folder, config)

    encoders, encoder = _command.models(
        partial(bert_model.Encoder, config, params, tokenizer, length), args
    )
    sections = doc_sections.sections()
    if args.compare:
        # Evenly spread: neighbours in the text repeat each other.
        count = min(args.eval_sections, len(sections))
        chosen = [sections[i * len(sections) // count].text for i in range(count)]
        print_comparison(encoders, chosen, args.dtype)
    print(f"embedding {len(sections)} sections", file=sys.stderr)
    vectors = encoder([section.text for section in sections])
    search(encoder, sections, vectors, args.query or QUERIES, args.top)
    return 0


if __name__ == "__main__":
    _command.start("embed.py", run)
