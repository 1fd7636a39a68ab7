import pytest
from hotpath_pack.devtools.reruns import Reruns
from hotpath_pack.hotpath.recorded import Recordings


@pytest.fixture
def recorder():
    return Reruns()


@pytest.fixture
def recordings(recorder):
    return Recordings(recorder, lambda size: True)
