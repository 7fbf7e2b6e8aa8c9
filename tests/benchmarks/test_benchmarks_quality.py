"""Tests of `python -m benchmarks quality`: its intervals, its figures, and a tiny run."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("sklearn", reason="needs scikit-learn: pip install '.[examples]'")

from benchmarks.harness.errors import BenchmarkError  # noqa: E402
from benchmarks.quality import measure, report, tasks  # noqa: E402
from benchmarks.quality.statistics import bootstrap, rank_correlations, wilson  # noqa: E402

# --- Statistics


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0, 16.11),
        (1, 29, 0.61, 17.18),
        (20, 20, 83.89, 100),
    ],
)
def test_wilson_is_newcombes_score_method(successes, trials, low, high):
    found = wilson(successes, trials)
    assert found["value"] == pytest.approx(100 * successes / trials)
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=0.005)


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, 1000)
    found = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert found["value"] == pytest.approx(values.mean())
    # The quantiles of 2000 resamples are uncertain by about 3 % of the width: 10 % is three times.
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.2 * half)
    assert bootstrap(values) == found
    doubled = bootstrap(values, lambda mean: 2 * mean)
    assert doubled == {key: 2 * value for key, value in found.items()}
    assert bootstrap(np.ones(5)) == {"value": 1, "low": 1, "high": 1}


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(2).normal(size=(2, 4, 30))
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlations(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(rank_correlations(a, np.exp(a)), 1, rtol=1e-12)
    np.testing.assert_allclose(rank_correlations(a, -a), -1, rtol=1e-12)


# --- Figures from outputs


def without_data(task, **attributes):
    """A task whose figures can be taken from made-up outputs."""
    made = object.__new__(task)
    vars(made).update(attributes)
    return made


def test_digits_are_counted():
    task = without_data(tasks.Digits, _truth=np.array([0, 1, 2, 3]))
    exact = {"predictions": np.array([[0, 1, 2, 9], [0, 1, 2, 3], [0, 1, 2, 3]])}
    found = {"predictions": np.array([[0, 1, 9, 8], [0, 1, 2, 3], [9, 1, 2, 3]])}
    alone = task.figures(found, None)
    assert set(alone) == {"accuracy", "distorted_accuracy"}
    figures = task.figures(found, exact)
    assert figures["accuracy"] == wilson(2, 4) == alone["accuracy"]
    assert figures["changed"] == 2  # one from right to wrong, one from wrong to wrong
    assert figures["accuracy_change"] == -25
    assert figures["distorted_accuracy"]["value"] == 87.5
    assert figures["distorted_changed"] == 1
    assert figures["distorted_accuracy_change"]["value"] == -12.5


def test_text_is_compared():
    task = without_data(tasks.Text)
    exact = {
        "losses": np.array([1.0, 2.0]),
        "likeliest": np.array([[1, 2], [3, 4]]),
        "continuations": np.array([[5, 5, 5, 5], [6, 7, 8, 9]]),
    }
    found = {
        "losses": np.array([1.5, 2.5]),
        "likeliest": np.array([[1, 2], [9, 4]]),
        # The second one's last token is the exact one's by chance.
        "continuations": np.array([[5, 5, 5, 5], [6, 0, -1, 9]]),
    }
    assert set(task.figures(exact, None)) == {"perplexity"}
    figures = task.figures(found, exact)
    assert figures["perplexity"]["value"] == pytest.approx(math.exp(2))
    assert figures["perplexity_change"] == pytest.approx(
        dict.fromkeys(("value", "low", "high"), 100 * (math.exp(0.5) - 1))
    )
    assert figures["same_greedy"]["value"] == 75
    assert figures["same_continuations"] == wilson(1, 2)
    assert figures["tokens_alike"]["value"] == (4 + 1) / 2


def test_continuations_end_at_the_first_difference(monkeypatch):
    """And the losses are those of the log-softmax, the windows being predicted one by one."""
    import gpt_model

    logits = np.random.default_rng(4).normal(size=(3, 6)).astype(np.float32)

    class Generator:
        def __init__(self, config, params, order=None, weights=None, calibrate=None, rules=None):
            tokens = {"exact": [1, 2, 3, 4], 5: [1, 2, 0, 4], "int8": [0, 2, 3, 4]}
            assert rules in (None, [("h_0/.*", None)])
            assert calibrate is None or calibrate.tolist() == [[8, 9]] * tasks.SAMPLES
            self._tokens = tokens[order or weights]

        def logits(self, tokens):
            assert list(tokens) == [0, 1, 2]
            return logits

        def stream(self, prompt, sampling, seed):
            assert prompt == [7] and sampling.temperature == 0
            return iter(self._tokens + self._tokens)

    monkeypatch.setattr(gpt_model, "Generator", Generator)
    monkeypatch.setattr(gpt_model, "load", lambda folder, dtype: (None, None, {}))
    task = without_data(
        tasks.Text,
        _folder=None,
        _tokens=4,
        _windows=np.array([[0, 1, 2, 5]]),
        _prompts=[[7]],
        _seen=np.array([[8, 9]] * 70),
    )
    exact = task.outputs("float32", "exact", None)
    found = task.outputs("float32", 5, exact)
    assert exact["continuations"].tolist() == [[1, 2, 3, 4]]
    assert found["continuations"].tolist() == [[1, 2, 0, -1]]
    for weights in ("int8", "int8-calibrated", "int8 but h_0/.*"):
        packed = task.outputs("float32", weights, exact)
        assert packed["continuations"].tolist() == [[0, -1, -1, -1]]
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(shares[[0, 1, 2], [1, 2, 5]]).mean()
    np.testing.assert_allclose(exact["losses"], [expected], rtol=1e-6)
    np.testing.assert_array_equal(exact["likeliest"], [logits.argmax(-1)])


def test_search_is_compared():
    vectors = np.random.default_rng(3).normal(size=(20, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    task = without_data(tasks.Search)
    assert task.figures({"vectors": vectors}, None) == {}
    same = task.figures({"vectors": vectors}, {"vectors": vectors})
    assert same["same_nearest"]["value"] == same["common_nearest"]["value"] == 100
    assert same["rank_correlation"]["value"] == pytest.approx(1)
    assert same["least_cosine"] == pytest.approx(1, abs=1e-6)
    # The first vector becomes the second one's nearest, and the other way round.
    moved = vectors.copy()
    moved[0] = moved[1]
    figures = task.figures({"vectors": moved}, {"vectors": vectors})
    assert figures["least_cosine"] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-6)
    similarities = [v @ v.T - 9 * np.eye(20) for v in (moved, vectors)]
    best, expected = (s.argmax(axis=1) for s in similarities)
    assert figures["same_nearest"] == wilson(int((best == expected).sum()), 20)
    assert figures["rank_correlation"]["value"] < 1


# --- The report


def made_up_result():
    def row(order, change, reference="float32"):
        made = {"dtype": "float32", "order": order, "reference": reference}
        accuracy = {"accuracy": wilson(440, 450), "distorted_accuracy": wilson(8800, 9000)}
        perplexity = {"perplexity": bootstrap(np.ones(3))}
        if order == "exact":
            return made | accuracy, made | perplexity
        interval = {"value": change, "low": change - 0.01, "high": change + 0.01}
        accuracy |= {"changed": 1, "accuracy_change": -change, "distorted_changed": 2}
        accuracy["distorted_accuracy_change"] = interval
        perplexity |= {"perplexity_change": interval, "same_greedy": wilson(9, 10)}
        perplexity |= {"same_continuations": wilson(1, 2), "tokens_alike": interval}
        return made | accuracy, made | perplexity

    digits, text = zip(row("exact", 0, None), row(1, 3.0), row(2, 0.2), row(3, -1e-9), strict=True)
    sets = {"digits": 450, "distorted digits": 9000, "text of training": False, "windows": 63}
    sets |= {"tokens per window": 256, "generations": 16, "tokens per generation": 512}
    return {
        "environment": {"isa": "avx512", "threads": 1},
        "benchmark": "quality",
        "settings": {"quick": False},
        "tasks": {
            "digits": {"sets": sets, "rows": list(digits)},
            "text": {"sets": sets, "rows": list(text)},
        },
        "bars": [],
    }


def test_orders_from_two_up_are_judged():
    result = made_up_result()
    verdicts = {bar["name"]: bar for bar in report.judge(result)}
    assert {name: (bar["figure"], bar["met"]) for name, bar in verdicts.items()} == {
        "float32, orders from 2: largest accuracy change": (0.2, False),
        "float32, orders from 2: largest distorted accuracy change": (0.2, False),
        "float32, orders from 2: largest perplexity change": (0.2, False),
    }
    for task in result["tasks"].values():
        del task["rows"][2]  # order 2
    assert all(bar["met"] for bar in report.judge(result))
    for task in result["tasks"].values():
        del task["rows"][2]  # order 3
    assert report.judge(result) == []


def test_packed_weights_are_judged_by_what_they_lose():
    result = made_up_result() | {"benchmark": "quality, packed weights"}
    for task in result["tasks"].values():
        for row, name in zip(task["rows"], ("exact", "int4", "int8", "bfloat16"), strict=True):
            row["order"] = name
    rows = [{"order": name, "dtype": "float32"} for name in ("int4", "int8", "bfloat16")]
    for row, share in zip(rows, (90, 98, 100), strict=True):
        row["same_nearest"] = wilson(share, 100)
    result["tasks"]["search"] = {"sets": {}, "rows": rows}
    verdicts = {bar["name"]: (bar["figure"], bar["met"]) for bar in report.judge(result)}
    name = "float32 model, weights in"
    assert verdicts == {
        f"{name} int8: loss, accuracy change": (0.2, False),
        f"{name} int8: loss, distorted accuracy change": (0.0, True),  # a gain
        f"{name} bfloat16: loss, accuracy change": (0.0, True),
        f"{name} bfloat16: loss, distorted accuracy change": (1e-9, True),
        f"{name} int4: loss, perplexity change": (3.0, False),
        f"{name} int8: loss, perplexity change": (0.2, True),
        f"{name} bfloat16: loss, perplexity change": (0.0, True),
        f"{name} int8: same nearest": (98.0, False),
        f"{name} bfloat16: same nearest": (100.0, True),
    }
    assert report.tables(result)[0][1][0][0] == "weights"


def test_tables_have_a_row_for_each_order():
    result = made_up_result()
    result["bars"] = report.judge(result)
    (digits_title, digits), (text_title, text), (bars_title, _) = report.tables(result)
    assert digits_title == "ViT on handwritten digits, float32"
    assert text_title == "GPT on held-out text, float32" and bars_title.startswith("Bars (3 of 3")
    for rows in (digits, text):
        assert [row[0] for row in rows] == ["order", "exact", "1", "2", "3"]
        assert all(len(row) == len(rows[0]) for row in rows)
    assert digits[1][2:4] == ["–", "–"] and digits[2][2:4] == ["1", "-3.00"]
    # What rounds to zero has no minus.
    assert digits[4][3] == "+0.00" and text[4][2].startswith("+0.0000 (")
    remarks = " ".join(report.remarks(result))
    assert "450" in remarks and "9000" in remarks and "63 windows" in remarks
    assert "not the one that the GPT was trained beside" in remarks


def test_plots_are_small_files(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.harness import plots
    from benchmarks.quality import plots as quality_plots

    written = plots.draw(made_up_result(), quality_plots, tmp_path / "plots")
    names = ["quality_digits_avx512_t1.png", "quality_text_avx512_t1.png"]
    assert [path.name for path in written] == names
    assert all(0 < path.stat().st_size < 100_000 for path in written)
    (tmp_path / "file").touch()
    with pytest.raises(BenchmarkError, match="file"):
        plots.draw(made_up_result(), quality_plots, tmp_path / "file")


# --- The command


def test_a_missing_checkpoint_is_one_line(run_benchmarks):
    done = run_benchmarks("quality", "--embedding-checkpoint", "/no/where")
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert "error" in line and "/no/where: no such folder" in line
    assert "Traceback" not in done.stderr


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    sizes = measure.sizes_of(argparse.Namespace(quick=True))
    with pytest.raises(BenchmarkError, match=r"^sklearn.* is not installed: pip install '.\[exam"):
        measure.make_tasks(None, sizes)


def test_a_quick_run_from_end_to_end(run_benchmarks, tmp_path):
    from test_examples_checkpoints import write_checkpoint

    checkpoint = write_checkpoint(tmp_path / "bert", "bert")
    path, page = tmp_path / "quality.json", tmp_path / "quality.md"
    page.write_text("# Kept\n")
    options = ["--quick", "--dtype", "float32", "--order", "3"]
    files = ["--json", str(path), "--markdown", str(page)]
    done = run_benchmarks("quality", *options, *files, "--embedding-checkpoint", str(checkpoint))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert list(result["tasks"]) == ["digits", "text", "search"]
    for task in result["tasks"].values():
        assert [row["order"] for row in task["rows"]] == ["exact", 3]
        assert [row["reference"] for row in task["rows"]] == [None, "float32"]
    digits, text, search = (task["rows"] for task in result["tasks"].values())
    assert digits[0]["accuracy"]["value"] > 97
    assert digits[1]["changed"] == digits[1]["distorted_changed"] == 0
    assert 10 < text[0]["perplexity"]["value"] < 100
    assert abs(text[1]["perplexity_change"]["value"]) < 0.1
    assert search[1]["least_cosine"] > 1 - 1e-5
    assert result["bars"] == []  # a quick run proves nothing
    assert result["environment"]["versions"]["flax"] and result["environment"]["threads"] == 1
    written = page.read_text()
    assert written.startswith("# Kept\n") and "### Quality, one thread" in written
    assert len(re.findall(r"^\| (?:exact|3) \|", written, re.MULTILINE)) == 6
    assert "text, float32, 3" in done.stderr or "search" in done.stderr  # the progress
