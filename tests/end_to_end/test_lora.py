"""A run with adapters: the first pass of its base, an interruption, export, evaluation, and the user's mistakes."""

import json
import math
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import job
import peft
import pytest
import torch
import worlds
from door import Door, one_process_group
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config

from prefopt_dist.checkpoint import export_check
from prefopt_dist.checkpoint.manifest import read_manifest
from prefopt_dist.cli import main
from prefopt_dist.config import Lora
from prefopt_dist.model import adapter as adapters
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.model.load import load_unsharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.setup.check_lora import adapter_of

LORA: dict[str, object] = {"r": 4, "alpha": 12}
SFT: dict[str, Any] = {"loss": {"name": "sft"}}
SAFE = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The base model and 40 pairs."""
    folder = tmp_path_factory.mktemp("lora")
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_pairs(folder / "pairs.jsonl", 40)
    with one_process_group():
        yield folder


@pytest.fixture
def door(made: Path, capsys: pytest.CaptureFixture[str]) -> Door:
    """All tests share the folder."""
    return Door(made, capsys)


def started(door: Door, name: str, *overrides: str, stage: str = "train", **sections: dict[str, object]) -> str:
    """A run with adapters, to its end; what it said."""
    run = door.run(name, **({"lora": LORA, "data": {"eval": door.path("pairs.jsonl")}} | sections))
    door.capsys.readouterr()
    status = main([stage, str(run), *overrides])
    said = door.capsys.readouterr()
    assert status == 0, said.err
    return said.out + said.err


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


@pytest.fixture
def whole(door: Door) -> Path:
    """A run with adapters, begun when a full run from the same base has made its first pass; made once."""
    folder = door.folder / "runs" / "whole"
    if not (folder / "DONE").exists():
        run = door.run("full", data={"eval": door.path("pairs.jsonl")})
        assert main(["reference", str(run)]) == 0
        assert facts(door.folder / "runs" / "full")["reference"]["sequences_scored"] > 0
        started(door, "whole")
    return folder


def logps(lm: Any, manifest: Any) -> torch.Tensor:
    """float64 [U, R] of the checkpoint's probe."""
    batches, _ = export_check.export_check_batches(manifest.facts["probe"])
    scorer = Scorer(lm)
    with torch.no_grad():
        return torch.cat([scorer(batch)[batch.units] for batch in batches])


def test_the_reference_is_the_base(whole: Path) -> None:
    """The same first pass, the same store and key as the full run's: nothing is scored again."""
    reference, full = (facts(whole.parent / name)["reference"] for name in ("whole", "full"))
    assert reference["sequences_scored"] == 0
    assert reference["sequences_reused"] == full["sequences_scored"]
    assert reference["key"] == full["key"]
    first = next(r for r in job.rows(whole) if r["kind"] == "train")
    assert first["train/loss"] == pytest.approx(math.log(2), rel=1e-6)
    evals = [r["eval/loss"] for r in job.rows(whole) if r["kind"] == "eval"]
    assert evals[-1] < evals[0] - 0.01


