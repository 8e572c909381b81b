"""No file, override or prompt makes a reader end in anything but a result or a refusal with a cure: the same damaged
files each time. ``python -m bench.fuzz`` tries others."""

import pytest
from _targets import CURE, TARGETS, finding
from hypothesis import HealthCheck, given, settings

TRIES = {"prompt argument": 50, "metrics": 100, "lora": 250, "model": 60, "video": 200}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused_with_a_cure(name, tmp_path):
    target = TARGETS[name]
    target.warm(tmp_path)

    @settings(
        max_examples=TRIES.get(name, 150),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.files())
    def try_one(content):
        assert finding(target, content, tmp_path) == ""

    try_one()


def test_what_counts_as_a_finding(tmp_path):
    assert CURE.search("Give another file.") and not CURE.search("it is damaged")
    assert finding(TARGETS["prompts"], b'{"prompt": "a"}', tmp_path) == ""
    broken = TARGETS["prompts"].__class__(None, "x", lambda path: 1 / 0, None)
    assert "unexpected ZeroDivisionError" in finding(broken, b"", tmp_path)
