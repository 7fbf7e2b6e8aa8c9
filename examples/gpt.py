"""Continues a text with GPT-2 on QuAKE's kernels, token by token: the small model that is shipped,
trained on Python's documentation, or a GPT-2 checkpoint in Hugging Face's layout.
The comparison sets the exact model against orders 1, 2, 3 and 5: quality on text, and speed.
"""

import argparse
import math
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import _command
from _command import UserError, parse_count, parse_whole_number

FOLDER = Path(__file__).parent / "checkpoints" / "pydoc-gpt"
DECODE_STEPS = 16
# How much of the documentation a checkpoint of the user's is measured on.
CHECKPOINT_EVAL_TOKENS = 4096


def parse_temperature(text: str) -> float:
    """Parses --temperature."""
    value = _command.finite_number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value


def parse_share(text: str) -> float:
    """Parses --top-p."""
    value = _command.finite_number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _command.Parser(prog="gpt.py", description=__doc__)
    parser.add_argument(
        "--prompt",
        default="When an exception occurs,",
        help="text to continue (default: %(default)s)",
    )
    _command.add_model_options(
        parser,
        checkpoint="folder with config.json, model.safetensors and tokenizer.json of a GPT-2, or "
        "an id on the Hugging Face hub (default: the shipped model)",
        compare="print the table exact against QuAKE (default: yes, but not with --checkpoint)",
    )
    parser.add_argument(
        "--tokens",
        type=parse_whole_number,
        default=200,
        help="how many at most; the end of a text ends it earlier (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=parse_temperature,
        default=0.6,
        help="0 takes the likeliest token each time (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=parse_whole_number,
        default=0,
        help="draw among so many of the likeliest tokens, 0 for all (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=parse_share,
        default=1.0,
        help="draw among the fewest likeliest tokens that have this probability together "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=parse_whole_number, default=0, help="of the sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--eval-tokens",
        type=parse_count,
        help="use about this many held-out tokens for the table (default: all, with --checkpoint "
        f"{CHECKPOINT_EVAL_TOKENS})",
    )
    args = parser.parse_args(argv)
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    args.prompt = args.prompt.encode(errors="surrogateescape").decode(errors="replace")
    if not args.prompt:
        parser.error("argument --prompt: the prompt is empty")
    if args.compare is None:
        args.compare = args.checkpoint is None
    return args


def print_continuation(generator, tokenizer, end, prompt: list[int], args) -> None:
    """Prints the prompt and what follows it, each piece as soon as it is known."""
    import gpt_model
    import gpt_text

    decoder = gpt_text.StreamDecoder(tokenizer)
    sampling = gpt_model.Sampling(args.temperature, args.top_k, args.top_p)
    print(args.prompt, end="", flush=True)
    for token in islice(generator.stream(prompt, sampling, args.seed), args.tokens):
        if token == end:
            break
        print(decoder.feed(token), end="", flush=True)
    print(decoder.finish(), flush=True)


