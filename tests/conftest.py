"""What all tests share."""

import signal
import threading
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's affair: no test fails of it.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

SHARED_DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests run side by side: more threads than one each only get in one another's way."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def heeds_ctrl_c() -> Iterator[None]:
    """A job in the background inherits that Ctrl-C is ignored, and hands it on: tests and their children heed it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests of it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data: {SHARED_DATA} is absent")
    return SHARED_DATA.resolve()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks a test's cases as slow, but for those that its `quick` marker names: `make test` runs these alone."""
    for item in items:
        marker = item.get_closest_marker("quick")
        if marker and isinstance(item, pytest.Function):
            assert not marker.kwargs
            assert hasattr(item, "callspec"), f"{item.nodeid}: quick names cases, and the test has none"
            if not any(fnmatchcase(item.callspec.id, pattern) for pattern in marker.args):
                item.add_marker(pytest.mark.slow)
