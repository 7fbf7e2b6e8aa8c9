"""Which format the weights get that are made of a parameter."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

from quake_jax._core.drop_in import refusal
from quake_jax._dense.layout import GROUP_MULTIPLE, LARGEST
from quake_jax._rewrite.dense import Format
from quake_jax._rewrite.options import check_format


@dataclasses.dataclass(frozen=True)
class Rules:
    """The arguments of `pack` that say how weights are packed, checked."""

    default: Format
    ordered: tuple[tuple[re.Pattern, Format], ...]

    def format_of(self, path: str) -> Format:
        for pattern, chosen in self.ordered:
            if pattern.fullmatch(path):
                return chosen
        return self.default


def checked_rules(
    weights, activations, group_size, scale_method, rules, function: str = "pack", calibrated=False
) -> Rules:
    """Return the Rules that arguments mean; raise TypeError or ValueError for others."""
    refused = functools.partial(refusal, function)
    check_format(function, "weights", weights, may_be_none=False)
    if activations not in ("auto", "int8", None):
        raise refused("activations", '"auto", "int8" or None', repr(activations))
    if scale_method not in ("max", "mse"):
        raise refused("scale_method", '"max" or "mse"', repr(scale_method))
    if group_size is not None and (
        not isinstance(group_size, int) or group_size <= 0 or group_size % GROUP_MULTIPLE
    ):
        expected = f"None or a positive multiple of {GROUP_MULTIPLE}"
        raise refused("group_size", expected, repr(group_size))
    default = Format(weights, group_size, activations, scale_method, calibrated=calibrated)
    ordered = []
    if rules is not None and (isinstance(rules, str) or not isinstance(rules, Sequence)):
        expected = 'None or pairs of a pattern and a dtype, as in [(".*/head/.*", None)]'
        raise refused("rules", expected, repr(rules), TypeError)
    for i, rule in enumerate(rules or ()):
        if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2:
            raise refused(f"rules[{i}]", "a pair of a pattern and a dtype", repr(rule), TypeError)
        pattern, dtype = rule
        try:
            pattern = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise refused(f"rules[{i}][0]", "a regular expression", repr(pattern)) from error
        check_format(function, f"rules[{i}][1]", dtype, may_be_none=True)
        ordered.append((pattern, dataclasses.replace(default, dtype=dtype, is_rule=True)))
    used = {weights, *(f.dtype for _, f in ordered)}
    for argument, given in (("activations", activations == "int8"), ("group_size", group_size)):
        if given and not used.intersection(LARGEST):
            expected = f"left out where no weight is {' or '.join(LARGEST)}"
            raise refused(argument, expected, repr(locals()[argument]))
    return Rules(default, tuple(ordered))
