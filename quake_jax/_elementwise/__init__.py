"""Element-wise functions: the table of them, their derivatives, primitives and references."""
