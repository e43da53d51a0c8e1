"""Select the files of one configuration and one split of a folder that is laid out like a data set of the hub.

The front matter of README.md lists the files, or else the names of folders and files show where they belong, as in
en/train-00000-of-00002.parquet. The configuration and the split are those named, or else the only configuration and
the split `train`. Anything else would mix rows that the author separated, such as training and test rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prefopt_dist.config.data import DataSource
from prefopt_dist.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
KINDS = {
    "Parquet files": (".parquet",),
    ".jsonl files": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "CSV files": (".csv",),
}
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")
"""Files of a folder that describe its data set."""
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])[\w.]*?(?=-\d|_\d{4,}|$)")
NAMED = re.compile(
    r"(?:^|[^a-z])(?:train|training|test|testing|validation|valid|val|dev|eval|evaluation|heldout|holdout)(?:[^a-z]|$)",
    re.I,
)
"""A name that holds the word of a split elsewhere, as in dpo_train or Test."""
NUMBER = re.compile(r"[-_.]?\d+$")
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
DEFAULT = "default"
PLAIN_FOLDERS = ("data", ".")
"""Folders whose names do not name a configuration or a split."""
PLAIN_FILES = ("data", "part", "shard", "chunk", "file", "rows", "output")
"""Names of numbered files that do not name a split."""


@dataclass(frozen=True)
class SplitFile:
    """One file with its configuration and split."""

    file: Path
    configuration: str
    split: str | None
    """None: neither README.md nor the file's name names a split"""


def folder_files(source: DataSource, key: str) -> tuple[Path, ...]:
    """Return the files of a folder that hold the rows of the source; all have one type.

    Args:
        source: The source, whose path is a folder.
        key: The dotted key that named it, for messages.

    Raises:
        UserError: The folder holds no files of rows or those of several types, or `select_files` raises.
    """
    folder = Path(source.path)
    # Hidden folders hold caches and version histories, such as those of the hub's client. The folder itself may lie in
    # one. Spark gives folders names such as rows.parquet.
    found = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    kinds = {kind: [file for file in found if file.name.endswith(ends)] for kind, ends in KINDS.items()}
    if not any(kinds.values()):  # beside files of rows a .json file is a description
        kinds[".json files"] = [f for f in found if f.name.endswith(JSON_SUFFIXES) and f.name not in DESCRIPTIONS]
    holding = [kind for kind, files in kinds.items() if files]
    if not holding:
        raise UserError(
            f"{key}: the folder {source.path!r} holds neither a saved data set nor {', '.join(KINDS)} or .json files; "
            "name the file itself"
        )
    if len(holding) > 1:
        raise UserError(
            f"{key}: the folder {source.path!r} holds {' and '.join(holding)}, perhaps of the same rows; "
            "name the files themselves, or a pattern such as *.jsonl"
        )
    return select_files(
        folder, kinds[holding[0]], name=source.name, split=source.split, key=key, shown=source.path
    )  # fmt: skip


def select_files(
    folder: Path, files: list[Path], *, name: str | None, split: str | None, key: str, shown: str
) -> tuple[Path, ...]:
    """Return the files of one configuration and one split.

    Args:
        folder: The folder.
        files: All files of the folder.
        name: The configuration; None: the only one, or `default` where README.md lists it.
        split: The split; None: `train`, or all files of a folder without splits.
        key: The dotted key that named the folder, for messages.
        shown: The folder as the user wrote it, for messages.

    Raises:
        UserError: The configuration or split does not exist, or none is named where there are several; the message
            lists them.
    """
    declared = _declared(folder, files)
    parts = declared or _by_names(folder, files)
    configurations = sorted({part.configuration for part in parts})
    if name is not None and name not in configurations:
        raise UserError(f"{key}: {shown!r} has no configuration {name!r}; name one of {configurations}")
    # Only an author says which of several is the default; files beside folders of others are a choice.
    if name is None and len(configurations) > 1 and not (declared and DEFAULT in configurations):
        raise UserError(
            f"{key}: {shown!r} has the configurations {configurations}; name one: {{path: {shown}, name: "
            f"{configurations[0]}}}, or list several as sources of their own"
        )
    taken = name or (DEFAULT if DEFAULT in configurations else configurations[0])
    parts = [part for part in parts if part.configuration == taken]
    splits = sorted({part.split for part in parts if part.split is not None})
    if split is None and not splits:
        return tuple(part.file for part in parts)
    wanted = split or "train"
    found = tuple(part.file for part in parts if part.split == wanted)
    if split is None and not found:
        found = tuple(part.file for part in parts if part.split is not None and part.split.lower() == wanted)
    if not found:
        lacks = f"has no split {split!r}" if split else "has no split named 'train'"
        example = next((name for name in splits if name.startswith("train")), splits[0]) if splits else None
        has = f"name one of {splits}: {{path: {shown}, split: {example}}}" if example else "remove the split"
        raise UserError(f"{key}: {shown!r} {lacks}; {has}")
    return found


def _declared(folder: Path, files: list[Path]) -> list[SplitFile]:
    """Return the files that the front matter of README.md lists; an empty list where it lists none."""
    return [
        SplitFile(file, str(configuration.get("config_name", DEFAULT)), split)
        for configuration in _configurations(folder / "README.md")
        for split, pattern in _patterns(configuration.get("data_files"))
        for file in sorted(folder.glob(pattern))
        if file in files
    ]


def _configurations(readme: Path) -> list[Mapping[str, Any]]:
    try:
        text = readme.read_text(encoding="utf-8", errors="replace")
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, yaml.YAMLError, IndexError):
        return []  # README.md is written for people, so an unreadable one is not an error
    found = head.get("configs") if isinstance(head, dict) else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """Yield split and glob pattern; files without a split belong to `train`, as on the hub."""
    for one in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (one.get("split", "train"), one.get("path")) if isinstance(one, dict) else ("train", one)
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str) and path and not path.startswith("/") and ".." not in path:
                yield str(split), path


def _by_names(folder: Path, files: list[Path]) -> list[SplitFile]:
    return [_by_name(file, file.relative_to(folder)) for file in files]


def _by_name(file: Path, relative: Path) -> SplitFile:
    folders = [part for part in relative.parent.parts if part not in PLAIN_FOLDERS]
    stem = relative.name.split(".")[0]
    sharded, named = SHARD.match(stem), SPLIT.match(stem)
    if sharded and sharded.group(1) in PLAIN_FILES:
        sharded = None
    split = sharded.group(1) if sharded else named.group(0).rstrip("._") if named else None
    if split is None and NAMED.search(stem):
        split = NUMBER.sub("", stem)
    if folders and SPLIT.fullmatch(folders[-1]):
        split = split if sharded and named else folders[-1]
        folders = folders[:-1]
    return SplitFile(file, "/".join(folders) or DEFAULT, split)
