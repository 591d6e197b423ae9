"""Word's documents and e-books to text: paragraphs in reading order, and nothing that bites."""

import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptcli.data import archives, books
from gptcli.errors import GptError
from support.folders import Prepared, Write

from .test_readers import refusal, text_of

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
X = 'xmlns="http://www.w3.org/1999/xhtml"'
CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
)


def zipped(path: Path, **parts: str | bytes) -> Path:
    """Write a zip of parts; `__` is a slash in their names, `_` a dot."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), content)
    return path


def docx(path: Path, body: str, head: str = "") -> Path:
    """Write a document of Word with this body."""
    xml = f'<?xml version="1.0"?>{head}<w:document {W}><w:body>{body}</w:body></w:document>'
    return zipped(path, word__document_xml=xml)


def epub(path: Path, spine: str = "ab", folder: str = "", **chapters: str) -> Path:
    """Write an e-book of chapters by their letters, read in the order of the spine."""
    items = "".join(f'<item id="{n}" href="{folder}{n}%20x.xhtml"/>' for n in chapters)
    refs = "".join(f'<itemref idref="{n}"/>' for n in spine)
    opf = f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest>'
    pages = {f"OEBPS/{n} x.xhtml": text for n, text in chapters.items()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("META-INF/container.xml", CONTAINER)
        archive.writestr("OEBPS/book.opf", f"{opf}<spine>{refs}</spine></package>")
        for name, text in pages.items():
            archive.writestr(name, text)
    return path


def page(body: str) -> str:
    """Return a chapter as e-books have them."""
    return (
        '<?xml version="1.0"?><!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" "x.dtd">'
        f"<html {X}><head><title>not text</title><style>p {{}}</style></head>"
        f"<body>{body}</body></html>"
    )


def test_paragraphs_of_word(tmp_path: Path) -> None:
    body = (
        '<w:p><w:pPr><w:tabs><w:tab w:val="left"/></w:tabs></w:pPr>'
        "<w:r><w:t>One </w:t></w:r><w:r><w:t>two &amp; caf\u00e9 </w:t></w:r></w:p>\n"
        "<w:p/><w:p><w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t>"
        "<w:instrText>PAGE</w:instrText><w:delText>gone</w:delText></w:r></w:p>"
    )
    assert text_of(docx(tmp_path / "a.docx", body)) == "One two & caf\u00e9 \n\na\tb\nc"


def test_a_long_document_comes_in_pieces(tmp_path: Path) -> None:
    body = "".join(f"<w:p><w:r><w:t>Paragraph {i}.</w:t></w:r></w:p>" for i in range(30_000))
    text = text_of(docx(tmp_path / "a.docx", body))
    assert text == "\n\n".join(f"Paragraph {i}." for i in range(30_000))
    assert len(list(books.text_of(tmp_path / "a.docx", "strict"))) > 5


def test_chapters_are_read_in_the_order_of_the_spine(tmp_path: Path) -> None:
    one = page(
        "<h1>One</h1>\n  <p>It   was a\n <i>dark</i>&nbsp;night&hellip;</p><p>So.<br/>Yes.</p>"
    )
    two = page("<h1>Two</h1><ul><li>a</li><li>b</li></ul><pre>x  y\n z</pre><script>no</script>")
    path = epub(tmp_path / "a.epub", spine="bab", a=two, b=one, c=page("never"))
    said = "One\n\nIt was a dark\u00a0night\u2026\n\nSo.\nYes.\n\nTwo\n\na\nb\n\nx  y\n z"
    assert text_of(path) == said


def test_books_are_documents_of_a_folder(write: Write, prepared: Prepared) -> None:
    write("shelf/a.txt", "some text " * 30)
    docx(Path("shelf/b.docx"), "<w:p><w:r><w:t>text of Word</w:t></w:r></w:p>" * 30)
    epub(Path("shelf/c.epub"), a=page("<p>a book</p>"), b=page("<p>its end</p>"))
    assert prepared("shelf").documents == 3


def test_what_has_to_be_converted_names_the_tool(write: Write, prepared: Prepared) -> None:
    for name, tool in (
        ("my book.pdf", "pdftotext"),
        ("a.mobi", "ebook-convert"),
        ("a.zip", "unzip"),
    ):
        error = refusal(text_of, write(name, b"%PDF-1.4\xff"))
        assert "files are not read" in error.message
        assert (error.hint or "").startswith(f"convert it: {tool} ")
    write("papers/a.pdf", b"%PDF")
    with pytest.raises(GptError, match="papers: no text in this folder") as caught:
        prepared("papers")
    assert (caught.value.hint or "").startswith("convert its .pdf files: pdftotext ")


def test_entities_that_a_file_declares_are_refused(tmp_path: Path) -> None:
    laughs = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
    path = docx(tmp_path / "a.docx", "<w:p><w:r><w:t>&b;</w:t></w:r></w:p>", laughs)
    assert "declares the entity 'a', which is refused" in refusal(text_of, path).message
    outside = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    path = docx(tmp_path / "a.docx", "<w:p><w:r><w:t>&a;</w:t></w:r></w:p>", outside)
    assert "declares the entity" in refusal(text_of, path).message
    from_outside = '<!DOCTYPE x SYSTEM "file:///etc/passwd">'
    path = docx(tmp_path / "a.docx", "<w:p><w:r><w:t>text</w:t></w:r></w:p>", from_outside)
    assert text_of(path) == "text"


def test_what_expands_beyond_reason_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "<w:p><w:r><w:t>" + "0" * 1_000_000 + "</w:t></w:r></w:p>"
    path = docx(tmp_path / "a.docx", body)
    monkeypatch.setattr(books, "_MAX_PART_BYTES", 100_000)
    message = refusal(text_of, path).message
    assert message == f"{path}: word/document.xml is larger than any chapter"
    monkeypatch.undo()
    monkeypatch.setattr(archives, "_FREE_BYTES", 100_000)
    monkeypatch.setattr(archives, "_MOST_TIMES", 50)
    assert refusal(text_of, path).message.startswith(f"{path}: expands to more than ")
    monkeypatch.undo()
    deep = docx(tmp_path / "b.docx", "<w:p>" * 5000 + "</w:p>" * 5000)
    assert "elements in each other" in refusal(text_of, deep).message


@pytest.mark.parametrize("kind", ["docx", "epub"])
@pytest.mark.parametrize("damage", ["text", "cut", "empty", "other"])
def test_damage_is_an_error_of_the_data(tmp_path: Path, kind: str, damage: str) -> None:
    path = tmp_path / f"a.{kind}"
    docx(path, "<w:p/>") if kind == "docx" else epub(path, a=page("a"), b=page("b"))
    match damage:
        case "text":
            path.write_text("no zip")
        case "cut":
            path.write_bytes(path.read_bytes()[:-40])
        case "empty":
            path.write_bytes(b"")
        case "other":
            zipped(path, x_txt="text")
    error = refusal(text_of, path)
    assert error.message.startswith(f"{path}: ") and f".{kind} file" in error.message


def test_a_chapter_that_is_missing_or_no_xml_is_named(tmp_path: Path) -> None:
    path = epub(tmp_path / "a.epub", folder="../../", a=page("a"), b=page("b"))
    assert "no ../a x.xhtml in it" in refusal(text_of, path).message
    path = epub(tmp_path / "a.epub", a=page("<p>a"), b=page("b"))
    assert f"{path}: OEBPS/a x.xhtml: not well-formed XML" in refusal(text_of, path).message


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), kind=st.booleans())
def test_any_changed_byte_gives_text_or_an_error_of_the_data(
    tmp_path: Path, place: float, value: int, kind: bool
) -> None:
    path = tmp_path / ("a.docx" if kind else "a.epub")
    docx(path, "<w:p><w:r><w:t>text</w:t></w:r></w:p>") if kind else epub(path, a=page("a"), b="")
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] = value
    path.write_bytes(data)
    try:
        text_of(path)
    except GptError as error:
        assert error.exit_code == 3 and error.message.startswith(f"{path}: ")
