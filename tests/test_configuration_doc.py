"""docs/configuration.md says what the schema says, about every key."""

import pytest

from bench import configuration_doc
from lowmem_drf.config import known_keys


def test_the_page_is_what_the_schema_gives():
    assert configuration_doc.PAGE.read_text(encoding="utf-8") == configuration_doc.page(), (
        "run: python -m bench.configuration_doc"
    )


def test_every_key_is_on_the_page_once():
    page, keys = configuration_doc.page(), known_keys()
    assert len(keys) > 70
    assert [key for key in keys if page.count(f"| `{key}` |") != 1] == []


def test_a_key_without_a_docstring_is_refused(monkeypatch):
    docs = configuration_doc.field_docs()
    del docs["Optim"]["lr"]
    monkeypatch.setattr(configuration_doc, "field_docs", lambda: docs)
    with pytest.raises(ValueError, match="optim.lr has no docstring"):
        configuration_doc.page()
