"""What a study's runs are named by."""

from __future__ import annotations

import pytest

from deploy.study import runner


def test_the_methods_hash_sees_its_code(monkeypatch: pytest.MonkeyPatch):
    whole = runner.method_hash()
    assert whole == runner.method_hash()
    monkeypatch.setattr(runner, "METHOD_CODE", runner.METHOD_CODE[:-1])
    assert runner.method_hash() != whole
