"""The one exception that the benchmarks report as a single line instead of a traceback.

Everything that a user can put right (an option, a missing package) is raised as this.
"""


class BenchmarkError(Exception):
    """A problem that the user can put right; its text is one line."""
