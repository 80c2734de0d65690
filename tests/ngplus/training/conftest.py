import pytest

from tests.ngplus.training.processes import Team


@pytest.fixture(scope="session")
def team():
    """Two processes in one group; starting them is what takes time."""
    team = Team()
    yield team
    team.close()
