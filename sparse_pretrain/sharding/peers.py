"""The other processes of a run: JAX's own key-value store, and meeting places."""

import itertools
from typing import Any

import jax
from jax._src import distributed  # the store has no public name; orbax uses it so too

_MEETINGS = itertools.count()
PATIENCE = 3600  # seconds that the slowest compilation may take longer than the fastest


def store() -> Any:
    """The store that all processes share, of which jax.distributed is the server."""
    return distributed.global_state.client


def meet() -> None:
    """Waits for all processes, which come here the same number of times; alone, not at all.

    Before a program's first run, for gloo gives the others half a minute to come to a collective,
    and compilers are not done at the same time everywhere.
    """
    if jax.process_count() > 1:
        name = f"sparse_pretrain/meeting/{next(_MEETINGS)}"
        store().wait_at_barrier(name, PATIENCE * 1000)
