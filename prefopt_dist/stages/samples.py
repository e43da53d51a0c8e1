"""A few prompts answered by the model before and after training, for people to read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.template import read_template
from prefopt_dist.distributed import ranks
from prefopt_dist.files import write_atomic
from prefopt_dist.generation.prompts import Prompt
from prefopt_dist.generation.sampling import Sampling, stop_ids_of
from prefopt_dist.generation.transformers_engine import TransformersEngine
from prefopt_dist.model.load import ModelFolder, inspect_folder
from prefopt_dist.stages.ingredients import Models
from prefopt_dist.tracking import heartbeat
from prefopt_dist.tracking.feed import Sample

MOST_TOKENS = 256
"""Of an answer."""
GREEDY = 1e-6
"""A temperature at which the likeliest token is taken: what differs between the two is then the weights."""


def write_samples(config: Config, models: Models, rows: TokenisedRows) -> list[Sample]:
    """Rank 0, when the model is exported: RUN/samples.jsonl. The reference's answer stands beside the policy's.

    Each model is whole on this rank's device while it answers, as in the export's check.
    """
    asked = _prompts(config, models, rows)
    room = config.data.max_length - max(len(p.ids) for p in asked)
    template = read_template(models.tokenizer, config.data.template)
    final = inspect_folder(config.export_dir, "export.dir", config.data.max_length)

    def answers(model: ModelFolder) -> list[str]:
        sampling = Sampling(
            n=1,
            temperature=GREEDY,
            top_p=1.0,
            max_new_tokens=max(1, min(MOST_TOKENS, room)),
            seed=config.run.seed,
            stop_ids=stop_ids_of(template, model.path),
        )
        return _answers(models, model, asked, sampling)

    reference, policy = answers(models.reference), answers(final)
    found = [
        Sample(str(prompt.prompt), before, after)
        for prompt, before, after in zip(asked, reference, policy, strict=True)
    ]
    lines = [json.dumps(sample._asdict(), ensure_ascii=False) for sample in found]
    write_atomic(Path(config.run_dir) / "samples.jsonl", "\n".join(lines) + "\n")
    return found


def _prompts(config: Config, models: Models, rows: TokenisedRows) -> list[Prompt]:
    """The set's first different prompts, the shortest first, as the engine likes them."""
    distinct: dict[bytes, int] = {}
    for i in range(rows.n):
        distinct.setdefault(rows.prompt(i).tobytes(), i)
        if len(distinct) == config.tracking.samples:
            break
    prompts = []
    for i in distinct.values():
        ids = rows.prompt(i).tolist()
        text = models.tokenizer.decode(ids, skip_special_tokens=True)
        prompts.append(Prompt(i, rows.origin(i), text, None, {}, ids))
    return sorted(prompts, key=lambda p: len(p.ids))


def _answers(models: Models, model: ModelFolder, asked: list[Prompt], sampling: Sampling) -> list[str]:
    heartbeat.beat("answering the sample prompts")
    engine = TransformersEngine(model, dtype=models.dtype, device=ranks.device(), batch_tokens=MOST_TOKENS * 64)
    try:
        # The end token is no text; a prompt of its own number, so that the engine's order is ours.
        answers = engine.sample([replace(p, index=k) for k, p in enumerate(asked)], sampling)
    finally:
        engine.close()
    return [models.tokenizer.decode(one[0], skip_special_tokens=True) for one in answers]
