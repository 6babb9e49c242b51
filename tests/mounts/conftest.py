"""A real FUSE mount of the fault-injecting file system for every test that asks for one."""

import pytest
from fault_mount import FaultMount, NoMount, why_not


@pytest.fixture
def mount(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    made = FaultMount.below(tmp_path)
    try:
        made.start()
    except NoMount as error:
        pytest.skip(str(error))
    yield made
    made.stop()
