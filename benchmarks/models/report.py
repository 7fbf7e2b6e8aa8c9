"""The tables of a result of `models`."""

from collections.abc import Callable

from benchmarks.harness import bars, pages
from benchmarks.harness.pages import NONE, Rows, Table, median, number
from benchmarks.harness.peers import TORCH
from benchmarks.models import goals
from benchmarks.models.cases import FLAX, FLAX_BFLOAT16, MEANING, PEERS, STATIC, SUBJECT, label

HEADING = "Models"
MODEL = ("model", lambda case: case["title"])
# Of a case and the name of one of its packed systems.
_OF_PAIRS = (
    (MODEL[0], lambda pair: MODEL[1](pair[0])),
    ("weights", lambda pair: pair[1].removeprefix("pack-").replace("-", ", ")),
)


def tables(result: dict) -> list[Table]:
    """Make the tables."""
    cases, dtype = result["cases"], result["settings"]["dtype"]
    made = [
        *_of_systems(cases, f"Time, {dtype}: ms per call (median)", _milliseconds),
        (f"Speed, {dtype}: flax's time over theirs (median)", _speeds(cases)),
        (
            f"Packed weights against flax and peers, {dtype}",
            _packed(cases if dtype == goals.DTYPE else []),
        ),
        (f"Where the time of packed models goes, {dtype}", _profiles(cases)),
        *_of_systems(
            cases, f"Peak memory, {dtype}: MB of a call on top of weights and inputs", _megabytes
        ),
        (f"What accelerate does, {dtype}", _programs(cases)),
        *_of_systems(cases, f"Difference from flax's result, {dtype}", _difference),
    ]
    return pages.filled(made) + bars.tables(result)


def _names(cases: list[dict]) -> list[str]:
    """The systems of all cases, in the order in which tables show them."""
    return [name for name in MEANING if name in pages.contestants(cases)]


def _of_systems(cases: list[dict], title: str, shown: Callable[[dict], str]) -> list[Table]:
    """A row for each model, with what is shown of each system in JAX; and a table of the others."""
    names = _names(cases)
    others = [name for name in names if name in PEERS and name != FLAX_BFLOAT16]
    in_jax = [name for name in names if name not in others]
    return [
        (heading, pages.rows_of(cases, MODEL, *pages.of_contestants(of, shown, label)))
        for heading, of in ((title, in_jax), (f"{title}, other libraries", others))
    ]


def _milliseconds(entry: dict) -> str:
    time = entry["ms"]["median"]
    return f"{time:.{2 if time < 100 else 0}f}" + pages.doubt(entry)


def _megabytes(entry: dict) -> str:
    size = entry["memory_bytes"]
    return NONE if size is None else f"{1e-6 * size:.0f}"


def _difference(entry: dict) -> str:
    return f"{entry['difference']:.1e}" if "difference" in entry else NONE


def _speeds(cases: list[dict]) -> Rows:
    def speed(case: dict) -> dict[str, dict]:
        return case["speed"]

    others = [name for name in _names(cases) if name not in (FLAX, SUBJECT, *PEERS)]
    return pages.rows_of(
        cases,
        MODEL,
        *pages.named_columns([SUBJECT], pages.spread, speed, "{} (quartiles)".format),
        *pages.named_columns(others, lambda ratio: number(ratio["median"]), speed, label),
        (f"{TORCH} / {SUBJECT}", lambda case: number(median(case["over_ours"].get(TORCH)))),
        ("share of the ceiling", lambda case: number(bars.percent(case["share"]), 0, " %")),
    )


def _packed(cases: list[dict]) -> Rows:
    """Of each model and packed format what its time is compared with."""
    pairs = [(case, name) for case in cases for name in case["ratios"]]

    def fastest(pair: tuple[dict, str]) -> str:
        found = goals.fastest(*pair)
        return f"{found[0]:.2f} {found[1]}" if found else NONE

    return pages.rows_of(
        pairs,
        *_OF_PAIRS,
        ("flax / ours", lambda pair: number(median(pair[0]["speed"].get(pair[1])))),
        ("fastest peer of the same precision / ours", fastest),
        (f"{STATIC} / ours", lambda p: number(median(p[0]["ratios"][p[1]].get(STATIC)))),
    )


def _profiles(cases: list[dict]) -> Rows:
    """The shares of the time of each model and packed format."""
    pairs = [(case, name) for case in cases for name in case["profile"]]
    kinds = pages.names_in(case["profile"][name] for case, name in pairs)
    shares = pages.named_columns(
        kinds, lambda share: number(100 * share, 0, " %"), lambda pair: pair[0]["profile"][pair[1]]
    )
    return pages.rows_of(pairs, *_OF_PAIRS, *shares)


def _programs(cases: list[dict]) -> Rows:
    """What is replaced and what is left, and the time of tracing and compiling."""

    def counts(key: str) -> Callable[[dict], str]:
        return lambda case: ", ".join(f"{n} {name}" for name, n in case[key].items()) or NONE

    def seconds(step: str) -> Callable[[dict], str]:
        def text(case: dict) -> str:
            ours, flax = (case["contestants"].get(name) for name in (SUBJECT, FLAX))
            return f"{flax[step]:.2f} → {ours[step]:.2f}" if ours and flax else NONE

        return text

    return pages.rows_of(
        cases,
        MODEL,
        ("calls put in", counts("replaced")),
        ("left", counts("left")),
        ("traced, s", seconds("trace_seconds")),
        ("compiled, s", seconds("compile_seconds")),
    )


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    cases, dtype = result["cases"], result["settings"]["dtype"]
    meanings = "; ".join(f"{name}: {MEANING[name]}" for name in _names(cases))
    lines = pages.prose(
        "models/remarks.txt",
        result,
        meanings=meanings[0].upper() + meanings[1:],
        accelerated=any(SUBJECT in case["contestants"] for case in cases),
        share=any(case["share"] for case in cases),
        bfloat16=dtype == "bfloat16",
        packed=dtype == goals.DTYPE and any(case["ratios"] for case in cases),
        static=STATIC,
        profile=any(case["profile"] for case in cases),
    )
    return lines + pages.run_remarks(result)
