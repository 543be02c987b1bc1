"""The configuration of a run: the top record, its cross-field checks, and files that make one."""

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sparse_pretrain
from sparse_pretrain import attention, optim, routing, sections, spec
from sparse_pretrain import phases as phased
from sparse_pretrain.checkpoint import Config as CheckpointConfig
from sparse_pretrain.data import Config as DataConfig
from sparse_pretrain.games import mixtures, shapley
from sparse_pretrain.model import ffn, lm, residual
from sparse_pretrain.optim import schedules
from sparse_pretrain.sharding import apply, offload, plans
from sparse_pretrain.sharding import mesh as meshes
from sparse_pretrain.sharding.placement import Config as PlacementConfig

SINKS = ("jsonl", "tensorboard", "wandb", "mlflow", "trackio")
DEFAULT = "quickstart.py"
DISTRIBUTION = "sparse-pretrain"


def not_negative(config: spec.Config, *names: str) -> None:
    """ValueError naming the first of `names` that is below zero."""
    for name in names:
        value = getattr(config, name)
        spec.require(value >= 0, f"{name}: must be 0 or more, got {value}")


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """ValueError unless `value` is known."""
    ok = value in known
    spec.require(ok, f"{name}: unknown value {value!r}; {sections.nearest(value, known)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(spec.Config):
    """When the held-out text is scored, and how much of it.

    Units: `every` steps, 0 for the end of the run only; `tokens` targets, 0 for all; `between` as
    many in the evaluations before the last, 0 for `tokens`. The last then scores both, so that the
    curve and the best checkpoint are of one set of targets.
    """

    every: int = 0
    tokens: int = 0
    between: int = 0

    def __post_init__(self):
        not_negative(self, "every", "tokens", "between")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(spec.Config):
    """Which sinks a run writes to; `every` thins the services, `metrics.jsonl` keeps every step.

    Units: `every` steps.
    """

    every: int = 1
    sinks: tuple[str, ...] = ("jsonl",)

    def __post_init__(self):
        spec.positive(self, "every")
        for i, sink in enumerate(self.sinks):
            one_of(f"sinks[{i}]", sink, SINKS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(spec.Config):
    """The text written at the end of a run; `tokens=0` writes none, `temperature=0` is greedy."""

    prompt: str = "def "
    tokens: int = 96
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self):
        not_negative(self, "tokens", "temperature")
        spec.require(0 < self.top_p <= 1, f"top_p: must be in (0, 1], got {self.top_p}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(spec.Config):
    """Everything that decides a run.

    Units: `steps` optimizer steps, 0 to derive them from `tokens`; `tokens` training targets, 0
    for one epoch of the data; `accumulate` micro-batches per step; `ema` decay per step of the
    averaged weights, 0 for none; `plan` and `mesh` (such as fsdp=2,expert=4) how the run is spread
    over devices, see `sharding.plans`, or plan=auto; `exchange` how tokens travel to experts, auto,
    padded or ragged, `context` how keys reach the parts of a row, auto, gather or ring, `pipeline`
    how stages take turns, see `sharding.ticks`; `offload` what waits in the host's memory, none or
    optimizer; `init_from` a workdir the run starts from the weights of, with @best or @STEP.
    """

    name: str
    seed: int = 0
    steps: int = 0
    tokens: int = 0
    accumulate: int = 1
    ema: float = 0.0
    plan: str = "single"
    mesh: str = ""
    pipeline: str = "auto"
    exchange: str = "auto"
    context: str = "auto"
    offload: str = "none"
    init_from: str = ""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: lm.Config
    optim: spec.Config
    schedule: schedules.Config = dataclasses.field(default_factory=schedules.Config)
    phases: Mapping[str, phased.Phase] = dataclasses.field(default_factory=dict)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    placement: PlacementConfig = PlacementConfig()
    credit: shapley.Config = shapley.Config()

    def __post_init__(self):
        ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) is not None
        rule = "up to 100 letters, digits, '.', '_' and '-'"
        spec.require(ok, f"name: must be {rule}, got {self.name[:120]!r}")
        not_negative(self, "seed", "steps", "tokens")
        spec.require(self.seed < 2**32, f"seed: must be below 2**32, got {self.seed}")
        spec.positive(self, "accumulate")
        spec.require(0 <= self.ema < 1, f"ema: must be in [0, 1), got {self.ema}")
        plans.find("single" if self.plan == plans.AUTO else self.plan)
        for field, known in (apply.CHOICES | {"offload": offload.KINDS}).items():
            one_of(field, getattr(self, field), known)
        products, where = self.model.precision.products, "runs on one device, under plan=single"
        ok = products == "model" or self.plan == "single"
        spec.require(ok, f"model.precision.products: {products} {where}; got plan {self.plan}")
        self.credit.check(self.plan, self.data.mixture.KIND, self.model.blocks)
        meshes.parse(self.mesh)
        spec.require(
            self.data.batch % self.accumulate == 0,
            f"accumulate: {self.accumulate} does not divide data.batch {self.data.batch}",
        )
        spec.require(
            self.tokens_per_step < 2**31,
            f"data.batch: {self.data.batch} rows of seq {self.data.seq} are {self.tokens_per_step} "
            "tokens, a step holds fewer than 2**31",
        )
        self._check_blocks()
        self._check_placement()
        if steps := self.steps_of(0):
            self.check_schedule(steps)

    @property
    def tokens_per_step(self) -> int:
        """Targets of one optimizer step over all processes."""
        return self.data.batch * self.data.seq

    def steps_of(self, train_tokens: int) -> int:
        """Optimizer steps over data whose epoch holds `train_tokens`; 0 while nothing says."""
        per_step = self.tokens_per_step
        if self.steps and self.tokens:
            planned = self.steps * per_step
            spec.require(
                0 <= planned - self.tokens < per_step,
                f"tokens: {self.tokens} disagrees with steps {self.steps} of {per_step} tokens, "
                f"{planned} in all; set one of the two to 0",
            )
        if self.steps or self.tokens:
            return self.steps or math.ceil(self.tokens / per_step)
        return train_tokens // per_step

    def check_schedule(self, steps: int) -> None:
        """ValueError with both numbers when schedule or phases do not fit a run of `steps`."""
        learned = phased.learning(self.stages(steps))
        per_step = self.tokens_per_step
        try:
            schedules.make(
                self.schedule, peak=1.0, total_tokens=learned * per_step, tokens_per_step=per_step
            )
        except ValueError as e:
            raise ValueError(f"schedule.{e}") from None

    def _check_placement(self) -> None:
        if not self.placement.every:
            return
        parts = {n: b.ffn for n, b in self.model.blocks.items() if getattr(b.ffn, "copies", 0)}
        spec.require(
            bool(parts),
            f"placement.every: {self.placement.every} moves copies of experts, and no block has "
            "ffn.copies above 0",
        )
        for name, section in parts.items():
            try:
                self.placement.check(section.experts, section.experts + section.copies)
            except ValueError as e:
                raise ValueError(f"placement: {e} (model.blocks.{name}.ffn)") from None

    def _check_blocks(self) -> None:
        model, seq = self.model, self.data.seq
        for name, block in model.blocks.items():
            path = f"model.blocks.{name}.attention"
            phased.check_attention(block.attention, path, model.width, seq, "data.seq")
        phased.check(self.phases, model, seq)

    def stages(self, steps: int) -> tuple[phased.Stage, ...]:
        """What a run of `steps` trains, one phase after the other; one stage without phases."""
        per_step = self.tokens_per_step
        return phased.stages(
            self.phases, self.model, self.data.seq, steps=steps, tokens_per_step=per_step
        )


class _Schema(sections.Schema):
    def fill(self, values: Any) -> dict[str, Any]:
        return super().fill(phased.inherit(self, sections.as_mapping(values, self.name)))


SCHEMA = _Schema(
    Experiment,
    {"attention": attention.TABLE, "ffn": ffn.TABLE, "router": routing.TABLE,
     "residual": residual.TABLE, "optim": optim.TABLE, "mixture": mixtures.TABLE},
)  # fmt: skip


def from_config_dict(values: Any) -> Experiment:
    """The Experiment that nested plain data (or a ConfigDict) describes.

    Errors: ValueError naming the full key, what was expected and the value.
    """
    return SCHEMA.build(values)


def defaults(values: Any) -> dict[str, Any]:
    """`values` with every default filled in, each section's by its kind.

    Errors: ValueError for an unknown key or kind, naming it and the nearest known one.
    """
    return SCHEMA.fill(values)


class Run(NamedTuple):
    """How long a run is. Units: `tokens` training targets in `steps` steps."""

    steps: int
    tokens: int
    tokens_per_step: int


def complete(experiment: Experiment, *, vocab: int, train_tokens: int) -> tuple[Experiment, Run]:
    """The experiment with the data's vocabulary filled in, and how long its run is.

    Errors: ValueError with both numbers when the data's vocabulary is not the model's, or the data
    holds fewer tokens than the run needs and may not be repeated.
    """
    source, model = experiment.data, experiment.model
    spec.require(
        model.vocab in (0, vocab),
        f"config.model.vocab: {model.vocab}, but the vocabulary of tokenizer "
        f"{source.tokenizer!r} is {vocab}",
    )
    spec.require(
        experiment.steps_of(0) > 0 or train_tokens <= sections.LARGEST,
        f"config.steps: {source.source!r} never ends; set config.steps or config.tokens",
    )
    steps, per_step = experiment.steps_of(train_tokens), experiment.tokens_per_step
    held = f"{source.source!r} holds {train_tokens} training tokens"
    spec.require(
        steps > 0,
        f"config.data.batch: one step of {source.batch} x {source.seq} is {per_step} tokens, but "
        f"{held}",
    )
    spec.require(
        source.repeat or source.pack == "random_crop" or steps * per_step <= train_tokens,
        f"config.{'steps' if experiment.steps else 'tokens'}: {steps} steps of {per_step} are "
        f"{steps * per_step} tokens, but {held}; train less, or set config.data.repeat=true",
    )
    try:
        experiment.check_schedule(steps)
    except ValueError as e:
        raise ValueError(f"config.{e}") from None
    model = dataclasses.replace(model, vocab=vocab)
    return dataclasses.replace(experiment, model=model), Run(steps, steps * per_step, per_step)


# --- files ---------------------------------------------------------------------------------------


def resolve(where: str = "", overrides: Sequence[str] = ()) -> Experiment:
    """The Experiment of `FILE[:arg]` (a path, or the name of one that ships; '' is quickstart).

    `overrides` are `x.y=text` pairs, set after the file's defaults are filled in. A length given
    there, `steps` or `tokens`, replaces the file's, however the file gives it.
    Errors: ValueError naming the file or the key.
    """
    path, arg = locate(where)
    values = load(path, arg)
    values.setdefault("name", path.stem)
    given = {text.partition("=")[0] for text in overrides}
    lengths = {"steps", "tokens"}
    if len(lengths & given) == 1:
        values |= dict.fromkeys(lengths - given, 0)
    return from_config_dict(SCHEMA.override(values, overrides))


def experiment_dirs() -> list[Path]:
    """Where shipped experiments are: beside the package in a checkout, else as installed data."""
    beside = Path(sparse_pretrain.__file__).resolve().parent.parent / "experiments"
    found = [beside] if (beside / DEFAULT).exists() else []
    for distribution in importlib.metadata.distributions(name=DISTRIBUTION):
        for file in distribution.files or []:
            if file.parts[-2:] == ("experiments", DEFAULT):
                found.append(Path(str(file.locate())).resolve().parent)
    return found


def locate(where: str) -> tuple[Path, str]:
    """(the file, its argument) of `FILE[:arg]`; a bare name is looked up among shipped experiments.

    Errors: ValueError naming the file, and one that exists with nearly its name.
    """
    where = where or DEFAULT
    name, arg = where, ""
    if not Path(where).exists():
        head, marker, tail = where.partition(".py:")
        name, arg = (head + ".py", tail) if marker else (where, "")
        if not marker and ":" in where:
            name, _, arg = where.partition(":")
    path = Path(name).expanduser()
    spec.require(not path.is_dir(), f"--config: {name!r} is a folder, not an experiment file")
    if path.is_file():
        return path, arg
    shipped: dict[str, Path] = {}
    for folder in reversed(experiment_dirs()):
        for file in sorted(folder.rglob("*.py")):
            if "def get_config" in file.read_text(encoding="utf-8"):
                shipped[file.relative_to(folder).as_posix()] = file
    short = name.removeprefix("experiments/").removesuffix(".py") + ".py"
    if short not in shipped:
        near = sections.nearest(short, shipped)
        raise ValueError(f"--config: there is no file {name!r}; {near}")
    return shipped[short], arg


def load(path: Path, arg: str = "") -> dict[str, Any]:
    """What the file's `get_config(arg)` returns, as a nested dict.

    Errors: ValueError of one line with the file's name, and the line that failed.
    """
    try:
        source = importlib.util.spec_from_file_location(f"_experiment_{path.stem}", path)
        if source is None or source.loader is None:
            raise ValueError("is not a Python file")
        module = importlib.util.module_from_spec(source)
        sys.modules[source.name] = module  # dataclasses in the file look themselves up here
        source.loader.exec_module(module)
        get: Any = getattr(module, "get_config", None)
        spec.require(callable(get), "has no function get_config(arg)")
        takes = len(inspect.signature(get).parameters) > 0
        spec.require(takes or not arg, f"get_config takes no argument, got {arg!r}")
        values = get(arg) if takes and (arg or _required(get)) else get()
        return dict(sections.as_mapping(values, "get_config"))
    except Exception as e:  # the file is the user's own code: anything can come out of it
        raise ValueError(f"{path}{_line(e, path)}: {_reason(e)}") from e


def declared(where: str, name: str, default: Any) -> Any:
    """What an experiment's file says beside its configuration, such as PRECISION.

    Errors: ValueError as of `load`.
    """
    path, arg = locate(where)
    load(path, arg)
    return getattr(sys.modules[f"_experiment_{path.stem}"], name, default)


def _required(function: Any) -> bool:
    first = next(iter(inspect.signature(function).parameters.values()))
    return first.default is inspect.Parameter.empty


def _line(error: BaseException, path: Path) -> str:
    """', line N' of the experiment file, where the error passed through it."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename) == path]
    return f", line {lines[-1]}" if lines else ""


def _reason(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(str(text).split())
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"
