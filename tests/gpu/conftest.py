"""Several test processes share the GPU's memory."""

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_for_the_others():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
