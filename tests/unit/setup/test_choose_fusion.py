"""The choice of a training's fusion: by the configuration, the length of the run, the machine, and a proof."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny_families
import torch
import worlds
from transformers import AutoConfig

from prefopt_dist import cli
from prefopt_dist.config import Config, identity, load_config
from prefopt_dist.errors import UserError
from prefopt_dist.model import compiled_layers, fusion
from prefopt_dist.setup import checks, choose_fusion
from prefopt_dist.setup.choose_fusion import LEAST_FLOP, choose

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LONG = 1e18
NEW: dict[str, Any] = {"data": {"train": None}}
FOUND = SimpleNamespace(seconds=3.0, tried=[SimpleNamespace(text=lambda: "shared: equal")])


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was proven; each proof succeeds."""
    asked: list[dict[str, Any]] = []

    def proven(model: Any, **given: Any) -> Any:
        asked.append(given)
        return FOUND, False

    monkeypatch.setattr(choose_fusion, "proven_path", proven)
    monkeypatch.setattr(compiled_layers, "prepare", lambda folder: None)
    monkeypatch.setattr(compiled_layers, "compiler", lambda: "/usr/bin/g++")
    return asked


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return of(tmp_path)


def of(folder: Path, *overrides: str) -> Config:
    worlds.write_run(folder / "run.yaml", folder / "model", folder / "pairs.jsonl", folder / "run")
    return load_config(folder / "run.yaml", overrides)


def models(path: str = "shared", family: str = "llama", quantised: bool = False) -> Any:
    model = AutoConfig.for_model(family, **tiny_families.SIZES)
    policy = SimpleNamespace(config=model, key="model.name_or_path", quantised=quantised)
    return SimpleNamespace(policy=policy, path=path, adapter=None)


def test_auto_compiles_a_long_run_on_a_cpu(config: Config, proofs: list[dict[str, Any]]) -> None:
    found = choose(config, models(), NEW, LEAST_FLOP * torch.get_num_threads(), CPU)
    assert found.text() == "model.compile: layers, proven in 3 s: shared: equal"
    assert [(asked["fusion"], asked["path"]) for asked in proofs] == [("layers", "shared")]


def test_ten_steps_of_the_benchmark_are_too_short(config: Config, proofs: list[dict[str, Any]]) -> None:
    """8 pairs of some 350 tokens, 11 million parameters: such a step takes two seconds."""
    found = choose(config, models(), NEW, 10 * 3 * 8 * 350 * 2 * 11e6, CPU)
    assert found.text() == "model.compile: none, since the run is too short to gain what the compilation takes"
    assert not proofs


@pytest.mark.parametrize(
    ("of_run", "device", "why"),
    [
        (models("plain"), CPU, "on the path plain"),
        (models(family="mixtral"), CPU, "the loads of the experts"),
        (models(quantised=True), CPU, "the base is quantised"),
        (models(), GPU, "not measured on a GPU"),
    ],
)
def test_auto_leaves_out_what_was_not_measured_or_proven(
    config: Config, proofs: list[dict[str, Any]], of_run: Any, device: torch.device, why: str
) -> None:
    found = choose(config, of_run, NEW, LONG, device)
    assert found.fusion == "none"
    assert why in found.why
    assert not proofs


def test_auto_without_a_compiler(
    config: Config, proofs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled_layers, "compiler", lambda: None)
    assert choose(config, models(), NEW, LONG, CPU).why == "since no C++ compiler is installed"
    with pytest.raises(UserError, match=r"model\.compile: got layers, which needs a C\+\+ compiler .*install g\+\+"):
        choose(of(tmp_path, "model.compile=layers"), models(), NEW, LONG, CPU)


