"""The quarantine: reasons for which a row cannot become a sample, the exception that carries one, the table's row."""

import re
from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Reasons for which a source row is quarantined. The values are stored in quarantine.csv."""

    NOT_A_ROW = "not a row"
    IMAGE_MISSING = "image missing"
    IMAGE_NOT_FETCHED = "image not fetched"
    IMAGE_UNREADABLE = "image unreadable"
    IMAGE_TRUNCATED = "image truncated"
    IMAGE_TOO_LARGE = "image too large"
    PATH_ESCAPES = "image path escapes the root"
    NO_TURNS = "no turns"
    NOT_ALTERNATING = "turns do not alternate"
    TOKEN_WITHOUT_IMAGE = "image token without image"
    IMAGE_WITHOUT_TOKEN = "image without image token"
    NOTHING_SUPERVISED = "nothing supervised"
    TOO_LONG = "too long"
    FAILED = "row failed"  # any other exception while it was processed
    CRASHED = "crashed"  # it ended the process that handled it


_MAX_DETAIL = 200
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")


def describe_error(error: BaseException) -> str:
    """Return an exception's class and message in one short line that is the same in every run."""
    text = _ADDRESS.sub("0x…", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:_MAX_DETAIL]


class BadRow(Exception):
    """Raised for a row that must be quarantined, with the reason and a detail that helps to fix the row.

    `image` is the name of the image that is to blame; what reads the images of a row sets it.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.image = ""


@dataclass(frozen=True)
class QuarantinedRow:
    """One row of the quarantine table. `row` is the row's number in the file `source`, starting at 0.

    `image` is the image that is to blame, or else the row's images, separated by spaces.
    """

    row: int
    sample_id: str
    source: str
    reason: str
    detail: str
    image: str = ""
