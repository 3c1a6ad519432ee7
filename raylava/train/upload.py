"""A checkpoint to its storage, tried again while storage fails. No Ray: worker.py calls it from Ray's upload thread."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from raylava.errors import RunError, first_line
from raylava.storage import Place

logger = logging.getLogger(__name__)

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0


def upload(folder: Path, target: Place, retry_seconds: float, last_good: Callable[[], str]) -> None:
    """Copy `folder` into `target`, waiting longer after each failure, for `retry_seconds` in all.

    Raises RunError, naming `last_good` and the last failure, when the time is up.
    """
    give_up = time.monotonic() + retry_seconds
    wait = _FIRST_WAIT_SECONDS
    while True:
        try:
            target.upload_folder(folder)
            return
        except OSError as error:
            if time.monotonic() + wait > give_up:
                raise RunError(
                    f"a checkpoint could not be written to {target} for {retry_seconds:.0f} s "
                    f"({first_line(error)[:200]}); the last good checkpoint is {last_good()}; when storage is back, "
                    "the same command goes on from it"
                ) from error
            logger.warning("writing %s failed, trying again in %.0f s: %s", target, wait, first_line(error)[:200])
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
