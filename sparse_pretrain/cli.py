"""The console script: a row per command, and one line of error for every mistake.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import argparse
import contextlib
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from sparse_pretrain import __version__
from sparse_pretrain.commands import errors

PROGRAM = "sparse-pretrain"
COMMANDS = {
    "train": "train a model, or resume the run in its workdir",
    "eval": "score a trained model on held-out text, a file or multiple-choice tasks",
    "generate": "write text with a trained model",
    "runs": "the table of runs, or what differs between two",
    "sweep": "run every setting of a sweep file and rank the results",
    "fit": "a scaling law from runs or a CSV, with intervals and a page",
    "isoflop": "plan and run a grid of sizes and tokens per budget, fit it, say what to run next",
    "placement": "replay a run's expert loads on devices: balance, bytes moved, simulated gain",
    "reproduce": "run published claims to a verdict: PASS, FAIL or why not",
    "claims": "the ledger of claims: published, measured, criterion, verdict",
    "plan": "what a run costs on some chips, which plan it should use, and why",
    "config": "print a resolved configuration and what it costs, without training",
}
EXAMPLES = f"""examples:
  {PROGRAM} train
  {PROGRAM} train --config=dense_baseline --workdir=runs/dense --config.optim.lr=2e-3
  {PROGRAM} generate --workdir=runs/quickstart --prompt='def main('
  {PROGRAM} runs

`{PROGRAM} COMMAND --help` says more. SPARSE_PRETRAIN_TRACEBACK=1 shows where an error came from."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Raise Usage with argparse's message."""
        raise errors.Usage(message.removeprefix("argument "))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, 1 failed while running, 2 a mistake in what was asked, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    show = os.environ.get("SPARSE_PRETRAIN_TRACEBACK", "") not in ("", "0")
    if not show:
        _quiet()
    try:
        with errors.interrupts_are_heard():
            code = _dispatch(argv)
        sys.stdout.flush()  # here, where a closed pipe is expected, and not at exit
        return code
    except BrokenPipeError:
        # the reader of a pipe went away; what is still buffered must not fail at exit
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as e:
        if show:
            traceback.print_exc()
        code, line = errors.describe(e)
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
        return code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_top().format_help(), end="")
        return 0
    if argv[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name.startswith("-"):
        raise errors.Usage(f"{name}: options come after the command, one of {', '.join(COMMANDS)}")
    if name not in COMMANDS:
        raise errors.Usage(f"unknown command {name!r}; {errors.nearest(name, COMMANDS)}")
    module = importlib.import_module(f"sparse_pretrain.commands.{name}")
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=COMMANDS[name][0].upper() + COMMANDS[name][1:] + ".",
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add(parser)
    overrides: list[str] = []
    if getattr(module, "OVERRIDES", False):
        rest, overrides = split_overrides(rest)
    args, extra = parser.parse_known_args(rest)
    if extra:
        raise errors.Usage(errors.unknown_option(extra[0], parser, module, args))
    args.overrides, args.argv = overrides, [PROGRAM, *argv]
    return module.run(args) or 0


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(other arguments, `x.y=value` of every `--config.x.y=value` or `--config.x.y value`).

    Errors: Usage when an override has no value.
    """
    rest, found = [], []
    left = iter(argv)
    for arg in left:
        if arg == "--":
            rest += [arg, *left]
        elif arg.startswith("--config."):
            text = arg.removeprefix("--config.")
            if "=" not in text:
                value = next(left, None)
                if value is None or value.startswith("--"):
                    raise errors.Usage(f"{arg}: needs a value, as in {arg}=VALUE")
                text = f"{text}={value}"
            found.append(text)
        else:
            rest.append(arg)
    return rest, found


def _top() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [options]",
        description=f"Pretrain sparse language models.\n\ncommands:\n{rows}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _quiet() -> None:
    """Warnings and logs of libraries off; a warning of our own is one line."""
    logging.disable(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own log, read when jax is imported
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"sparse_pretrain(\.|$)")
    warnings.showwarning = _one_line


def _one_line(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
