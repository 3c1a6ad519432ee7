"""Where a recipe runs when it is not this process: `needs` computes what a recipe wants of a cluster and what the
cluster lacks (pure), `nodes` reads what a cluster has, `jobs` submits, follows and stops jobs, `spot` watches for the
cloud's notice that a node goes, `laptop` is an autoscaling cluster on one machine. The files that describe clusters to
Ray and Kubernetes are in cluster/ at the top.
"""
