"""The preemption watcher against a local stand-in for the clouds' metadata services."""

import time

import pytest

from raylava.cluster.preemption import AwsMetadata, GcpMetadata, Notice, find_metadata_service, watch_for_preemption
from raylava.errors import UserError
from tests.support.metadata_server import MetadataServer


@pytest.mark.parametrize(("cloud", "expected_type", "seconds"), [("aws", AwsMetadata, 120), ("gcp", GcpMetadata, 30)])
def test_notice_of_each_cloud_is_parsed_with_its_deadline(
    metadata: MetadataServer, cloud: str, expected_type: type, seconds: float
) -> None:
    metadata.cloud = cloud
    service = find_metadata_service()
    assert isinstance(service, expected_type)
    assert service.poll_notice() is None
    metadata.preempted = True
    notice = service.poll_notice()
    assert notice is not None
    assert notice.deadline - time.time() == pytest.approx(seconds, abs=5)


@pytest.mark.usefixtures("metadata")
def test_machine_outside_the_supported_clouds_is_reported() -> None:
    with pytest.raises(UserError, match="neither the AWS nor the Google Cloud"):
        find_metadata_service(timeout_s=0.0)


def test_failed_drain_is_retried(metadata: MetadataServer) -> None:
    metadata.cloud, metadata.preempted = "aws", True
    attempts: list[Notice] = []

    def drain(notice: Notice) -> None:
        attempts.append(notice)
        if len(attempts) < 3:
            raise ConnectionError("GCS is away")

    watch_for_preemption(AwsMetadata(metadata.url), drain, poll_interval_s=0.01)
    assert len(attempts) == 3


def test_metadata_service_is_polled_again_after_errors(metadata: MetadataServer) -> None:
    metadata.cloud, metadata.preempted, metadata.failures = "aws", True, 3
    drained: list[Notice] = []
    watch_for_preemption(AwsMetadata(metadata.url), drained.append, poll_interval_s=0.01)
    assert len(drained) == 1
    assert metadata.failures == 0
