"""What a recipe will cost, before anything runs. `workload` says what a stage has to compute (from a prepared corpus,
or from stated assumptions), `forecast` what that comes to on a cluster, `ingest` the same for preparing, `calibrate`
times this machine, `simulate` plays a run on thousands of GPUs with failures; `table` shows it. What a single step
costs is cost's.
"""
