"""What to try next after a run: each suggestion says what was seen, and the command that acts."""

import math
import shlex
from typing import Any, NamedTuple

import numpy as np

from sparse_pretrain.report.charts import numbers, smooth
from sparse_pretrain.report.workdir import Run, dotted
from sparse_pretrain.training.progress import si

CHINCHILLA = 20  # tokens per parameter at the optimum: Hoffmann et al. 2022, table 3


_ALIASES = {"steps": "tokens", "data.source": "data"}


class Suggestion(NamedTuple):
    """`why` states what the run shows; `command` can be pasted into a shell, or is empty."""

    why: str
    command: str


def _train(run: Run, suffix: str, **overrides: Any) -> str:
    """The command of this run with other values, in a workdir beside it; '' if it was not train."""
    argv = [str(a) for a in run.run.get("argv") or []]
    if "train" not in argv:
        return ""
    # What says the same thing another way must go too.
    drop = {"workdir", *overrides, *(_ALIASES[k] for k in overrides if k in _ALIASES)}
    kept, skip = [], False
    for arg in argv[argv.index("train") + 1 :]:
        name = arg.split("=", 1)[0].removeprefix("--")
        if skip or name.removeprefix("config.") in drop:
            skip = not skip and "=" not in arg
            continue
        kept.append(arg)
    kept += [f"--config.{key}={value}" for key, value in overrides.items()]
    workdir = run.path.with_name(f"{run.path.name}-{suffix}")
    return shlex.join(["sparse-pretrain", "train", *kept, f"--workdir={workdir}"])


def before_decay(run: Run) -> int:
    """Steps until the rate leaves its peak for good; all of them for a rate that has no plateau.

    While the rate falls the loss does so by itself, and says nothing of what more data would give.
    """
    rate = numbers(run.metrics, "lr")
    if not len(rate) or not np.isfinite(rate).all():
        return len(run.metrics)
    plateau = int(np.flatnonzero(rate >= 0.99 * rate.max())[-1]) + 1
    return plateau if plateau > 0.3 * len(rate) else len(rate)


def still_falling(run: Run) -> float | None:
    """Nats/token gained per doubling by the last tenth before the decay; None for a short run."""
    steps = before_decay(run)
    loss, tokens = (numbers(run.metrics, key)[:steps] for key in ("loss", "tokens"))
    if len(loss) < 50:
        return None
    curve = smooth(loss, max(5, len(loss) // 30))
    start = int(0.9 * len(loss))
    if not (np.isfinite(curve[[start, -1]]).all() and 0 < tokens[start] < tokens[-1]):
        return None
    return float((curve[start] - curve[-1]) / math.log2(tokens[-1] / tokens[start]))


def suggest(run: Run) -> list[Suggestion]:
    """What this run's numbers suggest, most useful first; overrides name keys that it has."""
    found: list[Suggestion] = []
    config = dotted(run.config)
    where = shlex.quote(str(run.path))
    if run.status == "interrupted" or run.status == "running":
        again = shlex.join(["sparse-pretrain", *(str(a) for a in (run.run.get("argv") or [])[1:])])
        found.append(Suggestion("The run is not complete; the same command resumes it.", again))
    bad = [r["step"] for r in run.metrics if r.get("loss", 0.0) is None and "step" in r]
    lr = next((k for k in ("optim.lr", "optim.peak", "lr") if k in config), None)
    if bad and lr:
        why = f"The loss was not finite at step {bad[0]}: lower the learning rate."
        found.append(Suggestion(why, _train(run, "low-lr", **{lr: config[lr] / 2})))
    found += _balance(run, config)
    gain = still_falling(run)
    if gain is not None and gain > 0.02:
        decays = before_decay(run) < len(run.metrics)
        why = (
            f"The loss was still falling by {gain:.2f} nats/token per doubling of the data at "
            f"the {'end of the peak rate' if decays else 'end'}: train longer"
        )
        found.append(_longer(run, config, why))
    tokens = run.result("tokens")
    active = run.derived.get("active_params")
    if tokens and active and tokens < CHINCHILLA * active:
        why = (
            f"It saw {si(tokens)} tokens, {tokens / active:.2g} per active parameter (compute-"
            f"optimal dense models take about {CHINCHILLA}): more data, or a smaller model, "
            "gives more for the same FLOPs."
        )
        found.append(Suggestion(why, ""))
    if run.status == "finished":
        if lr:
            twice = _train(run, "lr2", **{lr: 2 * config[lr]})
            why = f"One learning rate ({config[lr]:g}) says little: compare with twice as much."
            found.append(Suggestion(why, twice))
        if not str(config.get("data.source", "")).startswith("synthetic:"):  # which reads no text
            prompt = shlex.quote(str(config.get("sample.prompt", "def ")))
            write = f"sparse-pretrain generate --workdir={where} --prompt={prompt}"
            found.append(Suggestion("Write with the model.", write))
            measure = f"sparse-pretrain eval --workdir={where} --text=FILE"
            found.append(Suggestion("Measure it on a text of your own.", measure))
    found.append(Suggestion("Compare with the other runs.", f"sparse-pretrain runs {_beside(run)}"))
    return found


def _longer(run: Run, config: dict[str, Any], why: str) -> Suggestion:
    """Twice the length, as far as the corpus goes without a token seen twice."""
    steps, tokens = run.derived.get("steps"), run.derived.get("tokens")
    held = run.derived.get("train_tokens")
    if not (steps and tokens and "steps" in config):
        return Suggestion(f"{why}.", "")
    if held and 2 * tokens > held and not config.get("data.repeat"):
        if config.get("data.source") == "python_stdlib":
            command = _train(
                run, "packages", **{"steps": 2 * steps, "data.source": "python_packages"}
            )
            return Suggestion(f"{why}, on a larger corpus (this one holds {si(held)}).", command)
        return Suggestion(f"{why}; that needs more text than the {si(held)} tokens here.", "")
    return Suggestion(f"{why}.", _train(run, "longer", steps=2 * steps))


def _beside(run: Run) -> str:
    return shlex.quote(str(run.path.parent))


def _balance(run: Run, config: dict[str, Any]) -> list[Suggestion]:
    if not run.moe:
        return []
    last, found = run.moe[-1], []
    dead = total_dead(last)
    if dead:
        why = f"{dead} expert(s) got no token at the last look: they are parameters unused."
        found.append(Suggestion(why, ""))
    vio = [v for v in last.get("max_vio") or [] if isinstance(v, (int, float))]
    rate = next((k for k in config if k.endswith(".router.rate")), None)
    if vio and max(vio) > 1.0:
        why = (
            f"The busiest expert of MoE layer {int(np.argmax(vio))} carries {1 + max(vio):.1f} "
            "times its even share: let the router's prices move faster, or longer."
        )
        command = _train(run, "balance", **{rate: 2 * config[rate]}) if rate else ""
        found.append(Suggestion(why, command))
    return found


def total_dead(row: dict[str, Any]) -> int:
    """Dead experts in a row of `moe.jsonl`, which may count them in all or per layer."""
    dead = row.get("dead_experts") or 0
    return int(sum(dead) if isinstance(dead, list) else dead)
