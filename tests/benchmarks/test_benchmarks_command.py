"""Tests of the command line of the benchmarks: bad values are one line, whatever the subcommand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks import __main__ as command  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NO_FOLDER = ("--json", "/no/such/folder/x.json")
BAD = {
    "ops": [
        (("--shape", "12,no"), "'12,no'"),
        (("--shape", "0,4"), "'0,4'"),
        (("--rounds", "0"), "'0'"),
        (("--function", "sine"), "'sine'"),
        (("--order", "7"), "7"),
        (("--json", "/"), "/"),
    ],
    "attention": [
        (("--shape", "12,no"), "'12,no'"),
        (("--shape", "1,8,6/4,8"), "'1,8,6/4,8'"),
        (("--mask", "round"), "'round'"),
        (("--rounds", "0"), "'0'"),
        (("--order", "7"), "7"),
    ],
    "dense": [
        (("--layer", "12,no"), "'12,no'"),
        (("--layer", "12"), "'12'"),
        (("--rows", "0"), "'0'"),
        (("--form", "relu"), "'relu'"),
    ],
    "models": [
        (("--model", "gpt5"), "'gpt5'"),
        (("--system", "tensorflow"), "'tensorflow'"),
        (("--rounds", "0"), "'0'"),
    ],
    "quality": [
        (("--order", "7"), "7"),
        (("--dtype", "float16"), "'float16'"),
        (("--tokens", "0"), "'0'"),
    ],
    "approximations": [(("--kind", "tanh"), "'tanh'")],
    "devices": [(("--rounds", "0"), "'0'")],
}


def test_every_subcommand_is_tried():
    assert set(BAD) == set(command.SUBCOMMANDS)


@pytest.mark.parametrize(
    ("subcommand", "arguments", "named"),
    [
        (subcommand, *bad)
        for subcommand, of_it in BAD.items()
        for bad in [*of_it, (NO_FOLDER, "/no/such/folder")]
    ]
    + [("nothing", (), "'nothing'")],
)
def test_bad_values_are_one_line(subcommand, arguments, named, capsys):
    if subcommand in ("models", "devices"):
        pytest.importorskip("flax")
    try:
        status = command.main([subcommand, *arguments])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1
    assert "error" in said.err and named in said.err


def test_nothing_starts_jax_before_a_run_has_pinned_the_process():
    modules = "jax", "numpy", "scipy", "matplotlib", "quake_jax"
    script = (
        "import sys, benchmarks.__main__ as command\n"
        "command.parse(['ops', '--function', 'exp'])\n"
        f"sys.exit(','.join(n for n in {modules} if n in sys.modules) or 0)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
