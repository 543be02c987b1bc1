"""Training rows drawn domain by domain, by weights that a game decides while training goes on.

Each domain's documents are packed on their own, as `pack` packs a corpus, so nothing is dropped;
row n of the run is the next row of the domain that is drawn for it. The draw is a function of
(seed, n, weights in force), and the weights decided when step t has been told are in force from
step t + lag on. The lag is larger than what is made ahead of the step, so rows do not depend on how
fast a host or a device is. The cursor holds the game, n, how many rows each domain has given, and
the weights of the `lag` steps to come: a resumed run draws the same rows.

A domain whose rows have all been given drops out, and the others share its draws, unless the data
repeats: then it starts over, in another order.
"""

from __future__ import annotations

import bisect
import collections
import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparse_pretrain.data import AHEAD, draws, pipeline
from sparse_pretrain.games import mixtures
from sparse_pretrain.shapes import FIELDS, Batch

UNITS = 1 << 24  # weights as whole numbers of these: draws are exact, and the same everywhere


class Mixed(pipeline.Dataset):
    """A corpus whose training rows are drawn by domain; held out it is as without a mixture."""

    def __init__(self, whole: pipeline.TextDataset):
        super().__init__(whole.config, seed=whole.seed, share=whole.share)
        self.tokenizer, self.domains = whole.tokenizer, whole.domains
        self.manifest, self._whole = whole.manifest, whole
        self.mixture: Any = whole.config.mixture
        try:
            self.weights = mixtures.weights(self.mixture, self.domains)
        except ValueError as e:
            raise ValueError(f"data.mixture.{e}") from None
        self._parts = [whole.part(k, self._seed(k)) for k in range(len(self.domains))]
        used = [part for part, w in zip(self._parts, self.weights, strict=True) if w]
        self.train_tokens = sum(part.train_tokens for part in used)
        if not self.train_tokens:
            raise ValueError("data.mixture.weights: no domain with a weight has training text")

    def _seed(self, k: int) -> int:
        """That of a domain's own order; the first one's is the run's, as of a corpus of one."""
        return int(draws.draw(self.seed, pipeline.DOMAINS, k)) if k else self.seed

    @property
    def learns(self) -> bool:
        """Whether a game moves the weights."""
        return self.mixture.KIND != "fixed"

    @functools.cached_property
    def limits(self) -> list[int]:
        """How many rows each domain can give."""
        known = [part.total_rows() if part.train_tokens else 0 for part in self._parts]
        return [pipeline.ENDLESS if rows is None else rows for rows in known]

    def total_rows(self) -> int | None:
        if self.config.repeat:
            return None
        rows = zip(self.limits, self.weights, strict=True)
        return sum(limit for limit, weight in rows if weight)

    def rows_of(self, domain_B: np.ndarray, index_B: np.ndarray) -> Batch:
        """Row `index` of each row's domain; padding where the domain is -1."""
        places, found = [], []
        for k in np.unique(domain_B):
            place = np.flatnonzero(domain_B == k)
            places.append(place)
            if k < 0:
                found.append(_padding(len(place), self.config.seq))
            else:
                found.append(self._parts[k].train_rows(index_B[place]))
        back = np.argsort(np.concatenate(places))
        fields = zip(*(batch.fields for batch in found), strict=True)
        return Batch(*(np.concatenate(field)[back] for field in fields))

    def heldout(self, limit_tokens: int | None = None) -> Iterator[Batch]:
        return map(self.carried, self._whole.heldout(limit_tokens))

    def train(self, cursor: dict[str, Any] | None = None) -> MixedIterator:
        return MixedIterator(self, cursor)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"domains": list(self.domains)}

    def reference(self) -> np.ndarray | None:
        """Held-out nats per token of each domain in the run that the game compares with.

        Errors: ValueError naming the folder, when it holds no finished run of this text.
        """
        where = getattr(self.mixture, "reference", "")
        if not where:
            return None
        named = f"data.mixture.reference: {where!r}"
        try:
            home = Path(where).expanduser()
            summary = json.loads((home / "summary.json").read_text(encoding="utf-8"))
            manifest = json.loads((home / "run.json").read_text(encoding="utf-8"))["manifest"]
            losses = {k: float(v["nats_per_token"]) for k, v in summary["per_domain"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{named} holds no finished run") from None
        for key in ("hash", "tokenizer_hash"):
            then, now = manifest.get(key), self.manifest[key]
            if then != now:
                raise ValueError(f"{named} is of other text: its {key} is {then}, here it is {now}")
        for name in self.domains:
            if name not in losses:
                raise ValueError(f"{named} has scored no text of domain {name!r}")
        return np.array([losses[name] for name in self.domains])


def _padding(rows: int, seq: int) -> Batch:
    kinds = {"weights": np.float32}
    return Batch(*(np.zeros((rows, seq), kinds.get(f, np.int32)) for f in FIELDS))


class _Place(NamedTuple):
    """Where training stands: steps drawn, rows drawn, and rows that each domain has given."""

    step: int
    rows: int
    used: tuple[int, ...]


class MixedIterator(pipeline.TrainIterator):
    """Training batches of one process, and the game that is told of them.

    For every step in turn `learn` must be told its sums before the batch two steps later is asked
    for, as the loop does.
    """

    dataset: Mixed
    _game: mixtures.State
    _told: int  # steps
    _weights: collections.deque[list[int]]  # of step told + 1 and those after it

    def __init__(self, dataset: Mixed, cursor: dict[str, Any] | None = None, *, ahead: int = AHEAD):
        self.dataset, self.ahead = dataset, ahead
        self._pool = futures.ThreadPoolExecutor(1)
        if cursor is not None:
            self.set_state(cursor)
            return
        game = mixtures.start(dataset.weights, dataset.reference())
        steps = dataset.mixture.lag if dataset.learns else 1
        self._begin(_Place(0, 0, (0,) * len(dataset.domains)), game, 0, steps * [_units(game)])

    def __next__(self) -> Batch:
        while len(self._made) <= self.ahead and self._draw():
            pass
        if not self._made:
            raise StopIteration
        self._handed, batch = self._made.popleft()
        return batch.result()

    def learn(
        self, nats_K: np.ndarray, tokens_K: np.ndarray, worth: Mapping[str, float] | None = None
    ) -> dict[str, dict[str, float]]:
        """Tells the game the sums of the next step not told; what it says of it, by domain.

        `worth` is the credit per target of each domain that the step held, if it was measured.

        `mixture`: the weights that the step's rows were drawn by; `domain_loss`: nats per target,
        NaN where the batch held none.
        """
        dataset, names = self.dataset, self.dataset.domains
        units = np.array(self._weights[0], np.float64)
        played = units / units.sum()
        nats_K, tokens_K = (np.asarray(x, np.float64) for x in (nats_K, tokens_K))
        worth_K = None
        if worth is not None:
            worth_K = np.array([worth.get(name, np.nan) for name in names])
        self._game = mixtures.update(
            dataset.mixture, self._game, nats_K, tokens_K, played, worth_K
        )
        self._told += 1
        self._weights.append(_units(self._game))
        self._weights.popleft()
        loss = np.where(tokens_K > 0, nats_K / np.maximum(tokens_K, 1), np.nan)
        pairs = {"mixture": played, "domain_loss": loss}
        return {k: dict(zip(names, v.tolist(), strict=True)) for k, v in pairs.items()}

    @property
    def mean_weights(self) -> dict[str, float]:
        """The mean over all decisions: what DoReMi trains the large model by."""
        return dict(zip(self.dataset.domains, self._game.mean.tolist(), strict=True))

    def get_state(self) -> dict[str, Any]:
        mixture = {
            "step": self._handed.step,
            "used": list(self._handed.used),
            "told": self._told,
            "weights": list(self._weights),
            "game": mixtures.to_plain(self._game),
        }
        return {"rows": self._handed.rows, **self.dataset.identity(), "mixture": mixture}

    def set_state(self, state: dict[str, Any]) -> None:
        self._check(state)
        kept = state["mixture"]
        place = _Place(kept["step"], state["rows"], tuple(kept["used"]))
        self._begin(place, mixtures.from_plain(kept["game"]), kept["told"], kept["weights"])

    def _begin(self, place: _Place, game: mixtures.State, told: int, weights: list) -> None:
        self._handed = self._drawn = place
        self._game, self._told = game, told
        self._weights = collections.deque(weights)
        self._made: collections.deque[tuple[_Place, futures.Future[Batch]]] = collections.deque()

    def _draw(self) -> bool:
        """Draws one more batch and has it made; False when the data has ended."""
        dataset, before, size = self.dataset, self._drawn, self.dataset.config.batch
        later = before.step - self._told if dataset.learns else 0
        assert later < len(self._weights), f"step {before.step + 1} is drawn, {self._told} are told"
        weights = self._weights[later]
        domain, index, used = _drawn(dataset.seed, before, size, weights, dataset.limits)
        if domain[0] < 0:
            return False
        self._drawn = _Place(before.step + 1, before.rows + size, used)
        mine = slice(dataset._start, dataset._start + dataset.local_batch)
        made = self._pool.submit(
            lambda d, i: dataset.carried(dataset.rows_of(d, i)), domain[mine], index[mine]
        )
        self._made.append((self._drawn, made))
        return True


def _units(game: mixtures.State) -> list[int]:
    """The game's weights as whole numbers, none of a weight above 0 lost."""
    whole = np.rint(game.weight * UNITS).astype(np.int64)
    return np.maximum(whole, game.weight > 0).tolist()


def _drawn(
    seed: int, place: _Place, size: int, units: list[int], limits: list[int]
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """(domain, row of that domain) of the next `size` rows, and the rows given by then.

    The domain is -1 when there is no row left.
    """
    used, domains, indices = list(place.used), [], []

    def ends() -> list[int]:
        return list(
            itertools.accumulate(
                u if n < most else 0 for u, n, most in zip(units, used, limits, strict=True)
            )
        )

    bits = draws.draw(seed, pipeline.DOMAINS, 0, place.rows + np.arange(size))
    bounds = ends()
    for bit in bits.tolist():
        if not bounds[-1]:
            domains.append(-1)
            indices.append(0)
            continue
        k = bisect.bisect_right(bounds, bit % bounds[-1])
        domains.append(k)
        indices.append(used[k])
        used[k] += 1
        if used[k] == limits[k]:
            bounds = ends()
    return np.array(domains), np.array(indices), tuple(used)
