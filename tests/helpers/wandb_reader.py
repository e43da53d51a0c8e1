"""Read an offline folder of W&B; wandb has no Python reader of its files."""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.monitoring.wandb_logger import WandbLogger


def logger(run: Path, metrics: MetricsFile, mode: str = "offline") -> WandbLogger:
    """Return a logger of a run with made-up names."""
    config = {"loss": {"name": "dpo", "beta": 0.1}}
    return WandbLogger(
        mode=mode,
        project="prefopt",
        name="n",
        group="g",
        tags=("t",),
        run_id="abc123",
        folder=run,
        config=config,
        metrics=metrics,
    )


def records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format, blocks of 32 KiB, crc32, u16 length, u8 type, data."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""  # W&B's own header takes the first 7 bytes of the first block
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:  # too little for a header: zeros to the block's end
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:  # preallocated, never written
            return
        assert position + 7 + length <= len(data), f"{path}: the record at byte {position} is not whole"
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(folder: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """Run ids and rows in a run folder of W&B."""
    (path,) = folder.glob("run-*.wandb")
    ids: set[str] = set()
    rows: list[dict[str, Any]] = []
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        elif record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                value = item.WhichOneof("value")
                name, *fields = [item.key] if item.key else item.nested_key
                if fields:  # of an object, as a histogram is
                    row.setdefault(name, {})["/".join(fields)] = json.loads(item.value_json)
                else:
                    row[name] = getattr(item, value) if value else json.loads(item.value_json)
            rows.append(row)
    return ids, rows


def config_and_summary(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both as they stand after the last record; nested summaries by dotted-slash names."""
    (path,) = folder.glob("run-*.wandb")
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= _values(record.run.config.update)
        elif kind == "config":
            config |= _values(record.config.update)
        elif kind == "summary":
            summary |= _values(record.summary.update)
    return config, summary


def _values(items: Iterable[Any]) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
