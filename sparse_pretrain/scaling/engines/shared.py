"""What engines of many machines share: a child is asked to stop by a file beside the runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparse_pretrain.scaling import process
from sparse_pretrain.scaling.children import Child


def stop_file(child: Child) -> Path:
    """Holds what `asked` answers on the machine that runs the child."""
    claim = process.claim_file(child)
    return claim.with_name(f"{claim.name}.stop")


def ask_to_stop(child: Child, wish: int) -> None:
    """Have the child save and end, or end at once."""
    stop_file(child).parent.mkdir(parents=True, exist_ok=True)
    stop_file(child).write_text(str(wish))


def no_stop(child: Child) -> None:
    """Forget an earlier request."""
    stop_file(child).unlink(missing_ok=True)


def execute(child: Child, prefix: Sequence[str] = process.PREFIX) -> process.Outcome:
    """`process.execute` on another machine.

    Errors: ValueError when that machine does not see the sweep's folder.
    """
    if not child.workdir.parent.is_dir():
        import platform

        return process.Outcome(
            process.MISTAKE,
            f"--workdir: {platform.node()} does not see {child.workdir.parent}; it must lie on a "
            "file system that all machines share",
        )
    file = stop_file(child)

    def asked() -> int:
        try:
            return int(file.read_text() or 0)
        except (OSError, ValueError):
            return 0

    return process.execute(child, prefix, asked)


def number(engine: str, options: Mapping[str, str], key: str, default: float) -> float:
    """The number that an option gives.

    Errors: ValueError naming the option.
    """
    try:
        value = float(options.get(key, default))
    except ValueError:
        value = -1.0
    if value < 0:
        raise ValueError(f"--option: {key}={options[key]} of the engine {engine} is not a number")
    return value


def gist(error: BaseException) -> str:
    """The first line of an error that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
