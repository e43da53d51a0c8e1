"""The packed, shared path against plain float64: log-probs, losses and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import plain
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt_dist.data.micro_batch import Segment, Unit, pack, packed_tokens
from prefopt_dist.model import attention, head
from prefopt_dist.model.load import FAMILIES
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO, SFT, Terms

VOCABULARY = 67
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 5
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [4.0, 8.0, 12.0, 16.0],
    "original_max_position_embeddings": 128,
}
GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa-biases": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW, "tie_word_embeddings": False}),
    "mistral-window-2": ("mistral", {"sliding_window": 2}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-upper-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "tie_word_embeddings": False},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3-window": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    # Caps that bind, windows that are shorter than the sequences, heads whose scale is not 1/√d.
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma2-untied-no-caps": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "gemma2-attention-cap": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window_pattern": 2}),
    "gemma3-untied-linear": (
        "gemma3_text",
        GEMMA
        | {
            "tie_word_embeddings": False,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            },
        },
    ),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "phi3-window-partial-tied": (
        "phi3",
        {
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "olmo2-tied": ("olmo2", {"tie_word_embeddings": True}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows of logits, so that every micro-batch has many; tests may set another size."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 7 * VOCABULARY)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model whose every parameter matters: biases and norms moved off 0 and 1, log-probs wide apart."""
    family, fields = MODELS[name]
    config = AutoConfig.for_model(family, **(SIZES | fields | changes))
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return lm.to(dtype).eval()


def tokens(draw: np.random.RandomState, n: int) -> np.ndarray:
    return draw.randint(0, VOCABULARY, size=n).astype(np.int32)


def pairs() -> list[Unit]:
    """Every kind of sharing and of length: see the names."""
    draw = np.random.RandomState(1)
    shared_by_two, shared_by_four, lonely, single, begun = (tokens(draw, n) for n in (9, 6, 12, 1, 5))
    same, a, b, c, one, other_one = (tokens(draw, n) for n in (11, 8, 3, 17, 1, 1))
    assert one[0] != other_one[0]
    rows = [
        (shared_by_two, (a, b)),
        (lonely, (tokens(draw, 20), tokens(draw, 2))),
        (shared_by_four, (one, other_one)),  # one-token responses first: the prompt's segment is the prompt alone
        (shared_by_two, (c, a)),  # a: chosen there, rejected here
        (single, (tokens(draw, 13), one)),
        (shared_by_four, (same, one)),
        (shared_by_four, (same, c)),
        (shared_by_four, (b, same)),
        (lonely[:-1], (a, c)),  # a prompt that begins another one
        (shared_by_two, (a, b)),  # a whole row again
        (single, (one, other_one)),
        (tokens(draw, 1), (one, tokens(draw, 30))),
        (begun, (np.r_[b, a], np.r_[b, c])),  # responses that begin alike
        (begun, (np.r_[b, other_one], b)),  # one that begins another one, and b is now told from two
        (tokens(draw, 4), (a, np.r_[a, one])),
        (tokens(draw, 4), (np.r_[c, one], c[:-1])),
        (tokens(draw, 7), (np.r_[c, one], np.r_[c, other_one])),  # apart in their last token only
    ]
    return [Unit(100 + i, prompt, responses) for i, (prompt, responses) in enumerate(rows)]


def plain_sums(model: Any, units: list[Unit]) -> torch.Tensor:
    return torch.stack([torch.stack([plain.sequence_logp(model, u.prompt, r) for r in u.responses]) for u in units])


def references(units: list[Unit]) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    lengths = torch.tensor([[len(r) for r in u.responses] for u in units], dtype=torch.float64)
    return -lengths * (3.5 + 2 * torch.rand(lengths.shape, generator=draw, dtype=torch.float64))


def gradients(lm: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.double().clone() for n, p in lm.named_parameters()}


