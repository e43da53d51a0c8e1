"""Push of an exported folder to the hub, in a process of its own: python -m prefopt_dist.checkpoint.hub FOLDER NAME.

The library waits without an end for a server that does not answer. A process can be ended after a time, and whatever
happens in it costs the job nothing but a message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from prefopt_dist.config import mask_secrets
from prefopt_dist.errors import UserError
from prefopt_dist.monitoring import heartbeat

BASE_SECONDS = 300.0
BYTES_PER_SECOND = 20e6
"""A push may take BASE_SECONDS, and a second more for each BYTES_PER_SECOND of the folder."""
ATTEMPTS = 3
PAUSE_SECONDS = 2.0
"""Time before the second attempt; before each later one it is twice as long."""


def check_name(name: str) -> None:
    """Raise UserError where `name` is not one of a repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as e:
        raise UserError(
            f"export.push_to_hub: got {name!r}, must be the name of a repository on the hub ({e}); write "
            "OWNER/NAME or NAME"
        ) from None


def push(folder: Path, name: str) -> str | None:
    """Push a folder to a repository, which is made private where it does not exist (one process calls it).

    Returns:
        Why it failed, without a full stop at the end; None where it is done.
    """
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    limit = BASE_SECONDS + size / BYTES_PER_SECOND
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "prefopt_dist.checkpoint.hub", str(folder.resolve()), name]
    try:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": path}
        )
    except OSError as e:
        return f"no process could be started for it ({e.strerror})"
    end = time.monotonic() + limit
    with child:
        try:
            while child.poll() is None:
                if time.monotonic() > end:
                    return f"it was not done after {limit:.0f} s, the time for {size / 1e6:.0f} MB"
                heartbeat.beat("the push to the hub")
                time.sleep(0.2)
            said = child.stdout.read() if child.stdout is not None else ""
        finally:
            child.kill()
    try:
        why = json.loads(said.strip().splitlines()[-1])["failed"]
    except (ValueError, KeyError, IndexError, TypeError):
        return f"its process ended with status {child.returncode}"
    return None if why is None else mask_secrets(str(why))


def main(folder: str, name: str) -> None:
    """Push, with several attempts, and print why it failed, or null, as JSON."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    failed: str | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            api = HfApi()
            # An existing repository keeps its visibility.
            repo = api.create_repo(name, private=True, exist_ok=True, repo_type="model").repo_id
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload the model of a training run")
        except Exception as e:  # those of the http library differ between versions
            failed = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            status = e.response.status_code if isinstance(e, HfHubHTTPError) and e.response is not None else None
            if status is not None and status < 500 and status not in (408, 429):
                break  # such as a token that may not write: another attempt would fail too
        else:
            failed = None
            break
    print(json.dumps({"failed": failed}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
