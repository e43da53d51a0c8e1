"""Store sampled and scored responses on disk, in a folder named by a digest of all that determines them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt_dist.data.example import BadRow
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError
from prefopt_dist.files import digest, json_digest, read_json, remove_stale, write_atomic, write_json
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Ids, Response, TextResponse


@dataclass(frozen=True)
class Answer:
    """One sampled response."""

    ids: Ids
    """Sampled token ids, the stop token included"""
    text: str
    """Text without the stop token"""
    fault: str | None
    """Why it cannot be in a pair: `unfinished`, or the kind of bad row that it would make; such an answer is scored too
    """
    exact: bool
    """Whether tokenising the text in training gives the same ids, with the template's end token for the stop token"""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def answers_of(
    prompt: Prompt, responses: Sequence[Response], stop_ids: Sequence[int], tokeniser: Tokeniser
) -> list[Answer]:
    """Decode the sampled responses to one prompt, and check that each can be a row of training data.

    Of a response that is known by its text alone, the ids are those of the training, and it is not `exact`.

    Args:
        prompt: the prompt.
        responses: token ids or text of each response.
        stop_ids: ids that end a response.
        tokeniser: of the training.
    """
    given = [r if isinstance(r, TextResponse) else None for r in responses]
    sampled = [
        ids_of_text(r.text, r.ended, stop_ids, tokeniser) if isinstance(r, TextResponse) else r for r in responses
    ]
    ended = [ids[-1] in stop_ids if t is None else t.ended for ids, t in zip(sampled, given, strict=True)]
    bodies = [ids[:-1] if end else ids for ids, end in zip(sampled, ended, strict=True)]
    decoded = tokeniser.tokenizer.batch_decode(bodies, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts = [d if t is None else t.text for d, t in zip(decoded, given, strict=True)]
    rows = tokeniser.encode([prompt.example(text) for text in texts])
    found = []
    for ids, body, end, text, row, of_text in zip(sampled, bodies, ended, texts, rows, given, strict=True):
        if not text.strip():
            found.append(Answer(ids, text, "empty_response", False))
        elif not end:
            found.append(Answer(ids, text, "unfinished", False))
        elif isinstance(row, BadRow):
            found.append(Answer(ids, text, row.kind, False))
        else:
            exact = row.prompt == prompt.ids and row.responses[0][:-1] == body and not row.cut
            found.append(Answer(ids, text, None, exact and of_text is None))
    return found


def ids_of_text(text: str, ended: bool, stop_ids: Sequence[int], tokeniser: Tokeniser) -> Ids:
    """Return the ids into which training splits an answer's text, with its end token if it ended; at least one id."""
    ids: Ids = tokeniser.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    template = tokeniser.template
    end = template.plain_end_token if template.mode == "none" else template.end_token
    return [*ids, tokeniser.tokenizer.convert_tokens_to_ids(end)] if ended else ids or [stop_ids[0]]


SHARD_PROMPTS = 64
"""Number of prompts in a shard, the most work that each rank loses when the job is killed."""
SETTINGS = "settings.json"
ASKED = "asked.jsonl"
"""What each start asked of servers, a line each"""

Scores = list[float | str]
"""The value of each reward for one answer, or the reason why there is none."""


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with its answers and the scores of each."""

    prompt: Prompt
    answers: list[Answer]
    scores: list[Scores]


@dataclass(frozen=True)
class SampleStore:
    """The folder for one model, set of prompts and sampling settings; one rank makes it and all ranks read it."""

    folder: Path

    def make_plan(
        self, prompts: Sequence[Prompt], settings: dict[str, Any], shard_prompts: int = SHARD_PROMPTS
    ) -> None:
        """Write the prompts in shards, unless an earlier start has done so (one rank calls it).

        Args:
            prompts: all prompts, in the order in which they are sampled.
            settings: all that determines the responses, written to settings.json.
            shard_prompts: number of prompts in a shard.

        Raises:
            UserError: the folder cannot be created.
        """
        if (self.folder / SETTINGS).is_file():
            remove_stale(self.folder, ".*.tmp")
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"run.cache: {self.folder} cannot be created ({e.strerror}); give a folder in which files can be "
                "created"
            ) from e
        for number, start in enumerate(range(0, len(prompts), shard_prompts)):
            part = prompts[start : start + shard_prompts]
            # NaN is allowed here, since it may be in a field of the row that no reward uses.
            _write_lines(self._file("prompts", number), [asdict(prompt) for prompt in part], nan=True)
        shards = -(-len(prompts) // shard_prompts)
        write_json(self.folder / SETTINGS, {"shards": shards, **settings})

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the responses, and the number of shards."""
        settings: dict[str, Any] = read_json(self.folder / SETTINGS)
        return settings

    def missing(self, what: str) -> tuple[list[int], list[str]]:
        """Return the numbers of the missing shards, and a message for each damaged one, which is removed.

        Args:
            what: `samples`, or the name of the scores.
        """
        numbers, messages = [], []
        os.listdir(self.folder)  # for the reason that _rows gives
        for number in range(self.settings["shards"]):
            file = self._file(what, number)
            if file.exists() and _read_lines(file) is None:
                messages.append(f"{file} does not match its checksum; it is removed and computed again")
                file.unlink()
            if not file.exists():
                numbers.append(number)
        return numbers, messages

    def prompts(self, number: int) -> list[Prompt]:
        """Return a shard's prompts."""
        return [Prompt(**row) for row in self._rows("prompts", number)]

    def answers(self, number: int) -> list[list[Answer]]:
        """Return the answers to each prompt of a shard."""
        return [[Answer(**answer) for answer in row] for row in self._rows("samples", number)]

    def write_answers(self, number: int, answers: Iterable[Iterable[Answer]]) -> None:
        """Commit a shard's answers, for each prompt of the shard, and remove scores of earlier ones."""
        for scores in self.folder.glob(f"scores-*-{number:05d}.jsonl"):
            # They are of answers that were damaged, and rounding may have changed the new ones.
            scores.unlink()
        _write_lines(self._file("samples", number), [[a.as_json() for a in of_prompt] for of_prompt in answers])

    def note_asked(self, record: dict[str, Any]) -> None:
        """Append what one start asked of servers."""
        with (self.folder / ASKED).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def asked(self) -> list[dict[str, Any]]:
        """Return what was asked of servers for these answers, by start; none where no server was asked."""
        file = self.folder / ASKED
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def note_judged(self, scores: str, counts: dict[str, int]) -> None:
        """Append what one start asked of a judge for the scores of this name."""
        with (self.folder / f"judged-{scores}.jsonl").open("a") as file:
            file.write(json.dumps(counts) + "\n")

    def judged(self, scores: str) -> list[dict[str, int]]:
        """Return what judges were asked for the scores of this name, by start."""
        file = self.folder / f"judged-{scores}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def write_scores(self, what: str, number: int, scores: Iterable[list[Scores]]) -> None:
        """Commit a shard's scores, for each answer to each prompt, under the name from `scores_name`."""
        _write_lines(self._file(what, number), scores)

    def answered(self, what: str | None) -> list[AnsweredPrompt]:
        """Return all prompts with answers and scores, in the order of the prompts' files.

        Args:
            what: the name from `scores_name`; None for empty scores.

        Raises:
            UserError: a shard is missing or damaged.
        """
        found = []
        for number in range(self.settings["shards"]):
            answers = self.answers(number)
            scores = [[[] for _ in of_prompt] for of_prompt in answers] if what is None else self._rows(what, number)
            found += [AnsweredPrompt(*one) for one in zip(self.prompts(number), answers, scores, strict=True)]
        return sorted(found, key=lambda a: a.prompt.index)

    def _file(self, what: str, number: int) -> Path:
        return self.folder / f"{what}-{number:05d}.jsonl"

    def _rows(self, what: str, number: int) -> list[Any]:
        file = self._file(what, number)
        if not file.exists():
            # Another node may have written the file: listing the folder makes a network file system forget that the
            # file did not exist.
            os.listdir(self.folder)
        rows = _read_lines(file) if file.exists() else None
        if rows is None:
            raise UserError(f"run.cache: {file} is missing or damaged; remove it if it exists, and start again")
        return rows


def scores_name(identities: Sequence[dict[str, Any]]) -> str:
    """Return the name under which a store keeps the scores of these rewards."""
    return "scores-" + json_digest([dict(i) for i in identities])[:16]


def _write_lines(path: Path, rows: Iterable[Any], nan: bool = False) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=nan) + "\n" for row in rows)
    write_atomic(path, text + json.dumps({"check": digest(text)}) + "\n")


def _read_lines(path: Path) -> list[Any] | None:
    """Return the rows of a file, or None where it does not match its checksum."""
    text = path.read_bytes()
    body, _, last = text.removesuffix(b"\n").rpartition(b"\n")
    body += b"\n" if body else b""
    if last != json.dumps({"check": digest(body)}).encode():
        return None
    # Not splitlines, which also splits at other characters, such as U+2028 within a string.
    return [json.loads(line) for line in body.split(b"\n")[:-1]]
