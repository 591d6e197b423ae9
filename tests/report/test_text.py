"""Text and numbers of the page."""

import json

import pytest

from gptcli.report import text


def test_embedded_json_cannot_leave_its_element() -> None:
    value = ["</script><!--", "a & b", "\u2028"]
    found = text.embedded(value)
    assert not set("<>&\u2028") & set(found) and json.loads(found) == value


def test_what_is_no_number_is_not_embedded() -> None:
    with pytest.raises(ValueError):
        text.embedded([float("nan")])


def test_text_is_shown_and_never_obeyed() -> None:
    assert text.escaped("a\x1b<b>\n") == "a\ufffd&lt;b&gt;\n"
