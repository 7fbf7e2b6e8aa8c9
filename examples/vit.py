"""Classifies images with a Vision Transformer on QuAKE's kernels: held-out handwritten digits with
the small model that is shipped, or image files with a checkpoint in Hugging Face's layout.
The comparison sets the exact model against orders 1, 2, 3 and 5: predictions and speed.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import _command
from _command import UserError

FOLDER = Path(__file__).parent / "checkpoints" / "digits-vit"
SHADES = " .:-=+*#%@"
SHOWN_DIGITS = 5
BATCH = 64
TOP = 5


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _command.Parser(prog="vit.py", description=__doc__)
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="files to classify (default: scikit-learn's digits that no training has seen)",
    )
    _command.add_model_options(
        parser,
        checkpoint="folder with config.json, preprocessor_config.json and model.safetensors of a "
        "ViT that classifies, or an id on the Hugging Face hub (default: the shipped model)",
        compare="print the table exact against QuAKE (default: yes, but not with --checkpoint)",
    )
    args = parser.parse_args(argv)
    if args.compare is None:
        args.compare = args.checkpoint is None
    return args


def read_images(names: list[str], preprocess):
    """Returns the image files, preprocessed: float32 (n, height, width, channels)."""
    import numpy as np
    from PIL import Image

    images = []
    for name in names:
        try:
            with Image.open(name) as image:
                images.append(preprocess(image))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"argument IMAGE: cannot read {name}: {error}") from error
    return np.stack(images)


def logits_of(classify, images):
    """Returns the logits (n, classes), computed in batches that are all of one size."""
    import numpy as np

    size = min(BATCH, len(images))
    parts = []
    for first in range(0, len(images), size):
        batch = images[first : first + size]
        padding = np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)
        parts.append(np.asarray(classify(np.concatenate([batch, padding])))[: len(batch)])
    return np.concatenate(parts)


def print_top(names: list[str], logits, labels: list[str]) -> None:
    """Prints the likeliest classes of each image and their probabilities."""
    import jax

    for name, probabilities in zip(names, jax.nn.softmax(logits), strict=True):
        print(name)
        for i in (-probabilities).argsort()[:TOP]:
            print(f"  {probabilities[i]:6.2%}  {labels[i]}")


def print_digits(images, logits, truth, labels: list[str]) -> None:
    """Draws a few digits with what the model takes them for, and prints how often it is right."""
    import numpy as np

    shades = np.array(list(SHADES))[np.rint(images[..., 0] / 255 * (len(SHADES) - 1)).astype(int)]
    # Digits that are spread over the data, each pixel two characters wide.
    shown = np.linspace(0, len(images) - 1, SHOWN_DIGITS).astype(int)
    for row in range(shades.shape[1]):
        print("   ".join("".join(np.repeat(shades[i, row], 2)) for i in shown))
    width = 2 * shades.shape[2]
    print("   ".join(f"{labels[logits[i].argmax()]} ({truth[i]})".ljust(width) for i in shown))
    right = int((logits.argmax(-1) == truth).sum())
    print(f"predicted (true); of all {len(truth)} held-out digits {right} right, ", end="")
    print(f"{right / len(truth):.2%}")


def print_comparison(classifiers: dict, images, truth, dtype: str) -> None:
    """Measures all models and prints the table; `truth` may be None."""
    import jax
    import numpy as np

    logits = {order: logits_of(classify, images) for order, classify in classifiers.items()}
    exact = logits["exact"]
    batch = images[:BATCH]
    times, rounds = _command.interleaved_medians(
        {
            order: partial(lambda classify: [_command.timed(classify, batch)[0]], classify)
            for order, classify in classifiers.items()
        }
    )
    exact_time = times["exact"][0]
    rows = []
    for order, found in logits.items():
        changed = int((found.argmax(-1) != exact.argmax(-1)).sum())
        difference = float(np.abs(jax.nn.softmax(found) - jax.nn.softmax(exact)).max())
        right = "" if truth is None else f"{(found.argmax(-1) == truth).mean():.2%}"
        speed = f"{exact_time / times[order][0]:.2f}x"
        size = _command.megabytes(classifiers[order])
        rows.append((order, right, changed, f"{difference:.2g}", speed, size))
    _command.print_table(
        f"Exact model against QuAKE, {len(images)} images, {dtype}, {_command.kernels_note()}",
        ("order", "accuracy", "changed predictions", "max probability diff.", "speed", "MB"),
        rows,
        f"Speed: exact time / time, medians of {rounds} interleaved runs. Exact: {len(batch)} "
        f"image(s) {exact_time * 1e3:.2f} ms.",
    )


def run(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    # Imported only now, so that --help and bad values answer at once.
    import _checkpoint
    import rich  # noqa: F401
    import vit_digits
    import vit_model

    sys.stdout.reconfigure(errors="replace")
    folder = FOLDER
    if args.checkpoint is not None:
        folder = _checkpoint.find(args.checkpoint, files=[vit_model.PREPROCESSOR])
    config, labels, params, _ = vit_model.load(folder, args.dtype)
    preprocess = vit_model.load_preprocessing(folder, config)
    if args.images:
        images, truth = read_images(args.images, preprocess), None
    elif (config.image_size, config.num_channels) == (vit_digits.SIZE, 1):
        digits, truth = vit_digits.load(held_out=True)
        images = preprocess.normalize(digits)
    else:
        raise UserError("argument IMAGE: at least one is needed with this checkpoint")

    classifiers, chosen = _command.models(partial(vit_model.Classifier, config, params), args)
    logits = logits_of(chosen, images)
    if args.images:
        print_top(args.images, logits, labels)
    else:
        print_digits(digits, logits, truth, labels)
    if args.compare:
        print_comparison(classifiers, images, truth, args.dtype)
    return 0


if __name__ == "__main__":
    _command.start("vit.py", run)
