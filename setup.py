"""Build the package with the folders that a clone has beside it: scripts, recipes and DeepSpeed's settings.

A wheel has them in prefopt_dist/shipped_files/, where prefopt_dist/shipped.py finds them.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "launch": ["*.sh"],
    "launch/recipes": ["*.yaml"],
    "slurm": ["*.sh", "*.sbatch", "*.example", "submit"],
    "deepspeed_configs": ["*.json"],
}
SHIPPED = {f"prefopt_dist.shipped_files.{folder.replace('/', '.')}": folder for folder in FOLDERS}

setup(
    packages=[*find_packages(include=["prefopt_dist*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "prefopt_dist.report": ["templates/*.j2"],
        **{name: FOLDERS[folder] for name, folder in SHIPPED.items()},
    },
)
