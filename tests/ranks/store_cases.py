"""Attacks on the reference store, on real ranks: torchrun tests/ranks/store_cases.py FOLDER CASE …

Each case runs the stages `reference` and `train` as the door does and counts the sequences scored, as
run.json has them. What a run takes from the store is compared with a float64 model of the folder as it is
then: a row of other weights would be off by far more than rounding.
"""

import json
import os
import random
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import case_runner
import numpy as np
import plain
import pytest
import torch
import worlds
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.batching.packing import packed_tokens
from prefopt_dist.checkpoint import export_check
from prefopt_dist.commands import reference, train
from prefopt_dist.config import Config, load_config
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.files import FileLock
from prefopt_dist.model.fingerprint import cached_digest
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import factory
from prefopt_dist.reference import first_pass
from prefopt_dist.reference.scoring_plan import plan_name
from prefopt_dist.reference.store import MAGIC, ROW, ReferenceStore
from prefopt_dist.setup import prepare_data, prepare_models, prepare_reference

PAIRS, MORE, MAX_LENGTH = 40, 9, 48


def prepare(folder: Path) -> None:
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_pairs(folder / "all.jsonl", PAIRS + MORE)
    lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(lines[:PAIRS]))
    (folder / "subset.jsonl").write_text("".join(lines[5:15]))
    shuffled = random.Random(0).sample(lines[:PAIRS], PAIRS)
    (folder / "shuffled.jsonl").write_text("".join(shuffled))


def distinct(*files: Path) -> int:
    """Distinct sequences of raw pairs; the texts are short enough that nothing is cut."""
    texts = set()
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            texts |= {(row["prompt"], row[k]) for k in ("chosen_response", "rejected_response")}
    return len(texts)


def config_for(folder: Path, name: str, *, cache: str, **sections: dict[str, object]) -> Config:
    """A run of its own on a cache of the case's own; the model is <folder>/<cache>-model, made once."""
    model, file = folder / f"{cache}-model", folder / f"{name}.yaml"

    def write() -> None:
        if not model.exists():
            shutil.copytree(folder / "model", model)
        given = {"run": {"dir": str(folder / name), "cache": str(folder / cache)}} | sections
        if "seed" in sections.get("run", {}):
            given["run"] = {"dir": str(folder / name), "cache": str(folder / cache)} | sections["run"]
        worlds.write_run(file, model, folder / "pairs.jsonl", folder / name, **given)

    ranks.run_on_rank_zero(write)
    return load_config(file)


def scored(config: Config) -> list[int]:
    """Runs the first pass: sequences scored, and sequences reused."""
    reference.run(config)
    return counted(config)


def counted(config: Config) -> list[int]:
    def read() -> list[int]:  # on rank 0, which has written it
        facts = json.loads((config.run_dir / "run.json").read_text())["reference"]
        return [facts["sequences_scored"], facts["sequences_reused"]]

    return ranks.run_on_rank_zero(read)


def worst(config: Config) -> float:
    """How far what a run takes from the store is from the exact log-probs of the model folder, relative."""
    models = prepare_models.load_models(config)
    objective = factory.make_objective(config.loss, models.dtype)
    rows = prepare_data.load_train(config, models, objective)
    weights = prepare_reference.reference_weights(config, models, objective)
    (taken,), done = prepare_reference.score_reference(config, models, [rows], weights, lambda: False)
    assert done is not None
    assert done.scored == 0
    assert taken.reference is not None
    exact_model = plain.build_plain(models.reference.path)
    with torch.no_grad():
        exact = torch.tensor(
            [
                [plain.sequence_logp(exact_model, rows.prompt(i), rows.response(i, k)).item() for k in range(2)]
                for i in range(rows.n)
            ]
        )
    return float(((taken.reference - exact).abs() / exact.abs()).max())


def shards(config: Config) -> list[Path]:
    return sorted(config.reference_store.glob("*/rows-*.bin"))


def stored(config: Config) -> list[bytes]:
    """Every row of the store as bytes, sorted."""
    content = b"".join(s.read_bytes()[len(MAGIC) : -16] for s in shards(config))
    return sorted(content[i : i + ROW.itemsize] for i in range(0, len(content), ROW.itemsize))


def settle() -> None:
    """Until files written now are old enough for their digest to be remembered."""
    time.sleep(2.2)


