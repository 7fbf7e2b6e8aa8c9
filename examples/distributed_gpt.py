"""Continues texts with the shipped GPT in several processes that work as one, by jax.distributed:
each has a part of the texts (data parallel), of the model (tensor parallel), or both.
Alone it starts the processes on this machine; with --process-id it is one of them, on any machine.
"""

import argparse
import math
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import _command
from _command import UserError, parse_count, parse_whole_number

FOLDER = Path(__file__).parent / "checkpoints" / "pydoc-gpt"
PROMPTS = (
    "When an exception occurs,",
    "The with statement",
    "A class definition",
    "Keyword arguments are",
)
# How the axes of the arrays in the model are divided: these names are in gpt_model.py.
RULES = (("batch", "data"), ("heads", "model"))
LOOPBACK = ("127.0.0.1", "[::1]", "localhost")
# Of float32 logits around 10, whose sums were taken in another order; 1e-5 was seen. With packed
# weights they are not: 0 was seen.
TOLERANCE = 1e-4


def parse_address(text: str) -> str:
    """Parses --coordinator."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, as in 127.0.0.1:1234")
    return text


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _command.Parser(prog="distributed_gpt.py", description=__doc__)
    add = parser.add_argument
    add("--processes", type=parse_count, default=2, help="how many in all (default: %(default)s)")
    add(
        "--mode",
        choices=("data", "tensor", "both"),
        default="data",
        help="what the processes divide among them: the texts, the model's heads and hidden "
        "units, or two halves of the model and the texts (default: %(default)s)",
    )
    add("--prompt", action="append", help="text to continue; repeatable (default: four of them)")
    add("--tokens", type=parse_count, default=12, help="how many to add (default: %(default)s)")
    add("--order", type=_command.parse_order, help="1 to 5, or exact (default: quake_jax's own)")
    _command.add_weights(parser)
    add("--process-id", type=parse_whole_number, help="be this one of the processes, from 0 on")
    add("--coordinator", type=parse_address, help="HOST:PORT of process 0, with --process-id")
    add(
        "--timeout",
        type=parse_count,
        default=300,
        help="seconds after which every process is ended (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.prompt = args.prompt or list(PROMPTS)
    if "" in args.prompt:
        parser.error("argument --prompt: the prompt is empty")
    if (args.process_id is None) != (args.coordinator is None):
        parser.error("arguments --process-id and --coordinator: one needs the other")
    if args.process_id is not None and args.process_id >= args.processes:
        parser.error(
            f"argument --process-id: {args.process_id} is not below --processes, {args.processes}"
        )
    return args


# One of the processes


def mesh_shape(mode: str, devices: int) -> tuple[int, int]:
    """Returns over how many devices the texts and the model are divided."""
    if mode == "both" and devices % 2:
        raise UserError(f"argument --mode: both needs an even number of devices, not {devices}")
    parts = {"data": 1, "tensor": devices, "both": 2}[mode]
    return devices // parts, parts


def parameter_spec(path, _):
    """Returns how a parameter is divided: what makes heads and hidden units by its outputs, what
    reads them by its inputs; all else is on every device."""
    from jax.sharding import PartitionSpec as P

    match [entry.key for entry in path][-2:]:
        case "c_attn" | "c_fc", "kernel":
            return P(None, "model")
        case ("c_attn" | "c_fc", "bias") | ("c_proj", "kernel"):
            return P("model")
    return P()


def bind_address(coordinator: str) -> str | None:
    """Returns where process 0 listens; None for JAX's default, every address of the machine.

    The machine's own name may mean a loopback address to itself, where no other machine gets in.
    """
    host = coordinator.rpartition(":")[0]
    return coordinator if host in LOOPBACK else None


def next_logits(model, params, tokens, lengths):
    """Returns the logits (batch, vocab_size) of what follows the first `lengths` tokens."""
    import jax.numpy as jnp

    logits, _ = model.apply({"params": params}, tokens)
    return jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]


def continue_greedily(step, tokens, lengths, count: int):
    """Adds `count` of the likeliest tokens to each row of `tokens` (batch, context).

    Returns:
        The tokens, and the logits (count, batch, vocab_size) that they were taken from.
    """
    import numpy as np

    rows = np.arange(len(tokens))
    tokens, lengths, taken = tokens.copy(), lengths.copy(), []
    for _ in range(count):
        logits = np.asarray(step(tokens, lengths))
        tokens[rows, lengths] = logits.argmax(-1)
        lengths += 1
        taken.append(logits)
    return tokens, np.stack(taken)


def work(args: argparse.Namespace) -> None:
    """Runs the model as one of the processes; the first one prints."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        # The one thing that a program on one machine does not do.
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process_id,
            # XLA gives up some seconds later, and says why; signal.alarm ends it without a word.
            initialization_timeout=max(1, args.timeout - 10),
            coordinator_bind_address=bind_address(args.coordinator),
        )
    except Exception as error:
        raise UserError(f"argument --coordinator: {args.coordinator}: {error}") from error

    import _checkpoint
    import gpt_model
    import numpy as np
    from flax import linen as nn
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    config, params, _ = gpt_model.load(FOLDER)
    tokenizer = _checkpoint.load_tokenizer(FOLDER, config.vocab_size)
    prompts = [tokenizer.encode(prompt).ids for prompt in args.prompt]
    context = max(map(len, prompts)) + args.tokens
    if context > config.n_positions:
        raise UserError(
            f"arguments --prompt and --tokens: {context} tokens, context is {config.n_positions}"
        )
    data, parts = mesh_shape(args.mode, jax.device_count())
    if len(prompts) % data:
        raise UserError(f"argument --prompt: {len(prompts)} texts cannot be divided by {data}")
    if config.n_embd % parts:
        raise UserError(f"argument --mode: {config.n_embd} features cannot be divided by {parts}")
    # What follows a text changes nothing in a causal model.
    tokens = np.array([ids + [0] * (context - len(ids)) for ids in prompts], np.int32)
    lengths = np.array([len(ids) for ids in prompts], np.int32)

    mesh = jax.make_mesh((data, parts), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    function = partial(next_logits, gpt_model.GPT(config))

    def on_kernels(params):
        ((step,), params) = _command.on_kernels(
            (function,), ((tokens, lengths),), params, args.order, args.weights
        )
        return step, params

    specs = jax.tree_util.tree_map_with_path(parameter_spec, params)
    divided = jax.tree.map(
        lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), params, specs
    )
    texts, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        # Packed weights are divided as the weights are.
        step, divided = on_kernels(divided)
        step = jax.jit(step, out_shardings=everywhere)
        found, logits = continue_greedily(
            lambda *x: step(divided, *jax.device_put(x, texts)), tokens, lengths, args.tokens
        )

    if args.process_id == 0:
        # The same on one device of this process, without the others.
        alone, params = on_kernels(params)
        expected, expected_logits = continue_greedily(
            partial(jax.jit(alone), params), tokens, lengths, args.tokens
        )
        print(
            f"{args.processes} processes, {data * parts} devices: texts divided by {data}, heads "
            f"and hidden units by {parts}; {_command.kernels_note()}"
        )
        arrays = jax.tree.leaves(divided)
        local = sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in arrays)
        print(
            f"A device has {local / 1e6:.2f} of {sum(x.nbytes for x in arrays) / 1e6:.2f} MB of "
            f"parameters, weights {args.weights or 'as they are'}"
        )
        for row, length in zip(found, lengths, strict=True):
            print(f"- {tokenizer.decode(row[: length + args.tokens].tolist())!r}")
        difference = np.abs(logits - expected_logits).max()
        if not (np.array_equal(found, expected) and difference <= TOLERANCE):
            raise UserError(f"not what one process gives: logits differ by up to {difference:.2g}")
        print(f"The same tokens as in one process; logits differ by at most {difference:.2g}")
        sys.stdout.flush()
    # The others wait here until the first one has finished too.
    jax.distributed.shutdown()


