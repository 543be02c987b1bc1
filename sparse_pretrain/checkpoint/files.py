"""Where checkpoints are, what is wrong with one, and the late import of orbax."""

import json
import threading
from pathlib import Path
from typing import Any

FOLDER = "checkpoints"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found, read or matched; one line naming the path."""


def orbax() -> Any:
    """orbax's v1 interface; half a second of imports, needed first at a save or a restore."""
    from orbax.checkpoint.experimental import v1

    return v1


def warm() -> None:
    """Imports orbax in a background thread, best called just before the first compilation."""
    threading.Thread(target=orbax, daemon=True).start()


def folder(workdir: str | Path) -> Path:
    """Where the checkpoints of a workdir are."""
    return Path(workdir).absolute() / FOLDER


def steps(workdir: str | Path) -> list[int]:
    """Steps of the committed checkpoints in a workdir, oldest first."""
    root = folder(workdir)
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and p.is_dir())


def path_of(workdir: str | Path, step: int | None) -> Path:
    """The folder of the checkpoint at `step`, the newest for None.

    Errors: CheckpointError naming the folder when there is none.
    """
    found, root = steps(workdir), folder(workdir)
    if not found:
        raise CheckpointError(f"{root}: no checkpoint here")
    if step is None:
        return root / f"{found[-1]:08d}"
    if step not in found:
        raise CheckpointError(f"{root}: no checkpoint at step {step}; there are {found}")
    return root / f"{step:08d}"


def parse(source: str) -> tuple[Path, str]:
    """(workdir, which checkpoint) of `WORKDIR` or `WORKDIR@last|best|STEP`."""
    workdir, _, which = source.rpartition("@")
    if not workdir or not which or Path(source).expanduser().exists():
        return Path(source).expanduser(), "last"
    return Path(workdir).expanduser(), which


def reason(error: BaseException) -> str:
    """The part of an error a user can act on, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    for known in ("No space left on device", "Permission denied", "Read-only file system"):
        if known in text:
            return known
    return text[:200]


def damaged(path: Path, error: BaseException) -> CheckpointError:
    """The error to raise for a checkpoint that orbax could not read."""
    return CheckpointError(
        f"{path}: checkpoint is damaged ({reason(error)}); remove this folder to use an older one"
    )


def read_json(path: str | Path) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no such file.

    Errors: CheckpointError naming a file that holds anything else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{path}: cannot be read ({reason(e)})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: cannot be read (holds a {type(found).__name__}, no object)")
    return found


def read_record(workdir: str | Path) -> dict[str, Any] | None:
    """The run.json of a workdir, None when there is none.

    Errors: CheckpointError naming the file when it is damaged.
    """
    path = Path(workdir) / "run.json"
    record = read_json(path)
    if record is None:
        return None
    for key in ("config", "manifest", "derived"):
        if not isinstance(record.get(key), dict):
            raise CheckpointError(f"{path}: cannot be read (has no section {key!r})")
    return record
