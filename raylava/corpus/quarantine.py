"""Why a row can't become a training sample: the reasons, the exception that carries one, and the table's row."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Every way a source row can end in the quarantine."""

    NOT_A_ROW = "not a row"
    IMAGE_MISSING = "image missing"
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


class BadRow(Exception):
    """A row that is set aside: the reason, and a detail for the person who will repair it."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Quarantined:
    """One row of the quarantine table. `row` counts from 0 in the file `source`."""

    row: int
    sample_id: str
    source: str
    reason: str
    detail: str
