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


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (text.count(None), "–"), (text.count(0), "0"), (text.count(9_999), "9,999"),
        (text.count(12_345), "12.3k"), (text.count(124e6), "124M"), (text.count(3e12), "3T"),
        (text.size(512), "512 bytes"), (text.size(1_468_703), "1.47 MB"),
        (text.duration(3.654), "3.65 s"), (text.duration(600), "10 min"),
        (text.duration(86_400), "24 h"), (text.loss(None), "–"), (text.loss(2.39887), "2.3989"),
        (text.perplexity(0.0), "1.00"), (text.perplexity(None), "–"),
        (text.perplexity(1e9), "1.0e+304"), (text.escaped("a\x1b<b>\n"), "a\ufffd&lt;b&gt;\n"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_a_person_would(found: str, shown: str) -> None:
    assert found == shown
