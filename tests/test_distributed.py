"""examples/distributed_gpt.py as a user runs it: two processes on loopback work as one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flax")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

SCRIPT = Path(__file__).parents[1] / "examples" / "distributed_gpt.py"
PROMPTS = [
    "--prompt",
    "When an exception occurs,",
    "--prompt",
    "The with statement",
    "--tokens",
    "4",
]
# Far more than they need: a guard against processes that wait for each other.
TIMEOUT = 300


def start(*arguments) -> subprocess.Popen:
    """Starts it with one device in each process."""
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--timeout", str(TIMEOUT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
    )


def run(*arguments) -> subprocess.CompletedProcess:
    process = start(*arguments)
    try:
        out, errors = process.communicate(timeout=TIMEOUT + 60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def continuations(result: subprocess.CompletedProcess) -> list[str]:
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if line.startswith("- ")]


@pytest.fixture(scope="module")
def of_one_process():
    texts = continuations(run("--processes", "1", *PROMPTS))
    assert len(texts) == 2 and texts[0].startswith("- 'When an exception occurs,")
    return texts


@pytest.mark.parametrize(
    ("mode", "parts"), [("data", (2, 1)), ("tensor", (1, 2))], ids=["data", "tensor"]
)
def test_two_processes_give_the_results_of_one(mode, parts, of_one_process):
    # It fails by itself if the logits are not those of one device, too.
    result = run("--mode", mode, *PROMPTS)
    assert continuations(result) == of_one_process
    split = re.search(
        r"2 processes, 2 devices: texts divided by (\d), heads .* by (\d)", result.stdout
    )
    assert tuple(map(int, split.groups())) == parts
    assert "The same tokens as in one process" in result.stdout


def test_processes_that_are_started_one_by_one():
    """As on several machines; what they have no use for is refused by each of them."""
    port = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); "
         "import distributed_gpt; print(distributed_gpt.free_port())"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    options = ["--coordinator", f"127.0.0.1:{port}", "--mode", "both", *PROMPTS]
    workers = [start(*options, "--process-id", str(i)) for i in range(2)]
    try:
        ends = [worker.communicate(timeout=TIMEOUT + 60) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], ends
    assert "texts divided by 1, heads and hidden units by 2" in ends[0][0]
    assert "- '" not in ends[1][0]


MISTAKES = {
    "a process alone": (["--process-id", "0"], "--process-id and --coordinator: one needs"),
    "number of a process": (
        ["--process-id", "2", "--coordinator", "127.0.0.1:1"],
        "argument --process-id: 2 is not below --processes, 2",
    ),
    "address": (
        ["--process-id", "0", "--coordinator", "here"],
        "argument --coordinator: 'here' is not HOST:PORT, as in 127.0.0.1:1234",
    ),
    "empty prompt": (["--prompt", ""], "argument --prompt: the prompt is empty"),
    "no process": (["--processes", "0"], "argument --processes: at least 1 is needed"),
    # Found by the processes that were started.
    "texts": (
        ["--prompt", "One", "--tokens", "1"],
        " ended with status 2: argument --prompt: 1 texts cannot be divided by 2",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_take_one_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2 and result.stdout.replace("[Gloo]", "") == result.stdout
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr


def children(process: subprocess.Popen) -> list[int]:
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in file.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["terminated", "ctrl-c"])
def test_no_process_outlives_the_one_that_started_it(number):
    parent = start(*PROMPTS)
    try:
        end = time.monotonic() + 60
        while len(workers := children(parent)) < 2:
            assert parent.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        parent.send_signal(number)
        parent.communicate(timeout=60)
        assert parent.returncode == 128 + number
        assert not any(map(is_running, workers))
    finally:
        parent.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_that_dies_ends_the_others():
    parent = start(*PROMPTS)
    try:
        end = time.monotonic() + 60
        while len(workers := children(parent)) < 2:
            assert parent.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        os.kill(workers[1], signal.SIGKILL)
        _, errors = parent.communicate(timeout=60)
        assert parent.returncode == 2 and "process 1 ended with status -9" in errors
        assert not any(map(is_running, workers))
    finally:
        parent.kill()
