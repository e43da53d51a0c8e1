"""Run a stage: python -m prefopt_dist STAGE RUN.yaml [section.key=value ...]."""

from prefopt_dist.cli import run

if __name__ == "__main__":
    run()