def test_a_proof_that_fails(
    config: Config, proofs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(*_: Any, remedy: str, **__: Any) -> Any:
        raise UserError(f"the path shared with model.compile=layers does not compute. {remedy}")

    monkeypatch.setattr(choose_fusion, "proven_path", failing)
    found = choose(config, models(), NEW, LONG, CPU)
    assert found.fusion == "none"
    assert found.why.startswith("the path shared with model.compile=layers does not compute")
    with pytest.raises(UserError, match=r"Set model\.compile=none\.$"):
        choose(of(tmp_path, "model.compile=layers"), models(), NEW, LONG, CPU)
    with pytest.raises(UserError, match=r"began with it\. Put the versions back"):
        choose(config, models(), {"compile": "layers"}, LONG, CPU)


def test_a_run_keeps_its_choice(config: Config, proofs: list[dict[str, Any]]) -> None:
    assert choose(config, models(), {"compile": "layers"}, 0.0, CPU).fusion == "layers"
    assert choose(config, models(), {"compile": "none"}, LONG, CPU).fusion == "none"
    begun = {"data": {"train": {"rows": 3}}, "starts": [{"step": 0}, {"step": None}]}  # by a version without the key
    assert choose(config, models(), begun, LONG, CPU).why == "with which the run began"


def test_a_start_without_a_step_leaves_the_choice_open(config: Config, proofs: list[dict[str, Any]]) -> None:
    """As the stage `reference` does, which notes data too."""
    scored = {"data": {"train": {"rows": 3}}, "starts": [{"step": None}, {"step": None}]}
    assert choose(config, models(), scored, LONG, CPU).fusion == "layers"


def test_torch_compile_turned_off_in_the_environment(
    config: Config, proofs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then torch would call the layers as they are, and another start with the same run would round otherwise."""
    for name in compiled_layers.TURNED_OFF:
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            found = choose(config, models(), NEW, LONG, CPU)
            assert (found.fusion, name in found.why) == ("none", True)
            with pytest.raises(UserError, match=rf"^model\.compile: got layers, which {name}=1 .*; unset it, or set"):
                choose(of(tmp_path, "model.compile=layers"), models(), NEW, LONG, CPU)
            with pytest.raises(UserError, match=r"^model\.compile: the run began with layers, which .*; unset it$"):
                choose(config, models(), {"compile": "layers"}, LONG, CPU)
    assert not proofs


def test_what_the_machine_of_another_rank_lacks(config: Config, proofs: list[dict[str, Any]], tmp_path: Path) -> None:
    lacking = "which needs a C++ compiler; install g++ (on node2)"
    found = choose(config, models(), NEW, LONG, CPU, lacking)
    assert (found.fusion, "(on node2)" in found.why) == ("none", True)
    with pytest.raises(UserError, match=r"got layers, which needs .* \(on node2\), or set model\.compile=none$"):
        choose(of(tmp_path, "model.compile=layers"), models(), NEW, LONG, CPU, lacking)
    assert not proofs


def test_a_run_that_began_with_layers_asks_for_its_compiler(
    config: Config, proofs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for model.compile=none, with which it would be another run."""
    monkeypatch.setattr(compiled_layers, "compiler", lambda: None)
    with pytest.raises(UserError, match=r"^model\.compile: the run began with layers, which .*; install g\+\+$"):
        choose(config, models(), {"compile": "layers"}, LONG, CPU)


def test_what_is_asked_for_is_done_or_refused(tmp_path: Path, proofs: list[dict[str, Any]]) -> None:
    asked = of(tmp_path, "model.compile=layers")
    assert choose(asked, models(), NEW, 0.0, CPU).fusion == "layers"
    assert choose(of(tmp_path, "model.compile=none"), models(), NEW, LONG, CPU).fusion == "none"
    with pytest.raises(UserError, match=r"^model\.compile: got layers, but on the path plain .*; set it to none$"):
        choose(asked, models("plain"), NEW, LONG, CPU)
    with pytest.raises(UserError, match=r"train\.sequence_parallel"):
        choose(of(tmp_path, "model.compile=layers", "train.sequence_parallel=2"), models(), NEW, LONG, CPU)
    dora = of(tmp_path, "model.compile=layers", "lora.dora=true")
    with pytest.raises(UserError, match=r"lora\.dora"):
        choose(dora, models(), NEW, LONG, CPU)


def test_what_no_machine_could_do_is_refused_before_data_are_read(tmp_path: Path) -> None:
    for of_run in (models("plain"), models(family="mixtral"), models(quantised=True)):
        with pytest.raises(UserError, match=r"^model\.compile: got layers, but .*; set it to none$"):
            choose_fusion.refuse_impossible(of(tmp_path, "model.compile=layers"), of_run)
        choose_fusion.refuse_impossible(of(tmp_path), of_run)
    choose_fusion.refuse_impossible(of(tmp_path, "model.compile=layers"), models())


def test_a_check_refuses_compiled_dora(tmp_path: Path) -> None:
    worlds.write_model(tmp_path / "model")
    worlds.write_pairs(tmp_path / "pairs.jsonl", 4)
    config = of(tmp_path, "model.compile=layers", "lora.dora=true", f"run.cache={tmp_path / 'cache'}")
    with pytest.raises(UserError, match=r"^model\.compile: got layers, but adapters with lora\.dora"):
        cli._check(config, "train")


def test_liger_needs_a_gpu_and_its_package_and_the_family(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proofs: list[dict[str, Any]]
) -> None:
    """Not run on a GPU."""
    asked = of(tmp_path, "model.compile=liger")
    with pytest.raises(UserError, match=r"^model\.compile: got liger, whose kernels run on GPUs alone"):
        choose(asked, models(), NEW, LONG, CPU)
    with pytest.raises(UserError, match=r"^model\.compile: .*needs the package liger_kernel.*set model\.compile=none"):
        choose(asked, models(), NEW, LONG, GPU)
    with pytest.raises(UserError, match=r"^model\.compile: .*liger_kernel"):
        checks.check_packages(asked)  # before a queue
    calls: list[dict[str, Any]] = []
    patches: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    patches._apply_liger_kernel_to_instance = lambda **given: calls.append(given)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    assert choose(asked, models(), NEW, LONG, GPU).fusion == "liger"
    with pytest.raises(UserError, match=r"no kernels for gpt_neox models"):
        choose(asked, models(family="gpt_neox"), NEW, LONG, GPU)
    lm: Any = object()
    fusion.fuse(lm, "liger")
    assert calls == [{"model": lm, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_the_default_is_no_part_of_a_run(tmp_path: Path) -> None:
    assert "model.compile" not in identity(of(tmp_path))
    assert identity(of(tmp_path, "model.compile=layers"))["model.compile"] == "layers"


def test_rows_that_ranks_share_are_not_compiled(tmp_path: Path, proofs: list[dict[str, Any]]) -> None:
    """Also where the run began with compiled layers: other ranks round otherwise in any case."""
    shared = of(tmp_path, "train.sequence_parallel=2")
    for facts in (NEW, {"compile": "layers"}):
        found = choose(shared, models(), facts, LONG, CPU)
        assert found.fusion == "none"
        assert found.why.startswith("since ranks that share a row (train.sequence_parallel) ")
    asked = of(tmp_path, "train.sequence_parallel=2", "model.compile=layers")
    with pytest.raises(UserError, match="got layers, but ranks that share a row"):
        choose(asked, models(), NEW, LONG, CPU)
    assert not proofs
