"""Write model, pairs and runs for tests/slurm/run.sh: python make_world.py FOLDER."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import worlds

folder = Path(sys.argv[1])
worlds.write_model(folder / "model", seed=1, scale=2.0)
worlds.write_pairs(folder / "pairs.jsonl", 240)


def write(name: str, *, epochs: int, cache: str = "cache", every: int = 100) -> None:
    worlds.write_run(
        folder / f"{name}.yaml",
        folder / "model",
        folder / "pairs.jsonl",
        folder / name,
        run={"cache": str(folder / cache)},
        train={"global_batch_pairs": 24, "micro_batch_tokens": 512, "epochs": epochs},
        checkpoint={"every_steps": every},
        eval={"every_steps": None},
    )


write("through", epochs=1)
for name in ("limited", "whole"):
    write(name, epochs=24, cache=f"cache-of-{name}")
for name in ("requeued", "preempted"):
    write(name, epochs=12)
for name in ("cancelled", "gently"):
    write(name, epochs=2000)
write("unfit", epochs=1)
write("raised", epochs=20)
write("swept", epochs=4, cache="cache-of-sweep")
