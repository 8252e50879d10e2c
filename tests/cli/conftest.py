"""Commands write as on a terminal, unless a test says otherwise."""

import pytest


@pytest.fixture(autouse=True)
def for_people(monkeypatch):
    monkeypatch.setenv("KVFERRY_LOG_FORMAT", "text")
