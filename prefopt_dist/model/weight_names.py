"""Names of the tensors in a folder's files, and of its language model's, and which are of other parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from prefopt_dist.errors import UserError
from prefopt_dist.model.parts import backbone, name_of
from prefopt_dist.model.weight_files import StoredTensor


@dataclass(frozen=True)
class Names:
    """The names of a folder's tensors."""

    prefixes: tuple[tuple[str, str], ...] = ()
    """(prefix in the files, prefix in the language model) where they differ, as in a model that also takes images."""
    kept: tuple[str, ...] = ()
    """Names in the files of tensors of other parts, which are not loaded and which an export copies: those of images
    or audio, and of predictions of several tokens, which transformers skips too."""

    def in_model(self, name: str) -> str:
        """Return the name in the language model of a tensor with this name in the files."""
        for stored, own in self.prefixes:
            if name.startswith(stored):
                return own + name.removeprefix(stored)
        return name

    def in_files(self, name: str) -> str:
        """Return the name in the files of a tensor with this name in the language model."""
        for stored, own in self.prefixes:
            if name.startswith(own):
                return stored + name.removeprefix(own)
        return name

    @property
    def key_mapping(self) -> dict[str, str] | None:
        """Return the argument of from_pretrained that renames the files' tensors; None where nothing is renamed."""
        # transformers may rename twice, so what has its own prefix already is left alone.
        return {f"^{re.escape(stored) or f'(?!{re.escape(own)})'}": own for stored, own in self.prefixes} or None


def match(lm: PreTrainedModel, found: Mapping[str, StoredTensor], path: Path, key: str, *, part_of_more: bool) -> Names:
    """Refuse weights that do not fill the model (under ZeRO-3 from_pretrained does not report them); name the others.

    Args:
        lm: the language model, without weights.
        found: the tensors of the files.
        path: the folder.
        key: the configuration key that named the folder.
        part_of_more: whether the folder's model has other parts too, such as one for images.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or a tied one differs.
    """
    in_model = lm.state_dict()
    # The layout of the usual files, in which each expert has its own tensors.
    expected = revert_weight_conversion(lm, dict(in_model))
    tied = lm.all_tied_weights_keys if lm.config.tie_word_embeddings else {}
    if part_of_more:
        pairs = _prefixes(lm, expected.keys(), found.keys())
    else:
        pairs = _bare_backbone(lm, expected.keys() - tied.keys(), found.keys())
    names = Names(tuple((stored, own) for stored, own in pairs if stored != own))
    in_files = {names.in_model(name): name for name in found}
    stored = {name: found[in_files[name]] for name in in_files}
    if any(name in stored for name in in_model.keys() - expected.keys()):
        expected = in_model  # saved as in the model, with all experts of a layer in one tensor
    for name, source in tied.items():
        if name in stored and source in stored and not _equal(stored[name], stored[source], names, name, source):
            raise UserError(
                f"{key}: {path} says tie_word_embeddings, but its {names.in_files(name)} differs from "
                f"{names.in_files(source)}. Set tie_word_embeddings to false in its config.json, or remove "
                f"{names.in_files(name)}."
            )
    missing = sorted(n for n in expected if n not in stored and n not in tied and not _matches(lm, n, missing=True))
    extra = sorted(n for n in stored if n not in expected and not n.endswith("rotary_emb.inv_freq"))
    language = tuple(stored for stored, _ in pairs)
    kept = [
        n for n in extra if _matches(lm, n, missing=False) or (part_of_more and not in_files[n].startswith(language))
    ]
    unknown = [n for n in extra if n not in kept]
    shapes = [
        f"{n} {list(stored[n].shape)} instead of {list(expected[n].shape)}"
        for n in sorted(stored)
        if n in expected and stored[n].shape != tuple(expected[n].shape)
    ]
    faults = [
        f"{what}: {', '.join(names_)}{' …' if len(all_) > 4 else ''} ({len(all_)} in all)"
        for what, all_ in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if (names_ := all_[:4])
    ]
    if faults:
        raise UserError(
            f"{key}: the weights in {path} do not match its config.json. {'; '.join(faults)}. "
            "Missing weights would start at random: give a folder of a whole causal language model."
        )
    return Names(names.prefixes, tuple(sorted(in_files[n] for n in kept)))


def _matches(lm: PreTrainedModel, name: str, *, missing: bool) -> bool:
    """Return whether transformers itself skips a tensor of this name where it is missing, or where it is not known."""
    patterns = lm._keys_to_ignore_on_load_missing if missing else lm._keys_to_ignore_on_load_unexpected
    return any(re.search(pattern, name) for pattern in patterns or ())


def _prefixes(lm: PreTrainedModel, expected: Iterable[str], found: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return (prefix in a larger model's files, own prefix) of the backbone, and the same of each other tensor."""
    stored = set(found)
    trunk = f"{name_of(lm, backbone(lm))}."
    groups: dict[str, list[str]] = {}
    for name in expected:
        groups.setdefault(trunk if name.startswith(trunk) else name, []).append(name.removeprefix(trunk))
    prefixes = []
    for own, rests in groups.items():
        # What stands before most of the names; other parts may have some names in common.
        begins = {name.removesuffix(rest) for rest in rests[:50] for name in stored if name.endswith(f".{rest}")}
        counts = {begin: sum(begin + rest in stored for rest in rests) for begin in begins}
        best = max(sorted(counts), key=counts.__getitem__, default="")
        pair = (best, own) if own == trunk else (best + own, own)
        prefixes.append(pair if best else (own, own))
    # A longer prefix in the files first, since one may begin with another.
    return tuple(sorted(prefixes, key=lambda pair: -len(pair[0])))


def _bare_backbone(lm: PreTrainedModel, needed: Set[str], found: Set[str]) -> tuple[tuple[str, str], ...]:
    """Return the prefix that files saved from the backbone alone lack (GPT-2's), where that is all of the model."""
    trunk = f"{name_of(lm, backbone(lm))}."
    bare = all(name.startswith(trunk) and name.removeprefix(trunk) in found for name in needed)
    return (("", trunk),) if bare and not any(name.startswith(trunk) for name in found) else ()


def _equal(first: StoredTensor, second: StoredTensor, names: Names, one: str, other: str) -> bool:
    """Return whether two tensors of the weight files are equal."""
    tensors = []
    for stored, name in ((first, one), (second, other)):
        with safe_open(stored.file, framework="pt") as file:
            tensors.append(file.get_tensor(names.in_files(name)))
    return torch.equal(*tensors)
