"""`python -m benchmarks build`: how long the wheel takes to build, and how large it is.

The build is the user's: in isolation, with what pyproject.toml asks for.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from benchmarks.harness import environment
from benchmarks.harness.errors import BenchmarkError, check_files

DESCRIBED = ("date", "cpu", "platform", "python", "commit", "uncommitted_changes")
HELP = "time to build the wheel, and its size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result as JSON")
    parser.add_argument(
        "--build-isolation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="without it, the build requirements must be installed already",
    )


def run(args: argparse.Namespace) -> None:
    """Build the wheel in a temporary folder and print time and sizes."""
    from rich.console import Console

    check_files(args.json)
    console = Console(stderr=True)
    with console.status("building the wheel (minutes)"):
        result = measure(args.build_isolation)
    print(f"build    {result['seconds']:.1f} s on {result['environment']['cores']} cores")
    print(f"wheel    {result['wheel']}: {result['wheel_bytes'] / 2**20:.2f} MiB")
    print(f"unpacked {result['unpacked_bytes'] / 2**20:.2f} MiB")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(build_isolation: bool = True) -> dict:
    """Build the wheel once: seconds, sizes in bytes, its name and the environment. Isolation, which
    is part of the time, means that pip installs the build requirements into a fresh environment. If
    the build fails, pip's output is printed and BenchmarkError raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", str(environment.ROOT)]
        command += ["--quiet", "--no-deps", "--no-cache-dir", "--wheel-dir", folder]
        command += [] if build_isolation else ["--no-build-isolation"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            sys.stderr.write(done.stdout + done.stderr)
            raise BenchmarkError("the build failed; pip's output is above")
        with zipfile.ZipFile(wheels[0]) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        described = environment.describe(threads=0)
        return {
            "benchmark": "build",
            "environment": {
                **{name: described[name] for name in DESCRIBED},
                "cores": os.cpu_count(),
            },
            "seconds": seconds,
            "wheel": wheels[0].name,
            "wheel_bytes": wheels[0].stat().st_size,
            "unpacked_bytes": unpacked,
        }
