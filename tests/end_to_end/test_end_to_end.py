"""The job as a user runs it: the command line, two ranks, kills, stops, other numbers of ranks.

The run is no toy: 540 pairs of mixed lengths with duplicates, 23 steps of which the last is partial, more
than three store shards, four checkpoints.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import patience
import psutil
import pytest
import torch
import wandb_reader
import worlds
from job import (
    ENVIRONMENT,
    PAIRS,
    STEPS,
    G,
    World,
    assert_same_end,
    at_step,
    kill_all,
    launch,
    rows,
    start_and,
    stored,
    without_speed,
)
from places import REPOSITORY
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("end-to-end")
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_pairs(folder / "pairs.jsonl", PAIRS)
    worlds.write_pairs(folder / "eval.jsonl", 61, seed=1)
    return World(folder)


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    """The run that nothing interrupts."""
    launch(world.run("whole"))
    return world.folder / "whole"


def test_what_a_run_leaves(whole: Path) -> None:
    found = rows(whole)
    assert [(r["kind"], r["step"]) for r in found if r["kind"] == "eval"] == [("eval", s) for s in (0, 10, 20, 23)]
    train = [r for r in found if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, STEPS + 1))
    assert train[0]["train/loss"] == pytest.approx(0.693147, abs=1e-4)
    assert train[0]["train/rewards/accuracies"] == 0
    assert train[0]["train/ties"] == 1
    assert train[-1]["pairs_seen"] == PAIRS
    for row in train:
        forward, backward, both = (row[f"perf/{w}_seconds"] for w in ("forward", "backward", "forward_backward"))
        assert forward > 0
        assert backward > 0
        assert forward + backward < both
    assert found[-1]["eval/loss"] < found[0]["eval/loss"]
    facts = json.loads((whole / "run.json").read_text())
    assert facts["data"]["train"]["rows"] == facts["data"]["train"]["used"] == PAIRS
    assert facts["reference"]["sequences_reused"] == 0
    distinct = set()
    for file in ("pairs.jsonl", "eval.jsonl"):
        for line in (whole.parent / file).read_text().splitlines():
            row = json.loads(line)
            distinct |= {(row["prompt"], row["chosen_response"]), (row["prompt"], row["rejected_response"])}
    assert facts["reference"]["sequences_scored"] == len(distinct) < 2 * (PAIRS + 61)
    assert len(list((whole.parent / "cache" / "reference").glob("*/rows-*.bin"))) >= 3
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == ["step-00000018", "step-00000023"]
    assert (whole / "DONE").exists()
    assert not (whole / "STOPPED").exists()


@pytest.mark.slow
def test_kill_in_training(world: World, whole: Path) -> None:
    run = world.run("killed")
    start_and(run, at_step(world.folder / "killed", 9), kill_all)
    launch(run)
    assert_same_end(world.folder / "killed", whole)
    starts = json.loads((world.folder / "killed" / "run.json").read_text())["starts"]
    assert [s["step"] for s in starts] == [0, 6]


@pytest.mark.slow
def test_wandb_has_every_row_after_two_kills(world: World, whole: Path) -> None:
    """Read back from the newest offline folder, as `wandb sync` takes it: rows, table, configuration, summary."""
    run = world.run("killed-twice", tracking={"wandb": {"mode": "offline"}}, answers={"number": 3})
    folder = world.folder / "killed-twice"
    start_and(run, at_step(folder, 9), kill_all)
    start_and(run, at_step(folder, 15), kill_all)
    launch(run)
    assert [s["step"] for s in json.loads((folder / "run.json").read_text())["starts"]] == [0, 6, 12]
    facts = json.loads((folder / "run.json").read_text())
    (newest,) = {path.parent for path in (folder / "wandb").glob(f"offline-run-*-{facts['wandb_id']}/*.wandb")}
    ids, sent = wandb_reader.history(newest)
    assert ids == {facts["wandb_id"]}
    by_step = {row["_step"]: row for row in sent}
    assert sorted(by_step) == list(range(len(sent)))
    truth = rows(folder)
    table = by_step.pop(len(truth))["samples"]
    assert table["_type"] == "table-file"
    answers = json.loads((newest / "files" / table["path"]).read_text())
    written = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    table = [dict(zip(answers["columns"], line, strict=True)) for line in answers["data"]]
    assert [{name: value for name, value in line.items() if value is not None} for line in table] == written
    assert len(written) == 3
    assert len(truth) == len(by_step) == STEPS + 4 + 2
    for index, row in enumerate(truth):
        for name, value in row.items():
            if name == "kind" or name.startswith("perf/"):
                continue
            got = by_step[index][name]
            if name.endswith("histogram"):
                got = got["values"]
            assert got == value or value == "NaN", (index, name)
    config, summary = wandb_reader.config_and_summary(newest)
    assert config["loss"]["beta"] == 0.1
    assert config["made_of"]["data"]["train"]["digest"] == facts["data"]["train"]["digest"]
    assert config["made_of"]["reference"]["key"] == facts["reference"]["key"]
    assert summary["verdict"] == "not judged"
    assert summary["best/eval/loss"] == min(row["eval/loss"] for row in truth if row["kind"] == "eval")
    assert summary["pairs_seen"] == PAIRS


@pytest.mark.slow
def test_kill_in_first_pass(world: World, whole: Path) -> None:
    """The second start scores only what is missing, in the micro-batches of the plan."""
    run = world.run("killed-early", cache="cache-early")
    store = world.folder / "cache-early" / "reference"
    start_and(run, lambda: any(store.glob("*/rows-*.bin")), kill_all)
    there = len(stored(store.parent))
    launch(run)
    reference = json.loads((world.folder / "killed-early" / "run.json").read_text())["reference"]
    assert reference["sequences_reused"] == there > 0
    assert len(list(store.glob("*/plan-*"))) == 1
    assert_same_end(world.folder / "killed-early", whole)


@pytest.mark.slow
def test_kill_in_first_pass_then_on_one_rank(world: World, whole: Path) -> None:
    """The plan of two ranks is finished by one: the same rows to the bit, and the same end where two train."""
    run, cache = world.run("killed-two", cache="cache-two"), world.folder / "cache-two"
    start_and(run, lambda: any(cache.glob("reference/*/rows-*.bin")), kill_all)
    there = len(stored(cache))
    launch(run, "reference", n=1)
    reference = json.loads((world.folder / "killed-two" / "run.json").read_text())["reference"]
    all_rows = stored(whole.parent / "cache")
    assert reference["sequences_reused"] == there > 0
    assert reference["sequences_scored"] == len(all_rows) - there > 0
    assert stored(cache) == all_rows
    said = launch(run)
    reference = json.loads((world.folder / "killed-two" / "run.json").read_text())["reference"]
    assert reference["sequences_scored"] == 0
    # What was read, dropped, reused, what comes; at the end what was done and where it lies.
    for words in (
        f"data.train: {PAIRS} rows (raw_pair): {PAIRS} used, 0 dropped",
        "data.eval: 61 rows",
        f"all {len(all_rows)} sequences are in the store",
        f"training: dpo, steps 1 to {STEPS} of {G} rows",
        "evaluation every 10 steps; checkpoint every 6 steps",
        f"done: {STEPS} steps, {PAIRS} rows seen",
        str(world.folder / "killed-two" / "final"),
        str(world.folder / "killed-two" / "metrics.jsonl"),
    ):
        assert words in said
    assert_same_end(world.folder / "killed-two", whole)


@pytest.mark.slow
def test_a_sweep_scores_each_sequence_once(world: World, whole: Path) -> None:
    """Three betas started at the same moment on one empty cache: one scores, the others wait for it."""
    jobs, names = [], []
    for beta in (0.05, 0.1, 0.3):
        names.append(f"sweep-{beta}")
        settings = {"loss": {"name": "dpo", "beta": beta}, "train": {"global_batch_pairs": G, "max_steps": 2}}
        run = world.run(names[-1], cache="cache-sweep", **settings)  # type: ignore[arg-type]
        with run.with_suffix(".log").open("w") as log:
            jobs.append(
                subprocess.Popen(
                    ["launch/run.sh", "-n", "1", "train", str(run)],
                    env=ENVIRONMENT,
                    cwd=REPOSITORY,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    statuses = [patience.wait_for_end(job, world.folder) for job in jobs]
    said = [(world.folder / f"{name}.log").read_text() for name in names]
    assert statuses == [0, 0, 0], "\n".join(text[-3000:] for text in said)
    scored = [
        json.loads((world.folder / name / "run.json").read_text())["reference"]["sequences_scored"] for name in names
    ]
    assert sorted(scored) == [0, 0, len(stored(whole.parent / "cache"))]
    assert len(stored(world.folder / "cache-sweep")) == max(scored)
    first = [json.loads((world.folder / n / "metrics.jsonl").read_text().splitlines()[1]) for n in names]
    assert all(row["train/loss"] == pytest.approx(0.693147, abs=1e-4) for row in first)


@pytest.mark.slow
def test_stop_and_go_on(world: World, whole: Path) -> None:
    """The file STOP, then TERM, then to the end: statuses 75, 75, 0; W&B shows one run."""
    run, folder = world.run("stopped", tracking={"wandb": {"mode": "offline"}}), world.folder / "stopped"
    assert start_and(run, at_step(folder, 3), lambda _: (folder / "STOP").touch()) == 75
    assert "asked by the file STOP; stopped after step" in (folder / "STOPPED").read_text()
    assert not (folder / "STOP").exists()
    assert start_and(run, at_step(folder, 12), lambda p: p.send_signal(signal.SIGTERM)) == 75
    assert not (folder / "DONE").exists()
    launch(run)
    assert_same_end(folder, whole)
    assert not (folder / "STOPPED").exists()
    run_id = json.loads((folder / "run.json").read_text())["wandb_id"]
    assert [p.name.endswith(run_id) for p in (folder / "wandb").glob("offline-run-*")] == [True]
    before = (folder / "run.json").stat().st_mtime_ns
    assert "is done" in launch(run)
    assert len(rows(folder)) == len(rows(whole))
    assert (folder / "run.json").stat().st_mtime_ns >= before


@pytest.mark.slow
def test_other_ranks_and_micro_batches(world: World, whole: Path) -> None:
    """One rank, one large micro-batch, rows of three steps: the same trajectory, since the layout does not matter."""
    run = world.run(
        "one-rank",
        train={"global_batch_pairs": G, "micro_batch_tokens": 100_000},
        tracking={"wandb": {"mode": "disabled"}, "log_every_steps": 3},
    )
    launch(run, n=1)
    mine = {(r["kind"], r["step"]): r for r in rows(world.folder / "one-rank")}
    theirs = {(r["kind"], r["step"]): r for r in rows(whole)}
    assert [s for k, s in mine if k == "train"] == [3, 6, 9, 12, 15, 18, 21, 23]
    first = [theirs["train", s] for s in (1, 2, 3)]
    for name in ("train/loss", "train/logps/chosen"):
        assert mine["train", 3][name] == pytest.approx(sum(r[name] for r in first) / 3, rel=1e-5)
    last = [theirs["train", s] for s in (22, 23)]
    weighted = (G * last[0]["train/loss"] + (PAIRS % G) * last[1]["train/loss"]) / (G + PAIRS % G)
    assert mine["train", 23]["train/loss"] == pytest.approx(weighted, rel=1e-4)
    for step in (0, 10, 20, 23):
        assert mine["eval", step]["eval/loss"] == pytest.approx(theirs["eval", step]["eval/loss"], rel=1e-4)


SLOW_CONVERSION = """
import sys, time
from prefopt_dist.cli import main
from prefopt_dist.training import universal
write = universal._write
universal._write = lambda *a: (time.sleep(0.3), write(*a))[1]
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.slow
def test_two_then_one_then_three_ranks(world: World, whole: Path) -> None:
    """Stopped on two ranks, killed on one in the middle of the conversion, stopped on one, ended on three.

    Every step has the rows of the run on two ranks, and its numbers within rounding.
    """
    run, folder = world.run("numbers"), world.folder / "numbers"
    checkpoints = folder / "checkpoints"

    def stop(_: psutil.Process) -> None:
        (folder / "STOP").touch()

    def names() -> list[str]:
        return sorted(p.name for p in checkpoints.iterdir())

    assert start_and(run, at_step(folder, 7), stop) == 75
    two = int(names()[-1].removeprefix("step-"))
    start_and(
        run,
        lambda: len(list(checkpoints.glob(".converting/*.f32"))) >= 3,
        kill_all,
        command=[sys.executable, "-c", SLOW_CONVERSION, str(run)],
    )
    assert names() == [".converting", "step-00000006", f"step-{two:08d}"]
    assert start_and(run, at_step(folder, two + 5), stop, n=1) == 75
    one = int(names()[-1].removeprefix("step-"))
    said = launch(run, n=3)
    assert f"step-{one:08d} was written by 1 ranks and this job has 3" in said
    assert names() == ["step-00000018", "step-00000023"], "what was converted is superseded"
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert [(s["world_size"], s["step"]) for s in starts] == [(2, 0), (1, None), (1, two), (3, one)]

    mine, theirs = without_speed(rows(folder)), without_speed(rows(whole))
    assert [(r["kind"], r["step"], r["pairs_seen"]) for r in mine] == [
        (r["kind"], r["step"], r["pairs_seen"]) for r in theirs
    ]
    for row, other in zip(mine, theirs, strict=True):
        for name in ("loss", "logps/chosen", "logps/rejected"):
            key = f"{row['kind']}/{name}"
            assert row[key] == pytest.approx(other[key], rel=1e-5), (key, row["step"])
    weights, expected = (load_file(d / "final" / "model.safetensors") for d in (folder, whole))
    for name in expected:
        assert float((weights[name] - expected[name]).norm() / expected[name].norm()) <= 1e-5, name


