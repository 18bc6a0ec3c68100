"""Every test runs on one thread: the models are tiny, and more threads only wait for each other."""

import torch

torch.set_num_threads(1)
