"""Compiled layers against plain float64: log-probs, losses, gradients; how many graphs there are, and for which rows.

The quick tests trace the layers as a run does, but let torch's eager operations run the graph: writing code takes tens
of seconds a family, and is left to the slow tests and to ranks/test_compiled.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import tiny_families
import torch
from models_for_tests import MODELS, apart, gradients, make, pairs, plain_sums, references, tokens, worst
from torch._dynamo.utils import counters
from transformers import AutoConfig

from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model import attention, compiled_layers
from prefopt_dist.model.proof.prove import try_paths
from prefopt_dist.model.proof.result import Proof
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO

pytestmark = pytest.mark.usefixtures("one_thread", "fresh")

QUICK = ("llama-tied", "mistral-window", "gemma2", "phi3")
EXPERTS = ("mixtral", "qwen3_moe", "olmoe")
ON_OTHER_PATHS = ("qwen3_5_text", "granitemoehybrid", "falcon_h1")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph of another test."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")
    compiled_layers._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    compiled_layers._compiled.cache_clear()
    torch._dynamo.reset()


def compare(name: str, checkpointing: bool) -> dict[str, float]:
    """Return the relative errors of log-probs, loss and gradients beside plain float64, after a compiled step."""
    lm = make(name)
    exact = plain.build_plain(lm)
    if checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
        lm.train()
    compiled_layers.compile_layers(lm)
    units = pairs()
    reference = references(units)
    terms = Scorer(lm)(pack(units, 2), DPO(0.3, 0.1), reference)
    loss = terms.loss / len(units)
    loss.backward()
    sums = plain_sums(exact, units)
    expected = plain.dpo(sums, reference, 0.3, 0.1)
    expected["loss"].backward()
    error, tensor = worst(gradients(lm), gradients(exact))
    return {
        "log-probs": apart(terms.sums, sums.detach()),
        "loss": apart(loss.detach(), expected["loss"].detach()),
        f"gradient of {tensor}": error,
    }


BOUNDS = [1e-6, 1e-5, 1e-5]
"""Of the errors that `compare` returns, as in test_scorer.py."""


def beyond(errors: dict[str, float]) -> dict[str, float]:
    """Return the errors that are not within their bounds; a NaN is not."""
    return {of: error for (of, error), most in zip(errors.items(), BOUNDS, strict=True) if not error <= most}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", QUICK)
def test_traced_layers_equal_plain_float64(name: str, checkpointing: bool) -> None:
    assert beyond(compare(name, checkpointing)) == {}
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"


@pytest.mark.slow
@pytest.mark.parametrize("family", [*(name for name in tiny_families.FAMILIES if name not in ON_OTHER_PATHS), *EXPERTS])
def test_special_families_are_proven_with_traced_layers(family: str) -> None:
    """Sinks, experts, latent attention, several kinds of layers: one cut of each, beside plain transformers."""
    special = family in tiny_families.FAMILIES
    config = tiny_families.tiny_config(family) if special else AutoConfig.for_model(family, **tiny_families.SIZES)
    found = try_paths(config, path="shared", fusion="layers")
    assert isinstance(found, Proof), found
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (family, _) in MODELS.items() if family not in EXPERTS])
def test_compiled_layers_equal_plain_float64(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every family of the shared path but mixtures of experts, whose loads are counted inside of the layers."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    assert beyond(compare(name, checkpointing=False)) == {}
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"


def test_long_rows_take_the_kernel_of_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no gradient of its own, so that the operator computes it again under autograd."""
    monkeypatch.setattr(attention, "MOST_KEYS_IN_BLOCKS", 1)
    assert beyond(compare("mistral-window", checkpointing=False)) == {}
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"


@pytest.mark.parametrize(("name", "kinds"), [("llama-tied", 1), ("gemma2", 2)])
def test_one_graph_for_all_layers_and_row_lengths(name: str, kinds: int) -> None:
    """Three layers of one kind, or two windowed ones and one without a window; ten lengths; a break would raise."""
    lm = make(name)
    compiled_layers.compile_layers(lm)
    scorer = Scorer(lm)
    units = pairs()
    lengths = set()
    for n in range(1, len(units)):
        for some in (units[:n], units[n:]):
            batch = pack(some, 2)
            scorer(batch, DPO(0.3, 0.1), references(some)).loss.backward()
            lengths.add(batch.tokens)
    assert len(lengths) >= 10
    assert counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_code_takes_rows_of_any_length(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shorter than the guess and longer; of the norms of heads the sums are over more numbers than tokens."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what `prepare` sets is taken back
    compiled_layers.prepare(tmp_path)
    found = []
    for compiled in (False, True):
        lm = make(name)
        if compiled:
            compiled_layers.compile_layers(lm)
        draw = np.random.RandomState(1)
        for n in (1, 90):
            units = [Unit(i, tokens(draw, 30), (tokens(draw, 40), tokens(draw, 30))) for i in range(n)]
            batch = pack(units, 2)
            Scorer(lm)(batch, DPO(0.3, 0.1), references(units)).loss.backward()
        assert batch.tokens > 2 * compiled_layers.GUESSED_TOKENS
        found.append(gradients(lm))
    assert counters["stats"]["unique_graphs"] == 1
    assert worst(found[1], {n: g.double() for n, g in found[0].items()})[0] <= 2e-5


def test_without_gradients_and_for_one_token_the_layers_are_called_as_they_are() -> None:
    lm = make("llama-tied")
    compiled_layers.compile_layers(lm)
    scorer = Scorer(lm)
    with torch.no_grad():
        scorer(pack(pairs(), 2), None)
    empty = pack([], 2)
    assert empty.tokens == 1
    scorer(empty, DPO(0.3, 0.1), torch.empty(0, 2, dtype=torch.float64)).loss.backward()
    assert not counters["stats"]["unique_graphs"]
    assert compiled_layers.is_compiled(lm)


def test_a_library_that_was_cut_short_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch loads each that exists: a kill while it was written would end every later start."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what `prepare` sets is taken back
    compiled_layers.prepare(tmp_path)
    folder = Path(compiled_layers.os.environ["TORCHINDUCTOR_CACHE_DIR"])
    (folder / "ab").mkdir(parents=True)
    (folder / "locks").mkdir()
    whole = Path(torch._C.__file__).read_bytes()
    written = {"whole": whole, "half": whole[: len(whole) // 2], "head": whole[:40], "zeros": bytes(4096), "empty": b""}
    for name, content in written.items():
        (folder / "ab" / f"{name}.main.so").write_bytes(content)
    compiled_layers.prepare(tmp_path)
    assert [file.name for file in (folder / "ab").iterdir()] == ["whole.main.so"]


def test_code_for_another_processor_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors of one class, such as AVX512, may differ in the instructions that the compiler takes."""
    known = dict(torch.cpu.get_capabilities())
    digests = []
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: known | {"amx_tile": amx})
        digests.append(compiled_layers._digest())
    assert digests[0] != digests[1]


def test_code_for_another_number_of_threads_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of a parallel sum depends on it, and the compiler's own key does not."""
    found: list[Any] = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        compiled_layers.prepare(tmp_path)
        found.append(compiled_layers.os.environ["TORCHINDUCTOR_CACHE_DIR"])
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert len({*found}) == 2
    assert all(Path(folder).parent == tmp_path / "compiled" for folder in found)
