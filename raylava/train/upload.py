"""A checkpoint to its storage, tried again while storage fails. No Ray: worker.py calls it from Ray's upload thread."""

from collections.abc import Callable
from pathlib import Path

from raylava.errors import RunError, first_line
from raylava.storage import StoragePath, retry


def upload(folder: Path, target: StoragePath, retry_seconds: float, last_good: Callable[[], str]) -> None:
    """Copy `folder` into `target`, tried again for `retry_seconds`.

    Raises RunError, naming `last_good` and the last failure, when the time is up.
    """
    try:
        retry(lambda: target.upload_folder(folder), retry_seconds, f"writing {target}")
    except OSError as error:
        raise RunError(
            f"a checkpoint could not be written to {target} for {retry_seconds:.0f} s ({first_line(error)[:200]}); "
            f"the last good checkpoint is {last_good()}; when storage is back, the same command goes on from it"
        ) from error
