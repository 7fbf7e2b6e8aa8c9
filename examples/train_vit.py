"""Trains the checkpoint of vit.py: a small ViT on scikit-learn's handwritten digits.
With --quake it trains through QuAKE's kernels; held-out accuracy and step time are printed.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import optax
import vit_digits
import vit_model
from _command import parse_order
from rich.console import Console
from rich.progress import track

import quake_jax.linen

FOLDER = Path(__file__).parent / "checkpoints" / "digits-vit"
STEPS_PER_CALL = 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=FOLDER, help="folder to write the checkpoint to")
    add("--quake", action="store_true", help="train through QuAKE's kernels")
    add("--order", type=parse_order, help="of the kernels; None for their defaults")
    add("--seed", type=int, default=0, help="of the initial weights, the batches and the dropout")
    add("--steps", type=int, default=2000, help=f"rounded up to a multiple of {STEPS_PER_CALL}")
    add("--batch", type=int, default=64, help="images per step")
    add("--width", type=int, default=64, help="size of the residual stream")
    add("--layers", type=int, default=4, help="number of blocks")
    add("--heads", type=int, default=4, help="attention heads per block")
    add("--dropout", type=float, default=0.1, help="rate on embedding and residual branches")
    add("--learning-rate", type=float, default=2e-3, help="at its peak")
    add("--weight-decay", type=float, default=0.1, help="of matrices, decoupled")
    args = parser.parse_args()
    for name in ("steps", "batch", "width", "layers", "heads"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: must be at least 1")
    if args.width % args.heads:
        parser.error("argument --width: must be a multiple of --heads")
    if args.order is not None and not args.quake:
        parser.error("argument --order: needs --quake")
    return args


def distorted(images, key):
    """Returns images (batch, 8, 8, 1), each shifted, turned, scaled and sheared a little."""
    n, size = len(images), images.shape[1]
    change = jax.random.uniform(key, (n, 6), minval=-1, maxval=1)
    matrices = jnp.eye(2) + 0.1 * change[:, :4].reshape(n, 2, 2)
    center = (size - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(size) - center] * 2, indexing="ij"))
    places = jnp.einsum("nij,jyx->niyx", matrices, grid) + center + 0.7 * change[:, 4:, None, None]
    sample = partial(jax.scipy.ndimage.map_coordinates, order=1, mode="nearest")
    return jax.vmap(lambda image, place: sample(image[..., 0], [*place])[..., None])(images, places)


def make_step(model: vit_model.ViT, optimizer, key, images, labels, args):
    """Returns step(state, number) -> (state, loss), of state (parameters, average, optimizer's)."""

    def loss_of(params, batch, rngs):
        seen = distorted(images[batch], rngs["distortion"])
        with quake_jax.linen.substitute(args.order if args.quake else "exact"):
            logits = model.apply({"params": params}, seen, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def step(state, number):
        params, average, optimizer_state = state
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        rngs = {"dropout": keys[0], "distortion": keys[1]}
        batch = jax.random.choice(keys[2], len(images), (args.batch,))
        loss, gradient = jax.value_and_grad(loss_of)(params, batch, rngs)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        # An average over the latest steps does at once what a lower learning rate would.
        average = optax.incremental_update(params, average, 0.01)
        return (params, average, optimizer_state), loss

    return step


def make_optimizer(args, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine, matrices decayed."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, max(steps // 20, 1), max(steps, 2)
    )

    def is_matrix(params):
        return jax.tree.map(lambda array: array.ndim > 1, params)

    adam = optax.adamw(schedule, weight_decay=args.weight_decay, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def train(args, console: Console):
    """Trains a model.

    Returns:
        Its sizes, its parameters, the loss of each call's steps, and the seconds per step.
    """
    config = vit_model.Config(
        image_size=vit_digits.SIZE,
        patch_size=2,
        num_channels=1,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.width,
    )
    images, labels = vit_digits.load(held_out=False)
    images = preprocessing(config).normalize(images)
    classes = len(vit_digits.LABELS)
    model = vit_model.ViT(config, classes, args.dropout)
    key = jax.random.key(args.seed)
    params = jax.jit(vit_model.ViT(config, classes).init)(key, images[:1])["params"]
    calls = -(-args.steps // STEPS_PER_CALL)
    optimizer = make_optimizer(args, calls * STEPS_PER_CALL)
    step = make_step(model, optimizer, key, jnp.asarray(images), jnp.asarray(labels), args)

    # Several steps per call: XLA asks for its scratch memory anew in each call.
    @partial(jax.jit, donate_argnums=0)
    def several_steps(state, first):
        state, losses = jax.lax.scan(step, state, first + jnp.arange(STEPS_PER_CALL))
        return state, losses.mean()

    state = (params, jax.tree.map(jnp.copy, params), jax.jit(optimizer.init)(params))
    losses, times = [], []
    for call in track(range(calls), "training", console=console, transient=True):
        start = time.perf_counter()
        state, loss = several_steps(state, call * STEPS_PER_CALL)
        losses.append(float(loss))
        times.append((time.perf_counter() - start) / STEPS_PER_CALL)
    return config, state[1], losses, median(times[1:] or times)  # the first call compiles


def preprocessing(config: vit_model.Config) -> vit_model.Preprocessing:
    """Returns the preprocessing that the checkpoint says."""
    return vit_model.preprocessing_of(vit_digits.SETTINGS, config, Path(vit_model.PREPROCESSOR))


def write(folder: Path, config, params, metadata: dict[str, str]) -> None:
    """Writes the checkpoint with its preprocessing."""
    vit_model.save(folder, config, vit_digits.LABELS, params, metadata)
    settings = {"image_processor_type": "ViTImageProcessor"} | vit_digits.SETTINGS
    (folder / vit_model.PREPROCESSOR).write_text(json.dumps(settings, indent=2) + "\n")


def accuracy(config, params) -> float:
    """Returns the share of held-out digits that the exact model classifies rightly."""
    images, labels = vit_digits.load(held_out=True)
    logits = vit_model.Classifier(config, params, "exact")(preprocessing(config).normalize(images))
    return float((np.asarray(logits).argmax(-1) == labels).mean())


def main() -> None:
    args = parse_arguments()
    console = Console()
    config, params, losses, step_time = train(args, console)
    share = accuracy(config, params)
    metadata = {
        "seed": str(args.seed),
        "steps": str(len(losses) * STEPS_PER_CALL),
        "trained_with": f"quake_jax, order {args.order or 'default'}" if args.quake else "jax.nn",
        "held_out_accuracy": f"{share:.4f}",
    }
    write(args.out, config, params, metadata)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    count = sum(array.size for array in jax.tree.leaves(params))
    console.print(
        f"{metadata['trained_with']}: {count} parameters, last loss {losses[-1]:.4f}, held-out "
        f"accuracy {share:.2%}, {step_time * 1e3:.1f} ms a step; {size} bytes in {args.out}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
