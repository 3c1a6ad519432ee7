"""The mutants of `make mutants` are up to date with the sources."""

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.catalog import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.promise)
def test_mutant_replaces_a_line_that_occurs_once_and_names_a_test_that_exists(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.line) == 1
    file, _, name = mutant.test.partition("::")
    assert (ROOT / file).exists()
    assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def test_every_mutant_has_its_own_promise_and_line() -> None:
    promises = Counter(mutant.promise for mutant in MUTANTS)
    assert promises.most_common(1)[0][1] == 1
    assert len({(mutant.file, mutant.line) for mutant in MUTANTS}) == len(MUTANTS) >= 80
