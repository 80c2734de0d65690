import pytest

from tests.ngplus.training.processes import Team


@pytest.fixture(scope="session")
def team_of_four():
    """Four processes in one group."""
    team = Team(4)
    yield team
    team.close()


@pytest.fixture(scope="session")
def team():
    """Two processes in one group; starting them is what takes time."""
    team = Team()
    yield team
    team.close()
