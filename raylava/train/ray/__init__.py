"""The Ray Train backend.

`driver` runs a stage from the driver; `worker` is what each of its workers runs, and their TrainBackend; `monitor` is
the actor to which workers report and which the driver polls; `failures` decides after which failures the workers start
again. Only functions import torch: the monitor's process imports these modules, and would take three seconds longer to
start.
"""
