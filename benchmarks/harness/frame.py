"""The frame of a run: the options that subcommands share, the settings that follow from them, the
progress on the terminal, and the files that a result is written to.

Nothing here imports JAX before `run` has pinned the process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from benchmarks.harness import bars, environment, timing
from benchmarks.harness.errors import BenchmarkError, check_files
from benchmarks.harness.timing import Contestant, Series

T = TypeVar("T")

# --- Options


# What several subcommands understand.
OPTIONS: dict[str, dict[str, Any]] = {
    "threads": {
        "type": int,
        "choices": (1, 2),
        "default": 1,
        "help": "cores and threads of each library",
    },
    "peers": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "compare with other libraries where installed",
    },
    "allocator": {
        "choices": ("keep", "system"),
        "default": "keep",
        "help": "keep: freed pages stay mapped, no page faults inside readings (default); system: "
        "as users have it, where XLA's large temporaries are fresh pages at each call",
    },
    "embedding-checkpoint": {
        "metavar": "DIR",
        "help": "folder, or id on the Hugging Face hub, of a BERT that embeds sentences, such as "
        "all-MiniLM-L6-v2; without it there is no search",
    },
    "quick": {"action": "store_true", "help": "small and short: a try, no result"},
    "json": {"type": Path, "metavar": "PATH", "help": "write the result as JSON"},
    "resume": {
        "action": "store_true",
        "help": "add to what the file of --json has, of an earlier run of other cases",
    },
    "markdown": {"type": Path, "metavar": "PATH", "help": "write or replace this run's section"},
    "plot": {"type": Path, "metavar": "DIR", "help": "write plots as PNG files"},
}
# Of all subjects whose speed is compared.
TIMED = ("threads", "peers", "allocator", "quick", "json", "resume", "markdown")


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Declare options of `OPTIONS`."""
    for name in names:
        parser.add_argument(f"--{name}", **OPTIONS[name])


def add_repeatable(
    parser: argparse.ArgumentParser, name: str, choices: Iterable[Any], default: str = "all"
) -> None:
    """Declare an option that chooses from a list of names or numbers, and may be repeated."""
    choices = tuple(choices)
    kind, help_ = type(choices[0]), f"repeatable; {default} by default"
    parser.add_argument(name, action="append", type=kind, choices=choices, help=help_)


def add_rounds(parser: argparse.ArgumentParser, rounds: int, few: str) -> None:
    """Declare the number of rounds; `few` says when there are fewer than `rounds` by default."""
    parser.add_argument("--rounds", type=positive, help=f"interleaved rounds ({rounds}; {few})")


def positive(text: str) -> int:
    """Read a number from 1 up, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def read_by(parse: Callable[[str], T], what: str) -> Callable[[str], T]:
    """Read an option by `parse`, for argparse; `what` says what a text that it refuses is not."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except (ValueError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}") from None

    return read


# --- A run


def run(args: argparse.Namespace, package: str) -> None:
    """Measure what the options ask for, print it, and write the files asked for.

    `package`, `benchmarks.NAME`, has `HELP`, `add_arguments` and, if there is more to check or to
    be kept from, `check` and `PINNED` in `command`; `measure` in `measure`; `HEADING`, `tables` and
    `remarks` of a result in `report`, and `figures` of it in `plots`.
    """
    command = importlib.import_module(f"{package}.command")
    check_files(args.json, args.markdown)
    getattr(command, "check", lambda args: None)(args)
    if getattr(command, "PINNED", True):
        keep_pages = getattr(args, "allocator", "keep") == "keep"
        environment.prepare(getattr(args, "threads", 1), keep_pages)
    result = importlib.import_module(f"{package}.measure").measure(args)

    from benchmarks.harness import pages

    report = importlib.import_module(f"{package}.report")
    page = pages.Page(report.HEADING, report.tables(result), report.remarks(result))
    pages.to_terminal(result, page)
    if args.json:
        pages.to_json(result, args.json)
    if args.markdown:
        pages.to_markdown(result, page, args.markdown)
    if getattr(args, "plot", None):
        from benchmarks.harness import plots

        for path in plots.draw(result, importlib.import_module(f"{package}.plots"), args.plot):
            print(path)


