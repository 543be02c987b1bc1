"""What the arms of the length benchmark share: sizes, timed turns, the peak of the memory.

Standard library and numpy only: the torch arm runs it under another interpreter.
"""

import ctypes
import gc

import peers_common as common

HEADS, HEAD_DIM = 4, 64
WIDTH = HEADS * HEAD_DIM
PASSES = ("forward", "both")  # both: forward and backward


def _status(field):
    """Bytes of a field of this process's status; None off Linux."""
    try:
        with open("/proc/self/status") as lines:
            line = next(x for x in lines if x.startswith(field + ":"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def peak_of(call):
    """(bytes by which the resident memory rose at most during `call()` or None, its result).

    Memory that is free but kept is given back before, or the call would find it there uncounted.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as reset:  # the peak begins again
            reset.write("5")
    except (AttributeError, OSError, TypeError):
        return None, call()
    before = _status("VmRSS")
    value = call()
    peak = _status("VmHWM")
    return (None if None in (before, peak) else max(0, peak - before)), value


def turn(call, calls):
    """Wall and processor seconds of one call, the mean of `calls`."""
    took = common.timed(lambda: [call() for _ in range(calls)] and None)
    return {name: took[name] / calls for name in ("seconds", "cpu_seconds")}


def first_turns(programs):
    """The first call of each program: what it took, and the peak of the memory."""
    first, peak = {}, {}
    for name, call in programs.items():
        peak[name], first[name] = peak_of(lambda call=call: turn(call, 1))
    return {"first": first, "peak": peak}
