"""What the package `ngplus-suite` is made of; `make package` builds it."""

import tomllib
from importlib import import_module
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
OWN = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
SUITE = tomllib.loads((REPOSITORY / "suite" / "pyproject.toml").read_text(encoding="utf-8"))


def test_it_has_every_recorded_run():
    included = SUITE["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    recorded = {f"../{each.relative_to(REPOSITORY).as_posix()}" for each in REPOSITORY.glob("results/*/*/runs")}
    assert {source for source in included if source.startswith("../results/")} == recorded
    for source, target in included.items():
        assert (REPOSITORY / "suite" / source).exists()
        assert target == source.replace("../results/", "experiments/recorded/") or not source.startswith("../results/")


def test_both_packages_are_of_one_version_and_need_each_other():
    version = OWN["project"]["version"]
    assert SUITE["project"]["version"] == version
    assert OWN["project"]["optional-dependencies"]["suite"] == [f"ngplus-suite=={version}"]
    (needed,) = SUITE["project"]["dependencies"]
    assert needed.endswith(f"]=={version}")
    assert OWN["project"]["dependencies"] == ["torch>=2.12"]


def test_its_command_is_the_command_line():
    module, _, name = SUITE["project"]["scripts"]["ngplus-bench"].partition(":")
    assert callable(getattr(import_module(module), name))
