"""The pages: links lead somewhere, and named files, functions and classes exist."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from places import REPOSITORY
from transformers import TrainingArguments

PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "tests" / "README.md"],
)
LONGEST_README = 170


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as they are made by the usual hosts of repositories."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file) if file else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_named_files_exist(page: Path) -> None:
    """A path of the package, with or without its first folder, and what is named in it after a colon."""
    missing = []
    for path, names in re.findall(r"`((?:[\w-]+/)*\w+\.py)(?::([\w.]+))?`", page.read_text()):
        files = [root / path for root in (REPOSITORY / "prefopt_dist", REPOSITORY, REPOSITORY / "tests")]
        file = next((f for f in files if f.is_file()), None)
        if file is None or (names and not has(file, names.split("."))):
            missing.append(f"{path}:{names}")
    assert not missing


def has(file: Path, names: list[str]) -> bool:
    """Return whether a file defines a name, or a class with that member."""
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    for name in names:
        found = None
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if getattr(node, "name", None) == name or any(getattr(t, "id", None) == name for t in targets):
                found = node
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


def test_the_readme_is_a_front_door() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= LONGEST_README


DPO_FIELDS = """
    learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc max_length
    truncation_mode padding_free pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type
    loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau
    activation_offloading sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token
"""
KTO_FIELDS = """
    learning_rate train_sampling_strategy model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout
    dataset_num_proc max_length pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type beta
    desirable_weight undesirable_weight activation_offloading sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
"""
"""The fields that DPOConfig and KTOConfig of TRL 1.16 have beside TrainingArguments."""


@pytest.mark.parametrize("kind", ["DPOConfig", "KTOConfig", "TrainingArguments"])
def test_every_field_of_trl_has_a_line(kind: str) -> None:
    """What it is here, or why it is not."""
    page = (REPOSITORY / "docs" / "from-other-tools.md").read_text()
    sections = re.split(r"^###? ", page, flags=re.M)
    (section,) = [part for part in sections if part.startswith(kind)]
    own = {"DPOConfig": DPO_FIELDS.split(), "KTOConfig": KTO_FIELDS.split()}
    names = own.get(kind) or [field.name for field in dataclasses.fields(TrainingArguments)]
    if kind == "KTOConfig":
        section += next(part for part in sections if part.startswith("TrainingArguments"))
    lacking = [name for name in names if not re.search(rf"`{name}[`:]", section)]
    assert not lacking
