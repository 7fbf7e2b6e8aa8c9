"""Tests of the ViT example on handwritten digits: the split, the shipped checkpoint, training
through the kernels, and vit.py as a user runs it.
"""

import argparse
import re
import sys
from functools import partial

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn", reason="needs scikit-learn: pip install '.[examples]'")

from test_examples import (  # noqa: E402, F401
    EXAMPLES,
    run_example,
    short_comparisons,
)

sys.path.insert(0, str(EXAMPLES))
import vit  # noqa: E402
import vit_digits  # noqa: E402
import vit_model  # noqa: E402

CHECKPOINT = EXAMPLES / "checkpoints" / "digits-vit"


@pytest.fixture(scope="module")
def logits():
    """The shipped model's logits for the held-out digits, and their labels."""
    config, _, params, _ = vit_model.load(CHECKPOINT)
    digits, truth = vit_digits.load(held_out=True)
    images = vit_model.load_preprocessing(CHECKPOINT, config).normalize(digits)
    orders = ("exact", 1, 2, 3, 5)
    found = {order: vit_model.Classifier(config, params, order) for order in orders}
    return {order: vit.logits_of(classify, images) for order, classify in found.items()}, truth


def test_split_has_each_digit_once():
    (seen, seen_labels), (held_out, held_out_labels) = map(vit_digits.load, (False, True))
    assert seen.shape == (1347, 8, 8, 1) and held_out.shape == (450, 8, 8, 1)
    assert seen.min() == 0 and seen.max() == 255
    for labels in (seen_labels, held_out_labels):
        assert min(np.bincount(labels, minlength=10)) > 0.08 * len(labels)
    both = {image.tobytes() for image in seen} & {image.tobytes() for image in held_out}
    assert not both


def test_checkpoint_is_small_and_as_good_as_it_says(logits):
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 1_000_000
    config, labels, params, metadata = vit_model.load(CHECKPOINT)
    assert labels == vit_digits.LABELS and config.image_size == vit_digits.SIZE
    assert metadata["trained_with"] == "jax.nn"
    found, truth = logits
    accuracy = (found["exact"].argmax(-1) == truth).mean()
    # train_vit.py took it before the parameters were rounded to float16.
    assert accuracy == pytest.approx(float(metadata["held_out_accuracy"]), abs=1 / 450)
    assert accuracy > 0.97


def test_orders_keep_the_predictions(logits):
    found, truth = logits
    exact = found["exact"]
    errors = [np.abs(found[order] - exact).max() for order in (1, 2, 3, 5)]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[3] > 0
    for order, error in zip((1, 2, 3, 5), errors, strict=True):
        # A prediction changes only where two classes are closer than the error.
        best = np.sort(exact)[:, -2:]
        changed = found[order].argmax(-1) != exact.argmax(-1)
        assert np.all(best[changed, 1] - best[changed, 0] <= 2 * error)
        if order >= 2:
            accuracy = [(x.argmax(-1) == truth).mean() for x in (found[order], exact)]
            # Within 0.1 point: not one digit of 450.
            assert accuracy[0] == accuracy[1]


def training_arguments(**changes):
    """What train_vit.py's parser gives, with a small model and few steps."""
    values = {"quake": False, "order": None, "seed": 0, "steps": 20, "batch": 32, "width": 16}
    values |= {"layers": 1, "heads": 2, "dropout": 0.1, "learning_rate": 2e-3, "weight_decay": 0.1}
    return argparse.Namespace(**(values | changes))


