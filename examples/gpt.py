"""Continues a text with a small GPT-2 whose softmax and GELU are quake_jax's, token by token.
Then compares the exact model with orders 1, 2, 3 and 5: quality on held-out text, and speed.
"""

import argparse
import math
import os
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

FOLDER = Path(__file__).parent / "checkpoints" / "pydoc-gpt"
COMPARED_ORDERS = (1, 2, 3, 5)
TIMING_ROUNDS = 25
DECODE_STEPS = 16


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take one line."""

    def error(self, message):
        self.exit(2, f"gpt.py: {message}\n")


def parse_order(text: str) -> int | str:
    """Parses --order."""
    if text == "exact":
        return text
    if text in ("1", "2", "3", "4", "5"):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of 1, 2, 3, 4, 5, exact")


def parse_whole_number(text: str) -> int:
    """Parses --tokens, --seed and --eval-tokens."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 999999999")
    return int(text)


def parse_temperature(text: str) -> float:
    """Parses --temperature."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="gpt.py", description=__doc__)
    parser.add_argument(
        "--prompt",
        default="When an exception occurs,",
        help="text to continue (default: %(default)s)",
    )
    parser.add_argument(
        "--order",
        type=parse_order,
        help="1 to 5, or exact for XLA's own softmax and GELU (default: quake_jax's default order)",
    )
    parser.add_argument(
        "--tokens", type=parse_whole_number, default=200, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=parse_temperature,
        default=0.6,
        help="0 takes the likeliest token each time (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=parse_whole_number, default=0, help="of the sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--no-compare", action="store_true", help="only generate, without the table"
    )
    parser.add_argument(
        "--eval-tokens",
        type=parse_whole_number,
        help="use about this many held-out tokens for the table (default: all)",
    )
    args = parser.parse_args(argv)
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    args.prompt = args.prompt.encode(errors="surrogateescape").decode(errors="replace")
    if not args.prompt:
        parser.error("argument --prompt: the prompt is empty")
    if args.eval_tokens == 0:
        parser.error("argument --eval-tokens: at least 1 is needed")
    return args


def print_continuation(generator, tokenizer, prompt: list[int], args) -> None:
    """Prints the prompt and what follows it, each piece as soon as it is known."""
    import gpt_text

    end = tokenizer.token_to_id(gpt_text.END_OF_TEXT)
    decoder = gpt_text.StreamDecoder(tokenizer)
    print(args.prompt, end="", flush=True)
    for token in islice(generator.stream(prompt, args.temperature, args.seed), args.tokens):
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
        exact_logits, _ = generators["exact"].prefill(window[:-1])
        for order, generator in generators.items():
            logits, _ = generator.prefill(window[:-1])
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


def measure_speed(generators: dict, tokens) -> dict:
    """Times prefill of a full context and decoding at half context, the models taking turns.

    Returns:
        For each order: seconds per prefill and per decoded token, each the median over rounds.
    """
    import jax

    half = len(tokens) // 2
    times: dict = {order: ([], []) for order in generators}
    for round_ in range(TIMING_ROUNDS + 1):
        for order, generator in generators.items():
            start = time.perf_counter()
            jax.block_until_ready(generator.prefill(tokens))
            prefill = time.perf_counter() - start

            _, cache = generator.prefill(tokens[:half])
            jax.block_until_ready(cache)
            start = time.perf_counter()
            for token in tokens[half : half + DECODE_STEPS]:
                logits, cache = generator.decode(cache, token)
                logits.block_until_ready()
            decode = (time.perf_counter() - start) / DECODE_STEPS
            if round_:  # The first round compiles.
                times[order][0].append(prefill)
                times[order][1].append(decode)
    return {order: (median(prefill), median(decode)) for order, (prefill, decode) in times.items()}


def print_table(generators: dict, held_out) -> None:
    """Measures all models and prints the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    import quake_jax

    quality = measure_quality(generators, held_out)
    speed = measure_speed(generators, held_out[0, :-1])
    exact_prefill, exact_decode = speed["exact"]
    context = held_out.shape[1] - 1
    table = Table(
        title=f"Exact model against QuAKE, {held_out[:, 1:].size} held-out tokens, "
        f"{quake_jax.isa()}",
        caption=f"Speed: exact time / time, medians of {TIMING_ROUNDS} interleaved runs. Exact: "
        f"prefill of {context} tokens {exact_prefill * 1e3:.2f} ms, "
        f"decode {exact_decode * 1e3:.2f} ms a token.",
        box=box.SIMPLE,
    )
    for column in ("order", "perplexity", "same greedy", "max logit diff.", "prefill", "decode"):
        table.add_column(column, justify="right")
    for order, (perplexity, same, difference) in quality.items():
        prefill, decode = speed[order]
        table.add_row(
            str(order),
            f"{perplexity:.4f}",
            f"{same:.2%}",
            f"{difference:.2g}",
            f"{exact_prefill / prefill:.2f}x",
            f"{exact_decode / decode:.2f}x",
        )
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # Imported only now, so that --help and bad values answer at once.
    try:
        import gpt_model
        import gpt_text
        import rich  # noqa: F401

        import quake_jax
    except ModuleNotFoundError as error:
        return fail(f"the module {error.name} is missing: pip install '.[examples]'")
    except ImportError as error:
        return fail(str(error))
    sys.stdout.reconfigure(errors="replace")

    try:
        tokenizer = gpt_text.load_tokenizer(FOLDER / "tokenizer.json")
        config, params, metadata = gpt_model.load(FOLDER)
    except Exception as error:  # tokenizers and safetensors raise classes of their own
        return fail(f"cannot read the checkpoint in {FOLDER}: {error}")
    prompt = tokenizer.encode(args.prompt).ids
    if len(prompt) > config.n_positions:
        return fail(f"argument --prompt: {len(prompt)} tokens, context is {config.n_positions}")
    if metadata["text_sha256"] != gpt_text.text_digest():
        print(
            f"note: the text of this Python ({gpt_text.PYTHON_VERSION}) is not the one that the "
            f"model was trained on ({metadata['python']}): expect another perplexity",
            file=sys.stderr,
        )

    def generator(order):
        return gpt_model.Generator(
            config,
            params,
            softmax=partial(quake_jax.softmax, order=order),
            gelu=partial(quake_jax.gelu, order=order),
        )

    generators = {order: generator(order) for order in ("exact", *COMPARED_ORDERS)}
    chosen = generators.get(args.order) or generator(args.order)
    print_continuation(chosen, tokenizer, prompt, args)
    if not args.no_compare:
        ids = gpt_text.encode_documents(tokenizer, gpt_text.held_out_documents())
        held_out = gpt_text.windows(ids, config.n_positions)
        if args.eval_tokens:
            held_out = held_out[: math.ceil(args.eval_tokens / config.n_positions)]
        print_table(generators, held_out)
    return 0


def fail(message: str) -> int:
    print(f"gpt.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader has left (| head). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
