"""What the processes of tests use, for the one that they are forked from."""

import fvcore.nn  # noqa: F401
import pytest  # noqa: F401
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel  # noqa: F401

import gatedconv
import gatedconv.train
import tests.image_files
import tests.tolerances  # noqa: F401

torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)  # the first optimizer imports the compiler
gatedconv.Engine(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3)).eval(), torch.zeros(1, 1, 8, 8))
