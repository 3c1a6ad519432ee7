"""The nodes that work is for: `roles` says which nodes a stage may go to, `nodes` what a cluster has and may start,
`resource_requests` what a recipe wants of it and what it lacks (pure); `spot` watches for the cloud's notice that a node goes,
`laptop` is an autoscaling cluster on one machine. The files that describe clusters to Ray and Kubernetes are in the
top's cluster/; jobs are submitted by submission.py.
"""