@pytest.mark.slow
def test_without_sharing(world: World, whole: Path) -> None:
    """Every response with a prompt of its own, first pass included: the same ten steps: packing does not matter."""
    settings = {"eval": {"at_start": False, "every_steps": 100, "at_end": False}}
    run = world.run("unshared", cache="cache-unshared", train={"global_batch_pairs": G, "max_steps": 10}, **settings)
    done = patience.run(
        [sys.executable, "tests/helpers/unshared_door.py", "train", run], world.folder, env=ENVIRONMENT, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = world.run("shared", train={"global_batch_pairs": G, "max_steps": 10}, **settings)
    launch(shared, n=1)
    mine, theirs = (rows(world.folder / name) for name in ("unshared", "shared"))
    assert len(mine) == len(theirs) == 10
    for one, other in zip(mine, theirs, strict=True):
        for name in ("train/loss", "train/logps/chosen", "train/logps/rejected"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)
        assert one["train/rewards/margins"] == pytest.approx(other["train/rewards/margins"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "mix"])
def test_kill_with_another_loss(world: World, name: str) -> None:
    """Killed in training on two ranks; the same end as the run that goes through, evaluated on one rank."""
    loss: dict[str, object] = {"name": "kto", "split_pairs": True}
    if name == "mix":
        loss = {"name": "mix", "of": {"dpo": {"weight": 1.0}, "orpo": {"weight": 0.2}}}
    settings = {"loss": loss, "train": {"global_batch_pairs": G, "micro_batch_tokens": 512, "max_steps": 23}}
    launch(world.run(f"{name}-whole", **settings))  # type: ignore[arg-type]
    whole, killed = world.folder / f"{name}-whole", world.folder / f"{name}-killed"
    run = world.run(f"{name}-killed", **settings)  # type: ignore[arg-type]
    start_and(run, at_step(killed, 9), kill_all)
    launch(run)
    assert_same_end(killed, whole)
    assert [s["step"] for s in json.loads((killed / "run.json").read_text())["starts"]] == [0, 6]
    launch(run, "evaluate", n=1)
    found, last = json.loads((killed / "evaluation.json").read_text()), rows(killed)[-1]
    for metric in ("loss", "rewards/accuracies", "rewards/margins", "kto/z0" if name == "kto" else "orpo_loss"):
        assert found[f"eval/{metric}"] == pytest.approx(last[f"eval/{metric}"], rel=1e-4), metric


@pytest.mark.slow
def test_evaluate_and_export_on_one_rank(world: World, whole: Path) -> None:
    """Stages on a checkpoint of two ranks, run by one."""
    run = world.run("whole")
    launch(run, "evaluate", n=1)
    found = json.loads((whole / "evaluation.json").read_text())
    last = rows(whole)[-1]
    assert found["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert found["eval/rewards/margins"] == pytest.approx(last["eval/rewards/margins"], rel=1e-4)
    target = world.folder / "exported"
    again = world.run("whole", export={"dir": str(target)})
    launch(again, "export")
    mine, theirs = (load_file(d / "model.safetensors") for d in (target, whole / "final"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    # Colleagues who can read one of its files can read all.
    assert len({f.stat().st_mode for f in target.iterdir()}) == 1


@pytest.mark.slow
def test_bfloat16(world: World) -> None:
    """Trained in bfloat16; exported in it, and the float32 master weights on request."""
    settings = {"model": {"dtype": "bfloat16"}, "train": {"global_batch_pairs": G, "max_steps": 4}}
    launch(world.run("bf16", **settings))  # type: ignore[arg-type]
    found = [r for r in rows(world.folder / "bf16") if r["kind"] == "train"]
    assert found[0]["train/loss"] == pytest.approx(0.6931, abs=5e-2)
    exported = load_file(world.folder / "bf16" / "final" / "model.safetensors")
    assert {t.dtype for t in exported.values()} == {torch.bfloat16}
    target = world.folder / "master"
    launch(world.run("bf16", **settings, export={"dir": str(target), "dtype": "float32"}), "export")  # type: ignore[arg-type]
    assert {t.dtype for t in load_file(target / "model.safetensors").values()} == {torch.float32}


def test_a_planted_secret_is_in_nothing_that_a_run_writes(world: World) -> None:
    """Keys in the environment, in the YAML and on the command line; a run that ends well and one that does not."""
    planted = {
        "HF_TOKEN": "hf_" + "Pl4ntedHub" * 3,
        "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
        "SITE_PASSWORD": "planted-pass-phrase-7719",
        "AWS_SECRET_ACCESS_KEY": "pl4nted/Acc3ss+Key/ofAStore",
    }
    in_yaml, in_override = "hf_" + "1nTheYaml9" * 3, "wandb_v1_" + "0nTheC0mmandLine" * 2
    run = world.run(
        "secret",
        cache="cache-secret",
        train={"global_batch_pairs": G, "max_steps": 2},
        tracking={"wandb": {"mode": "offline", "group": f"token={in_yaml}", "name": in_yaml}},
    )
    before = {p: p.stat().st_mtime_ns for p in Path("/tmp").iterdir()}
    said = ""
    for overrides in (
        [f"tracking.wandb.tags=[{in_override},{planted['SITE_PASSWORD']}]"],
        [f"data.train={in_override}"],
    ):
        done = patience.run(
            ["launch/run.sh", "-n", "1", "train", run, *overrides],
            world.folder,
            env=ENVIRONMENT | planted,
            cwd=REPOSITORY,
        )
        assert done.returncode == (0 if "tags" in overrides[0] else 2), done.stderr[-3000:]
        said += done.stdout + done.stderr
    assert "***" in (world.folder / "secret" / "config.yaml").read_text(), "the secrets were planted where they show"
    secrets = [*planted.values(), in_yaml, in_override]
    assert [s for s in secrets if s in said] == []
    places = [world.folder / "secret", world.folder / "cache-secret"]
    places += [p for p in Path("/tmp").iterdir() if p.is_file() and before.get(p) != p.stat().st_mtime_ns]
    files = [f for p in places for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()]
    assert any(f.suffix == ".wandb" for f in files)
    found = [(f.name, s) for f in files for s in secrets if s.encode() in f.read_bytes()]
    assert found == []


@pytest.mark.slow
def test_changed_data_are_refused_at_a_resume(world: World) -> None:
    """Rows of a changed file would be lost or repeated; nothing is touched and the old file goes on."""
    data, folder = world.folder / "changing.jsonl", world.folder / "changed"
    worlds.write_pairs(data, 200, seed=3)
    run = world.run("changed", data={"train": str(data)}, eval={"at_end": False, "at_start": False})
    assert start_and(run, at_step(folder, 2), lambda _: (folder / "STOP").touch()) == 75
    before, content = (folder / "metrics.jsonl").read_text(), data.read_text()
    data.write_text(content + '{"prompt": "a", "chosen_response": "b", "rejected_response": "c"}\n')
    launch(run, expect=2)
    assert (folder / "metrics.jsonl").read_text() == before


def test_mistakes_end_with_2_and_leave_nothing(world: World) -> None:
    """Found before any rank starts, with place, value, rule and remedy."""
    for name, sections, said in (
        ("bad-model", {"model": {"name_or_path": "./nowhere"}}, "model.name_or_path"),
        ("bad-data", {"data": {"train": "./nowhere.jsonl"}}, "data.train"),
        ("bad-loss", {"loss": {"name": "dpo", "beta": 0}}, "loss.beta"),
    ):
        run = world.run(name, **sections)  # type: ignore[arg-type]
        done = subprocess.run(
            [sys.executable, "-m", "prefopt_dist", "train", str(run), "--check"],
            env=ENVIRONMENT,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert not (world.folder / name).exists()


@pytest.mark.slow
def test_more_rows_a_step_than_there_are(world: World) -> None:
    """Found only when the data are read; the folder is as before, so the mended run is not refused as another."""
    run = world.run("too-large", train={"global_batch_pairs": 1000})
    launch(run, expect=2)
    assert not (world.folder / "too-large").exists()


def test_another_run_is_refused(world: World, whole: Path) -> None:
    before = sorted(p.name for p in whole.iterdir())
    run = world.run("whole", loss={"name": "dpo", "beta": 0.2})
    launch(run, expect=2)
    assert sorted(p.name for p in whole.iterdir()) == before
