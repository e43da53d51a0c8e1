"""An OpenAI-compatible server on this machine that answers with a small model, and fails as it is told."""

from __future__ import annotations

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Sampling
from prefopt_dist.rollouts.transformers_engine import TransformersEngine

F = TypeVar("F", bound="Fake")
VLLM = {"return_token_ids", "stop_token_ids", "ignore_eos", "skip_special_tokens", "top_k", "min_p"}
GREEDY = 1e-6
"""A temperature at which sampling takes the most likely token."""


class Fake(ABC):
    """How a server behaves, and what it was asked."""

    name = "the-model"

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.url = ""
        self.statuses: list[int] = []
        """Statuses of the next replies, the first one first"""
        self.hangs = threading.Event()
        self.released = threading.Event()
        self.lives: int | None = None
        """Answers after which it cuts each connection"""
        self.key: str | None = None
        self.longest: int | None = None
        """Tokens that it says it takes"""
        self.answered: list[Any] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return the status and the JSON of the reply to a request at a path."""
        return self.complete(body)

    @abstractmethod
    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Return the status and the JSON of the reply to a request."""


class FakeJudge(Fake):
    """Behind /v1/chat/completions: it is shown two answers, each in angle brackets, and says which it prefers."""

    def __init__(self, prefers: Callable[[str, str], str]) -> None:
        super().__init__()
        self.prefers = prefers

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        (turn,) = body["messages"]
        first, second = re.findall(r"<<(.*?)>>", turn["content"], re.S)
        with self.lock:
            self.answered.append((first, second))
        said = f"I have read both.\n\nVerdict: {self.prefers(first, second)}\n"
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"total_tokens": 100}}


class FakeReward(Fake):
    """A sequence classifier with vLLM's paths for one, which applies a sigmoid unless it is told not to."""

    def __init__(self, folder: Path, path: str = "/classify", takes: type = list) -> None:
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.path, self.takes = path, takes
        self.changes: Callable[[list[float]], list[float]] = lambda values: values
        """What becomes of the outputs before they are sent"""
        self.always_sigmoid = False

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return self.complete(body) if path == self.path else (404, {"error": f"no path {path}"})

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not isinstance(body["input"], self.takes) or body["model"] != self.name:
            return 400, {"error": "not understood"}
        ids = body["input"] if self.takes is list else self.tokenizer(body["input"])["input_ids"]
        with self.lock, torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0]
            self.answered.append(tuple(ids))
        raw = body.get("use_activation") is False and not self.always_sigmoid
        values = self.changes((logits if raw else torch.sigmoid(logits)).tolist())
        row = {"probs": values} if self.path == "/classify" else {"object": "pooling", "data": values}
        return 200, {"data": [{"index": 0, **row}], "usage": {"prompt_tokens": len(ids)}}


class FakeServer(Fake):
    """A model behind /v1/completions, what it understands, how it behaves, and what it was asked."""

    def __init__(self, folder: Path, dialect: str = "ids") -> None:
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.engine = TransformersEngine(model, "fake", batch_tokens=100_000)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.stops = tuple(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])
        self.dialect = dialect
        self.greedy = False
        """Ignores the temperature"""
        self.temperature: float | None = None
        """Takes this temperature, whatever it is asked"""
        self.forgets_seeds = False
        self.garbles = False
        """Gives token ids of another vocabulary"""
        self.answered: list[tuple[tuple[int, ...], int]] = []
        """Prompt and seed of each answer at a temperature above 0"""

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] != self.name:
            return 404, {"error": f"no model {body['model']!r}"}
        prompt, ids = body["prompt"], self.dialect == "ids"
        if isinstance(prompt, list) and not ids:
            return 400, {"error": "prompt must be a string"}
        if not ids and VLLM & body.keys():
            return 422, {"error": f"unexpected fields {sorted(VLLM & body.keys())}"}
        if self.dialect == "strict" and "generation_config" in body:
            return 422, {"error": "unexpected field generation_config"}
        prompt_ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        given = json.loads(body.get("generation_config", "{}"))
        stops = body.get("stop_token_ids") or given.get("eos_token_id") or self.stops
        temperature = GREEDY if self.greedy else (body["temperature"] or GREEDY)
        if self.temperature is not None and body["temperature"]:
            temperature = self.temperature
        seed = body["seed"] + (len(self.answered) if self.forgets_seeds else 0)
        sampling = Sampling(1, temperature, body["top_p"], body["max_tokens"], seed, tuple(stops))
        one = Prompt(0, "", "", None, {}, list(prompt_ids))
        with self.lock:
            ((answer,),) = self.engine.sample([one], sampling)
            logps = torch.log_softmax(self.engine.logits_before(one.ids, answer), -1)
        ended = answer[-1] in stops
        text = self.tokenizer.decode(answer[:-1] if ended else answer)
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length"}
        if ids:
            shown = [i + 10_000 for i in answer] if self.garbles and body["temperature"] else answer
            choice |= {"token_ids": shown, "prompt_token_ids": prompt_ids}
        elif self.garbles and body["temperature"]:
            choice["finish_reason"] = "because"
        if ids and "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": logps[range(len(answer)), answer].tolist()}
        if body["temperature"]:
            self.answered.append((tuple(prompt_ids), body["seed"]))
        return 200, {
            "choices": [choice],
            "usage": {"prompt_tokens": len(prompt_ids), "completion_tokens": len(answer)},
        }


class _Handler(BaseHTTPRequestHandler):
    server_of: Fake
    protocol_version = "HTTP/1.1"

    def _reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        fake = self.server_of
        if self.path == "/health":
            self._reply(200, {})
        else:
            self._reply(200, {"object": "list", "data": [{"id": fake.name, "max_model_len": fake.longest}]})

    def do_POST(self) -> None:
        fake = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.keys.add(self.headers.get("Authorization"))
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        try:
            with suppress(OSError):  # the client has gone, as one does that waits no longer
                self._answer(body)
        finally:
            with fake.lock:
                fake.at_once -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        fake = self.server_of
        if fake.key is not None and self.headers.get("Authorization") != f"Bearer {fake.key}":
            self._reply(401, {"error": f"wrong key {self.headers.get('Authorization')}"})
        elif fake.lives is not None and len(fake.answered) >= fake.lives:
            self.close_connection = True
            self.connection.close()
        elif fake.hangs.is_set():
            fake.released.wait()
        elif fake.statuses:
            self._reply(fake.statuses.pop(0), {"error": "as asked for"})
        else:
            self._reply(*fake.reply(self.path, body))

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(fake: F, port: int = 0) -> Iterator[F]:
    """Run the server in threads of this process; its address is `fake.url`."""
    handler = type("Handler", (_Handler,), {"server_of": fake})

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    with Server(("127.0.0.1", port), handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            fake.released.set()
            server.shutdown()
            thread.join()