# All of the processes, on this machine


def reserve_port() -> socket.socket:
    """Returns a socket that keeps a port of 127.0.0.1 from other programs until it is closed.

    Process 0 can still listen there, because gRPC sets SO_REUSEPORT as well.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def stop(workers: list[subprocess.Popen]) -> None:
    """Ends all that still run; asked politely, one that waits for another would not."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.wait()


def start_all(argv: list[str], args: argparse.Namespace) -> int:
    """Starts the processes and waits for them; one that fails, or a signal, ends the others."""
    end = time.monotonic() + args.timeout
    workers: list[subprocess.Popen] = []
    # Not an exception, which could come between the start of a process and its place in the list.
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    with reserve_port() as reserved, tempfile.TemporaryDirectory() as folder:
        coordinator = f"127.0.0.1:{reserved.getsockname()[1]}"
        command = [sys.executable, __file__, *argv, "--coordinator", coordinator]
        logs = [Path(folder) / str(i) for i in range(args.processes)]
        try:
            for i, log in enumerate(logs):
                with log.open("w") as errors:
                    options = ["--process-id", str(i)]
                    workers.append(subprocess.Popen([*command, *options], stderr=errors))
            while None in (states := [worker.poll() for worker in workers]) and not any(states):
                if signals:
                    return 128 + signals[0]
                if time.monotonic() > end:
                    raise UserError(f"argument --timeout: not done after {args.timeout} seconds")
                time.sleep(0.05)
        finally:
            stop(workers)
        if any(states):
            i = next(i for i, state in enumerate(states) if state)
            lines = [line for line in logs[i].read_text(errors="replace").split("\n") if line]
            own = [line for line in lines if line.startswith("distributed_gpt.py: ")]
            message = (own or lines or ["it said nothing"])[-1].removeprefix("distributed_gpt.py: ")
            raise UserError(f"process {i} ended with status {states[i]}: {message}")
    return 0


def run(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.process_id is None:
        return start_all(sys.argv[1:] if argv is None else argv, args)
    # Whatever it waits for, and whoever started it, it ends.
    signal.alarm(args.timeout)
    work(args)
    return 0


if __name__ == "__main__":
    _command.start("distributed_gpt.py", run)
