"""Names for types that several folders use in their signatures."""

from collections.abc import Callable
from typing import Any, TypeAlias

# A nested structure of arrays: dictionaries, lists, tuples and classes that `jax.tree_util` knows.
PyTree: TypeAlias = Any
# Called as progress(done, total) while something long goes on; the caller says in which unit.
Progress: TypeAlias = Callable[[int, int], None]
