"""What a benchmark gives back, as a plain table for people and as JSON for programs.

@dataclass(frozen=True)
class Row:
    name: str = column("kernel")
    ms: float = column("ms", ".3f")

print(Report(machine, rows=[Row("gemm", 1.25)]))
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from mosaicbert_ds.bench.machine import Machine
from mosaicbert_ds.tables import column as column
from mosaicbert_ds.tables import table


@dataclasses.dataclass(frozen=True)
class Report:
    """`rows` and `details` are frozen dataclasses whose fields are `column`s; `notes` are sentences."""

    machine: Machine
    rows: Sequence[Any]
    details: Sequence[Any] = ()
    notes: Sequence[str] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        parts = [str(self.machine), table(self.rows), table(self.details), "\n".join(self.notes)]
        return "\n\n".join(part for part in parts if part)
