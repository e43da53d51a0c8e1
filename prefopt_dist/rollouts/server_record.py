"""Say and record how fast servers answered, and what the job waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt_dist.rollouts.server_pool import ServerPool


def speed_text(pool: ServerPool, seconds: float) -> str:
    """Return tokens per second, requests in flight and waiting time so far, for people."""
    asked = pool.asked
    return (
        f"{asked.tokens / max(seconds, 1e-9):,.0f} tokens/s, {pool.in_flight} requests in flight, "
        f"{asked.waited / max(1, asked.answers):.2f} s an answer"
    )


def record_of(pool: ServerPool, seconds: float) -> dict[str, Any]:
    """Return what one rank asked, as JSON values.

    Args:
        pool: the servers.
        seconds: since the first request.
    """
    asked = pool.asked
    return {
        "answers": asked.answers,
        "tokens": asked.tokens,
        "seconds": round(seconds, 3),
        "seconds_waited": round(asked.waited, 3),
        "most_in_flight": pool.most_in_flight,
        "repeated_requests": asked.retries,
        "seeds_hold": all(s.contract is None or s.contract.seeds_hold for s in pool.servers),
        "left_out": pool.lost(),
    }


def together(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the records of all ranks as one: sums, and of the time the longest."""
    some = [record for record in records if record]
    summed = ("answers", "tokens", "seconds_waited", "most_in_flight", "repeated_requests")
    return {name: sum(record[name] for record in some) for name in summed} | {
        "seconds": max((record["seconds"] for record in some), default=0.0),
        "seeds_hold": all(record["seeds_hold"] for record in some),
        "left_out": sorted({text for record in some for text in record["left_out"]}),
    }


def record_text(record: dict[str, Any]) -> str:
    """Return a record for people."""
    lines = [
        f"{record['answers']} answers of servers in {record['seconds']:.1f} s: "
        f"{record['tokens'] / max(record['seconds'], 1e-9):,.0f} tokens/s, at most {record['most_in_flight']} requests "
        f"in flight, {record['seconds_waited'] / max(1, record['answers']):.2f} s an answer, "
        f"{record['repeated_requests']} requests repeated"
    ]
    return "\n".join([*lines, *(f"  left out: {text}" for text in record["left_out"])])
