"""The transformers engine beside a server, on the demo's SFT model: python -m benchmarks.servers --command COMMAND.

Both answer 400 prompts that are in none of the demo's files, once greedily and four times by sampling. Greedy answers
are compared token by token, or text by text where the server gives no ids; of samples the true reward, with its 95 %
interval. COMMAND is that of generate.launch.command, such as

    /opt/serve/bin/transformers serve {model} --device cpu --port {port}

The server has as many threads as OMP_NUM_THREADS says, and so has the transformers engine. One process, no GPU. The
demo's SFT model must be there (`make demo`). The first time of each engine holds its start and its check.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.frontier import RECIPE, RESULTS, TRUE, write_fresh
from prefopt_dist.config import Config, load_config
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.files import write_json
from prefopt_dist.monitoring.statistics import interval_text
from prefopt_dist.rollouts import comparison
from prefopt_dist.rollouts.store import AnsweredPrompt
from prefopt_dist.setup import prepare_models, prepare_rollouts

COLD = 1e-6
"""A temperature at which each token is the most likely one."""
SAMPLES = 4


def answered(config: Config, *, temperature: float, n: int) -> tuple[list[AnsweredPrompt], dict[str, Any]]:
    """Answer the prompts of generate.prompts; return the answers and what it took."""
    models = prepare_models.load_models(config)
    job = prepare_rollouts.prepare(
        config,
        models,
        models.start,
        config.prompt_sources,
        "generate.prompts",
        n=n,
        temperature=temperature,
        top_p=1.0,
        what="generate",
    )
    began = time.monotonic()
    job.sample(lambda: False)
    seconds = time.monotonic() - began
    job.score(lambda: False)
    found = job.answered()
    tokens = sum(len(answer.ids) for one in found for answer in one.answers)
    taken = {"seconds": seconds, "tokens": tokens, "reward": comparison.summary(found, job.reward_weights)["reward"]}
    return found, taken | ({"asked": job.store.asked()} if job.store.asked() else {})


def compare_greedy(own: list[AnsweredPrompt], served: list[AnsweredPrompt]) -> dict[str, Any]:
    """Return how many greedy answers are equal, and those that are not."""
    others = []
    for mine, theirs in zip(own, served, strict=True):
        (a,), (b,) = mine.answers, theirs.answers
        if a.ids != b.ids:
            others.append({"prompt": mine.prompt.origin, "own": a.text, "served": b.text, "tokens": len(a.ids)})
    return {"answers": len(own), "equal": len(own) - len(others), "others": others}


def main() -> int:
    """Run both engines and write the result; return 1 where greedy answers differ or the rewards' intervals part."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.servers", description=__doc__.splitlines()[0])
    parser.add_argument("--command", required=True, help="generate.launch.command")
    parser.add_argument("--model", default="runs/demo/sft/final", help="the demo's SFT model")
    parser.add_argument("--folder", type=Path, default=Path("runs/servers"), help="removed and made again")
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--save", metavar="NAME", help="also write benchmarks/results/NAME.json")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    fresh = options.folder / "fresh.jsonl"
    write_fresh(fresh)
    common = [
        f"model.name_or_path={options.model}",
        f"run.dir={options.folder / 'run'}",
        f"run.cache={options.folder / 'cache'}",
        f"generate.prompts={fresh}",
        f"data.train={fresh}",
        f"evaluate.prompts={fresh}",
        TRUE,
    ]
    launch = json.dumps({"command": options.command})
    served = [*common, "generate.engine=server", f"generate.launch={launch}"]
    served.append(f"generate.requests_in_flight={options.in_flight}")
    found: dict[str, Any] = {"command": options.command, "in_flight": options.in_flight}
    ranks.start()
    try:
        for what, temperature, n in (("greedy", COLD, 1), ("sampled", 1.0, SAMPLES)):
            answers = {}
            for engine, overrides in (("transformers", common), ("server", served)):
                answers[engine], taken = answered(load_config(RECIPE, overrides), temperature=temperature, n=n)
                found[f"{what}/{engine}"] = taken
                speed = f"{taken['tokens']} tokens in {taken['seconds']:.1f} s"
                print(f"{what} by {engine}: {speed}, reward {interval_text(taken['reward'])}", flush=True)
            if what == "greedy":
                found["compared"] = compare_greedy(answers["transformers"], answers["server"])
                print(f"greedy answers that are equal: {found['compared']['equal']} of {found['compared']['answers']}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    finally:
        ranks.end()
    write_json(options.folder / "result.json", found)
    if options.save:
        write_json(RESULTS / f"{options.save}.json", found)
    own, theirs = found["sampled/transformers"]["reward"], found["sampled/server"]["reward"]
    within = own["low"] <= theirs["high"] and theirs["low"] <= own["high"]
    return 0 if within and found["compared"]["equal"] == found["compared"]["answers"] else 1


if __name__ == "__main__":
    sys.exit(main())
