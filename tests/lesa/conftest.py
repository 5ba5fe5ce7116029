"""The core's tests run on one thread: matrices are tiny, and one thread is what bit-reproducibility is promised for."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
