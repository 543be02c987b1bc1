"""The other processes of a run: JAX's own key-value store, and meeting places."""

import contextlib
import ctypes
import itertools
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the store has no public name; orbax uses it so too

_MEETINGS = itertools.count()
_KEPT: list[Any] = []
ANSWER = 2  # seconds in which the store answers, if it does
PATIENCE = 3600  # seconds that the slowest compilation may take longer than the fastest


def store() -> Any:
    """The store that all processes share, of which jax.distributed is the server."""
    return distributed.global_state.client


def when_lost(callback: Callable[[], None]) -> None:
    """Calls back before JAX aborts this process because another one, or its store, is gone.

    JAX's client does that from a thread of C++, wherever Python may be, and its option for a
    callback of our own ends in std::bad_cast. An abort for another reason takes its course: only in
    this one the client, which is busy with its failure, answers nothing.
    """

    def aborted(number: int) -> None:
        del number
        asking = threading.Thread(target=_ask, daemon=True)
        asking.start()
        asking.join(ANSWER)
        if asking.is_alive():
            callback()

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _KEPT.append(handler)  # C holds no reference
    ctypes.CDLL(None).signal(signal.SIGABRT.value, handler)


def _ask() -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no such key: an answer
        store().key_value_try_get("sparse_pretrain/nothing")


def meet() -> None:
    """Waits for all processes, which come here the same number of times; alone, not at all.

    Before a program's first run, for gloo gives the others half a minute to come to a collective,
    and compilers are not done at the same time everywhere.
    """
    if jax.process_count() > 1:
        name = f"sparse_pretrain/meeting/{next(_MEETINGS)}"
        store().wait_at_barrier(name, PATIENCE * 1000)
