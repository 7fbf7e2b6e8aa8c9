"""Trains the checkpoint of gpt.py: a small GPT-2 on the text of Python's own help topics.
Keeps the step that is best on the held-out topics: their perplexity is for comparing orders.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import gpt_model
import gpt_text
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

FOLDER = Path(__file__).parent / "checkpoints" / "pydoc-gpt"
STEPS_PER_CALL = 10
STEPS_PER_EVALUATION = 50
WARM_UP_STEPS = 50


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=FOLDER, help="folder to write the checkpoint to")
    add("--seed", type=int, default=0, help="of the initial weights, the batches and the dropout")
    add("--steps", type=int, default=2000, help="length of the learning-rate schedule")
    add("--patience", type=int, default=6, help="stop after so many evaluations without progress")
    add("--batch", type=int, default=8, help="windows per step")
    add("--context", type=int, default=256, help="tokens per window")
    add("--vocab", type=int, default=1024, help="tokens of the BPE")
    add("--width", type=int, default=160, help="size of the residual stream")
    add("--layers", type=int, default=4, help="number of blocks")
    add("--heads", type=int, default=5, help="attention heads per block")
    add("--dropout", type=float, default=0.25, help="rate on embedding and residual branches")
    add("--learning-rate", type=float, default=2e-3, help="at its peak")
    add("--weight-decay", type=float, default=0.3, help="of matrices, decoupled")
    args = parser.parse_args()
    if args.steps <= WARM_UP_STEPS or args.steps % STEPS_PER_EVALUATION:
        parser.error(
            f"argument --steps: must be a multiple of {STEPS_PER_EVALUATION} above {WARM_UP_STEPS}"
        )
    if args.width % args.heads:
        parser.error("argument --width: must be a multiple of --heads")
    return args


def cross_entropy(params, model, windows, rngs=None):
    """Mean negative log-likelihood, in nats per token, of windows (batch, context + 1)."""
    logits, _ = model.apply({"params": params}, windows[:, :-1], rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def make_optimizer(args) -> optax.GradientTransformation:
    """Muon (Jordan, 2024) for the matrices of the blocks, AdamW for all else.

    In 1500 steps of 8 windows it got to a held-out loss of 3.81 nats per token; AdamW alone, in
    1000 steps of 16, to 3.91 (one run each, dropout 0.2, before lines were joined by `unwrap`).
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, WARM_UP_STEPS, args.steps, args.learning_rate / 20
    )

    def is_matrix(params):
        return jax.tree.map(lambda array: array.ndim == 2, params)

    def muon_dimensions(params):
        dimensions = optax.contrib.MuonDimensionNumbers()
        return jax.tree_util.tree_map_with_path(
            lambda path, array: (
                dimensions if path[0].key.startswith("h_") and array.ndim == 2 else None
            ),
            params,
        )

    muon = optax.contrib.muon(
        schedule,
        weight_decay=args.weight_decay,
        weight_decay_mask=is_matrix,
        adam_weight_decay=args.weight_decay,
        adam_b2=0.98,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def main() -> None:
    args = parse_arguments()
    console = Console()

    documents = gpt_text.training_documents()
    tokenizer = gpt_text.train_tokenizer(documents, args.vocab)
    tokens = gpt_text.encode_documents(tokenizer, documents)
    held_out = gpt_text.windows(
        gpt_text.encode_documents(tokenizer, gpt_text.held_out_documents()), args.context
    )
    predicted = held_out[:, 1:].reshape(-1)
    held_out_bytes = len(tokenizer.decode(predicted.tolist()).encode())

    config = gpt_model.Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=args.context,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
    )
    training_model = gpt_model.GPT(config, dropout=args.dropout)
    model = gpt_model.GPT(config)
    key = jax.random.key(args.seed)
    params = gpt_model.initial_parameters(config, key)
    console.print(
        f"Python {gpt_text.PYTHON_VERSION}: {len(tokens)} tokens to train on, "
        f"{len(predicted)} held out ({held_out_bytes} bytes), "
        f"{sum(array.size for array in jax.tree.leaves(params))} parameters"
    )
    optimizer = make_optimizer(args)

    def step(state, inputs):
        params, average, optimizer_state = state
        number, windows = inputs
        rngs = {"dropout": jax.random.fold_in(key, number)}
        loss, gradient = jax.value_and_grad(cross_entropy)(params, training_model, windows, rngs)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        # An average over the latest steps does at once what a lower learning rate would.
        average = optax.incremental_update(params, average, 0.02)
        return (params, average, optimizer_state), loss

    # Several steps per call: XLA asks for its scratch memory anew in each call, and the page
    # faults of that took as long as the arithmetic.
    @partial(jax.jit, donate_argnums=0)
    def several_steps(state, numbers, windows):
        state, losses = jax.lax.scan(step, state, (numbers, windows))
        return state, losses.mean()

    @jax.jit
    def evaluate(params):
        return jax.lax.map(lambda w: cross_entropy(params, model, w[None]), held_out).mean()

    rng = np.random.default_rng(args.seed)
    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    best, best_loss, best_step = None, math.inf, 0
    start = time.perf_counter()
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=args.steps)
        for first in range(0, args.steps, STEPS_PER_CALL):
            numbers = np.arange(first, first + STEPS_PER_CALL)
            offsets = rng.integers(len(tokens) - args.context, size=(STEPS_PER_CALL, args.batch))
            windows = tokens[offsets[..., None] + np.arange(args.context + 1)]
            state, loss = several_steps(state, numbers, windows)
            loss.block_until_ready()
            progress.advance(bar, STEPS_PER_CALL)
            done = first + STEPS_PER_CALL
            if done % STEPS_PER_EVALUATION:
                continue
            held_out_loss = float(evaluate(state[1]))
            progress.console.print(
                f"step {done:5}  {time.perf_counter() - start:4.0f} s  "
                f"loss: training {float(loss):.3f}, held-out {held_out_loss:.4f}"
            )
            if held_out_loss < best_loss:
                # A copy, because the state is donated to the next call.
                best, best_loss, best_step = jax.tree.map(jnp.copy, state[1]), held_out_loss, done
            elif done - best_step >= args.patience * STEPS_PER_EVALUATION:
                break

    perplexity = math.exp(best_loss)
    bits_per_byte = best_loss / math.log(2) * len(predicted) / held_out_bytes
    metadata = {
        "python": gpt_text.PYTHON_VERSION,
        "text_sha256": gpt_text.text_digest(),
        "seed": str(args.seed),
        "step": str(best_step),
        "held_out_tokens": str(len(predicted)),
        "held_out_perplexity": f"{perplexity:.4f}",
        "held_out_bits_per_byte": f"{bits_per_byte:.4f}",
    }
    gpt_model.save(args.out, config, best, metadata)
    tokenizer.save(str(args.out / "tokenizer.json"))
    size = sum(file.stat().st_size for file in args.out.iterdir())
    console.print(
        f"best: step {best_step}, held-out perplexity {perplexity:.3f}, "
        f"{bits_per_byte:.4f} bits/byte; {size} bytes in {args.out}"
    )


if __name__ == "__main__":
    main()
