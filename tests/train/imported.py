"""What a run imports as it goes on, for the process that runs are forked from."""

import fvcore.nn  # noqa: F401
import torch

import gatedconv
import tests.train.kills  # noqa: F401

torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
gatedconv.Engine(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3)).eval(), torch.zeros(1, 1, 8, 8))
