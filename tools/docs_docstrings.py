"""Griffe extension: the docstrings' sections under the names that the site's parser knows.

Docstrings have one `Example:` of doctest lines, as JAX's have; the parser wants `Examples:`.
"""

import re

import griffe


class Sections(griffe.Extension):
    """Renames `Example:`."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Edit the docstring of a module, a class or a function."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"(?m)^(\s*)Example:$", r"\1Examples:", obj.docstring.value
            )
