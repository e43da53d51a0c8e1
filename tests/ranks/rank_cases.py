"""What is tested on real ranks, many cases in one process group: torchrun tests/ranks/rank_cases.py FOLDER CASE …

A case is a function of a folder in one of the modules below. Every rank runs every case; rank 0 writes
FOLDER/<case>.json with what the case found, or with the error.
"""

import adapter_cases
import case_runner
import evaluation_cases
import expert_cases
import fault_cases
import gradient_cases
import lora_cases
import loss_cases
import moving_cases
import path_cases
import rank_jobs
import ranked_cases
import sequence_cases
import shard_cases
import shared_loss_cases
import skipped_cases
import step_cases
import whole_run_cases

MODULES = [
    *(step_cases, loss_cases, evaluation_cases, whole_run_cases, gradient_cases, skipped_cases, fault_cases),
    *(shard_cases, adapter_cases, expert_cases, lora_cases, moving_cases, path_cases, ranked_cases, sequence_cases),
    shared_loss_cases,
]

if __name__ == "__main__":
    case_runner.serve(case_runner.cases_of(*MODULES), rank_jobs.prepare)