def measure_quality(generators: dict, held_out) -> dict:
    """Runs all models over the held-out windows (n, context + 1).

    Returns:
        For each order: perplexity, share of positions at which the likeliest token is the exact
        model's, and the largest difference of a logit from the exact model's.
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def compare(logits, exact_logits, targets):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)
        same = logits.argmax(-1) == exact_logits.argmax(-1)
        return -chosen.sum(), same.sum(), jnp.abs(logits - exact_logits).max()

    totals = {order: [0.0, 0, 0.0] for order in generators}
    for window in held_out:
        exact_logits = generators["exact"].logits(window[:-1])
        for order, generator in generators.items():
            logits = generator.logits(window[:-1])
            loss, same, difference = compare(logits, exact_logits, window[1:])
            total = totals[order]
            total[0] += float(loss)
            total[1] += int(same)
            total[2] = max(total[2], float(difference))
    count = held_out[:, 1:].size
    return {
        order: (math.exp(loss / count), same / count, difference)
        for order, (loss, same, difference) in totals.items()
    }


def read_times(generator, tokens) -> tuple[float, float]:
    """Times prefill of a full context, and decoding at half context per token."""
    import jax

    prefill, _ = _command.timed(generator.prefill, tokens)
    half = len(tokens) // 2
    _, cache = jax.block_until_ready(generator.prefill(tokens[:half]))
    steps = []
    for token in tokens[half : half + DECODE_STEPS]:
        step, (_, cache) = _command.timed(generator.decode, cache, token)
        steps.append(step)
    return prefill, sum(steps) / len(steps)


def print_comparison(generators: dict, held_out, dtype: str) -> None:
    """Measures all models and prints the table."""
    quality = measure_quality(generators, held_out)
    tokens = held_out[0, :-1]
    speed, rounds = _command.interleaved_medians(
        {order: partial(read_times, model, tokens) for order, model in generators.items()}
    )
    exact_prefill, exact_decode = speed["exact"]
    rows = []
    for order, (perplexity, same, difference) in quality.items():
        prefill, decode = speed[order]
        rows.append(
            (
                order,
                f"{perplexity:.4f}",
                f"{same:.2%}",
                f"{difference:.2g}",
                f"{exact_prefill / prefill:.2f}x",
                f"{exact_decode / decode:.2f}x",
                _command.megabytes(generators[order]),
            )
        )
    _command.print_table(
        f"Exact model against QuAKE, {held_out[:, 1:].size} held-out tokens, {dtype}, "
        f"{_command.kernels_note()}",
        ("order", "perplexity", "same greedy", "max logit diff.", "prefill", "decode", "MB"),
        rows,
        f"Speed: exact time / time, medians of {rounds} interleaved runs. Exact: prefill of "
        f"{len(tokens)} tokens {exact_prefill * 1e3:.2f} ms, decode {exact_decode * 1e3:.2f} ms a "
        "token.",
    )


def held_out_windows(tokenizer, end: int | None, config, eval_tokens: int | None):
    """Returns the text for the table, cut into windows of the model's context."""
    import gpt_text

    if end is None and tokenizer.token_to_id(gpt_text.END_OF_TEXT) is None:
        raise UserError("argument --compare: the checkpoint knows no end of text")
    ids = gpt_text.encode_documents(tokenizer, gpt_text.held_out_documents(), end)
    context = min(config.n_positions, len(ids) - 1)
    windows = gpt_text.windows(ids, context)
    return windows[: math.ceil(eval_tokens / context)] if eval_tokens else windows


def run(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # Imported only now, so that --help and bad values answer at once.
    import _checkpoint
    import gpt_model
    import gpt_text
    import rich  # noqa: F401

    sys.stdout.reconfigure(errors="replace")
    folder = FOLDER
    if args.checkpoint is not None:
        folder = _checkpoint.find(args.checkpoint, files=[_checkpoint.TOKENIZER])
        args.eval_tokens = args.eval_tokens or CHECKPOINT_EVAL_TOKENS
    config, params, metadata = gpt_model.load(folder, args.dtype)
    tokenizer = _checkpoint.load_tokenizer(folder, config.vocab_size)
    end = gpt_model.end_of_text(folder, tokenizer)
    try:
        gpt_text.StreamDecoder(tokenizer)
    except ValueError as error:
        raise UserError(f"{folder / _checkpoint.TOKENIZER}: {error}") from error
    prompt = tokenizer.encode(args.prompt).ids
    if not 0 < len(prompt) <= config.n_positions:
        raise UserError(f"argument --prompt: {len(prompt)} tokens, context is {config.n_positions}")
    if metadata.get("text_sha256", gpt_text.text_digest()) != gpt_text.text_digest():
        print(
            f"note: the text of this Python ({gpt_text.PYTHON_VERSION}) is not the one that the "
            f"model was trained on ({metadata['python']}): expect another perplexity",
            file=sys.stderr,
        )

    generators, chosen = _command.models(partial(gpt_model.Generator, config, params), args)
    print_continuation(chosen, tokenizer, end, prompt, args)
    if args.compare:
        held_out = held_out_windows(tokenizer, end, config, args.eval_tokens)
        print_comparison(generators, held_out, args.dtype)
    return 0


if __name__ == "__main__":
    _command.start("gpt.py", run)
