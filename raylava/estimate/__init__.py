"""Predicts what a recipe needs before anything runs: memory, time and cost on a given cluster.

`workload` derives a stage's samples and steps from a prepared corpus or from stated assumptions; `forecast` predicts
memory, time and cost on a target; `ingest` plans corpus preparation; `local_machine` describes this machine as a
target, and `calibrate` measures its speed with `synthetic` packs. `simulate` simulates a run with node failures and
`scaling` applies it from one node to thousands of GPUs; `sweep_cost` sums the distinct stages of a sweep; `tables`
renders the results. Memory and time of a single step are predicted by raylava.perf.
"""
