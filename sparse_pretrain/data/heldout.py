"""From raw documents to a train and a held-out split that share no near-duplicates."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparse_pretrain.data import dedup, spool
from sparse_pretrain.data.sources.base import Raw

SHARE = 0.07  # of a domain's bytes to hold out; accepted up to SHARE * (1 + SLACK)
SLACK = 0.15
TAIL = 0.1  # of the characters, where whole clusters are too large (nanoGPT's split)
MOST = 64 << 20  # bytes held out at most, which bounds the memory of the overlap index
REPEATED = 0.3  # of a document's characters in strings shared with train, and it is train instead
GOAL = 0.01  # of held-out characters in strings shared with train, above which lines are removed
LINE = 0.5  # share of a line's characters in shared strings from which the line is removed
LEAST = 32  # characters that a held-out document keeps at least, or it goes


class Text(NamedTuple):
    """A document of one split."""

    domain: str
    name: str
    text: str


@dataclasses.dataclass(slots=True)
class _Document:
    name: str
    domain: str
    slot: int  # in the spool
    size: int  # bytes
    part: int = 0  # of a document cut in parts; parts that stay neighbours are joined again
    tail: int | None = None  # first held-out character, where the end is held out
    heldout: bool = False
    cluster: int = -1


class Split:
    """The two splits of a corpus, and notes on their making for the manifest.

    Where the source names the splits, their texts stay as they are; so do those of a corpus of one
    document, whose last TAIL of characters is held out. Otherwise exact duplicates are dropped,
    whole near-duplicate clusters are held out, and lines that make overlap leave the held-out side.

    Errors: ValueError when there is too little text for both splits, beginning with `source`.
    """

    def __init__(
        self,
        documents: Iterable[Raw],
        folder: Path,
        *,
        source: str = "",
        fold: tuple[str, float] = ("", 0.0),
        tell: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._tell, self._source = tell, source
        self._seen: set[bytes] = set()
        self._dropped = 0
        self.notes: dict[str, Any] = {}
        self.heldout: list[Text] = []
        self._spool = spool.Spool(folder)
        try:
            self._make(documents, fold)
        except BaseException:
            self.close()  # whoever gets the error has no Split to close
            raise

    def _make(self, documents: Iterable[Raw], fold: tuple[str, float]) -> None:
        given = self._load(documents)
        if not self._documents:
            raise ValueError(f"{self._source}the source holds no readable text")
        self.single = len(self._documents) == 1
        if not given:
            self._fold(*fold)
            self._choose()
            self.notes["exact_duplicates_dropped"] = self._dropped
        self.domains = tuple(sorted({d.domain for d in self._documents}))
        self.heldout = list(self._side(heldout=True))
        if not self.heldout or next(self.train(), None) is None:
            names = ", ".join(d.name for d in self._documents[:3])
            raise ValueError(
                f"{self._source}too little text for a train and a held-out split: "
                f"{len(self._documents)} documents ({names}), {self.bytes} bytes"
            )
        self._clean(keep=given or self.single)

    def _add(self, document: _Document, text: str, unique: bool) -> _Document | None:
        """`document` with its `text` spooled; None for a second copy that `unique` forbids."""
        if unique:
            key = hashlib.sha256(text.encode()).digest()[:16]
            if key in self._seen:
                self._dropped += 1
                return None
            self._seen.add(key)
        slot = self._spool.add(text)
        return dataclasses.replace(document, slot=slot, size=self._spool.size(slot))

    def _load(self, documents: Iterable[Raw]) -> bool:
        """Spool the documents; whether the source names their splits."""
        self._documents: list[_Document] = []
        given = False
        size = told = 0
        for raw in documents:
            if not raw.text.strip():
                continue
            given = given or bool(raw.split)
            document = _Document(raw.name, raw.domain, 0, 0, heldout=raw.split == "heldout")
            added = self._add(document, raw.text, unique=not raw.split)
            if added is not None:
                self._documents.append(added)
                size += added.size
            if size - told > 1 << 22:
                told = size
                self._tell(f"reading, {size / 1e6:.1f} MB")
        if given:
            self.notes["split"] = "named by the source"
        return given

    def _fold(self, fold: str, share: float) -> None:
        sizes = _sizes(self._documents)
        small = {d for d in sizes if sizes[d] < share * sum(sizes.values())} - {fold}
        if small:
            for document in self._documents:
                document.domain = fold if document.domain in small else document.domain
            self.notes["domains_folded"] = dict.fromkeys(sorted(small), fold)

    def _choose(self) -> None:
        """Mark what is held out."""
        if self.single:
            self._cut(self._documents)
            self.notes["split"] = f"last {TAIL:.0%} of the characters of the only document"
            return
        self._compare()
        bare = self._pick(set())
        if bare and self._part(bare):
            self.notes["cut_in_parts"] = sorted(bare)
            self._compare()
            bare = self._pick(set())
        repeated = self._repeated()
        if repeated:
            self.notes["clusters_passed_over"] = (
                f"{len(repeated)}, each with a document of which at least {REPEATED:.0%} lies in "
                f"{dedup.WINDOW}-character strings of train"
            )
            bare = self._pick(repeated)
        if bare:
            self._cut([d for d in self._documents if d.domain in bare and not d.heldout])
            self.notes["split_by_tail"] = dict.fromkeys(
                sorted(bare), f"last {TAIL:.0%} of the characters of each document"
            )
        clusters = len({d.cluster for d in self._documents})
        self.notes["split"] = (
            f"near-duplicate clusters (MinHash of {dedup.SHINGLE}-character shingles, estimated "
            f"Jaccard similarity at least {dedup.SIMILAR}) in the order of a hash, {SHARE:.1%} of "
            f"each domain's bytes, at most {MOST} bytes in all"
        )
        self.notes["clusters"] = clusters
        self.notes["near_duplicates"] = len(self._documents) - clusters

    def _compare(self) -> None:
        """Give each document its near-duplicate cluster."""
        self._tell(f"comparing {len(self._documents)} documents")
        found = dedup.clusters(
            np.stack([dedup.signature(self._spool[d.slot]) for d in self._documents])
        )
        for document, cluster in zip(self._documents, found.tolist(), strict=True):
            document.cluster = cluster

    def _pick(self, without: set[int]) -> set[str]:
        """Hold out whole clusters in the order of a hash; the domains where too few fit."""
        members: dict[int, list[_Document]] = {}
        for document in self._documents:
            document.heldout = False
            if document.cluster not in without:
                members.setdefault(document.cluster, []).append(document)
        total = _sizes(self._documents)
        share = min(SHARE, MOST / sum(total.values()))
        taken: Counter[str] = Counter()
        # The name, not the text, decides: a new patch release holds out the same modules.
        for group in sorted(
            members.values(), key=lambda group: hashlib.sha256(group[0].name.encode()).digest()
        ):
            sizes = _sizes(group)
            if all(
                taken[d] < share * total[d]
                and taken[d] + sizes[d] <= share * (1 + SLACK) * total[d]
                for d in sizes
            ):
                taken += sizes
                for document in group:
                    document.heldout = True
        return {d for d in total if taken[d] < 0.5 * share * total[d]}

    def _repeated(self) -> set[int]:
        """Clusters held out whose text train mostly has, though in other documents' company."""
        self._tell("looking for repeats")
        chosen = [d for d in self._documents if d.heldout]
        overlap = dedup.Overlap([self._spool[d.slot] for d in chosen])
        overlap.scan(d.text for d in self.train())
        shares = [float(np.mean(covered)) for covered in overlap.covered()]
        return {d.cluster for d, share in zip(chosen, shares, strict=True) if share >= REPEATED}

    def _part(self, domains: set[str]) -> bool:
        """Cut the long documents of `domains` in parts; whether there were any."""
        documents: list[_Document] = []
        for document in self._documents:
            if document.domain not in domains or document.size < 4 * spool.PART:
                documents.append(document)
                continue
            for number, text in enumerate(spool.parts(self._spool[document.slot]), 1):
                part = dataclasses.replace(document, name=f"{document.name}#{number}", part=number)
                added = self._add(part, text, unique=True) if text.strip() else None
                if added is not None:
                    documents.append(added)
        changed = any(document.part for document in documents)
        self._documents = documents
        return changed

    def _cut(self, documents: list[_Document]) -> None:
        room = MOST // max(1, len(documents))
        for document in documents:
            length = len(self._spool[document.slot])
            document.tail = max(int((1 - TAIL) * length), length - room)

    def _side(self, heldout: bool) -> Iterator[Text]:
        """The documents of one side, neighbouring parts of one document joined."""
        domain = name = ""
        texts: list[str] = []
        last: _Document | None = None
        for d in self._documents:
            if d.heldout != heldout and d.tail is None:
                continue
            text = self._spool[d.slot]
            if d.tail is not None:
                text = text[d.tail :] if heldout else text[: d.tail]
            joins = last is not None and 0 < last.part == d.part - 1 and d.tail == last.tail is None
            if texts and not joins:
                yield Text(domain, name, "".join(texts))
                texts = []
            if not texts:
                domain, name = d.domain, f"{d.name} (tail)" if d.tail and heldout else d.name
            if text.strip():
                texts.append(text)
            last = d
        if texts:
            yield Text(domain, name, "".join(texts))

    def train(self) -> Iterator[Text]:
        """The train documents."""
        return self._side(heldout=False)

    def _clean(self, keep: bool) -> None:
        """Measure the overlap and, unless the texts are to `keep`, remove the lines behind it."""
        before = share = 0.0
        characters = sum(len(d.text) for d in self.heldout)
        for attempt in range(4):
            self._tell("measuring overlap")
            overlap = dedup.Overlap([d.text for d in self.heldout])
            overlap.scan(d.text for d in self.train())
            share = overlap.share()
            before = share if attempt == 0 else before
            if keep or share <= GOAL:
                break
            kept = []
            for document, covered in zip(self.heldout, overlap.covered(), strict=True):
                text = _without(document.text, covered)
                if len(text.strip()) >= LEAST:
                    kept.append(document._replace(text=text))
            if not kept:
                break
            self.heldout = kept
        removed = characters - sum(len(d.text) for d in self.heldout)
        self.notes["overlap_50"] = round(share, 6)
        self.notes["overlap_50_before_removal"] = round(before, 6)
        if removed:
            self.notes["removed"] = (
                f"held-out lines at least {LINE:.0%} inside {dedup.WINDOW}-character strings that "
                f"train has: {removed / characters:.1%} of held-out characters"
            )

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(d.size for d in self._documents)

    def close(self) -> None:
        """Free the disk space of the spooled texts."""
        self._spool.close()


def _sizes(documents: Iterable[_Document]) -> Counter[str]:
    """Bytes by domain."""
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.domain] += document.size
    return sizes


def _without(text: str, covered: np.ndarray) -> str:
    """`text` without the lines of which at least LINE is `covered`."""
    points = dedup.codes(text)
    starts = np.concatenate([[0], np.flatnonzero(points[:-1] == 10) + 1])
    length = np.diff(np.append(starts, len(points)))
    keep = np.add.reduceat(covered.astype(np.int64), starts) < LINE * length
    return points[np.repeat(keep, length)].tobytes().decode("utf-32-le")
