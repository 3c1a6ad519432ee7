"""Export of the gauges through Ray's metrics agent."""

import time
import urllib.request

import pytest
import ray

from raylava.cluster.gauges import GAUGES, Gauges, exported_gauges


@pytest.mark.usefixtures("ray_cluster")
def test_gauges_reach_prometheus_with_run_stage_and_rank() -> None:
    Gauges("0123456789abcdef", "finetune", 3).set(**dict.fromkeys(GAUGES, 7.0))
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    missing = set(exported_gauges())
    while missing:
        assert time.monotonic() < deadline, missing
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        lines = [line for line in text.splitlines() if 'run="0123456789abcdef"' in line]
        missing -= {line.split("{")[0] for line in lines if 'stage="finetune"' in line and 'rank="3"' in line}
        time.sleep(0.5)
