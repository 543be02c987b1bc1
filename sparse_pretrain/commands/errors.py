"""One line and an exit code for everything that can go wrong in a command."""

import _thread
import argparse
import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from sparse_pretrain.sections import nearest

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
OWN = ("sparse_pretrain", "kernels_pallas")
LONGEST = 1000  # characters of a message; compilers write pages
_FULL = ("no space left on device", "disk quota exceeded", "errno 28")


@contextlib.contextmanager
def interrupts_are_heard() -> Iterator[None]:
    """Raises a KeyboardInterrupt again that came where Python only reports errors and goes on.

    Collecting garbage is such a place, and jax runs a callback there: the interrupt would be a
    traceback on the terminal, and the program would not end.
    """
    before = sys.unraisablehook

    def hook(unraisable):
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            again = threading.Timer(0.05, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


class Usage(ValueError):
    """A mistake on the command line."""


class Stopped(Exception):
    """A command that ends early for a known reason, with its exit code."""

    def __init__(self, message: str, code: int = FAILED):
        super().__init__(message)
        self.code = code


def describe(error: BaseException) -> tuple[int, str]:
    """(exit code, the one line for standard error): what was wrong, not where in the code."""
    if isinstance(error, Stopped):
        return error.code, one_line(error) if error.code == INTERRUPTED else _error(one_line(error))
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; the same command continues where there is a checkpoint"
    if disk_full(error):
        return FAILED, _error(
            f"the disk is full ({one_line(error)}); make room and run the same command again: it "
            "continues from the last complete checkpoint"
        )
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return FAILED, _error(
            f"out of memory ({first_line(error)}); lower config.data.batch or raise "
            "config.accumulate"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        return MISTAKE, _error(f"{where}{error.strerror.lower()}")
    if isinstance(error, ValueError) and _is_ours(error):
        return MISTAKE, _error(one_line(error))
    if isinstance(error, RuntimeError) and type(error).__module__.startswith("sparse_pretrain"):
        return FAILED, _error(one_line(error))
    hint = "SPARSE_PRETRAIN_TRACEBACK=1 shows where"
    return FAILED, _error(f"unexpected {type(error).__name__}: {first_line(error)} ({hint})")


def _is_ours(error: BaseException) -> bool:
    """Whether this package (or Python itself) raised it, and not a library on our mistake."""
    trace = error.__traceback__
    if trace is None or isinstance(error, Usage):
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package in OWN or package in sys.stdlib_module_names


def disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is the cause: libraries wrap it in errors of their own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or any(t in str(error).lower() for t in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: BaseException) -> str:
    """The message in one line of bounded length; the type's name where there is none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first line of the message that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:LONGEST] if lines else type(error).__name__


def _error(text: str) -> str:
    return f"error: {text}"


def unknown_option(
    option: str, parser: argparse.ArgumentParser, module: Any, args: argparse.Namespace
) -> str:
    """What is wrong with an argument that a command does not have, and what may be meant."""
    if not option.startswith("-"):
        return f"unexpected argument {option!r}; {parser.prog} --help says what there is"
    name, equals, value = option.partition("=")
    known = [o[2:] for o in parser._option_string_actions if o.startswith("--")]
    # without the dashes, which would make all options look alike
    near = nearest(name.lstrip("-"), known, "--")
    if getattr(module, "OVERRIDES", False):
        head, dot, key = name.partition(".")
        if not (dot and nearest(head, ["--config"]).startswith("did")):
            key = name.lstrip("-").replace("-", "_")
            key = "" if near.startswith("did") else config_key(key, getattr(args, "config", ""))
        if key:
            near = f"did you mean --config.{key}{equals}{value}?"
    return f"unknown option {name!r}; {near}"


def config_key(name: str, where: str) -> str:
    """The shortest key of an experiment's configuration that ends in `name`; '' if none does."""
    from sparse_pretrain import config, sections

    try:
        keys = sections.flat(config.resolve(where).to_dict())
    except ValueError:
        return ""
    found = [key for key in keys if key == name or key.endswith(f".{name}")]
    return min(found, key=len, default="")
