"""What the tests of the plugin share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))  # the rows of the golden documents, and what made them


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A directory to run Axolotl in, shared by the tests of one process."""
    from axolotl_bench import Bench

    return Bench(tmp_path_factory.mktemp("axolotl"))
