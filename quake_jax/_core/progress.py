"""A progress bar for what takes seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(name: str, total: int | None, *, after: float = 0.0) -> Iterator[Callable[[], None]]:
    """Yield what advances a bar on stderr, which needs rich and a terminal.

    One that comes `after` some seconds goes away again at the end.
    """
    try:
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        shown = False
    else:
        shown = sys.stderr is not None and sys.stderr.isatty()
    if not shown:
        yield lambda: None
        return
    from rich.console import Console

    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    # Redirected, rich would send the lines to the terminal even if the output is a file.
    console, redirect = Console(stderr=True), sys.stdout.isatty()
    bar = Progress(*columns, console=console, redirect_stdout=redirect, transient=after > 0)
    task, begin = bar.add_task(name, total=total), time.monotonic()
    with contextlib.ExitStack() as stack:

        def advance() -> None:
            if time.monotonic() - begin >= after and not bar.live.is_started:
                stack.enter_context(bar)
            bar.advance(task)

        if not after:
            stack.enter_context(bar)
        yield advance
