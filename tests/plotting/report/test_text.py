"""Text and numbers of the page."""

import json

import pytest

from gptcli.plotting.report import markup


def test_embedded_json_cannot_leave_its_element() -> None:
    value = ["</script><!--", "a & b", "\u2028"]
    found = markup.embedded(value)
    assert not set("<>&\u2028") & set(found) and json.loads(found) == value


def test_what_is_no_number_is_not_embedded() -> None:
    with pytest.raises(ValueError):
        markup.embedded([float("nan")])


def test_text_is_shown_and_never_obeyed() -> None:
    assert markup.escaped("a\x1b<b>\n") == "a\ufffd&lt;b&gt;\n"
