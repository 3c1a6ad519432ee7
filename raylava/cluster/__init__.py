"""Ray clusters: how to connect to them, what they offer, and how to run jobs on them.

- `session`: connects to a Ray cluster, or starts one for the duration of a command;
- `roles`: label selectors of the nodes for preparation and for training;
- `nodes`: the live nodes of a cluster and the node types that its autoscaler may start;
- `placement`: the resources that a recipe requests, and whether they fit (pure);
- `local_cluster`: an autoscaling cluster on one machine;
- `preemption`: watches for the cloud's preemption notice and drains the node;
- `gauges`: the metrics exported to Prometheus;
- `jobs`: submits, follows and stops jobs through Ray's job server.

The configurations for `ray up` and KubeRay are in the top-level folder cluster/.
"""
