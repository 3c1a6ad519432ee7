"""How far runs are, by what they left in storage alone: artifacts, locks, ledgers and metrics. Asks no cluster."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from raylava.artifacts import HEARTBEAT_SECONDS, LOCK, RECORD, STALE_AFTER_SECONDS
from raylava.storage import StoragePath
from raylava.train.metrics_logger import recorded_steps
from raylava.train.spec import CHECKPOINTS, SNAPSHOT

STAGES = ("prepare", "pretrain", "finetune", "untrained", "evaluate")


@dataclass(frozen=True)
class ArtifactStatus:
    """One artifact, made or being made. `state` is made, building, or stopped (nobody builds it now)."""

    stage: str
    fingerprint: str
    state: str
    detail: str
    at: float  # seconds since the epoch: when it was finished, or last moved
    figures: dict[str, Any]


def list_artifacts(storage: StoragePath, fingerprints: set[str] | None = None) -> list[ArtifactStatus]:
    """Every artifact in storage (or those of a recipe), in the order of the stages, the newest last."""
    found = [one for stage in STAGES for one in _of_stage(storage, stage, fingerprints)]
    return sorted(found, key=lambda one: (STAGES.index(one.stage), one.at))


def _of_stage(storage: StoragePath, stage: str, fingerprints: set[str] | None) -> Iterator[ArtifactStatus]:
    for folder in (storage / stage).children():
        if fingerprints is None or folder.name in fingerprints:
            yield _made(stage, folder) or _unfinished(stage, folder)


def _made(stage: str, folder: StoragePath) -> ArtifactStatus | None:
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except FileNotFoundError:
        return None
    finished = datetime.strptime(record["finished"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    return ArtifactStatus(stage, folder.name, "made", f"in {record['seconds']:.0f} s", finished, record["metrics"])


def _unfinished(stage: str, folder: StoragePath) -> ArtifactStatus:
    heartbeat = _heartbeat(folder)
    is_building = heartbeat is not None and time.time() - heartbeat < STALE_AFTER_SECONDS + HEARTBEAT_SECONDS
    steps = recorded_steps(folder)
    kept = _whole_checkpoints(folder)
    figures: dict[str, Any] = {}
    parts = []
    if steps:
        last = steps[-1]
        figures = {"step": last["step"] + 1, "loss": last["loss"], "tokens_per_second": last["tokens_per_second"]}
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.3g}"
        parts.append(f"step {figures['step']}, loss {loss}, {last['tokens_per_second']:,.0f} tokens/s")
    if kept:
        figures["checkpoint"] = kept[-1]
        parts.append(f"checkpoint of step {figures['checkpoint']}")
    state = "building" if is_building else "stopped"
    return ArtifactStatus(stage, folder.name, state, "; ".join(parts), heartbeat or 0.0, figures)


def _whole_checkpoints(folder: StoragePath) -> list[int]:
    """Steps of the checkpoints that are on record: one that is still uploading has a folder, and no more."""
    try:
        snapshot = (folder / CHECKPOINTS / SNAPSHOT).read_bytes().decode()
    except FileNotFoundError:
        return []
    return sorted({int(step) for step in re.findall(r"\bstep-(\d{8})\b", snapshot)})


def _heartbeat(folder: StoragePath) -> float | None:
    try:
        return float(json.loads((folder / LOCK).read_bytes())["heartbeat"])
    except FileNotFoundError:
        return None