def worst(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest ‖Δ‖/‖g‖ of a tensor, and its name."""
    assert got.keys() == exact.keys()
    return max((float((got[n] - exact[n]).norm() / exact[n].norm()), n) for n in exact)


def apart(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).abs() / exact.abs()).max().item()


def test_every_family_is_tried_tied_and_untied() -> None:
    tried = {(f, make(name).config.tie_word_embeddings) for name, (f, _) in MODELS.items()}
    assert tried == {(f, tied) for f in FAMILIES for tied in (False, True)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_equals_plain_float64(name: str, checkpointing: bool) -> None:
    lm = make(name)
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.train()
    exact = plain.build_plain(lm)
    units = pairs()
    reference = references(units)
    batch = pack(units, 2)
    terms = Scorer(lm)(batch, DPO(0.3, 0.1), reference)
    (terms.loss / len(units)).backward()

    sums = plain_sums(exact, units)
    assert sums.std() > 5  # else the comparison says little
    expected = plain.dpo(sums, reference, 0.3, 0.1)
    expected["loss"].backward()
    assert terms.sums.dtype == torch.float64
    assert apart(terms.sums, sums.detach()) <= 1e-6
    assert (terms.loss / len(units)).item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    scale = 0.3 * sums.abs().sum(1).mean().item()
    means = dict(zip(DPO.metrics, (terms.statistics / len(units)).tolist(), strict=True))
    for metric, value in expected.items():
        assert means[metric] == pytest.approx(value.item(), rel=1e-5, abs=1e-6 * scale), metric
    error, tensor = worst(gradients(lm), gradients(exact))
    print(f"{name}: sums {apart(terms.sums, sums.detach()):.1e}, gradients {error:.1e} ({tensor})")
    assert error <= 1e-5, f"{tensor}: {error}"


@pytest.mark.parametrize("name", ["llama-tied", "mistral-window", "qwen2", "qwen3"])
def test_sft_equals_plain_float64(name: str) -> None:
    lm = make(name)
    exact = plain.build_plain(lm)
    units = [Unit(u.row, u.prompt, u.responses[:1]) for u in pairs()]
    terms = Scorer(lm)(pack(units, 1), SFT())
    (terms.loss / len(units)).backward()
    expected = plain.sft_loss(exact, [(u.prompt, u.responses[0]) for u in units])
    expected.backward()
    assert (terms.loss / len(units)).item() == pytest.approx(expected.item(), rel=1e-6)
    assert worst(gradients(lm), gradients(exact))[0] <= 1e-5


def test_the_window_matters() -> None:
    """The comparison above would miss a window that both leave out."""
    lm = make("mistral-window")
    exact, open_ = plain.build_plain(lm), plain.build_plain(make("mistral-window", sliding_window=None))
    u = pairs()[1]
    narrow, wide = (plain.sequence_logp(m, u.prompt, u.responses[0]) for m in (exact, open_))
    assert abs(narrow - wide) > 1e-2


def test_plain_of_a_folder_is_plain_of_the_model(tmp_path: Any) -> None:
    lm = make("qwen3")
    lm.save_pretrained(tmp_path)
    u = pairs()[0]
    from_folder, from_model = (
        plain.sequence_logp(plain.build_plain(s), u.prompt, u.responses[0]) for s in (tmp_path, lm)
    )
    assert from_folder.item() == pytest.approx(from_model.item(), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 10**6])
def test_block_size_of_the_head_does_not_matter(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", rows * VOCABULARY)
    lm = make("llama-tied")
    exact = plain.build_plain(lm)
    units = pairs()
    terms = Scorer(lm)(pack(units, 2), DPO(0.3), references(units))
    terms.loss.backward()
    sums = plain_sums(exact, units)
    plain.dpo_loss(sums, references(units), 0.3).sum().backward()
    assert apart(terms.sums, sums.detach()) <= 1e-6
    assert worst(gradients(lm), gradients(exact))[0] <= 1e-5


def test_block_smaller_than_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", VOCABULARY // 2)
    scorer = Scorer(make("llama-tied"))
    batch = pack(pairs(), 2)
    one_row = scorer(batch)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", VOCABULARY)
    assert torch.equal(one_row, scorer(batch))


def test_never_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 6: no tensor of [scored tokens, vocabulary] is made, forward or backward."""
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor) and t.dim() >= 2 and t.shape[-1] == VOCABULARY:
                    made.append(t.numel() // VOCABULARY)
            return out

    lm = make("llama-untied")
    batch = pack(pairs(), 2)
    assert len(batch.target) > 10 * 7
    with Watch():
        Scorer(lm)(batch, DPO(0.3), references(pairs())).loss.backward()
    rows_at_once = {m for m in made if m != SIZES["hidden_size"]}  # [D, V]: a transposed weight
    assert max(rows_at_once) <= 7


def test_bias_of_the_head() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, VOCABULARY)
    exact = copy.deepcopy(layer).double()
    hidden, target = torch.randn(40, 8, requires_grad=True), torch.randint(0, VOCABULARY, (40,))
    weight = torch.randn(40)
    head.attach_logp_head(layer)
    logps = layer(hidden, target[:, None])[:, 0]
    (logps * weight).sum().backward()
    twin = hidden.detach().double().requires_grad_()
    wanted = torch.log_softmax(exact(twin), -1).gather(-1, target[:, None])[:, 0]
    (wanted * weight.double()).sum().backward()
    assert apart(logps.double(), wanted) <= 1e-6
    for got, want in ((layer.weight, exact.weight), (layer.bias, exact.bias), (hidden, twin)):
        assert (got.grad - want.grad).norm() / want.grad.norm() <= 1e-6
    assert torch.equal(layer(hidden), torch.nn.functional.linear(hidden, layer.weight, layer.bias))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_extreme_logits_stay_finite(offset: float) -> None:
    layer = torch.nn.Linear(2, 5, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[offset, 0], [0, 0], [0, 1], [1, 0], [0, -1.0]]))
    head.attach_logp_head(layer)
    hidden = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], requires_grad=True)
    logps = layer(hidden, torch.tensor([[0], [0]]))[:, 0]
    wanted = torch.log_softmax(torch.nn.functional.linear(hidden.double(), layer.weight.double()), -1)[:, 0]
    torch.testing.assert_close(logps.double(), wanted, rtol=1e-6, atol=1e-6)
    logps.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["llama-tied", "mistral-window", "qwen2-window-upper-layers"])
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    found: list[tuple[Terms, dict[str, torch.Tensor]]] = []
    for checkpointing in (False, True):
        lm = make(name, use_cache=True)
        if checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert lm.is_gradient_checkpointing
        terms = Scorer(lm).train()(pack(pairs(), 2), DPO(0.3), references(pairs()))
        terms.loss.backward()
        found.append((terms, gradients(lm)))
    (a, a_gradients), (b, b_gradients) = found
    assert torch.equal(a.sums, b.sums)
    assert all(torch.equal(a_gradients[n], b_gradients[n]) for n in a_gradients)


