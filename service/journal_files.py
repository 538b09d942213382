"""Labels from a file, and pairs of the journal into one: CSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from service.client import Client
from service.errors import InvalidRequest, Refused

COLUMNS = ("prediction_id", "row", "label", "class_name", "receipt")
ROWS_TOGETHER = 10_000


def send_labels(client: Client, model: str, path: Path) -> Counter[str]:
    """Send the labels of a CSV file; how many became what.

    Its first line names the columns: `label` (a class index) or `class_name`; `prediction_id` or `receipt` or both;
    perhaps `row`.
    """
    columns = _columns(path)
    labels: list[Any] = columns["class_name"] if "class_name" in columns else _whole(path, "label", columns["label"])
    rows = _whole(path, "row", columns["row"]) if "row" in columns else None
    ids = columns.get("prediction_id", [""] * len(labels))
    return Counter(client.label(model, ids, labels, rows=rows, receipts=columns.get("receipt")))


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write rows into a file whose ending says how, .csv or .parquet; how many there were."""
    writers = {".csv": _write_csv, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise InvalidRequest(f"the file must end in {' or '.join(writers)}, got {path.name!r}")
    return writers[path.suffix](iter(rows), path)


def _columns(path: Path) -> dict[str, list[str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            names = next(reader, [])
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"{path} cannot be read as CSV: {error}") from None
    named = set(names)
    if named - set(COLUMNS) or not named & {"prediction_id", "receipt"} or len(named & {"label", "class_name"}) != 1:
        raise InvalidRequest(
            f"{path}: the first line must name the columns label or class_name, prediction_id or receipt, perhaps row; "
            f"got {', '.join(names) or 'nothing'}"
        )
    for number, line in enumerate(lines, 2):
        if len(line) != len(names):
            raise InvalidRequest(f"{path}, line {number}: {len(names)} columns wanted, got {len(line)}")
    return {name: [line[index] for line in lines] for index, name in enumerate(names)}


def _whole(path: Path, name: str, texts: list[str]) -> list[int]:
    for number, text in enumerate(texts, 2):
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise InvalidRequest(f"{path}, line {number}: {name} must be a whole number of 0 or more, got {text!r}")
    return list(map(int, texts))


def _write_csv(rows: Iterator[Mapping[str, Any]], path: Path) -> int:
    count = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for row in rows:
            if not count:
                writer.writerow(row)
            writer.writerow([json.dumps(value) if isinstance(value, list | dict) else value for value in row.values()])
            count += 1
    return count


def _write_parquet(rows: Iterator[Mapping[str, Any]], path: Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise Refused("Parquet needs pyarrow: pip install pyarrow, or export to a file that ends in .csv") from None
    texts, wholes = (
        ("prediction_id", "model_version", "calibrator_revision", "segment"),
        ("row", "online_state", "predicted", "label"),
    )
    schema = pa.schema(
        {name: pa.string() for name in texts}
        | {name: pa.int64() for name in (*wholes, "time_ms")}
        | {"confidence": pa.float32(), "classes": pa.list_(pa.int64())}
        | {name: pa.list_(pa.float32()) for name in ("logits", "probabilities")}
        | {"signals": pa.map_(pa.string(), pa.float32())}
    )
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        while together := list(itertools.islice(rows, ROWS_TOGETHER)):
            paired = [{**row, "signals": list(row["signals"].items())} for row in together]
            writer.write_table(pa.Table.from_pylist(paired, schema))
            count += len(together)
    return count
