"""Near-duplicates and shared strings, by rolling hashes over characters, vectorised in numpy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

WINDOW = 50  # characters of a shared string that count as overlap
SHINGLE = 24  # characters, white space left out, of one MinHash shingle
BINS = 128  # bins of a MinHash signature; standard error of an estimate is at most 0.044
ROWS = 4  # signature bins per locality-sensitive band
SIMILAR = 0.5  # estimated Jaccard similarity from which two documents are near-duplicates

_CHUNK = 1 << 20
_BASE = 0x9E3779B97F4A7C15 | 1
_INVERSE = pow(_BASE, -1, 1 << 64)
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)


def _powers(base: int) -> np.ndarray:
    powers = np.full(_CHUNK + WINDOW, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


class _Tables:
    """Powers of the rolling hash, made on first use: 16 MB that `--help` need not pay for."""

    up: np.ndarray | None = None
    down: np.ndarray | None = None

    @classmethod
    def get(cls) -> tuple[np.ndarray, np.ndarray]:
        if cls.up is None or cls.down is None:
            cls.up, cls.down = _powers(_BASE), _powers(_INVERSE)
        return cls.up, cls.down


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, which spreads every input bit over the whole word."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def codes(text: str) -> np.ndarray:
    """The code points of `text` as uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def rolling(points: np.ndarray, width: int) -> np.ndarray:
    """A 64-bit hash of every run of `width` code points; empty where there are fewer.

    Shapes: uint32[n] -> uint64[max(0, n - width + 1)].
    """
    if len(points) < width:
        return np.zeros(0, np.uint64)
    up, down = _Tables.get()
    parts = []
    for start in range(0, len(points) - width + 1, _CHUNK):
        chunk = points[start : start + _CHUNK + width - 1]
        sums = np.zeros(len(chunk) + 1, np.uint64)
        # The sum of c_i base^i wraps modulo 2^64; the odd base has an inverse there, so that
        # shifting a difference of sums back to exponent 0 loses nothing.
        np.cumsum(_mix(chunk.astype(np.uint64) + np.uint64(1)) * up[: len(chunk)], out=sums[1:])
        parts.append(_mix((sums[width:] - sums[:-width]) * down[: len(chunk) - width + 1]))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def shingles(text: str) -> np.ndarray:
    """Hashes of every run of SHINGLE characters of `text`, its white space left out.

    A text shorter than one shingle is its own only shingle.
    """
    points = codes(text)
    points = points[points > 32]
    return rolling(points, max(1, min(SHINGLE, len(points))))


def signature(text: str) -> np.ndarray:
    """The one-permutation MinHash signature of `text`: agreeing bins estimate Jaccard similarity.

    Shapes: uint64[BINS].
    Source: Li, Owen, Zhang 2012 (one permutation hashing); Shrivastava 2017, Optimal Densification
        for Fast and Accurate Minwise Hashing, Algorithm 1.
    """
    hashes = shingles(text)
    result = np.full(BINS, _EMPTY)
    if not len(hashes):
        return result
    np.minimum.at(result, (hashes % np.uint64(BINS)).astype(np.intp), hashes)
    filled = result != _EMPTY
    empty = np.flatnonzero(~filled)
    attempt = 0
    source = result.copy()
    while len(empty):  # an empty bin takes over a filled one that a hash of (bin, attempt) picks
        attempt += 1
        pick = _mix(empty.astype(np.uint64) * np.uint64(1 << 32) + np.uint64(attempt))
        pick = (pick % np.uint64(BINS)).astype(np.intp)
        good = filled[pick]
        result[empty[good]] = source[pick[good]]
        empty = empty[~good]
    return result


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray | np.float64:
    """Estimated Jaccard similarity of the shingle sets behind two (rows of) signatures."""
    return np.mean(a == b, axis=-1)


class _Union:
    def __init__(self, n: int) -> None:
        self.parent = list(range(n))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        i, j = self.find(i), self.find(j)
        self.parent[max(i, j)] = min(i, j)


def clusters(signatures: np.ndarray, threshold: float = SIMILAR) -> np.ndarray:
    """The near-duplicate cluster of each document, named by the smallest index in it.

    Documents that share a band of ROWS bins are compared with the first and the previous ones of
    that band, so that the work is linear in documents; those at least `threshold` alike are joined.

    Shapes: uint64[n, BINS] -> int64[n].
    """
    n = len(signatures)
    union = _Union(n)
    for band in range(0, BINS, ROWS):
        key = np.zeros(n, np.uint64)
        for row in range(band, band + ROWS):
            key = _mix(key * np.uint64(_BASE) + signatures[:, row])
        order = np.argsort(key, kind="stable")
        key = key[order]
        fresh = np.concatenate([[True], key[1:] != key[:-1]]) if n else np.zeros(0, bool)
        first = np.maximum.accumulate(np.where(fresh, np.arange(n), 0))
        for back in (0, 1, 2, 3):
            at = np.arange(n)
            other = first if back == 0 else np.maximum(at - back, first)
            left, right = order[at[other < at]], order[other[other < at]]
            for start in range(0, len(left), 4096):
                i, j = left[start : start + 4096], right[start : start + 4096]
                alike = similarity(signatures[i], signatures[j]) >= threshold
                for a, b in zip(i[alike].tolist(), j[alike].tolist(), strict=True):
                    union.join(a, b)
    return np.array([union.find(i) for i in range(n)], np.int64)


class Overlap:
    """Which characters of the held-out texts lie in a WINDOW-character string of the train texts.

    Memory: 9 bytes per held-out character and a filter of at most 128 MiB; train texts stream by.
    """

    def __init__(self, heldout: Sequence[str]) -> None:
        self._texts = heldout
        hashes = [rolling(codes(text), WINDOW) for text in heldout]
        found = np.sort(np.concatenate(hashes) if hashes else np.zeros(0, np.uint64))
        # numpy 2.3's own unique builds a hash table here, ten times slower than this sort.
        self._hashes = found[np.concatenate([[True], found[1:] != found[:-1]])[: len(found)]]
        self._found = np.zeros(len(self._hashes), bool)
        bits = min(27, max(16, 4 + len(self._hashes).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[(self._hashes >> self._shift).astype(np.intp)] = True

    def scan(self, train: Iterable[str]) -> None:
        """Note every window of the `train` texts that a held-out text has too."""
        if not len(self._hashes):
            return
        for text in train:
            hashes = rolling(codes(text), WINDOW)
            hashes = hashes[self._filter[(hashes >> self._shift).astype(np.intp)]]
            at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
            self._found[at[self._hashes[at] == hashes]] = True

    def covered(self) -> Iterator[np.ndarray]:
        """For each held-out text, True at the characters inside a shared string."""
        for text in self._texts:
            points = codes(text)
            edges = np.zeros(len(points) + 1, np.int64)
            if len(points) >= WINDOW:
                at = np.searchsorted(self._hashes, rolling(points, WINDOW))
                start = np.flatnonzero(self._found[at])
                edges[start] += 1
                edges[start + WINDOW] -= 1
            yield np.cumsum(edges[:-1]) > 0

    def share(self) -> float:
        """The share of held-out characters inside a shared string."""
        hit = total = 0
        for mask in self.covered():
            hit += int(mask.sum())
            total += len(mask)
        return hit / max(total, 1)
