"""What one chip runs in a step, counted in the text of its optimised program.

The compilers' own counts take a loop's body once, and NVIDIA's says 0 for products in its kernels.
Here products are counted wherever they stand, loops by their trips.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute",
)  # fmt: skip
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


class Shape(NamedTuple):
    """An array's element type and sizes."""

    kind: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        bits = _BITS.get(self.kind)
        if bits is None:
            bits = int((re.findall(r"\d+", self.kind) or ["8"])[0])
        return math.prod(self.sizes) * bits // 8


@dataclasses.dataclass
class Op:
    """One instruction: `type` and `rest` as printed, `rest` what follows its operands."""

    name: str
    type: str
    code: str
    operands: list[str]
    rest: str

    def called(self, key: str) -> list[str]:
        """Computations that an attribute names."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", found[1]) if found else []

    @property
    def result(self) -> Shape:
        """Its first array."""
        return next(_arrays(self.type))


@dataclasses.dataclass
class Counted:
    """What runs in a step. `flops` of products, a multiply-add as 2; `collectives` kind -> how
    often each runs, and the bytes of its results over all its runs.

    `open_loops` are the loops with products whose trips only the data decides, counted as one trip;
    `kernels` the calls of a kernel in which nothing can be counted, and that states no FLOPs.
    """

    flops: float = 0.0
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    open_loops: int = 0
    kernels: int = 0

    def add(self, other: "Counted", times: int = 1) -> None:
        """Puts another's counts to its own, run so many times."""
        self.flops += times * other.flops
        self.open_loops += other.open_loops
        self.kernels += other.kernels
        for kind, row in other.collectives.items():
            mine = self.collectives.setdefault(kind, {"count": 0, "bytes": 0})
            for key, n in row.items():
                mine[key] += times * n


def count(text: str) -> Counted:
    """All that the program's entry runs.

    Of a choice the branch with most FLOPs is taken: even loads, where experts have them.
    Errors: ValueError when the text has no entry.
    """
    program, entry = _parsed(text)
    if not entry:
        raise ValueError("hlo: the program's text has no ENTRY")
    return _Walk(program).of(entry)


class _Walk:
    """Counts each computation once, and adds it where it is called."""

    def __init__(self, program: dict[str, dict[str, Op]]):
        self.program = program
        self._known: dict[str, Counted] = {}

    def of(self, name: str) -> Counted:
        """What one run of a computation does."""
        if name not in self._known:
            total = Counted()
            for op in self.program.get(name, {}).values():
                self._op(op, name, total)
            self._known[name] = total
        return self._known[name]

    def _op(self, op: Op, inside: str, total: Counted) -> None:
        code, ops = op.code, self.program[inside]
        kind = code.removesuffix("-start")
        if kind in COLLECTIVES:
            row = {"count": 1, "bytes": _received(op, code)}
            total.add(Counted(collectives={kind: row}))
        elif code in ("dot", "scaled-dot"):
            inner = [ops[op.operands[0]].result.sizes[d] for d in _dims(op, "lhs_contracting_dims")]
            total.flops += 2.0 * math.prod(op.result.sizes) * math.prod(inner)
        elif code == "convolution":
            total.flops += _convolution(op, *(ops[n].result.sizes for n in op.operands[:2]))
        elif code == "custom-call":
            said = _kernel(op, ops)
            total.kernels += said is None
            total.flops += said or 0.0
        elif code == "while":
            (body,) = op.called("body")
            trips = self._trips(op, inside)
            found = self.of(body)
            total.add(found, 1 if trips is None else trips)
            total.open_loops += trips is None and found.flops > 0
        elif code == "conditional":
            branches = [c for key in ("branch_computations", "true_computation",
                                      "false_computation") for c in op.called(key)]  # fmt: skip
            total.add(max(map(self.of, branches), key=lambda c: c.flops))
        elif code in ("fusion", "call", "async-start"):
            for name in (*op.called("calls"), *op.called("to_apply")):
                total.add(self.of(name))

    def _trips(self, op: Op, inside: str) -> int | None:
        """How often a loop runs: as the compiler notes it, else from its condition."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest)
        if noted:
            return int(noted[1])
        (condition,), (body,) = op.called("condition"), op.called("body")
        test = _root(self.program[condition])
        if test.code != "compare" or "direction=LT" not in test.rest:
            return None
        counter, limit = (self.program[condition][n] for n in test.operands)
        if counter.code != "get-tuple-element":
            return None
        at = _index(counter)
        first, last = self._start(op, inside, at), self._constant(limit)
        if last is None and limit.code == "get-tuple-element":
            j = _index(limit)
            last = self._start(op, inside, j) if self._kept(body, j) else None
        step = self._step(body, at)
        if first is None or last is None or not step:
            return None
        return max(-(-(last - first) // step), 0)

    def _start(self, op: Op, inside: str, at: int) -> int | None:
        """The constant with which a loop's variable starts."""
        ops = self.program[inside]
        state = ops[op.operands[0]]
        return self._constant(ops[state.operands[at]], ops) if state.code == "tuple" else None

    def _constant(self, op: Op, ops: dict[str, Op] | None = None) -> int | None:
        while ops and op.code in ("copy", "bitcast") and op.operands:
            op = ops[op.operands[0]]
        if op.code != "constant":
            return None
        value = re.match(r"-?\d+$", op.operands[0]) if op.operands else None
        return int(value[0]) if value else None

    def _next(self, body: str, at: int) -> Op | None:
        ops = self.program[body]
        root = _root(ops)
        return ops.get(root.operands[at]) if root.code == "tuple" else None

    def _kept(self, body: str, at: int) -> bool:
        """Whether a loop leaves one of its variables as it is."""
        found = self._next(body, at)
        return found is not None and found.code == "get-tuple-element" and _index(found) == at

    def _step(self, body: str, at: int) -> int | None:
        """By how much a loop's counter grows, through a fusion of that one sum too."""
        found, ops = self._next(body, at), self.program[body]
        if found is not None and found.code == "fusion":
            (inner,) = found.called("calls")
            ops = self.program[inner]
            found = _root(ops)
        if found is None or found.code != "add":
            return None
        steps = [self._constant(ops[n], ops) for n in found.operands]
        return next((s for s in steps if s is not None), None)


