import base64
import hashlib

from experiments.analysis.report import scripts


def test_the_policy_allows_these_scripts_and_nothing_from_elsewhere():
    digest = base64.b64encode(hashlib.sha256(b"let a = 1;").digest()).decode()
    policy = scripts.policy("let a = 1;")
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe-eval" not in policy


def test_no_script_can_end_itself():
    for script in (scripts.vega(), scripts.own()):
        assert "</script" not in script
        assert "<!--" not in script
        assert "\r" not in script
