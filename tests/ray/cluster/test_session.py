"""A command starts a separate Ray cluster unless RAY_ADDRESS names one to join."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data

from raylava.cluster.session import ray_session
from raylava.config.recipe import Resources

SCRIPT = """
import ray
from ray.util.state import get_actor
from raylava.config.recipe import Resources
from raylava.cluster.session import ProgressCounter, ray_session

@ray.remote(num_cpus=0)
def state_seen_by_worker(actor_id):
    return get_actor(actor_id).state

with ray_session(Resources(workers=2)):
    assert ray.cluster_resources()["CPU"] >= 2
    progress = ProgressCounter.remote()
    ray.get(progress.count.remote())
    assert ray.get(state_seen_by_worker.remote(progress._actor_id.hex())) == "ALIVE"
"""


def test_session_starts_despite_the_address_file_of_a_killed_cluster() -> None:
    with tempfile.TemporaryDirectory(prefix="rl") as folder:  # a short path, since Ray creates Unix sockets below it
        address_file = Path(folder) / "ray" / "ray_current_cluster"
        address_file.parent.mkdir()
        address_file.write_text("127.0.0.1:1")  # as left behind by a killed cluster
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            capture_output=True,
            text=True,
            check=False,
            env=environment | {"RAY_TMPDIR": folder},
        )
    assert process.returncode == 0, process.stderr[-2000:]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings that ray.init is called with; no cluster is started."""
    settings: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **options: settings.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return settings


def test_cluster_of_a_command_listens_on_the_loopback_interface(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_session(Resources(workers=3)):
        pass
    assert settings["dashboard_host"] == "127.0.0.1"
    assert settings["num_cpus"] >= 3


def test_training_on_a_cluster_of_a_command_is_polled_often_unless_the_user_says_otherwise(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"):
        monkeypatch.setenv(name, "")  # so that the environment is restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    with ray_session(Resources()):
        assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
        assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"


def test_settings_of_a_cluster_that_is_joined_are_left_alone(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "")
    monkeypatch.delenv("RAY_TRAIN_ENABLE_STATE_TRACKING")
    context, level = ray.data.DataContext(), logging.getLogger("ray.data").level
    monkeypatch.setattr(ray.data.DataContext, "get_current", lambda: context)
    before = context.enable_progress_bars
    with ray_session(Resources()):
        assert os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1", "Ray's dashboard shows the training runs"
    assert settings == {"log_to_driver": False}
    assert context.enable_progress_bars == before
    assert logging.getLogger("ray.data").level == level