# --- the text


def _parsed(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    """(computation -> its instructions, the entry's name)."""
    program: dict[str, dict[str, Op]] = {}
    entry, now = "", {}
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            now = program[head[2]] = {}
            entry = head[2] if head[1] else entry
            continue
        named = _NAMED.match(line)
        if named:
            op = _instruction(named[2], named[3])
            if op:
                now[op.name] = op
                if named[1]:
                    now[""] = op  # the root, which _root finds
    for ops in program.values():
        root = ops.pop("", None)
        if root:  # last, as the scheduler leaves it
            ops[root.name] = ops.pop(root.name)
    return program, entry


def _root(ops: dict[str, Op]) -> Op:
    return ops[next(reversed(ops))]


def _instruction(name: str, text: str) -> Op | None:
    type_, rest = _balanced(text) if text.startswith("(") else text.split(" ", 1)
    found = re.match(r"\s*([\w\-]+)\(", rest)
    if not found:
        return None
    inside, after = _balanced(rest[found.end() - 1 :])
    inside = inside[1:-1]
    operands = re.findall(r"%([\w.\-]+)", inside)
    if found[1] in ("constant", "parameter"):
        operands = [inside]
    return Op(name, type_, found[1], operands, after)


def _balanced(text: str) -> tuple[str, str]:
    """(the parentheses at the start with what is in them, the rest)."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _arrays(type_: str) -> Iterator[Shape]:
    for kind, sizes in _ARRAY.findall(type_):
        yield Shape(kind, tuple(int(n) for n in sizes.split(",") if n))


def _index(op: Op) -> int:
    found = re.search(r"\bindex=(\d+)", op.rest)
    assert found, op
    return int(found[1])


def _dims(op: Op, key: str) -> list[int]:
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", op.rest)
    return [int(n) for n in found[1].split(",") if n] if found else []


# --- what an instruction does


def _received(op: Op, code: str) -> int:
    """Bytes of a collective's results; some that are started hold their operands beside them."""
    type_ = op.type
    if code in ("all-gather-start", "collective-permute-start", "reduce-scatter-start"):
        parts = _split(type_[1:-1])
        type_ = parts[1]
    return sum(a.bytes for a in _arrays(type_))


def _split(text: str) -> list[str]:
    """Parts of a tuple type, at commas outside all brackets."""
    out, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            out.append("")
        else:
            out[-1] += c
    return out


def _kernel(op: Op, ops: dict[str, Op]) -> float | None:
    """FLOPs of a call: a product of cuBLAS, or what a kernel says of itself; None if neither.

    Calls that only allocate or annotate have no FLOPs.
    """
    target = re.search(r'custom_call_target="([^"]*)"', op.rest)
    name = target[1] if target else ""
    if "cublas" in name:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.rest)
        sizes = ops[op.operands[0]].result.sizes
        inner = [sizes[int(n)] for n in re.findall(r"\d+", found[1])] if found else []
        return 2.0 * math.prod(op.result.sizes) * math.prod(inner)
    if not re.search(r"tpu_custom_call|mosaic|triton|cudnn", name):
        return 0.0
    said = re.search(r'"cost_estimate":(\{[^}]*\})', op.rest)
    flops = json.loads(said[1]).get("flops") if said else None
    return None if flops is None else float(flops)


def _convolution(op: Op, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """FLOPs of a convolution, as TPU products are written: only of positions that hold numbers."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    assert labels, op
    window = re.search(r"window=\{([^}]*)\}", op.rest)
    fields: dict[str, str] = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(c for c in labels[1] if c.isdigit())
    total = 2.0
    for i, c in enumerate(spatial):
        n, k = lhs[labels[1].index(c)], rhs[labels[2].index(c)]
        m = op.result.sizes[labels[3].index(c)]

        def at(key: str, default: str, i: int = i) -> str:
            return fields[key].split("x")[i] if key in fields else default

        low = int(at("pad", "0_0").split("_")[0])
        total *= _meet(
            n, k, m, low, int(at("stride", "1")), int(at("lhs_dilate", "1")),
            int(at("rhs_dilate", "1")),
        )  # fmt: skip
    out = dict(zip(labels[3], op.result.sizes, strict=True))
    return total * out["b"] * out["f"] * rhs[labels[2].index("i")]


@functools.cache
def _meet(n: int, k: int, out: int, low: int, stride: int, spread: int, holes: int) -> int:
    """How many pairs of a result's and a kernel's position read one of n numbers."""
    place = np.arange(out)[:, None] * stride - low + np.arange(k) * holes
    return int(np.sum((place >= 0) & (place % spread == 0) & (place < n * spread)))