def test_trained_checkpoint_is_classified_with(tmp_path, capsys, monkeypatch):
    """And training through the kernels is training: the same steps of the exact model lead to the
    same parameters."""
    pytest.importorskip("optax")
    import train_vit
    from rich.console import Console

    sizes = "--quake --order 5 --steps 20 --batch 32 --width 16 --layers 1 --heads 2 --out".split()
    monkeypatch.setattr(sys, "argv", ["train_vit.py", *sizes, str(tmp_path)])
    train_vit.main()
    printed = capsys.readouterr().out
    assert re.search(r"quake_jax, order 5: .* held-out accuracy [\d.]+%, [\d.]+ ms a step", printed)
    _, _, quake, metadata = vit_model.load(tmp_path)
    assert metadata["trained_with"] == "quake_jax, order 5" and metadata["steps"] == "20"

    _, exact, losses, step_time = train_vit.train(training_arguments(), Console(quiet=True))
    last_loss = float(re.search(r"last loss ([\d.]+)", printed)[1])
    assert step_time > 0 and last_loss == pytest.approx(losses[-1], abs=2e-4)
    # The checkpoint has float16's 11 bits. The gradient of the keys' bias is 0 but for rounding, of
    # which Adam makes steps of full length.
    close = partial(np.testing.assert_allclose, rtol=2**-11, atol=5e-4)
    jax.tree.map(close, quake, exact)

    assert vit.run(["--checkpoint", str(tmp_path)]) == 0
    share = f"{float(metadata['held_out_accuracy']):.2%}"
    assert f"held-out digits {round(450 * float(metadata['held_out_accuracy']))} right" in (
        out := capsys.readouterr().out
    )
    assert share in out and "changed" not in out


def test_classifies_digits_and_prints_the_table(capsys):
    assert vit.run(["--order", "2", "--weights", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "predicted (true); of all 450 held-out digits" in printed
    rows = re.findall(
        r"^ +(exact|\d|int8) +([\d.]+)% +(\d+) +(\S+) +([\d.]+)x +([\d.]+) *$",
        printed,
        re.MULTILINE,
    )
    assert [row[0] for row in rows] == ["exact", "1", "2", "3", "5", "int8"]
    assert rows[0][2:5] == ("0", "0", "1.00")
    assert abs(float(rows[5][1]) - float(rows[0][1])) < 1
    assert float(rows[5][5]) < float(rows[0][5]) / 3
    assert rows[2][1] == rows[3][1] == rows[4][1] == rows[0][1]


@pytest.mark.parametrize("script", ["gpt.py", "vit.py", "embed.py"])
def test_help_names_the_common_options(script):
    process = run_example("--help", script=script)
    assert process.returncode == 0
    for option in ("--checkpoint", "--order", "--dtype", "--weights", "--compare", "--no-compare"):
        assert option in process.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("vit.py", ["--order", "6"], "--order: '6' is none of 1, 2, 3, 4, 5, exact"),
        ("vit.py", ["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        ("vit.py", ["--checkpoint", "/no/where"], "/no/where: no such folder"),
        ("embed.py", [], "--checkpoint: required"),
        ("embed.py", ["--checkpoint", "x", "--top", "0"], "--top: at least 1 is needed"),
        ("embed.py", ["--checkpoint", "x", " "], "argument query: a query is empty"),
        ("gpt.py", ["--checkpoint", str(CHECKPOINT)], "model_type is 'vit'; expected 'gpt2'"),
    ],
)
def test_bad_values_get_one_line(script, arguments, message):
    process = run_example(*arguments, script=script)
    assert process.returncode == 2
    assert message in process.stderr
    assert process.stderr.startswith(f"{script}: ")
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""


def test_missing_extra_is_named(tmp_path):
    stub = "raise ModuleNotFoundError(\"No module named 'sklearn'\", name='sklearn')\n"
    (tmp_path / "sklearn.py").write_text(stub)
    process = run_example("--no-compare", script="vit.py", path=tmp_path)
    assert process.returncode == 2
    message = "vit.py: the module sklearn is missing: pip install '.[examples]'\n"
    assert process.stderr == message


def test_sections_are_the_documentation():
    import doc_sections

    sections = doc_sections.sections()
    assert len(sections) > 100
    assert len({section.text for section in sections}) == len(sections)
    for section in sections:
        assert section.text.startswith(section.heading) and section.topic in doc_sections.TOPICS
    statements = [s for s in sections if s.topic == "for"]
    assert statements[0].heading == 'The "for" statement'


def test_topics_are_cut_at_their_headings():
    import doc_sections

    text = "\nFirst\n*****\n\nintro\n\nSecond one\n==========\n\n----\nbody\n\nEmpty\n~~~~~\n"
    assert [(s.heading, s.text) for s in doc_sections.cut("t", text)] == [
        ("First", "First\n\nintro"),
        ("Second one", "Second one\n\n----\nbody"),
    ]
    (plain,) = doc_sections.cut("t", "no heading\n")
    assert (plain.topic, plain.heading, plain.text) == ("t", "t", "t\n\nno heading")
