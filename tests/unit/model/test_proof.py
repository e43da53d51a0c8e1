"""The proof of a path: which path each family takes, what a cut keeps, and that a planted lie is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from transformers import AttentionInterface, AutoConfig, PreTrainedConfig

from prefopt_dist.batching.micro_batch import MicroBatch, Segment, gather
from prefopt_dist.batching.packing import pack
from prefopt_dist.errors import UserError
from prefopt_dist.model import attention, scorer
from prefopt_dist.model.attention import shared_prefix_attention
from prefopt_dist.model.head import FinalTransform
from prefopt_dist.model.proof import cache, case, layers, reach
from prefopt_dist.model.proof.cut import cuts
from prefopt_dist.model.proof.kinds import layer_kinds
from prefopt_dist.model.proof.prove import prove
from prefopt_dist.model.proof.result import Proof, Refusal, Tried

KEY = "model.name_or_path"
PATHS_OF = {
    **dict.fromkeys(("olmo3", "smollm3", "gpt_oss", "glm4_moe", "gpt_neox", "granite", "deepseek_v3"), "shared"),
    **dict.fromkeys(("ministral3", "cohere", "gemma4_text"), "shared"),
    **dict.fromkeys(("qwen3_5_text", "granitemoehybrid", "falcon_h1"), "plain"),
}


def proof(config: PreTrainedConfig, path: Any = None) -> Proof:
    return prove(config, key=KEY, path=path)


def tiny(family: str, **more: Any) -> PreTrainedConfig:
    if family in tiny_families.FAMILIES:
        return tiny_families.tiny_config(family, **more)
    return AutoConfig.for_model(family, **tiny_families.SIZES | more)


@pytest.mark.parametrize("family", PATHS_OF)
def test_a_family_takes_its_path(family: str) -> None:
    found = proof(tiny(family))
    assert found.path == PATHS_OF[family], found
    assert found.influence < 1e-5
    for tried in found.tried[:-1]:
        assert not tried.equal
        assert tried.text().startswith(f"{tried.path}: ")


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0, 8.0, 12.0, 16.0]}
LONGROPE = FACTORS | {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128}
STATIC = {"rope_type": "default", "rope_theta": 1e3}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_parameters": DYNAMIC}),
        ("mistral", {"rope_parameters": LONGROPE}),
        (
            "gemma3_text",
            {
                "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": STATIC},
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
        ),
    ],
)
def test_a_rotary_scaling_that_looks_at_the_length(family: str, fields: dict[str, Any]) -> None:
    """Up to the original length nothing changes; beyond it each sequence is computed by itself, and that is proven."""
    config = tiny(family, **fields)
    assert prove(config, key=KEY, max_length=128).path == "shared"
    for max_length in (1000, None):
        found = prove(config, key=KEY, max_length=max_length)
        assert found.path == "alone"
        assert found.influence < 1e-5
        for tried in found.tried[:2]:
            assert (tried.gradients or 0) > 1e-3
        assert all(tried.why.endswith("looks at the longest of the row") for tried in found.tried[:-1])
    with pytest.raises(UserError, match=r"the path plain does not .*looks at the longest of the row.*model.path=auto"):
        prove(config, key=KEY, path="plain", max_length=1000)


def test_a_length_that_is_remembered_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "reset_before_each_use", lambda lm: None)
    with pytest.raises(UserError, match=r"no path computes .*; alone: log-probs differ by"):
        prove(tiny("llama", rope_parameters=DYNAMIC), key=KEY, max_length=1000)


def test_weights_are_drawn_on_the_host_whatever_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(case, "randomise", lambda lm: drawn.append(next(lm.parameters()).device.type))
    with pytest.raises(UserError, match="no small copy of this llama model can be computed"):
        prove(tiny("llama"), key=KEY, device=torch.device("meta"))
    assert set(drawn) == {"cpu"}


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Exchange our attention by one that changes its arguments."""

    def register(change: Callable[[torch.Tensor, dict[str, Any]], dict[str, Any]]) -> None:
        def lie(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **given: Any) -> Any:
            return shared_prefix_attention(module, query, key, value, mask, **given | change(query, given))

        monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, lie)

    return register


