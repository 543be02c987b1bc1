"""Texts kept on disk while a corpus is built, and long ones cut where their content says."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PART = 16 << 10  # characters between two cuts, on average


class Spool:
    """Texts on disk by index, so that a corpus need not fit in memory."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._ends = [0]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, text: str) -> int:
        """Store `text`; its index."""
        data = text.encode()
        self._file.seek(0, 2)
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        return len(self) - 1

    def size(self, i: int) -> int:
        """UTF-8 bytes of text `i`."""
        return self._ends[i + 1] - self._ends[i]

    def __getitem__(self, i: int) -> str:
        self._file.seek(self._ends[i])
        return self._file.read(self.size(i)).decode()

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()


def parts(text: str) -> Iterator[str]:
    """`text` cut at line ends that a hash of the next line chooses, PART characters apart or so.

    Equal passages are cut at equal places wherever they stand, so that a repeated passage gives
    equal parts, which the search for duplicates then finds. A part has at least PART / 2 and at
    most 4 PART characters, but for the last and for single longer lines, which are cut anyhow.
    """
    start = at = 0
    while at < len(text):
        end = text.find("\n", at, at + PART) + 1 or min(at + PART, len(text))
        # One line in PART / (2 * its length): half of PART on average beyond the least half.
        chosen = zlib.crc32(text[at:end].encode()) * PART < (end - at) << 33
        if (chosen and at - start >= PART // 2) or end - start > 4 * PART:
            if at > start:
                yield text[start:at]
                start = at
        at = end
    if start < len(text):
        yield text[start:]
