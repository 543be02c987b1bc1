"""The driver's end of a worker that stays: asks it for one child after the other."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence

from sparse_pretrain.scaling import process
from sparse_pretrain.scaling.children import Child

TRAIN = "sparse_pretrain.commands.train:in_process"
CHILDREN = 100  # of one process; then a new one, lest what leaks adds up


class Resident:
    """A process of `sparse_pretrain.scaling.worker`; `spent` when it should be replaced."""

    def __init__(self, runner: str, cores: Sequence[int], environment: Mapping[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparse_pretrain.scaling.worker", runner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches it once, through us
            env={**os.environ, **environment},
        )
        process.pin(self._process.pid, cores)
        self._left = CHILDREN
        self._read = b""

    @property
    def spent(self) -> bool:
        """Whether it has died or has run its share of children."""
        return self._left == 0 or self._process.poll() is not None

    def run(self, child: Child, asked: process.Asked) -> process.Outcome:
        """Have it run a child; its death is the child's."""
        self._left -= 1
        order = {"arguments": child.arguments(), "workdir": str(child.workdir)}
        order["log"] = str(child.log)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(order) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return process.Outcome(self._process.wait(), "its worker died before it began")
        start = child.log.stat().st_size if child.log.exists() else 0
        answer, asked_before = None, 0
        while answer is None:
            answer = self._line()
            if answer is None and self._process.poll() is not None:
                answer = self._line() or b""  # what it said before it died
            wish = asked()
            if answer is None and wish > asked_before:
                asked_before = wish
                if wish == process.KILL:
                    self._process.kill()
                else:
                    process.interrupt(self._process)
        if not answer:
            self._left = 0
            code = self._process.wait()
            words = process.last_words(child.log, start)
            return process.Outcome(code, words or "its worker ended", lost=code >= 0)
        return process.Outcome(**json.loads(answer))

    def _line(self) -> bytes | None:
        """A line of its answers, None when there is none within a tick."""
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        while b"\n" not in self._read:
            if not select.select([file], [], [], process.TICK)[0]:
                return None
            part = os.read(file, 65536)
            if not part:
                self._process.wait()
                return None
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line

    def close(self) -> None:
        """No more children; it ends by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
