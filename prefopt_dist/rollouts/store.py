"""Sampled and scored responses on disk, in a folder for all that decides them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt_dist.data.example import BadRow
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError
from prefopt_dist.files import read_json, sweep, write_atomic, write_json
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Ids


@dataclass(frozen=True)
class Answer:
    """One sampled response."""

    ids: Ids
    """As sampled, the stop token included"""
    text: str
    """Without the stop token"""
    fault: str | None
    """Why it can be in no pair: `unfinished`, or the kind of bad row that it would make; it is scored all the same"""
    exact: bool
    """Training gets these ids from the text, the template's end token standing for the stop token"""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def answers_of(prompt: Prompt, responses: Sequence[Ids], stop_ids: Sequence[int], tokeniser: Tokeniser) -> list[Answer]:
    """The samples of one prompt."""
    ended = [ids[-1] in stop_ids for ids in responses]
    bodies = [ids[:-1] if end else ids for ids, end in zip(responses, ended, strict=True)]
    texts = tokeniser.tokenizer.batch_decode(bodies, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    rows = tokeniser.encode([prompt.example(text) for text in texts])
    found = []
    for ids, body, end, text, row in zip(responses, bodies, ended, texts, rows, strict=True):
        if not text.strip():
            found.append(Answer(ids, text, "empty_response", False))
        elif not end:
            found.append(Answer(ids, text, "unfinished", False))
        elif isinstance(row, BadRow):
            found.append(Answer(ids, text, row.kind, False))
        else:
            exact = row.prompt == prompt.ids and row.responses[0][:-1] == body and not row.cut
            found.append(Answer(ids, text, None, exact))
    return found


SHARD_PROMPTS = 64
"""Prompts of a shard: what a kill costs each rank."""
SETTINGS = "settings.json"

Scores = list[float | str]
"""What each reward said of one answer: its number, or what was wrong."""


@dataclass(frozen=True)
class Answered:
    """A prompt with its answers and what the rewards said of each."""

    prompt: Prompt
    answers: list[Answer]
    scores: list[Scores]


@dataclass(frozen=True)
class SampleStore:
    """The folder of one model, set of prompts and sampling. It is made by one rank and read by all."""

    folder: Path

    def make_plan(
        self, prompts: Sequence[Prompt], settings: dict[str, Any], shard_prompts: int = SHARD_PROMPTS
    ) -> None:
        """Writes the prompts as shards of so many; where that was done before, nothing."""
        if (self.folder / SETTINGS).is_file():
            sweep(self.folder, ".*.tmp")
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"run.cache: {self.folder} cannot be made ({e.strerror}); name a folder where files can be made"
            ) from e
        for number, start in enumerate(range(0, len(prompts), shard_prompts)):
            part = prompts[start : start + shard_prompts]
            # NaN is no fault here: it may stand in a field of the row that nobody asks for.
            _write_lines(self._file("prompts", number), [asdict(prompt) for prompt in part], nan=True)
        shards = -(-len(prompts) // shard_prompts)
        write_json(self.folder / SETTINGS, {"shards": shards, **settings})

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the responses."""
        settings: dict[str, Any] = read_json(self.folder / SETTINGS)
        return settings

    def missing(self, what: str) -> tuple[list[int], list[str]]:
        """Numbers of the shards that are still to do, and a message for each damaged one, which is removed."""
        numbers, messages = [], []
        os.listdir(self.folder)  # as in _rows
        for number in range(self.settings["shards"]):
            file = self._file(what, number)
            if file.exists() and _read_lines(file) is None:
                messages.append(f"{file} does not match its checksum; removed and made again")
                file.unlink()
            if not file.exists():
                numbers.append(number)
        return numbers, messages

    def prompts(self, number: int) -> list[Prompt]:
        """A shard's prompts."""
        return [Prompt(**row) for row in self._rows("prompts", number)]

    def answers(self, number: int) -> list[list[Answer]]:
        """The answers to each prompt of a shard."""
        return [[Answer(**answer) for answer in row] for row in self._rows("samples", number)]

    def write_answers(self, number: int, answers: Iterable[Iterable[Answer]]) -> None:
        """Commits a shard."""
        for scores in self.folder.glob(f"scores-*-{number:05d}.jsonl"):
            scores.unlink()  # of a shard that was damaged; rounding may make other answers in its place
        _write_lines(self._file("samples", number), [[a.as_json() for a in of_prompt] for of_prompt in answers])

    def write_scores(self, what: str, number: int, scores: Iterable[list[Scores]]) -> None:
        """Commits a shard; what: see `scores_name`."""
        _write_lines(self._file(what, number), scores)

    def answered(self, what: str | None) -> list[Answered]:
        """Everything, in the order of the files that the prompts came from; all shards must be there.

        what: see `scores_name`; None: without scores.
        """
        found = []
        for number in range(self.settings["shards"]):
            answers = self.answers(number)
            scores = [[[] for _ in of_prompt] for of_prompt in answers] if what is None else self._rows(what, number)
            found += [Answered(*one) for one in zip(self.prompts(number), answers, scores, strict=True)]
        return sorted(found, key=lambda a: a.prompt.index)

    def _file(self, what: str, number: int) -> Path:
        return self.folder / f"{what}-{number:05d}.jsonl"

    def _rows(self, what: str, number: int) -> list[Any]:
        file = self._file(what, number)
        if not file.exists():
            os.listdir(self.folder)  # another node's file: a network file system may remember that it was not there
        rows = _read_lines(file) if file.exists() else None
        if rows is None:
            raise UserError(f"run.cache: {file} is missing or damaged; remove it and start again")
        return rows


def scores_name(identities: Sequence[dict[str, Any]]) -> str:
    """Names the scores of these rewards."""
    return "scores-" + digest_of([dict(i) for i in identities])[:16]


def digest_of(content: Any) -> str:
    """32 hexadecimal digits of plain values."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write_lines(path: Path, rows: Iterable[Any], nan: bool = False) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=nan) + "\n" for row in rows)
    write_atomic(path, text + json.dumps({"check": _check(text)}) + "\n")


def _read_lines(path: Path) -> list[Any] | None:
    """The rows, or None where they are not what was written."""
    text = path.read_bytes()
    body, _, last = text.removesuffix(b"\n").rpartition(b"\n")
    body += b"\n" if body else b""
    if last != json.dumps({"check": _check(body)}).encode():
        return None
    # Not splitlines: it parts at other characters too, such as U+2028 within a string.
    return [json.loads(line) for line in body.split(b"\n")[:-1]]


def _check(text: str | bytes) -> str:
    content = text.encode() if isinstance(text, str) else text
    return hashlib.blake2b(content, digest_size=16).hexdigest()
