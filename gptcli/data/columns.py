"""Rows in columns: Parquet files, and Arrow files such as `datasets.save_to_disk` writes."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptcli.data.archives import REPLACE, File, readable
from gptcli.data.messages import format_of
from gptcli.errors import DataError

Row = tuple[str, dict[str, Any]]  # its place in the file, and its values by field

SUFFIXES = (".parquet", ".arrow")
_AT_ONCE = 1024  # rows
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of record batches


def no_such_field(path: File, field: str, fields: list[str]) -> DataError:
    """Make the error for a field that rows do not have."""
    names = ", ".join(map(str, fields[:20])) or "none"
    hint = f"name the one with the text, e.g. -s data.text_field={fields[0]}" if fields else None
    if (form := format_of(fields)) is not None:
        hint = f"these are conversations: -s data.format={form}"
    return DataError(f"{path}: no field '{field}'; the fields are: {names}", hint)


def read_records(path: File, fields: Sequence[str], errors: str) -> Iterator[Row]:
    """Yield each row, with those of some fields that there are."""
    with _table(path) as (schema, batches):
        chosen = [name for name in schema.names if name in fields]
        for name in chosen:
            if chosen.count(name) > 1:
                raise DataError(f"{path}: {chosen.count(name)} fields are named '{name}'")
        first = 0
        for batch in batches(chosen):
            values = [_values(column, path, first, errors) for column in batch.columns]
            for row in range(len(batch)):
                found = (column[row] for column in values)
                yield f"row {first + row}", dict(zip(chosen, found, strict=True))
            first += len(batch)


def _values(column: Any, path: File, first_row: int, errors: str) -> list[Any]:
    """Return the values of a column, whose texts need not be UTF-8 whatever its type says."""
    import pyarrow as pa

    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        try:
            values = column.cast("large_binary").to_pylist()
        except pa.ArrowException:
            last = first_row + len(column) - 1
            raise DataError(f"{path}: rows {first_row} to {last} are not all UTF-8") from None
        for row, text in enumerate(values):
            try:
                values[row] = text and text.decode("utf-8", errors)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: row {first_row + row}: not UTF-8 at byte {error.start} of its text",
                    f"fix the row, or {REPLACE}",
                ) from None
    return values


def fields_of(path: File) -> list[str]:
    """Return the fields of a file of columns."""
    with _table(path) as (schema, _):
        return list(schema.names)


@contextlib.contextmanager
def _table(path: File) -> Iterator[tuple[Any, Callable[[list[str]], Iterator[Any]]]]:
    """Open a file of columns: its schema, and a function that reads batches of some columns.

    A damaged file is a DataError, whenever that is noticed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert isinstance(path, Path)
    kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
    with readable(path), path.open("rb") as raw:  # fails in plainer words than pyarrow's
        try:
            if kind == "Arrow":
                yield _open_arrow(raw)
                return
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                yield file.schema_arrow, lambda names: file.iter_batches(_AT_ONCE, columns=names)
        except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            reason = (str(error) or "a part larger than the memory").splitlines()[0][:120]
            raise DataError(f"{path}: damaged {kind} file ({reason})") from error


def _open_arrow(raw: Any) -> tuple[Any, Callable[[list[str]], Iterator[Any]]]:
    import pyarrow as pa

    is_file = raw.read(6) == b"ARROW1"  # with a footer; `datasets` writes streams, without one
    raw.seek(0)
    reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(raw)

    def batches(columns: list[str]) -> Iterator[Any]:
        found = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in found:
            chosen = batch.select(columns)
            for column in chosen.columns:
                _require_sound(column)
            yield from (chosen.slice(at, _AT_ONCE) for at in range(0, len(chosen), _AT_ONCE))
        if not is_file:
            raw.seek(-len(_END), 2)
            if raw.read() != _END:  # a reader takes a stream that is cut between batches for whole
                raise pa.ArrowInvalid("it has no end")

    return reader.schema, batches


def _require_sound(column: Any) -> None:
    """Check that no offset leads out of a column, which reading it does not."""
    import pyarrow as pa

    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    plain = kinds.get(column.type)  # whether its bytes are UTF-8 is for the reader of text to say
    (column if plain is None else column.view(plain)).validate(full=True)


def saved_files(folder: Path) -> list[Path] | None:
    """Return the files of a dataset that `datasets.save_to_disk` wrote; None if it is not one.

    Others beside them are caches, which hold rows a second time.
    """
    try:
        listed = json.loads((folder / "state.json").read_bytes())["_data_files"]
        files = [folder / Path(entry["filename"]).name for entry in listed]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(f"{missing[0]}: missing; state.json lists it")
    return files


def saved_splits(folder: Path) -> Sequence[str]:
    """Return the names of the splits that `datasets.save_to_disk` wrote; none if it did not."""
    try:
        names = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        plain = (str(name) for name in names if Path(str(name)).name == name)
        return [name for name in plain if (folder / name).is_dir()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()


def parquet_text_bytes(path: Path, field: str) -> int | None:
    """Return the bytes of a Parquet file's texts by its footer, None if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return None
    total = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(number) for number in range(group.num_columns))
        total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)
    return total