def test_an_interruption_does_not_matter(door: Door, whole: Path) -> None:
    assert "stopped after step 1" in started(door, "stopped", "train.max_hours=1e-9")
    said = started(door, "stopped")
    assert "resuming from step-00000001" in said
    mine, theirs = (load_file(f / "final" / adapters.WEIGHTS) for f in (whole.parent / "stopped", whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
    assert job.without_speed(job.rows(whole.parent / "stopped")) == job.without_speed(job.rows(whole))


def test_the_export_is_an_adapter_that_peft_loads(door: Door, whole: Path) -> None:
    final, base = whole / "final", door.folder / "model"
    saved = json.loads((final / adapters.CONFIG).read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (4, 12, 0.0)
    assert saved["base_model_name_or_path"] == str(base.resolve())
    assert set(saved["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not (final / "config.json").exists()
    assert "library_name: peft" in (final / "README.md").read_text()
    tensors = load_file(final / adapters.WEIGHTS)
    assert sum(t.numel() for t in tensors.values()) == 4864
    assert any(t.any() for n, t in tensors.items() if "lora_B" in n)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(final))
    assert [str(w.message) for w in told if "key" in str(w.message)] == [], "peft warns of keys that are missing"


def test_the_merged_model_is_the_adapters(door: Door, whole: Path) -> None:
    """In float32: the same log-probs; and W + α/r · B A by hand in float64. One process exports what two may train."""
    target, base = door.folder / "merged", door.folder / "model"
    options = "export.merged=true", f"export.dir={target}", "train.sequence_parallel=2"
    said = started(door, "whole", *options, stage="export")
    assert "with its adapters merged in" in said
    manifest = read_manifest(newest(whole))
    assert manifest is not None
    merged = load_unsharded(inspect_folder(target, "target"), dtype=torch.float32)
    beside = load_unsharded(inspect_folder(base, "base"), dtype=torch.float32)
    before = logps(load_unsharded(inspect_folder(base, "base"), dtype=torch.float32), manifest)
    adapters.load_with_peft(beside, whole / "final")
    mine, theirs = logps(merged, manifest), logps(beside, manifest)
    assert ((mine - theirs).abs() / theirs.abs()).max() <= 1e-6
    assert ((before - theirs).abs() / theirs.abs()).max() > 1e-4, "the adapters have learnt something"
    tensors, old, new = (load_file(f) for f in (whole / "final" / adapters.WEIGHTS, base / SAFE, target / SAFE))
    assert old.keys() == new.keys()
    for name, w in old.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        expected = w.double()
        if f"{layer}.lora_A.weight" in tensors:
            a, b = (tensors[f"{layer}.lora_{m}.weight"].double() for m in "AB")
            expected = expected + 12 / 4 * b @ a
        assert torch.allclose(new[name].double(), expected, rtol=1e-6, atol=1e-7), name
    assert "library_name: transformers" in (target / "README.md").read_text()


def newest(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").glob("step-*"))[-1]


def test_an_evaluation_of_the_checkpoint(door: Door, whole: Path) -> None:
    """Of the adapters beside their base: what the run's last evaluation found."""
    last = job.rows(whole)[-1]
    started(door, "whole", stage="evaluate")
    found = json.loads((whole / "evaluation.json").read_text())
    assert found["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert found["eval/rewards/margins"] == pytest.approx(last["eval/rewards/margins"], rel=1e-4)
    assert found["eval/rewards/accuracies"] == last["eval/rewards/accuracies"]
    assert not (whole / ".evaluating").exists()


def test_bfloat16(door: Door) -> None:
    """Some modules, rank-stabilised, merged at the end of the run."""
    lora = {"r": 8, "rslora": True, "target_modules": ["v_proj", "down_proj"]}
    said = started(door, "bf16", lora=lora, model={"dtype": "bfloat16"}, export={"merged": True})
    first = next(r for r in job.rows(door.folder / "runs" / "bf16") if r["kind"] == "train")
    assert first["train/loss"] == pytest.approx(math.log(2), abs=5e-2)
    trained = 2 * 8 * ((32 + 16) + (96 + 32))
    assert f"lora: {trained:,} parameters are trained" in said
    weights = load_file(door.folder / "runs" / "bf16" / "final" / SAFE)
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}


# Mistakes


def test_the_base_may_not_change(door: Door) -> None:
    """Adapters beside other weights would be another model: at a resume, at an export and in an evaluation."""
    shutil.copytree(door.folder / "model", door.folder / "changing")
    model = {"name_or_path": door.path("changing")}
    # A loss without reference, whose key would tell as well.
    sections: dict[str, Any] = {"model": model, "loss": {"name": "simpo"}, "lora": LORA}
    started(door, "base", "train.max_hours=1e-9", **sections)
    worlds.write_model(door.folder / "changing", seed=2, scale=2.0)
    run = door.run("base", data={"eval": door.path("pairs.jsonl")}, **sections)
    words = ["model.name_or_path: ", "base_key", "Put them back as they were"]
    door.fails(words, run=run)
    words = ["model.name_or_path: ", "adapters of step 1", "now has", "Restore the folder as it was"]
    door.fails(words, stage="export", run=run)
    door.fails(words, stage="evaluate", run=run)


def test_a_checkpoint_of_another_kind_of_run(door: Door, whole: Path) -> None:
    data = {"eval": door.path("pairs.jsonl")}
    with_adapters, plain = (
        door.run(name, data=data, **more) for name, more in (("whole", {"lora": LORA}), ("sft", SFT))
    )
    assert main(["train", str(plain), "train.max_hours=1e-9"]) == 0
    theirs = newest(whole.parent / "sft")
    words = [f"export.checkpoint: {theirs} holds a whole model", "this run's checkpoints hold adapters"]
    words.append("Give a checkpoint of this run")
    door.fails(words, f"export.checkpoint={theirs}", stage="export", run=with_adapters)
    words = [f"export.checkpoint: {newest(whole)} holds adapters", "this run's checkpoints hold whole models"]
    door.fails(words, f"export.checkpoint={newest(whole)}", stage="export", run=plain)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora.target_modules=[lm_head]"], ["lora.target_modules: got 'lm_head'", "the output head", "remove it"]),
        (["lora.target_modules=[q_prj]"], ["lora.target_modules: got 'q_prj'", "did you mean q_proj"]),
        (["lora.target_modules=[]"], ["lora.target_modules: got []", "leave it out for all"]),
        (["lora.r=17"], ["lora.r: got 17", "at most 16", "k_proj", "lower it"]),
        (["lora.r=0"], ["lora.r: got 0", "at least 1"]),
        (["lora.dropout=0.1"], ["lora.dropout: unknown key"]),
        (["export.merged=true"], ["export.merged: got true", "no section lora", "remove it"]),
    ],
)
def test_mistakes(door: Door, overrides: list[str], words: list[str]) -> None:
    door.fails(words, *overrides, early=True, run=door.run("mistaken"))


def test_adapters_are_no_model(door: Door, whole: Path) -> None:
    words = [str(whole / "final"), "holds adapters, not a whole model", "export.merged=true"]
    run = door.run("on-adapters")
    door.fails(["model.name_or_path: ", *words], f"model.name_or_path={whole / 'final'}", early=True, run=run)


def test_a_run_is_its_adapters(door: Door, whole: Path) -> None:
    data = {"eval": door.path("pairs.jsonl")}
    door.fails(["holds another run", "lora.r: was 4, now 3"], run=door.run("whole", data=data, lora=LORA | {"r": 3}))
    door.fails(["holds another run", "lora.r: was 4, now absent"], run=door.run("whole", data=data))


def test_without_peft(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["peft", *(n for n in sys.modules if n.startswith("peft."))]:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    words = ["lora: a run with adapters needs the package peft", "pip install peft", "remove the section lora"]
    door.fails(words, early=True, run=door.run("without", lora=LORA))
    door.fails(words, stage="plan", run=door.run("without", lora=LORA))


def test_layers_by_name() -> None:
    config = Phi3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0)
    found = adapter_of(Lora(), config, "hub/name")
    assert found is not None
    assert set(found.modules) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert found.base == "hub/name"
    assert adapter_of(None, config, "hub/name") is None


# Two ranks, as a user runs it


@pytest.mark.slow
def test_two_ranks_stopped_killed_and_gone_on_with(tmp_path: Path) -> None:
    """STOP on two ranks, a kill on one, to the end on two; the same adapters within rounding; the export merged."""
    worlds.write_model(tmp_path / "model", seed=1, scale=2.0)
    worlds.write_pairs(tmp_path / "pairs.jsonl", job.PAIRS)
    worlds.write_pairs(tmp_path / "eval.jsonl", 61, seed=1)
    world = job.World(tmp_path)
    job.launch(world.run("whole", lora=LORA))
    run, folder = world.run("moved", lora=LORA), tmp_path / "moved"
    assert job.start_and(run, job.at_step(folder, 4), lambda _: (folder / "STOP").touch()) == 75
    job.start_and(run, job.at_step(folder, 14), job.kill_all, n=1)
    job.launch(run)
    for row, other in zip(job.rows(folder), job.rows(tmp_path / "whole"), strict=True):
        assert (row["kind"], row["step"], row["pairs_seen"]) == (other["kind"], other["step"], other["pairs_seen"])
        name = f"{row['kind']}/loss"
        assert row[name] == pytest.approx(other[name], rel=1e-5), row["step"]
    mine, theirs = (load_file(f / "final" / adapters.WEIGHTS) for f in (folder, tmp_path / "whole"))
    for name in theirs:
        assert float((mine[name] - theirs[name]).norm() / theirs[name].norm()) <= 1e-4, name
    job.launch(world.run("moved", lora=LORA, export={"merged": True, "dir": str(tmp_path / "merged")}), "export")
    job.launch(world.run("moved", lora=LORA), "evaluate")
    found, last = json.loads((folder / "evaluation.json").read_text()), job.rows(folder)[-1]
    assert found["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    # The merged model as the policy of another run, evaluated against the same base.
    other = world.run("moved", lora=LORA, evaluate={"model": str(tmp_path / "merged")})
    job.launch(other, "evaluate", n=1)
    merged = json.loads((folder / "evaluation.json").read_text())
    assert merged["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
