"""examples/distributed_gpt.py as a user runs it: two processes on loopback work as one."""

import contextlib
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ONE_DEVICE

pytest.importorskip("flax")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

SCRIPT = Path(__file__).parents[2] / "examples" / "distributed_gpt.py"
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
    environment = os.environ | {"XLA_FLAGS": ONE_DEVICE, "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--timeout", str(TIMEOUT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
        start_new_session=True,
    )


def kill(process: subprocess.Popen) -> None:
    """Ends a process, and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # there are none left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(*arguments) -> subprocess.CompletedProcess:
    process = start(*arguments)
    try:
        out, errors = process.communicate(timeout=TIMEOUT + 60)
    finally:
        kill(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def continuations(result: subprocess.CompletedProcess) -> list[str]:
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if line.startswith("- ")]


@pytest.fixture(scope="module")
def of_one_process():
    texts = continuations(run("--processes", "1", *PROMPTS))
    assert len(texts) == 2 and texts[0].startswith("- 'When an exception occurs,")
    return texts


def assert_divided(printed: str, texts: int, heads: int) -> None:
    split = re.search(
        r"(\d) processes, \1 devices: texts divided by (\d), heads .* by (\d)", printed
    )
    assert tuple(map(int, split.groups())) == (texts * heads, texts, heads)
    # It fails by itself if the logits are not those of one device, too.
    assert "The same tokens as in one process" in printed


def test_processes_give_the_results_of_one(of_one_process):
    result = run("--processes", "4", "--mode", "both", *PROMPTS)
    assert continuations(result) == of_one_process
    assert_divided(result.stdout, texts=2, heads=2)


def test_packed_weights_give_the_results_of_one_process():
    result = run("--mode", "tensor", "--weights", "int8", *PROMPTS)
    assert len(continuations(result)) == 2
    assert_divided(result.stdout, texts=1, heads=2)
    local, whole = re.search(r"has ([\d.]+) of ([\d.]+) MB.* weights int8", result.stdout).groups()
    assert float(local) < 0.8 * float(whole)


@pytest.fixture
def distributed_gpt(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("distributed_gpt")


def test_processes_that_are_started_one_by_one(distributed_gpt, of_one_process):
    """As on several machines."""
    workers = []
    try:
        with distributed_gpt.reserve_port() as reserved:
            address = f"127.0.0.1:{reserved.getsockname()[1]}"
            options = ["--coordinator", address, "--mode", "data", *PROMPTS]
            for i in range(2):
                workers.append(start(*options, "--process-id", str(i)))
            ends = [worker.communicate(timeout=TIMEOUT + 60) for worker in workers]
    finally:
        for worker in workers:
            kill(worker)
    assert [worker.returncode for worker in workers] == [0, 0], ends
    assert_divided(ends[0][0], texts=2, heads=1)
    assert [line for line in ends[0][0].splitlines() if line[:2] == "- "] == of_one_process
    assert "- '" not in ends[1][0]


def test_no_other_program_gets_the_port_of_the_first_process(distributed_gpt):
    with distributed_gpt.reserve_port() as reserved, socket.socket() as other:
        with pytest.raises(OSError):
            other.bind(reserved.getsockname())


@pytest.mark.parametrize(
    ("coordinator", "address"),
    [
        ("127.0.0.1:1234", "127.0.0.1:1234"),
        ("localhost:1234", "localhost:1234"),
        ("[::1]:1234", "[::1]:1234"),
        # Every address of the machine.
        ("host0:1234", None),
        ("192.0.2.1:1234", None),
    ],
)
def test_where_the_first_process_listens(coordinator, address, distributed_gpt):
    assert distributed_gpt.bind_address(coordinator) == address


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
    assert result.returncode == 2 and "[Gloo]" not in result.stdout
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr


def children_file(pid: int) -> Path:
    return Path(f"/proc/{pid}/task/{pid}/children")


# Some kernels have no such file.
needs_children = pytest.mark.skipif(
    not children_file(os.getpid()).exists(), reason="needs /proc/PID/task/PID/children"
)


def two_children(process: subprocess.Popen) -> list[int]:
    """Waits until a process has started two others."""
    end = time.monotonic() + TIMEOUT
    while len(found := children_file(process.pid).read_text().split()) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    return [int(pid) for pid in found]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@needs_children
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["terminated", "ctrl-c"])
def test_no_process_outlives_the_one_that_started_it(number):
    parent = start(*PROMPTS)
    try:
        workers = two_children(parent)
        parent.send_signal(number)
        parent.communicate(timeout=TIMEOUT)
        assert parent.returncode == 128 + number
        assert not any(map(is_running, workers))
    finally:
        kill(parent)


@needs_children
def test_a_process_that_dies_ends_the_others():
    parent = start(*PROMPTS)
    try:
        workers = two_children(parent)
        os.kill(workers[1], signal.SIGKILL)
        _, errors = parent.communicate(timeout=TIMEOUT)
        assert parent.returncode == 2 and "process 1 ended with status -9" in errors
        assert not any(map(is_running, workers))
    finally:
        kill(parent)
