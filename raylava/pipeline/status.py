"""The status of all artifacts in storage, from artifacts, locks and step logs alone; no cluster is contacted."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from raylava.artifacts import HEARTBEAT_INTERVAL_S, LOCK_FILE, LOCK_TIMEOUT_S, read_artifact
from raylava.errors import UserError
from raylava.storage import StoragePath
from raylava.train.step_log import CHECKPOINTS, SNAPSHOT, recorded_steps

STAGES = ("prepare", "pretrain", "finetune", "untrained", "evaluate")


@dataclass(frozen=True)
class ArtifactStatus:
    """The status of one artifact. `state` is complete, building, stopped (incomplete and not being built) or damaged.

    `time` is when it was completed or last made progress, in seconds since the epoch.
    """

    stage: str
    fingerprint: str
    state: str
    detail: str
    time: float
    metrics: dict[str, Any]


def list_artifacts(storage: StoragePath, fingerprints: set[str] | None = None) -> list[ArtifactStatus]:
    """List all artifacts in storage, or those with the given fingerprints, in stage order, the newest last."""
    statuses = [status for stage in STAGES for status in _list_stage(storage, stage, fingerprints)]
    return sorted(statuses, key=lambda status: (STAGES.index(status.stage), status.time))


def _list_stage(storage: StoragePath, stage: str, fingerprints: set[str] | None) -> Iterator[ArtifactStatus]:
    for folder in (storage / stage).children():
        if fingerprints is None or folder.name in fingerprints:
            yield _complete_status(stage, folder) or _incomplete_status(stage, folder)


def _complete_status(stage: str, folder: StoragePath) -> ArtifactStatus | None:
    try:
        record = read_artifact(folder).record
    except FileNotFoundError:
        return None
    except UserError as error:
        return ArtifactStatus(stage, folder.name, "damaged", str(error).removeprefix(f"{folder}/"), 0.0, {})
    finished = datetime.strptime(record["finished"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    detail = f"in {record['seconds']:.0f} s"
    return ArtifactStatus(stage, folder.name, "complete", detail, finished, record["metrics"])


def _incomplete_status(stage: str, folder: StoragePath) -> ArtifactStatus:
    heartbeat = _last_heartbeat(folder)
    is_building = heartbeat is not None and time.time() - heartbeat < LOCK_TIMEOUT_S + HEARTBEAT_INTERVAL_S
    metrics: dict[str, Any] = {}
    details = []
    if steps := recorded_steps(folder):
        last = steps[-1]
        metrics = {"step": last["step"] + 1, "loss": last["loss"], "tokens_per_second": last["tokens_per_second"]}
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.3g}"
        details.append(f"step {metrics['step']}, loss {loss}, {last['tokens_per_second']:,.0f} tokens/s")
    if checkpoints := _complete_checkpoints(folder):
        metrics["checkpoint"] = checkpoints[-1]
        details.append(f"checkpoint of step {metrics['checkpoint']}")
    state = "building" if is_building else "stopped"
    return ArtifactStatus(stage, folder.name, state, "; ".join(details), heartbeat or 0.0, metrics)


def _complete_checkpoints(folder: StoragePath) -> list[int]:
    """Return the steps of the checkpoints that Ray Train has recorded; one in upload has a folder only."""
    try:
        snapshot = (folder / CHECKPOINTS / SNAPSHOT).read_bytes().decode()
    except FileNotFoundError:
        return []
    return sorted({int(step) for step in re.findall(r"\bstep-(\d{8})\b", snapshot)})


def _last_heartbeat(folder: StoragePath) -> float | None:
    try:
        return float(json.loads((folder / LOCK_FILE).read_bytes())["heartbeat"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # a lock that was cut off while it was written
        return None