@dataclass(frozen=True)
class Settings:
    """How the readings of a run are taken."""

    rounds: int | None  # interleaved; None for as many as a case has by default
    reading_seconds: float  # the least length of a reading
    allocator: str = "keep"  # or "system" where page faults are part of the times
    quick: bool = False  # a try
    threads: int = 1  # in use
    benchmark: str = ""  # runs of other kinds (a dtype, an allocator) have names of their own
    earlier: dict = field(default_factory=dict)  # the result that is added to

    @classmethod
    def of(
        cls, args: argparse.Namespace, reading_seconds: tuple[float, float], quick_rounds: int = 3
    ) -> Settings:
        """Those that the options ask for; readings have two lengths, without and with --quick.
        BenchmarkError if the result to be added to is another benchmark's.
        """
        rounds = args.rounds or (quick_rounds if args.quick else None)
        kinds = [args.dtype] if isinstance(getattr(args, "dtype", None), str) else []
        kinds += ["system allocator"] if args.allocator == "system" else []
        benchmark, earlier = ", ".join([args.subcommand, *kinds]), {}
        if args.resume and args.json and args.json.exists():
            earlier = json.loads(args.json.read_text())
            if earlier["benchmark"] != benchmark:
                found = f"{args.json} has results of {earlier['benchmark']!r}"
                raise BenchmarkError(f"--resume: {found}, not of {benchmark!r}")
        options = args.allocator, args.quick, args.threads, benchmark, earlier
        return cls(rounds, reading_seconds[args.quick], *options)

    def result(self, settings: dict, goals: ModuleType, judged: bool = True, **parts) -> dict:
        """A result, judged by the subject's goals unless it is a try, with the parts, which are
        lists and dictionaries, of the earlier one.
        """
        names = ("rounds", "reading_seconds", "allocator", "quick")
        for name, found in self.earlier.items():
            if name in parts:
                new = parts[name]
                parts[name] = [*found, *new] if isinstance(new, list) else found | new
        result = {
            "benchmark": self.benchmark,
            "environment": environment.describe(self.threads),
            "settings": {**settings, **{name: getattr(self, name) for name in names}},
            **parts,
        }
        judged = judged and not self.quick
        return result | {
            "bars": goals.judge(result) if judged else [],
            "bars_not_judged": bars.not_judged(goals.BARS, result) if judged else {},
        }

    def read(
        self,
        contestants: Sequence[Contestant],
        rounds: int,
        advance: Callable[[float], None] = lambda share: None,
        shortest: float = 0.0,
        attempts: int = timing.MAX_ATTEMPTS,
    ) -> dict[Any, Series]:
        """Take the readings of the contestants of one case, as `timing.measure` does.

        `rounds` counts where the settings leave them open; `advance` is called after each reading
        with its share of the whole. In readings that may be long, of at least `shortest` seconds,
        more page faults are let pass.
        """
        rounds = self.rounds or rounds
        allowed = max(timing.MAX_FAULTS, timing.FAULT_SHARE * shortest / timing.FAULT_SECONDS)
        return timing.measure(
            contestants,
            rounds=rounds,
            target=self.reading_seconds,
            threads=self.threads,
            max_faults=allowed if self.allocator == "keep" else float("inf"),
            advance=lambda: advance(1 / (rounds * len(contestants))),
            attempts=attempts,
        )


class Progress:
    """A bar on the terminal. A step is one case; within it, readings advance the bar."""

    def __init__(self, bar: Any, total: int | None):
        self._bar = bar
        self._task = bar.add_task("loading", total=total)

    def advance(self, share: float = 1.0) -> None:
        """Add the share of a step that is done."""
        self._bar.advance(self._task, share)

    def expect(self, total: int) -> None:
        """Say how many steps there are, if that was not known at first."""
        self._bar.update(self._task, total=total)

    def show(self, description: str) -> None:
        """Say what is being done."""
        self._bar.update(self._task, description=description)

    def over(self, cases: Iterable[T], label: Callable[[T], str]) -> Iterator[T]:
        """The cases, each of which is a step."""
        for done, case in enumerate(cases, 1):
            self.show(label(case))
            yield case
            self._bar.update(self._task, completed=done)


@contextlib.contextmanager
def progress(total: int | None = None) -> Iterator[Progress]:
    """Show a bar of so many steps while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Bar(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        yield Progress(bar, total)