def assert_found(config: PreTrainedConfig) -> None:
    """The lie is in our attention alone: both paths that use it are refused with numbers, and the plain one is not."""
    found = proof(config)
    assert found.path == "plain"
    for tried in found.tried[:2]:
        assert not tried.equal
        assert (tried.gradients or 0) > 1e-3, tried.text()
    with pytest.raises(UserError, match=r"the path shared does not .* log-probs differ by .*model.path=auto"):
        proof(config, "shared")


def test_dropped_sinks_are_found(lying: Callable[..., None]) -> None:
    lying(lambda query, given: {"s_aux": None})
    assert_found(tiny("gpt_oss"))


def test_a_window_off_by_one_is_found(lying: Callable[..., None]) -> None:
    lying(lambda query, given: {"sliding_window": given["sliding_window"] + 1})
    assert_found(tiny("mistral", sliding_window=4096))


def test_a_neighbour_that_is_seen_is_found(lying: Callable[..., None]) -> None:
    def whole_row(query: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
        segments = (Segment(0, 0, 0, query.shape[2]),)
        return {"segments": segments, "gathered": gather(segments)}

    lying(whole_row)
    assert_found(tiny("llama"))


def test_a_forgotten_logit_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("cohere", logit_scale=0.25)
    assert proof(config).path == "shared"
    monkeypatch.setattr(scorer, "final_transform", lambda lm: FinalTransform(1.0, None))
    with pytest.raises(UserError, match=r"no path .* of this cohere model alone\. shared: .* plain: "):
        proof(config)


def test_positions_of_the_second_response_off_by_one_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*given: Any) -> MicroBatch:
        batch = pack(*given)
        positions = batch.position_ids.clone()
        for segment in batch.segments:
            if segment.prefix_end > segment.prefix_start:
                positions[0, segment.start : segment.end] += 1
        return replace(batch, position_ids=positions)

    monkeypatch.setattr(case, "pack", shifted)
    found = proof(tiny("llama"))
    assert found.path == "packed"  # which has no response behind another's prompt
    assert not found.tried[0].equal


@pytest.mark.parametrize(("family", "sizes"), [("bert", {}), ("xlnet", {"d_head": 8, "d_inner": 32})])
def test_a_model_that_is_not_causal_is_refused(family: str, sizes: dict[str, int]) -> None:
    few = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **few | sizes)
    with pytest.raises(UserError, match=f"this {family} model is not causal: a later token changes an earlier logit"):
        proof(config)


def test_an_argument_of_the_attention_that_is_not_known_ends_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHOOSING", ())
    found = proof(tiny("mistral", sliding_window=4096))
    assert found.path == "plain"
    assert "passes sliding_window to its attention" in found.tried[0].why


def test_a_cut_keeps_every_kind_of_layer_in_order() -> None:
    config = AutoConfig.for_model("gemma4_text")
    kinds = layer_kinds(config)
    assert kinds is not None
    cut = next(cuts(config, most_bytes=16 * 2**20))
    few = layer_kinds(layers.cut_layers(config))
    assert few is not None
    assert len(few) == cut.config.num_hidden_layers < config.num_hidden_layers
    assert set(few) == set(kinds)
    assert cut.config.sliding_window == reach.WINDOW
    assert any(change.startswith("num_hidden_layers: ") for change in cut.changes)


def test_a_cut_keeps_first_dense_layers_experts_and_widths() -> None:
    config = AutoConfig.for_model("deepseek_v3")
    cut = next(cuts(config, most_bytes=64 * 2**30))
    assert cut.config.hidden_size == config.hidden_size
    assert (cut.config.num_hidden_layers, cut.config.first_k_dense_replace) == (2, 1)
    assert (cut.config.n_routed_experts, cut.config.num_experts_per_tok) == (8, 2)
    assert cut.config.vocab_size == 1024
    narrow = next(cuts(config, most_bytes=2**30))
    assert narrow.config.hidden_size < config.hidden_size
    ratio = config.num_attention_heads // config.num_key_value_heads
    assert narrow.config.num_attention_heads // narrow.config.num_key_value_heads == ratio


@pytest.mark.parametrize(("max_length", "original"), [(None, reach.ORIGINAL), (4096, reach.NOT_REACHED)])
def test_sequences_cross_the_length_of_longrope_where_the_run_does(max_length: int | None, original: int) -> None:
    rotary = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48, "rope_theta": 1e4}
    config = AutoConfig.for_model("phi3", rope_parameters=rotary | {"original_max_position_embeddings": 4096})
    cut = next(cuts(config, max_length, most_bytes=2**22))
    assert cut.config.rope_parameters["original_max_position_embeddings"] == original


