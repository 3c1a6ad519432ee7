"""Fingerprints, and artifacts that become visible only once they are committed."""

import json
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.artifacts import LOCK_TIMEOUT_S, ArtifactSpec, _is_abandoned, fingerprint, load_artifact
from raylava.errors import UserError
from raylava.storage import storage_path

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.text(max_size=6), JSON, max_size=5)


@given(FIELDS, st.randoms(use_true_random=False))
def test_fingerprint_does_not_depend_on_key_order(fields: dict[str, Any], random: Random) -> None:
    keys = list(fields)
    random.shuffle(keys)
    assert fingerprint("prepare", {key: fields[key] for key in keys}) == fingerprint("prepare", fields)


@given(FIELDS, FIELDS)
def test_fingerprints_are_equal_exactly_when_the_fields_are(first: dict[str, Any], second: dict[str, Any]) -> None:
    equal = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (fingerprint("s", first) == fingerprint("s", second)) == equal


def test_stage_is_part_of_the_fingerprint() -> None:
    assert fingerprint("pretrain", {}) != fingerprint("finetune", {})


def test_artifact_is_found_only_after_commit(tmp_path: Path) -> None:
    spec = ArtifactSpec("prepare", {"seed": 1}, storage_path(tmp_path))
    (spec.path / "block.arrow").write_bytes(b"half")
    assert spec.find() is None
    spec.commit({"rows": 3}, {"blocks": "abc"}, seconds=1.0)
    artifact = spec.find()
    assert artifact is not None
    assert artifact.metrics == {"rows": 3}
    assert load_artifact(str(spec.path)).record["fingerprint_fields"] == {"seed": 1}


def test_loading_a_folder_that_is_no_artifact_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a complete artifact"):
        load_artifact(str(tmp_path))


def test_lock_of_another_host_is_abandoned_once_its_heartbeat_is_too_old() -> None:
    holder = {"identity": "x", "host": "elsewhere", "pid": 1, "started": 0.0}
    assert not _is_abandoned(holder | {"heartbeat": time.time()})
    assert _is_abandoned(holder | {"heartbeat": time.time() - 2 * LOCK_TIMEOUT_S})
