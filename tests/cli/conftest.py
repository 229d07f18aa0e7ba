import pytest
from quick import embedded_at


@pytest.fixture(scope="module", autouse=True)
def quick(quick_folder):
    """What commands do with the embedded model does not depend on what its pictures show."""
    with embedded_at(quick_folder):
        yield
