"""What holds for all tests."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("rank_checks")  # checks of several files, which show the values as a test's own do

# Small matrices on a busy machine: threads that wait for each other would make a test of a second last thirty.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A runner that is itself started in the background ignores SIGINT, and so would everything started from here; a
# handler, whichever it is, is reset to the default in a new process.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Variables of the shell that would go over what a test has configured: W&B's mode, the job's cache, a rank.
for name in [name for name in os.environ if name.startswith(("WANDB_", "PREFOPT_")) or name in ("RANK", "WORLD_SIZE")]:
    if name not in ("PREFOPT_TEST_DEVICE", "PREFOPT_TEST_VLLM"):  # of tests/gpu, of end_to_end/test_vllm.py
        del os.environ[name]

LONG = (
    *("test_ranks", "test_end_to_end", "test_campaign", "test_own_answers", "test_generate", "test_store_attacks"),
    *("test_universal", "test_scorer", "test_report_answers", "test_flop", "test_head_loss", "test_report"),
    *("test_gpu_parts_on_cpu", "test_transformers_engine", "test_scoring_plan", "test_health", "test_plan_command"),
    *("test_config_fuzz", "test_data_fuzz"),
)
"""Files that take long, the longest first: begun last, one of them would keep one worker busy and the other idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish() -> None:
    gc.freeze()  # 3,700 tests and what they import stay: an engine's release, which collects, need not walk them


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread in torch: sums whose order does not depend on the machine."""
    import torch  # many files of tests do without it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
