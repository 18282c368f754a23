"""What all tests share."""

import signal

import torch

# A job behind nohup ignores interrupts, and so would what it starts; tests send some.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests run many small operators; several threads would wait for each other more than they help.
torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """Each test begins alike, alone or among others."""
    torch.manual_seed(0)