@pytest.mark.parametrize("name", ["llama-tied", "mistral-window", "qwen3-window"])
def test_a_cache_in_the_configuration_changes_nothing(name: str) -> None:
    batch = pack(pairs(), 2)
    sums = []
    for use_cache in (False, True):
        lm = make(name)
        lm.config.use_cache = use_cache
        if lm.generation_config is not None:
            lm.generation_config.use_cache = use_cache
        scorer = Scorer(lm)
        sums += [scorer(batch), scorer.train()(batch)]
    assert all(torch.equal(s, sums[0]) for s in sums)


ONE_OF_EACH = ["llama-tied", "mistral-window", "qwen2", "qwen3", "gemma2", "gemma3", "phi3-longrope", "olmo2"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_other_tokens_of_a_neighbour_change_no_bit(name: str) -> None:
    """One pair's tokens changed, its lengths kept: the row has the same shape, the others the same bits."""
    scorer = Scorer(make(name))
    units = pairs()
    draw = np.random.RandomState(9)
    k = 1
    changed = Unit(1, tokens(draw, len(units[k].prompt)), tuple(tokens(draw, len(r)) for r in units[k].responses))
    before, after = pack(units, 2), pack([*units[:k], changed, *units[k + 1 :]], 2)
    assert before.segments == after.segments
    assert not torch.equal(before.input_ids, after.input_ids)
    with torch.no_grad():
        sums, again = scorer(before)[before.units], scorer(after)[after.units]
    others = [i for i in range(len(units)) if i != k]
    assert torch.equal(sums[others], again[others])
    assert apart(again[k], sums[k]) > 1e-3


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_neighbours_do_not_matter(name: str) -> None:
    """Another pair's tokens changed, lengthened or left out: every other pair keeps its log-probs."""
    scorer = Scorer(make(name))
    units = pairs()
    before = pack(units, 2)
    with torch.no_grad():
        sums = scorer(before)[before.units]
    draw = np.random.RandomState(9)
    changes = {
        "other response": Unit(1, units[3].prompt, (tokens(draw, 17), tokens(draw, 8))),
        "longer": Unit(1, units[3].prompt, (tokens(draw, 90), tokens(draw, 70))),
        "other prompt": Unit(1, tokens(draw, 40), units[3].responses),
    }
    for what, changed in changes.items():
        batch = pack([*units[:3], changed, *units[4:]], 2)
        with torch.no_grad():
            again = scorer(batch)[batch.units]
        others = [i for i in range(len(units)) if i != 3]
        assert apart(again[others], sums[others]) <= 1e-6, what
        assert apart(again[3], sums[3]) > 1e-3, what
    for i, u in enumerate(units):
        alone = pack([u], 2)
        with torch.no_grad():
            assert apart(scorer(alone)[alone.units][0], sums[i]) <= 1e-6
    backwards = pack(units[::-1], 2)
    with torch.no_grad():
        assert apart(scorer(backwards)[backwards.units].flip(0), sums) <= 1e-6


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_empty_micro_batch_gives_zeros(name: str, checkpointing: bool) -> None:
    for objective, responses, reference in (
        (DPO(0.1), 2, torch.zeros(0, 2, dtype=torch.float64)),
        (SFT(), 1, None),
    ):
        lm = make(name)
        if checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        terms = Scorer(lm).train()(pack([], responses), objective, reference)
        assert terms.loss.item() == 0.0
        assert terms.statistics.tolist() == [0.0] * len(objective.metrics)
        assert terms.per_unit.shape == (0, len(objective.metrics))
        terms.loss.backward()
        for n, p in lm.named_parameters():
            assert p.grad is not None, n
            assert torch.count_nonzero(p.grad) == 0, n


def test_bfloat16_is_near_float64() -> None:
    """Against the float64 model of the same (bfloat16) weights: rounding of 8 bits, not errors."""
    lm = make("llama-untied", torch.bfloat16)
    exact = plain.build_plain(lm)
    units = pairs()
    terms = Scorer(lm)(pack(units, 2), DPO(0.05), references(units))
    assert terms.sums.dtype == torch.float64
    terms.loss.backward()
    sums = plain_sums(exact, units)
    plain.dpo_loss(sums, references(units), 0.05).sum().backward()
    lengths = torch.tensor([[len(r) for r in u.responses] for u in units], dtype=torch.float64)
    assert ((terms.sums - sums.detach()).abs() / lengths.sqrt()).max() <= 0.1
    error, tensor = worst(gradients(lm), gradients(exact))
    assert error <= 0.05, f"{tensor}: {error}"


def test_bfloat16_head_gradient_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 blocks of one row: accumulated in bfloat16 the sum would stall, far from the exact one."""
    torch.manual_seed(0)
    n, d = 2000, 16
    hidden = (torch.randn(n, d) + 0.5).bfloat16().requires_grad_()
    target = torch.randint(0, VOCABULARY, (n,))
    weight = (torch.randn(VOCABULARY, d) * 0.3).bfloat16()

    twin_hidden, twin = hidden.detach().double().requires_grad_(), weight.double().requires_grad_()
    torch.log_softmax(twin_hidden @ twin.t(), -1).gather(-1, target[:, None]).sum().backward()
    assert twin.grad is not None
    errors = {}
    for rows in (1, 16, n):
        monkeypatch.setattr(head, "LOGITS_AT_ONCE", rows * VOCABULARY)
        layer = torch.nn.Linear(d, VOCABULARY, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.copy_(weight)
        head.attach_logp_head(layer)
        hidden.grad = None
        layer(hidden, target[:, None]).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.bfloat16
        errors[rows] = float((layer.weight.grad.double() - twin.grad).norm() / twin.grad.norm())
        assert hidden.grad is not None
        assert twin_hidden.grad is not None
        assert (hidden.grad.double() - twin_hidden.grad).norm() / twin_hidden.grad.norm() <= 0.02
    assert max(errors.values()) <= 4e-3, errors  # one rounding to 8 bits is up to 3.9e-3 an element


def test_frozen_parts_get_no_gradient() -> None:
    lm = make("llama-untied")
    lm.get_output_embeddings().weight.requires_grad_(False)
    Scorer(lm)(pack(pairs(), 2), DPO(0.3), references(pairs())).loss.backward()
    assert lm.get_output_embeddings().weight.grad is None
    assert lm.model.layers[0].mlp.up_proj.weight.grad.norm() > 0


def test_parameter_names_gain_only_a_prefix() -> None:
    lm = make("llama-tied")
    names = [n for n, _ in lm.named_parameters()]
    assert [n for n, _ in Scorer(lm).named_parameters()] == [f"lm.{n}" for n in names]
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


# The packed row


def test_pack_of_a_hand_made_row() -> None:
    def ids(*t: int) -> np.ndarray:
        return np.array(t, dtype=np.int32)

    batch = pack(
        [
            Unit(7, ids(1, 2), (ids(3, 4, 5), ids(6))),
            Unit(9, ids(8), (ids(3, 4), ids(9, 9, 9))),
            Unit(4, ids(1, 2), (ids(6), ids(3, 4, 7, 7))),
        ],
        2,
    )
    #                                prompt  a1   b1 none, c1's rest (7), prompt, a2, b2
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 3, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 1, 2]]
    assert batch.segments == (Segment(0, 0, 0, 4), Segment(0, 4, 4, 5), Segment(5, 5, 5, 7), Segment(5, 6, 7, 9))
    assert batch.source.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.target.tolist() == [[3, 6], [4, 0], [5, 7], [7, 0], [3, 9], [4, 0], [9, 0], [9, 0]]
    #                              3  4  5   6   3  4  7  7   3  4    9  9  9
    assert batch.scored.tolist() == [0, 2, 4, 1, 0, 2, 5, 6, 8, 10, 9, 12, 14]
    assert batch.counts.tolist() == [3, 1, 4, 2, 3]
    assert batch.units.tolist() == [[0, 1], [3, 4], [1, 2]]
    assert batch.rows == (7, 9, 4)
    assert batch.tokens == 9
    assert batch.gathered.keys.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 5, 7, 8]
    assert batch.gathered.query_ends.tolist() == [0, 4, 5, 7, 9]
    assert batch.gathered.key_ends.tolist() == [0, 4, 9, 11, 14]
    assert (batch.gathered.longest_query, batch.gathered.longest_key) == (4, 5)


def test_every_segment_covers_the_row_once() -> None:
    batch = pack(pairs(), 2)
    covered = [t for s in batch.segments for t in range(s.start, s.end)]
    assert covered == list(range(batch.tokens))
    assert batch.counts.sum() == len(batch.scored)
    assert len(batch.target) == len(batch.source) == len(set(batch.source.tolist()))


def test_every_scored_token_is_its_response_s() -> None:
    """What the row says of each sequence, read back: its tokens, predicted by those before them."""
    units = pairs()
    batch = pack(units, 2)
    assert batch.tokens == packed_tokens(units)
    ends = batch.counts.cumsum(0).tolist()
    per_state = batch.target.shape[1]
    for u, sequences in zip(units, batch.units.tolist(), strict=True):
        for response, q in zip(u.responses, sequences, strict=True):
            places = batch.scored[ends[q] - int(batch.counts[q]) : ends[q]]
            assert batch.target.flatten()[places].tolist() == response.tolist()
            source = batch.source[places // per_state]
            assert batch.input_ids[0, source].tolist() == [u.prompt[-1], *response[:-1]]
            assert batch.position_ids[0, source].tolist() == list(
                range(len(u.prompt) - 1, len(u.prompt) + len(response) - 1)
            )


def test_a_common_beginning_stands_in_the_row_once() -> None:
    draw = np.random.RandomState(2)
    prompt, common = tokens(draw, 6), tokens(draw, 5)
    a, b = np.r_[common, 1, tokens(draw, 3)], np.r_[common, 2, tokens(draw, 7)]
    a, b = a.astype(np.int32), b.astype(np.int32)
    batch = pack([Unit(0, prompt, (a, b))], 2)
    assert batch.tokens == 6 + 5 + 3 + 7
    assert len(batch.source) == 1 + 5 + 3 + 7
    assert batch.segments[1].prefix_end == 11


def test_to_a_device_keeps_all() -> None:
    batch = pack(pairs(), 2)
    moved = batch.to(torch.device("meta"))
    assert moved.segments == batch.segments
    assert moved.rows == batch.rows
    for n in ("input_ids", "position_ids", "source", "target", "scored", "counts", "units"):
        assert getattr(moved, n).device.type == "meta"
        assert getattr(moved, n).shape == getattr(batch, n).shape
