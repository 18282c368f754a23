"""What all tests share."""

import torch

# The tests run many small operators; several threads would wait for each other more than they help.
torch.set_num_threads(1)
