"""Studies in a bucket."""

from raylava.storage import storage_path
from raylava.tune.variants import variants
from tests.support.studies import make_sweep, resume_study


def test_journal_can_be_stored_in_a_bucket(s3: str) -> None:
    (variant,) = variants(make_sweep(), [])
    bucket = storage_path(f"{s3}/studies")
    resume_study(variant, bucket).next_settings("a", True)
    assert resume_study(variant, bucket).next_settings("b", False) is not None