def what_does_not_change_the_reference(folder: Path) -> dict[str, Any]:
    first = config_for(folder, "first", cache="same")
    found: dict[str, Any] = {"first": scored(first), "distinct": distinct(folder / "pairs.jsonl")}
    others: dict[str, dict[str, dict[str, object]]] = {
        "beta": {"loss": {"name": "dpo", "beta": 0.5}},
        "rate": {"optim": {"learning_rate": 1e-5}},
        "seed": {"run": {"seed": 7}},
        "order": {"data": {"train": str(folder / "shuffled.jsonl")}},
        "run-folder": {},
        "epochs": {"train": {"epochs": 3, "global_batch_pairs": 5}},
        "subset": {"data": {"train": str(folder / "subset.jsonl")}, "train": {"global_batch_pairs": 5}},
    }
    found["others"] = {n: scored(config_for(folder, f"same-{n}", cache="same", **s))[0] for n, s in others.items()}
    # Another path to the same content: the key is no path.
    ranks.run_on_rank_zero(lambda: shutil.copytree(folder / "same-model", folder / "moved-model"))
    moved = config_for(folder, "same-moved", cache="same", model={"name_or_path": str(folder / "moved-model")})
    found["others"]["model-path"] = scored(moved)[0]
    more = config_for(folder, "same-more", cache="same", data={"train": str(folder / "all.jsonl")})
    found["more"] = scored(more)
    found["more distinct"] = distinct(folder / "all.jsonl")
    found["worst"] = worst(more)
    return found


