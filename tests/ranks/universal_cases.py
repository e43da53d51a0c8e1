"""Checkpoints of two ranks on other numbers of ranks: torchrun tests/ranks/universal_cases.py FOLDER CASE …

`written` on two ranks leaves checkpoints and what is in them; the other cases go on from there.
"""

import case_runner
import damage_cases
import export_cases
import large_cases
import resharding_cases
import resharding_jobs

if __name__ == "__main__":
    cases = case_runner.cases_of(resharding_cases, export_cases, damage_cases, large_cases)
    case_runner.serve(cases, resharding_jobs.prepare)