@pytest.mark.parametrize(("max_length", "most"), [(4096, reach.NOT_REACHED), (4097, reach.ORIGINAL)])
@pytest.mark.parametrize("original", [1024, 8192])
def test_dynamic_is_cut_by_the_largest_position(max_length: int, most: int, original: int) -> None:
    """As transformers and the choice of the path count, whatever original length stands beside."""
    rotary = DYNAMIC | {"original_max_position_embeddings": original}
    cut = next(cuts(tiny("llama", max_position_embeddings=4096, rope_parameters=rotary), max_length, most_bytes=2**22))
    assert cut.config.max_position_embeddings == most


def test_a_proof_is_kept_for_the_same_model_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(config: PreTrainedConfig, path: Any = None) -> tuple[Proof, bool]:
        device = torch.device("cpu")
        return cache.proven_path(config, key=KEY, path=path, max_length=64, device=device, cache=tmp_path / "proofs")

    first, kept = asked(tiny("llama"))
    assert not kept
    assert asked(tiny("llama")) == (first, True)
    assert not asked(tiny("llama", rms_norm_eps=1e-3))[1]
    assert not asked(tiny("llama"), "plain")[1]
    file = next((tmp_path / "proofs").glob("*.json"))
    for each in (tmp_path / "proofs").glob("*.json"):
        each.write_text(file.read_text()[:50])  # damaged
    assert not asked(tiny("llama"))[1]
    monkeypatch.setattr(cache, "_sources", lambda: "other code")
    assert not asked(tiny("llama"))[1]


def test_a_refusal_is_kept_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For this path alone, and with the remedy of whoever asks; not where memory ran out."""

    def asked(path: Any, remedy: str | None = None) -> str:
        given: dict[str, Any] = {"max_length": 64, "device": torch.device("cpu"), "cache": tmp_path}
        with pytest.raises(UserError) as raised:
            cache.proven_path(tiny("qwen3_5_text"), key=KEY, path=path, remedy=remedy, **given)
        return str(raised.value)

    first = asked("shared")
    assert first.startswith(f"{KEY}: the path shared does not compute the numbers of this qwen3_5_text model alone. ")
    assert first.endswith(". Allowed are 1e-06 and 1e-05. Set model.path=auto.")
    (file,) = tmp_path.glob("*.json")
    kept = f". (Found in the cache; remove {file} to try again.) "
    monkeypatch.setattr(cache, "try_paths", lambda *_, **__: pytest.fail("proven again"))
    assert asked("shared") == first.replace(". Set model", f"{kept}Set model")
    assert asked("shared", "Begin anew.") == first.replace(". Set model.path=auto.", f"{kept}Begin anew.")
    monkeypatch.undo()
    assert (
        cache.proven_path(
            tiny("qwen3_5_text"), key=KEY, path=None, max_length=64, device=torch.device("cpu"), cache=tmp_path
        )[0].path
        == "plain"
    )

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = set(tmp_path.glob("*.json"))
    monkeypatch.setattr(case, "pack", full)
    assert "packed: OutOfMemoryError: CUDA out of memory" in asked("packed")
    monkeypatch.setattr(case, "randomise", full)
    assert "no small copy of this qwen3_5_text model" in asked("alone")
    assert set(tmp_path.glob("*.json")) == before


def test_an_error_of_a_compiler_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of this machine or its disk: one that is mended compiles the same model."""
    given: dict[str, Any] = {"path": "shared", "max_length": 64, "device": torch.device("cpu"), "cache": tmp_path}
    for sums, kept in ((None, 0), (1.0, 1)):
        refusal = Refusal("the path differs.", "", (Tried("shared", False, sums, why="CppCompileError: no space"),))
        monkeypatch.setattr(cache, "try_paths", lambda *_, refusal=refusal, **__: refusal)
        with pytest.raises(UserError, match="the path differs"):
            cache.proven_path(tiny("llama"), key=KEY, fusion="layers", **given)
        assert len(list(tmp_path.glob("*.json"))) == kept


def test_the_random_numbers_of_a_run_do_not_depend_on_the_proof() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    proof(tiny("llama"))
    assert torch.equal(torch.rand(4), wanted)
