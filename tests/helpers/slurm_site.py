"""A site without Slurm: stubs of its commands and of Python note what they are asked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from places import REPOSITORY

# Stands for the package: the check, --print-config a resolved run, `-` the needs of its loss
# and the run folder.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$FAKE/calls"
case "$*" in
    *--check) eval "$FAKE_CHECK" ;;
    *--print-config)
        printf 'run:\\n  dir: x\\n  cache: null\\ndeepspeed:\\n'
        printf '  policy: deepspeed_configs/policy_zero3.json\\n  reference: mine.json\\n# %s\\n' "$*"
        printf 'plan:\\n  gpu: %s\\n' "$FAKE_GPU" ;;
    "-m prefopt_dist plan "*) eval "$FAKE_PLAN" ;;
    *preflight.rendezvous*) echo 10.0.0.9 ;;
    -*) cat >/dev/null; echo "$FAKE_REFERENCE"; echo "$FAKE/runs/mine" ;;
esac
"""
SBATCH = """#!/usr/bin/env bash
printf '%s|' "$@" >>"$FAKE/submitted"; echo >>"$FAKE/submitted"
[[ $* != *"$FAKE_REFUSES"* ]] || exit 1
echo $((40 + $(wc -l <"$FAKE/submitted")));
"""


class Site:
    """A folder with stubs on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "runs" / "mine"
        (folder / "bin").mkdir()
        for name, text in {
            "python": PYTHON,
            "sbatch": SBATCH,
            "scancel": '#!/usr/bin/env bash\necho "$*" >>"$FAKE/cancelled"\n',
            "scontrol": '#!/usr/bin/env bash\necho "$*" >>"$FAKE/scontrol"\n'
            "case $2 in hostnames) printf 'n1\\nn2\\n' ;; node) echo '   NodeAddr=10.0.0.7 NodeHostName=n1' ;;\n"
            'job) echo "   StartTime=2026-01-01T10:00:00 $FAKE_PREEMPTED" ;; esac\n',
            "sleep": "#!/usr/bin/env bash\n[[ $1 == 60 ]] || exec /bin/sleep 0.05\n",
            "srun": "#!/usr/bin/env bash\nif [[ $* == *check_node.sh* ]]; then\n"
            'echo "$*" >"$FAKE/checked"; eval "$FAKE_NODES"; exit; fi\n'
            'printf "%s|" "$@" >"$FAKE/srun"\neval "$FAKE_JOB"\n',
        }.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "site.env").write_text("PREFOPT_SBATCH=(--partition=gpu '--comment=two words')\n")

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PREFOPT_PYTHON": str(self.folder / "bin" / "python"),
            "PREFOPT_SITE": str(self.folder / "site.env"),
            "FAKE": str(self.folder),
            "FAKE_CHECK": "",
            "FAKE_REFERENCE": "True",
            "FAKE_REFUSES": "nothing",
            "FAKE_JOB": "",
            "FAKE_NODES": "",
            "FAKE_PREEMPTED": "PreemptTime=None",
            "FAKE_GPU": "null",
            "FAKE_PLAN": "exit 9",
            **more,
        }
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=30)

    def submit(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(REPOSITORY / "slurm" / "submit"), *arguments, **more)

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def job(self, stage: str = "train", **more: str) -> subprocess.CompletedProcess[str]:
        """The batch script of a stage after a submission, as Slurm starts it."""
        number = self.base.with_name("mine.submit") / "1"
        if not number.exists():
            assert self.submit("r.yaml", "--nodes", "2").returncode == 0
        self.base.mkdir(exist_ok=True)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"} | more
        script = number / "code" / "slurm" / f"{stage}.sbatch"
        return self.run("bash", str(script), str(number), **{k: v for k, v in job.items() if v})
