"""Unit tests run in parallel, one process per core: more threads per process would only compete."""

import torch

torch.set_num_threads(1)
