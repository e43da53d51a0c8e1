"""Checkpoints of two ranks on other numbers of ranks: torchrun tests/ranks/universal_cases.py FOLDER CASE …

`written` on two ranks leaves checkpoints and what is in them; the other cases go on from there.
"""

import gc
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import case_runner
import tiny_families
import torch
import worlds
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prefopt_dist.batching.batches import ScoredRows, step_batch
from prefopt_dist.checkpoint import export_check, export_weights, load, other_parts, resharding, save
from prefopt_dist.checkpoint.manifest import read_manifest, remove
from prefopt_dist.checkpoint.shards import MasterWeights
from prefopt_dist.config import Config, load_config
from prefopt_dist.distributed import partitions, ranks, zero3
from prefopt_dist.errors import UserError
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.model.load import load_language_model
from prefopt_dist.objectives import factory
from prefopt_dist.setup import export_run, prepare_data, prepare_models, prepare_policy, prepare_reference
from prefopt_dist.training import step
from prefopt_dist.training.stop import Request

PAIRS, G, UPDATES = 37, 11, 2
ZERO = {"stage": 3, "stage3_param_persistence_threshold": 1000}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": ({"optim": {"weight_decay": 0.0}}, ZERO),
    "bfloat16": ({"model": {"dtype": "bfloat16"}, "optim": {"weight_decay": 0.1}}, ZERO),
    "untied": ({"optim": {"weight_decay": 0.1}}, ZERO | {"sub_group_size": 5000}),
    "offload": ({"optim": {"weight_decay": 0.1}}, ZERO | {"offload_optimizer": {"device": "cpu"}}),
    "lora": ({"optim": {"weight_decay": 0.1}, "lora": {"r": 3}}, ZERO | {"sub_group_size": 1000}),
    "buffers": ({"optim": {"weight_decay": 0.1}}, ZERO),
    "images": ({"optim": {"weight_decay": 0.1}}, ZERO),
}
"""Sections of the run and ZeRO's settings; a small sub_group_size makes several sub-groups of a group."""
BUFFER = "e_score_correction_bias"
STATE = {"window": {"sums": [1 / 3, 2.0], "tokens": 7, "seconds": 0.1, "data_seconds": 1e-9}}