def new_weights_at_the_same_path(folder: Path) -> dict[str, Any]:
    """Same size, times put back by `touch -r` and by `cp -p`; the old digest is remembered."""
    first = config_for(folder, "weights-0", cache="weights")
    weights = folder / "weights-model" / "model.safetensors"
    settle()
    found: dict[str, Any] = {"distinct": distinct(folder / "pairs.jsonl"), "scored": [scored(first)[0]], "worst": []}
    found["remembered"] = len(list((folder / "weights" / "digests").iterdir()))
    found["again"] = scored(config_for(folder, "weights-again", cache="weights"))[0]
    sizes = [weights.stat().st_size]

    def touch_r() -> None:
        """Written over in place, then `touch -r`."""
        times = weights.stat()
        worlds.write_model(folder / "other", seed=3, scale=2.0)
        weights.write_bytes((folder / "other" / "model.safetensors").read_bytes())
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert weights.stat().st_mtime_ns == times.st_mtime_ns

    def cp_p() -> None:
        """`cp -p` of a file with the same time of modification."""
        times = weights.stat()
        worlds.write_model(folder / "third", seed=4, scale=2.0)
        os.utime(folder / "third" / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
        shutil.copy2(folder / "third" / "model.safetensors", weights)
        assert weights.stat().st_mtime_ns == times.st_mtime_ns

    for number, swap in enumerate((touch_r, cp_p), start=1):
        settle()
        ranks.run_on_rank_zero(swap)
        config = config_for(folder, f"weights-{number}", cache="weights")
        found["scored"].append(scored(config)[0])
        found["worst"].append(worst(config))
        sizes.append(weights.stat().st_size)
    return found | {"sizes": sizes}


def weights_that_change_while_they_are_read(folder: Path) -> dict[str, Any]:
    """Between the hashing and the loading: nothing is scored under the old weights' key."""
    config = config_for(folder, "raced", cache="raced")
    models = prepare_models.load_models(config)
    objective = factory.make_objective(config.loss, models.dtype)
    rows = prepare_data.load_train(config, models, objective)
    before = prepare_reference.reference_weights(config, models, objective)
    file = models.reference.weight_files[0]

    def swap() -> None:
        times = file.stat()
        file.write_bytes(file.read_bytes())
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    ranks.run_on_rank_zero(swap)
    try:
        prepare_reference.score_reference(config, models, [rows], before, lambda: False)
    except UserError as e:
        return {"message": str(e), "shards": len(shards(config))}
    return {"message": "", "shards": len(shards(config))}


def what_changes_the_numbers(folder: Path) -> dict[str, Any]:
    first = config_for(folder, "numbers", cache="numbers")
    found: dict[str, Any] = {"first": scored(first)[0], "worst": []}
    bf16 = config_for(folder, "numbers-bf16", cache="numbers", model={"dtype": "bfloat16"})
    # write_run's defaults are replaced as a whole section's keys, so the model stays.
    found["dtype"] = scored(bf16)[0]
    settings = folder / "numbers-model" / "config.json"

    def scale_rope() -> None:
        content = json.loads(settings.read_text())
        theta = (content.get("rope_parameters") or {}).get("rope_theta", 10000.0)
        content["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": theta}
        settings.write_text(json.dumps(content))

    ranks.run_on_rank_zero(scale_rope)
    rope = config_for(folder, "numbers-rope", cache="numbers")
    found["rope"] = scored(rope)[0]
    found["worst"].append(worst(rope))
    # Shorter: what is cut is another sequence, what is not cut is the same one.
    cut = config_for(
        folder, "numbers-cut", cache="numbers", data={"max_length": MAX_LENGTH, "max_prompt_length": MAX_LENGTH // 2}
    )
    keys = [sequences(rope), sequences(cut)]
    found["cut"] = scored(cut)[0]
    found["cut distinct"] = len(keys[1] - keys[0])
    found["uncut"] = len(keys[1] & keys[0])
    found["worst"].append(worst(cut))
    return found


def sequences(config: Config) -> set[tuple[bytes, bytes]]:
    """The distinct sequences of a run's training set by their tokens, without the digests."""
    models = prepare_models.load_models(config)
    rows = prepare_data.load_train(config, models, factory.make_objective(config.loss, models.dtype))
    return {(rows.prompt(i).tobytes(), rows.response(i, k).tobytes()) for i in range(rows.n) for k in range(2)}


def resume_with_the_store_deleted(folder: Path) -> dict[str, Any]:
    """After updates: what is scored again are the start's weights, and the run ends as if nothing had been."""
    whole = config_for(folder, "whole", cache="kept")
    train.run(whole)
    before = stored(whole)
    first = scored(config_for(folder, "scored", cache="deleted"))  # or the time would be over in the first pass
    stopped = config_for(folder, "stopped", cache="deleted", train={"max_hours": 1e-9})
    train.run(stopped)
    found: dict[str, Any] = {"stopped": ranks.run_on_rank_zero((stopped.run_dir / "STOPPED").read_text), "first": first}
    ranks.run_on_rank_zero(lambda: shutil.rmtree(folder / "deleted"))
    train.run(config_for(folder, "stopped", cache="deleted"))
    found["again"] = counted(stopped)
    found["same rows"] = stored(stopped) == before and len(before) > 0
    ranks.all_gather(None)
    mine, theirs = (load_file(c.run_dir / "final" / "model.safetensors") for c in (stopped, whole))
    start = load_file(folder / "model" / "model.safetensors")
    found["same end"] = all(torch.equal(mine[n], theirs[n]) for n in theirs)
    found["trained"] = any(not torch.equal(mine[n], start[n]) for n in start)
    return found


def an_altered_byte_in_any_shard(folder: Path) -> dict[str, Any]:
    config = config_for(folder, "bytes", cache="bytes")
    scored(config)
    before, draw = stored(config), random.Random(0)
    found: dict[str, Any] = {"rows": [], "scored": []}
    for number, shard in enumerate(shards(config)):
        content = bytearray(shard.read_bytes())
        found["rows"].append((len(content) - len(MAGIC) - 16) // ROW.itemsize)
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)

        def flip(shard: Path = shard, content: bytearray = content, place: int = place, bit: int = bit) -> None:
            content[place] ^= bit
            shard.write_bytes(content)

        ranks.all_gather(None)  # the other rank has read the shard as it was
        ranks.run_on_rank_zero(flip)
        found["scored"].append(scored(config_for(folder, f"bytes-{number}", cache="bytes"))[0])
    return found | {"same rows": stored(config) == before, "worst": worst(config)}


def a_store_on_the_nodes_own_disks(folder: Path) -> dict[str, Any]:
    """The same path is another folder on each rank, as with a local disk."""
    settings = {k: str(Path(f"deepspeed_configs/{k}_zero3.json").resolve()) for k in ("policy", "reference")}
    config = config_for(
        folder, "local", cache="local-cache", reference={"store": "/proc/self/cwd/store"}, deepspeed=settings
    )
    here, mine = Path.cwd(), folder / f"node-{ranks.rank()}"
    mine.mkdir()
    os.chdir(mine)
    try:
        reference.run(config)
        message = ""
    except UserError as e:
        message = str(e)
    finally:
        os.chdir(here)
    ranks.all_gather(None)
    return {
        "message": message,
        "shards": len(list(folder.glob("node-*/store/*/rows-*"))),
        "run": (folder / "local").exists(),
    }


def a_model_on_the_nodes_own_disks(folder: Path) -> dict[str, Any]:
    """The same path is another folder on each rank, which plays a node: with other weights, another configuration,
    the same of both; and one folder on a disk that they share."""
    settings = {k: str(Path(f"deepspeed_configs/{k}_zero3.json").resolve()) for k in ("policy", "reference")}
    here, mine, name = Path.cwd(), folder / f"disk-{ranks.rank()}", f"n{ranks.rank() + 1}"

    def parted() -> None:
        """The model in two weight files."""
        model = LlamaForCausalLM.from_pretrained(folder / "model")
        shutil.copytree(folder / "model", folder / "parted")
        (folder / "parted" / "model.safetensors").unlink()
        model.save_pretrained(folder / "parted", max_shard_size="100KB")

    def other_weights(model: Path) -> None:
        file = max(model.glob("*.safetensors"))
        tensors = {n: t + 1 for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    def other_config(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))

    ranks.run_on_rank_zero(parted)
    found: dict[str, Any] = {"files": len(list((folder / "parted").glob("*.safetensors")))}
    mine.mkdir()
    read: list[Path] = []

    def noted(file: Path, memory: Path) -> str:
        read.append(file)
        return cached_digest(file, memory)

    for case, change in {"weights": other_weights, "config": other_config, "same": None, "shared": None}.items():
        model = mine / case
        if case == "shared":
            model.symlink_to(folder / "parted")
        else:
            shutil.copytree(folder / "parted", model)
        if change is not None and ranks.rank() == 1:
            change(model)
        config = config_for(
            folder,
            f"disks-{case}",
            cache=f"disks-{case}",
            model={"name_or_path": f"/proc/self/cwd/{case}"},
            deepspeed=settings,
        )
        read.clear()
        message, count = "", [0, 0]
        os.chdir(mine)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(socket, "gethostname", lambda: name)
                patch.setattr(prepare_reference, "cached_digest", noted)
                count = scored(config)
        except UserError as e:
            message = f"{type(e).__name__}: {e}"
        finally:
            os.chdir(here)
        found[case] = {
            "messages": ranks.all_gather(message),
            "scored": count[0],
            "read": ranks.all_gather(len(read)),
            "stores": len(list(config.reference_store.glob("*"))),
        }
    return found


def stopped_while_it_waits_for_its_turn(folder: Path) -> dict[str, Any]:
    """Another job holds the turn and does not end: a STOP is obeyed, the lock is not taken from it."""
    config = config_for(folder, "waiting", cache="waiting")
    models = prepare_models.load_models(config)
    objective = factory.make_objective(config.loss, models.dtype)
    rows = prepare_data.load_train(config, models, objective)
    weights = prepare_reference.reference_weights(config, models, objective)
    assert weights is not None
    store = ReferenceStore(config.reference_store / weights.key)
    lock = FileLock(store.folder / f"turn-{plan_name([rows], 2)}.lock")
    if ranks.rank() == 0:
        store.make_folder()
        assert lock.acquire() is None

        def ask() -> None:
            while not (config.run_dir / "run.json").exists():
                time.sleep(0.05)
            time.sleep(1)
            (config.run_dir / "STOP").touch()

        threading.Thread(target=ask).start()
    reference.run(config)
    found = {
        "stopped": ranks.run_on_rank_zero((config.run_dir / "STOPPED").read_text),
        "shards": len(shards(config)),
        "held": lock.held,
    }
    ranks.all_gather(None)
    lock.release()
    return found | {"then": scored(config_for(folder, "waiting-2", cache="waiting"))}


def every_micro_batch_fits_the_budget(folder: Path) -> dict[str, Any]:
    """Tokens of all that an engine computes, in a first pass with stored rows to check and in a training."""
    whole = config_for(folder, "fits-lengths", cache="fits")
    models = prepare_models.load_models(whole)
    rows = prepare_data.load_train(whole, models, factory.make_objective(whole.loss, models.dtype))
    units = ScoredRows(rows, None).units(range(rows.n), 2)
    budget = max(packed_tokens([unit]) for unit in units)
    parts: dict[str, dict[str, object]] = {
        "train": {"global_batch_pairs": 5, "max_steps": 1, "micro_batch_tokens": budget},
        "reference": {"micro_batch_tokens": budget},
    }
    subset = {"train": str(folder / "subset.jsonl")}
    found: dict[str, Any] = {"budget": budget, "export check": packed_tokens(units[: export_check.EXPORT_CHECK_ROWS])}
    found["before"] = scored(config_for(folder, "fits-first", cache="fits", data=subset, **parts))
    config = config_for(folder, "fits", cache="fits", **parts)
    computed: dict[str, list[int]] = {}
    now = "other"
    forward = Scorer.forward

    def noted(scorer: Scorer, batch: MicroBatch, *arguments: Any) -> Any:
        computed.setdefault(now, []).append(batch.tokens)
        return forward(scorer, batch, *arguments)

    def under(name: str, function: Any) -> Any:
        def named(*arguments: Any) -> Any:
            nonlocal now
            now, before = name, now
            try:
                return function(*arguments)
            finally:
                now = before

        return named

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "forward", noted)
        patch.setattr(first_pass, "_spot_check", under("spot check", first_pass._spot_check))
        patch.setattr(export_check, "record_export_check", under("export check", export_check.record_export_check))
        patch.setattr(export_check, "verify", under("export", export_check.verify))
        train.run(config)
    return found | {"computed": ranks.all_gather(computed)}


if __name__ == "__main__":
    np.seterr(all="raise")
    case_runner.serve(globals(), prepare)
