"""What one cell of a study produced, as one line of JSON that outlives the process.

A file of records is only ever appended to. A line is written by one system call, so a crash can
cut off only the last one; it is skipped when read, and its cell runs again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from torch import Tensor

from ...meta.training.outcome import Outcome
from ...search.provenance import Provenance

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]
Measures = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Tuned:
    """What tuning found before the training that a record measures, and on which route. loss: the
    held-out loss that tuning saw, a mean over seeds of its own. options: the discrete ones learned.
    """

    hypers: dict[str, Json]
    options: dict[str, Json]
    loss: float | None
    outcome: Outcome
    route: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class Record:
    """inputs: all that decides the numbers. measures: by split, then by name, such as
    ["valid"]["loss"]; null where the training diverged. seconds: of the training alone. error:
    what a cell raised that has no result; outcome is null exactly then.
    """

    study: str
    inputs: dict[str, Json]
    outcome: Outcome | None
    measures: Measures = field(default_factory=dict)
    seconds: float | None = None
    tuned: Tuned | None = None
    error: str | None = None
    provenance: Provenance = field(default_factory=dict)

    @property
    def key(self) -> str:
        return key_of(self.inputs)

    def line(self) -> str:
        """This record as one line of JSON, with no number that JSON does not have."""
        return json.dumps(asdict(self), allow_nan=False)

    @staticmethod
    def from_line(line: str) -> Record:
        """Raises ValueError for JSON that is not a record."""
        content = json.loads(line)
        known = {f.name for f in fields(Record)}
        if not isinstance(content, dict) or not {"study", "inputs", "outcome"} <= set(content):
            raise ValueError("not a record of a study: it has no study, inputs and outcome")
        content = {name: value for name, value in content.items() if name in known}
        if content["outcome"] is not None:
            content["outcome"] = Outcome(content["outcome"])
        if content.get("tuned") is not None:
            tuned = content["tuned"]
            content["tuned"] = Tuned(**{**tuned, "outcome": Outcome(tuned["outcome"])})
        return Record(**content)


@dataclass(frozen=True)
class Records:
    """The records of a study in its order: problems, then arms, then seeds. missing: cells without
    a record, because the run was interrupted.
    """

    study: str
    records: tuple[Record, ...]
    missing: int = 0

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def key_of(inputs: Mapping[str, Json]) -> str:
    """The same for equal inputs, whatever their order.

    Empty ones do not count, so that a field added in a later version leaves old keys as they are.
    """
    canonical = json.dumps(_without_empty(dict(inputs)), sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _without_empty(value: Json) -> Json:
    if not isinstance(value, dict):
        return value
    kept = {name: _without_empty(each) for name, each in value.items()}
    return {name: each for name, each in kept.items() if each not in (None, {}, [])}


def append(path: str | Path, record: Record) -> None:
    """Add a record to a file, which is made if it is not there."""
    line = record.line().encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if _torn(handle):
            line = b"\n" + line
        if os.write(handle, line) < len(line):
            raise OSError(f"{path}: a record was written only in part; is the disk full?")
    finally:
        os.close(handle)


def _torn(handle: int) -> bool:
    """Whether a file does not end at the end of a line."""
    return os.lseek(handle, 0, os.SEEK_END) > 0 and _last_byte(handle) != b"\n"


def _last_byte(handle: int) -> bytes:
    os.lseek(handle, -1, os.SEEK_END)
    return os.read(handle, 1)


def read(path: str | Path) -> list[Record]:
    """The records of a file in the order they were written; none if it is not there."""
    if not Path(path).exists():
        return []
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            records.append(Record.from_line(line.decode()))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # Cut off by a crash: a part of a JSON object is never JSON.
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def plain(value: object) -> Json:
    """A value as JSON has it: tensors as lists, numbers that are not finite as null."""
    if isinstance(value, Tensor):
        return plain(value.detach().tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{type(value).__name__} has no place in a record")


__all__ = ["Json", "Measures", "Record", "Records", "Tuned", "append", "key_of", "plain", "read"]