def config_of(folder: Path, name: str) -> Config:
    sections, zero = SETTINGS[name]
    file = folder / f"{name}.yaml"

    def write() -> None:
        (folder / f"{name}.json").write_text(
            json.dumps({"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}})
        )
        model = folder / (f"model-{name}" if name in ("untied", "buffers", "images") else "model")
        worlds.write_run(
            file,
            model,
            folder / "pairs.jsonl",
            folder / f"run-{name}",
            **(sections | {"loss": {"name": "dpo"}, "deepspeed": {"policy": str(folder / f"{name}.json")}}),
        )

    ranks.run_on_rank_zero(write)
    return load_config(file)


def ready(config: Config) -> tuple[Any, Any, ScoredRows]:
    """Engine, objective and scored training rows, by the job's own way."""
    models = prepare_models.load_models(config)
    objective = factory.make_objective(config.loss, models.dtype)
    rows = prepare_data.load_train(config, models, objective)
    reference = prepare_reference.reference_weights(config, models, objective)
    (scored,), _ = prepare_reference.score_reference(config, models, [rows], reference, lambda: False)
    return prepare_policy.load_policy(config, models, 1.0)[0], objective, scored


def update(engine: Any, objective: Any, scored: ScoredRows, index: int) -> float:
    rows = [(index * G + i) % PAIRS for i in range(G)]
    batch = step_batch(scored, rows, objective.responses, 256)
    sums, _ = step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
    step.optimizer_step(engine, 1e-3)
    return sums[0] / sums[-1]


def trained(engine: Any) -> dict[str, Any]:
    """Every parameter that an update changes."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def contents(engine: Any) -> dict[str, torch.Tensor]:
    """Every trained parameter's master weight and moments, whole."""
    found = {}
    for name, p in trained(engine).items():
        found[f"{name}/fp32"] = safe_get_full_fp32_param(p).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name}/{moment}"] = safe_get_full_optimizer_state(p, moment).clone()
    return found


def written(folder: Path) -> dict[str, Any]:
    """Two updates, a checkpoint, one update more; and what was there at both moments."""
    found = {}
    for name in SETTINGS:
        config = config_of(folder, name)
        engine, objective, scored = ready(config)
        for index in range(UPDATES):
            update(engine, objective, scored, index)
        root = folder / f"checkpoints-{name}"
        save.save(engine, root, step=UPDATES, state=STATE, facts=facts_of(config, engine, scored), keep=2)
        saved = contents(engine)
        loss = update(engine, objective, scored, UPDATES)
        after = contents(engine)
        zero3.release(engine)
        if ranks.rank() == 0:
            torch.save({"saved": saved, "after": after, "loss": loss}, folder / f"{name}.pt")
        found[name] = loss
    return found


def facts_of(config: Config, engine: Any, scored: ScoredRows) -> dict[str, Any]:
    """What a manifest says of the run, as far as exports need it."""
    base = prepare_reference.adapter_base(config, prepare_models.load_models(config))
    facts = {"reference_key": "r", "probe": export_check.record_export_check(engine, scored, 2)}
    return facts | ({} if base is None else {"base_key": base.key})


@contextmanager
def counted_reads(taken: list[int]) -> Iterator[None]:
    """Inside, the elements of every slice that this rank takes are added to `taken`."""
    fill = partitions.fill

    def counting(engine: Any, read: partitions.Read, *args: Any) -> None:
        def counted(name: str, state: str, start: int, end: int) -> torch.Tensor:
            taken.append(end - start)
            return read(name, state, start, end)

        fill(engine, counted, *args)

    partitions.fill = counting
    try:
        yield
    finally:
        partitions.fill = fill


def resumed(folder: Path) -> dict[str, Any]:
    """Loads the checkpoints of two ranks into this number of ranks, twice, and makes the third update."""
    found = {}
    for name in SETTINGS:
        config = config_of(folder, name)
        root = folder / f"checkpoints-{name}-{ranks.world_size()}"
        ranks.run_on_rank_zero(
            lambda name=name, root=root: shutil.copytree(folder / f"checkpoints-{name}", root) and None
        )
        engine, objective, scored = ready(config)
        manifest = load.find_newest(root)
        assert manifest is not None
        taken: list[int] = []
        with counted_reads(taken):
            loaded = load.load(engine, root, manifest)
        draws = [random.random(), float(torch.rand(()))]
        form = root / "universal-step-00000002"
        before = form.stat().st_ino
        assert load.find_newest(root) == manifest
        load.load(engine, root, manifest)
        told = torch.load(folder / f"{name}.pt")
        mine = contents(engine)
        zero = engine.optimizer
        groups = [g["weight_decay"] for g in zero.optimizer.param_groups]
        masters = zero.fp32_partitioned_groups_flat
        steps = [zero.optimizer.state[m]["step"] for m in masters]
        pointers, counts = [s.data_ptr() for s in steps], [float(s) for s in steps]
        half = all(
            bool(torch.equal(flat.float(), master.to(flat.dtype).float()))
            for flat, master in zip(zero.fp16_partitioned_groups_flat, masters, strict=True)
        )
        loss = update(engine, objective, scored, UPDATES)
        after = contents(engine)
        found[name] = {
            "step": loaded.step,
            "state": loaded.state == STATE,
            "facts": manifest.facts,
            "reused": form.stat().st_ino == before,
            "draws": ranks.all_gather(draws),
            "draws_again": ranks.all_gather([random.random(), float(torch.rand(()))]),
            "equal": mine.keys() == told["saved"].keys() and all(torch.equal(mine[n], told["saved"][n]) for n in mine),
            "weight_decays": groups,
            "sub_groups": len(steps),
            "step_tensors": len(set(pointers)),
            "steps": counts,
            "half": all(ranks.all_gather(half)),
            "taken": ranks.all_gather(sum(taken)),
            "elements": sum(p.ds_numel for p in trained(engine).values()),
            "parameters": len(trained(engine)),
            "loss": [loss, told["loss"]],
            "steps_after": [float(zero.optimizer.state[m]["step"]) for m in masters],
            "worst": max(float((after[n] - t).norm() / t.norm()) for n, t in told["after"].items() if "fp32" in n),
            "global_steps": engine.global_steps,
        }
        save.save(engine, root, step=UPDATES + 1, state=STATE, facts={}, keep=2)
        found[name]["after_the_next"] = sorted(p.name for p in root.iterdir())
        zero3.release(engine)
    return found


def exported(folder: Path) -> dict[str, Any]:
    """The checkpoints of two ranks as model folders in several files, written by all ranks and loaded back by them."""
    found = {}
    for name in SETTINGS:
        config = config_of(folder, name)
        models = prepare_models.load_models(config)
        source = folder / f"checkpoints-{name}" / "step-00000002"
        target = folder / f"exported-{name}-{ranks.world_size()}"
        wrote: list[str] = []
        with small_parts(wrote):
            export_run.export_checkpoint(config, models, source, RunFacts(), target=target, merged=False)
        files = sorted(path.name for path in target.glob("*.safetensors"))
        found[name] = {"files": files, "wrote": ranks.all_gather(wrote), "size": 0, "left": []}
        found[name]["wrong"] = ranks.run_on_rank_zero(lambda name=name, target=target: different(folder, name, target))
        index = target / "model.safetensors.index.json"
        if index.exists():
            found[name]["size"] = json.loads(index.read_text())["metadata"]["total_size"]
        found[name]["bytes"] = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        found[name]["left"] = sorted(path.name for path in folder.glob(".exported*"))
    return found


class RunFacts:
    """As much of a run folder as an export reads."""

    facts: ClassVar[dict[str, Any]] = {"run_id": "r"}
    metrics = Path("no-metrics.jsonl")


@contextmanager
def small_parts(wrote: list[str]) -> Iterator[None]:
    """Inside, an export has files of few layers, and the names of this rank's are added to `wrote`."""
    write, most = export_weights._write_part, export_weights.PART_BYTES

    def noted(tensors: Any, lm: Any, folder: Path, name: str, names: Any, *, first: bool) -> Any:
        wrote.append(name)
        return write(tensors, lm, folder, name, names, first=first)

    copy = other_parts.copy_part

    def noted_copy(tensors: Any, target: Path) -> Any:
        wrote.append(target.name)
        return copy(tensors, target)

    export_weights._write_part, export_weights.PART_BYTES = noted, 20_000
    other_parts.copy_part = noted_copy
    try:
        yield
    finally:
        export_weights._write_part, export_weights.PART_BYTES = write, most
        other_parts.copy_part = copy


def different(folder: Path, name: str, target: Path) -> list[str]:
    """The exported tensors that are not bit for bit those of the checkpoint (rank 0)."""
    saved = torch.load(folder / f"{name}.pt")["saved"]
    saved = {n.removeprefix("lm.").removesuffix("/fp32"): t for n, t in saved.items() if n.endswith("/fp32")}
    if name == "lora":
        held = load_file(target / "adapter_model.safetensors")
        held = {n.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t for n, t in held.items()}
    elif name == "images":
        exported = inspect_folder(target, "export.dir")
        held = load_language_model(exported, exported.config, torch.float32).state_dict()
    else:
        held = AutoModelForCausalLM.from_pretrained(target, dtype="auto").state_dict()
    wrong = [n for n, t in saved.items() if not torch.equal(held[n], t.to(held[n].dtype))]
    wrong += changed_beside_training(folder, name, target)
    return wrong + sorted(n for n in held.keys() - saved.keys() - {"lm_head.weight"} if BUFFER not in n)


def changed_beside_training(folder: Path, name: str, target: Path) -> list[str]:
    """Tensors that no update changes, and that are not those of the folder that training started from."""
    if name not in ("buffers", "images"):
        return []
    before, after = (
        {n: t for file in place.glob("*.safetensors") for n, t in load_file(file).items()}
        for place in (folder / f"model-{name}", target)
    )
    kept = [n for n in before if BUFFER in n or "vision" in n or "projector" in n]
    assert kept
    return [n for n in kept if not torch.equal(before[n], after[n])] + sorted(before.keys() ^ after.keys())


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def copy_of(folder: Path, name: str) -> Path:
    """A checkpoint root of its own for this case and this number of ranks."""
    root = folder / f"{name}-{ranks.world_size()}"
    ranks.run_on_rank_zero(lambda: shutil.copytree(folder / "checkpoints-untied", root) and None)
    return root


def damaged_checkpoints(folder: Path) -> dict[str, Any]:
    """One random bit of every file of a committed checkpoint in turn: never found sound, whoever looks."""
    draw = random.Random(ranks.world_size())
    root = copy_of(folder, "damaged")
    source = root / "step-00000002"
    names = sorted(os.listdir(source))
    assert load.find_newest(root) is not None
    missed = []
    for name in names:
        content = ranks.run_on_rank_zero(lambda name=name: (source / name).read_bytes() if ranks.rank() == 0 else b"")
        ranks.run_on_rank_zero(lambda name=name: flip(source / name, draw))
        try:
            load.find_newest(root)
            missed.append(name)
        except UserError:
            ranks.run_on_rank_zero(lambda: (root / "damaged-step-00000002").rename(source) and None)
        ranks.run_on_rank_zero(lambda name=name, content=content: (source / name).write_bytes(content))
    assert load.find_newest(root) is not None
    return {"names": names, "missed": missed}


def damaged_forms(folder: Path) -> dict[str, Any]:
    """The same of a converted form: made anew, with the same content."""
    draw = random.Random(ranks.world_size())
    root = copy_of(folder, "forms")
    source, manifest = root / "step-00000002", load.find_newest(root)
    assert manifest is not None
    form, said = resharding.prepare(source, manifest)
    names = sorted(os.listdir(form))
    missed, changed = [], []
    for name in names:
        before = (form / name).read_bytes()
        inode = form.stat().st_ino
        ranks.all_gather(None)
        ranks.run_on_rank_zero(lambda name=name: flip(form / name, draw))
        again = resharding.prepare(source, manifest)
        if ranks.run_on_rank_zero(lambda inode=inode: form.stat().st_ino == inode):
            missed.append(name)
        if (form / name).read_bytes() != before or again != (form, said):
            changed.append(name)
        ranks.all_gather(None)
    # A checkpoint of the same step, but another one: what was converted is not its.
    inode = form.stat().st_ino
    other = replace(manifest, facts={"reference_key": "another"})
    ranks.run_on_rank_zero(lambda: (source / "manifest.json").write_text(other.text()) and None)
    resharding.prepare(source, other)
    return {
        "names": names,
        "missed": missed,
        "changed": changed,
        "left": sorted(os.listdir(root)),
        "of_another": ranks.run_on_rank_zero(lambda: form.stat().st_ino == inode),
    }


def interrupted_conversion(folder: Path) -> dict[str, Any]:
    """A fault on the last rank, then one before the manifest, then one before the rename: nothing counts as whole."""
    root = copy_of(folder, "interrupted")
    source, manifest = root / "step-00000002", load.find_newest(root)
    assert manifest is not None
    found: dict[str, Any] = {"left": []}
    last = ranks.world_size() - 1

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    write, atomic = resharding._write, resharding.write_atomic
    for name, patch in {
        "one rank": lambda: setattr(resharding, "_write", fails if ranks.rank() == last else write),
        "manifest": lambda: setattr(resharding, "write_atomic", fails),
        "rename": lambda: setattr(resharding, "remove", fails),
    }.items():
        if name == "rename":  # a form is there that is not this checkpoint's, so that `remove` comes before the rename
            ranks.run_on_rank_zero(lambda: (root / "universal-step-00000002").mkdir())
        patch()
        try:
            resharding.prepare(source, manifest)
            ended = "prepared"
        except (OSError, ranks.OtherRankFailed) as e:
            ended = str(e)
        finally:
            resharding._write, resharding.write_atomic, resharding.remove = write, atomic, remove
        found[name] = ranks.all_gather(ended)
        whole = ranks.run_on_rank_zero(lambda: read_manifest(root / "universal-step-00000002") is not None)
        found["left"].append(whole)
    assert load.find_newest(root) == manifest
    found["swept"] = ranks.run_on_rank_zero(lambda: sorted(p.name for p in root.iterdir()))
    form, said = resharding.prepare(source, manifest)
    found["sound"] = resharding.check_share(form, said)
    found["end"] = ranks.run_on_rank_zero(lambda: sorted(p.name for p in root.iterdir()))
    return found


def large_config(folder: Path) -> Config:
    """A model of 425 MB in float32, whose converted form has 1.3 GB."""
    big = folder / "big"

    def write() -> None:
        if not (big / "config.json").exists():
            worlds.write_model(big)
            config = LlamaConfig.from_pretrained(
                big, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8
            )
            LlamaForCausalLM(config).save_pretrained(big)
        worlds.write_run(folder / "large.yaml", big, folder / "pairs.jsonl", folder / "run-large")

    ranks.run_on_rank_zero(write)
    return load_config(folder / "large.yaml")


def large_written(folder: Path) -> dict[str, Any]:
    engine, _ = prepare_policy.load_policy(large_config(folder), prepare_models.load_models(large_config(folder)), 1.0)
    engine.optimizer.initialize_optimizer_states()
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        state = engine.optimizer.optimizer.state[master]
        for moment in ("exp_avg", "exp_avg_sq"):
            state.setdefault(moment, torch.zeros_like(master.data)).normal_()
        state.setdefault("step", torch.tensor(1.0))
    save.save(engine, folder / "large", step=1, state=STATE, facts={}, keep=2)
    zero3.release(engine)
    return {}


@contextmanager
def most_memory(found: dict[str, Any], name: str) -> Iterator[None]:
    """Inside, the most memory of this process's own (mapped files are not) above that at the beginning; in bytes."""

    def own() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    gc.collect()
    zero3._trim_heap()  # what is free in the heap would hide what is taken
    most = [own()] * 2
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[1] = max(most[1], own())

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    found[name] = ranks.all_gather(max(most[1], own()) - most[0])


def large_exported(folder: Path) -> dict[str, Any]:
    """What writing the model's files adds to each rank's memory, beside the float32 whole that one rank once held."""
    found: dict[str, Any] = {}
    weights = MasterWeights(folder / "large" / "step-00000001", 2)
    lm = export_weights.empty_model(prepare_models.load_models(large_config(folder)).policy, torch.bfloat16, [])
    target = folder / "large-exported"
    ranks.run_on_rank_zero(lambda: target.mkdir() and None)
    most, export_weights.PART_BYTES = export_weights.PART_BYTES, 30_000_000
    with most_memory(found, "writing"):
        export_weights.write_share(weights, lm, torch.bfloat16, target, range(ranks.world_size()))
    export_weights.PART_BYTES = most
    ranks.all_gather(None)
    found["largest"] = max(path.stat().st_size for path in target.glob("*.safetensors"))
    found["bytes"] = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return found


def large_resumed(folder: Path) -> dict[str, Any]:
    """What converting and loading add to each rank's memory."""
    root = folder / "large"
    manifest = load.find_newest(root)
    assert manifest is not None
    found: dict[str, Any] = {}
    with most_memory(found, "converting"):
        resharding.prepare(root / "step-00000001", manifest)
    engine, _ = prepare_policy.load_policy(large_config(folder), prepare_models.load_models(large_config(folder)), 1.0)
    found["elements"] = sum(p.ds_numel for p in engine.module.parameters())
    load.load(engine, root, manifest)  # Adam's moments are made here where they are not there yet
    with most_memory(found, "loading"):
        load.load(engine, root, manifest)
    zero3.release(engine)
    return found


def prepare(folder: Path) -> None:
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_model(folder / "model-untied", seed=1, scale=2.0, tied=False)
    worlds.write_pairs(folder / "pairs.jsonl", PAIRS)
    if not (folder / "model-images").exists():
        write_buffers(folder / "model-buffers", folder / "model")
        write_images(folder / "model-images", folder / "model")


def write_buffers(folder: Path, like: Path) -> None:
    """A dense layer, and one whose experts are chosen with a correction that is not trained."""
    worlds.write_family(folder, like, "glm4_moe", **tiny_families.ROUTED, head_dim=8, n_shared_experts=1)
    held = load_file(folder / "model.safetensors")
    (name,) = (n for n in held if BUFFER in n)
    held[name] = torch.tensor([0.5, -0.25, 0.125, 1 / 3])
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def write_images(folder: Path, like: Path) -> None:
    """A model that also takes images, with the tokenizer of `like`."""
    shutil.copytree(like, folder)
    (folder / "model.safetensors").unlink()
    text = {"vocab_size": 310, "num_hidden_layers": 2, "sliding_window": 16}
    tokens = {"image_token_index": 301, "boi_token_index": 302, "eoi_token_index": 303}
    tiny_families.larger_model("gemma3", text, **tokens).save_pretrained(folder)


if __name__ == "__main__":
    case_runner.serve(globals(), prepare)
