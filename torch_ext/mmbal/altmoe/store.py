"""Vectors of targets, kept and searched once training is over."""

from __future__ import annotations

import hashlib
import json
import numbers
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmbal._library import ops
from mmbal.altmoe.state import bare, plain_names
from mmbal.files import atomic_folder
from mmbal.methods.rows import choose

FORMAT_VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def _is_store(folder: Path) -> bool:
    return (folder / "mmbal.json").is_file()


class SearchResult(NamedTuple):
    """The best k entries of each query, best first."""

    scores: Tensor  # [Q, k], cosines
    ids: Tensor | list[list[str]]  # [Q, k], as they were added


def fingerprint_of(*modules: nn.Module | None) -> str:
    """Changes with any bit of the modules' weights and buffers, and with their names; 16 hexadecimal digits. The same
    where torch.compile or data parallelism wraps a module; what ``get_extra_state`` gives is not in it."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(b"\0")
        tensors = plain_names(bare(module).state_dict()) if module is not None else {}
        for name, value in sorted((n, v) for n, v in tensors.items() if isinstance(v, Tensor)):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class VectorStore:
    """Unit vectors with ids, searched by cosine.

        store = mmbal.VectorStore(connector.cl_dim, fingerprint=connector.fingerprint("text", text_encoder))
        store.add(ids, connector.target(tokens, "text").cl)
        store.save("captions")
        store = mmbal.VectorStore.load("captions", connector.fingerprint("text", text_encoder))  # checks it
        scores, ids = store.search(connector(image, "image", "text").cl, k=10)

    Parameters
    ----------
    dim : width of the vectors.
    dtype : in which they are kept. Of float16 and bfloat16 scores are summed in float32 all the same.
    fingerprint : of the weights that the vectors come from, :meth:`mmbal.MoEConnector.fingerprint`. A store that has
        one and is loaded or searched without ever being compared with one warns, once.
    """

    def __init__(self, dim: int, dtype: torch.dtype = torch.float32, fingerprint: str = ""):
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"VectorStore: dim must be an integer of at least 1, got {dim!r}")
        choose("VectorStore", "dtype", dtype, list(DTYPES.values()))
        self.dim, self.dtype, self.fingerprint = dim, dtype, fingerprint
        self._parts: list[Tensor] = []
        self._ids: dict[int | str, None] = {}
        self._listed: Tensor | list[str] | None = None  # the ids in order, as a search takes them
        self._checked = not fingerprint

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> list:
        return list(self._ids)

    @property
    def vectors(self) -> Tensor:
        """[n, dim], in the order of ``ids``."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0] if self._parts else torch.empty(0, self.dim, dtype=self.dtype)

    def to(self, device: torch.device | str) -> VectorStore:
        """Moves the vectors to where queries will be; those added later follow them. Returns itself."""
        self._parts = [self.vectors.to(device)]
        self._listed = None
        return self

    def check(self, fingerprint: str, mismatch: str = "refuse") -> None:
        """Whether vectors here come from the weights with this fingerprint; if not, an error, or a warning ("warn")."""
        choose("VectorStore", "mismatch", mismatch, ("refuse", "warn"))
        self._checked = True
        if fingerprint == self.fingerprint:
            return
        text = (
            f"VectorStore: fingerprint must be {fingerprint}, got {self.fingerprint!r}: these vectors come from other "
            "weights of encoder or connector; make them anew"
        )
        if mismatch == "refuse":
            raise ValueError(text)
        warnings.warn(text, stacklevel=3)

    def _warn_unchecked(self) -> None:
        if not self._checked:
            self._checked = True
            text = "VectorStore: pass the fingerprint of the weights in use: these vectors may come from others"
            warnings.warn(text, stacklevel=3)

    @torch.no_grad()
    def add(self, ids: Sequence[int | str] | Tensor, vectors: Tensor, fingerprint: str | None = None) -> None:
        """ids: int64 numbers or strings that are not there yet, one for each of vectors [n, dim], which get the length
        1. A fingerprint is checked against that of the store."""
        if fingerprint is not None:
            self.check(fingerprint)
        ids = _as_ids(ids.tolist() if isinstance(ids, Tensor) else ids)
        if vectors.dim() != 2 or vectors.shape != (len(ids), self.dim):
            raise ValueError(f"VectorStore: vectors must be {[len(ids), self.dim]}, got {list(vectors.shape)}")
        if ids and self._ids and type(ids[0]) is not type(next(iter(self._ids))):
            raise ValueError("VectorStore: ids must be all integers or all strings")
        if known := [i for i in ids if i in self._ids]:
            raise ValueError(f"VectorStore: ids must be new, got {known[:5]}")
        real = vectors if vectors.dtype == torch.float64 else vectors.float()
        if not real.isfinite().all():
            raise ValueError("VectorStore: vectors must be finite")
        device = self._parts[0].device if self._parts else vectors.device
        self._parts.append(unit(real).to(device, self.dtype))
        self._ids.update(dict.fromkeys(ids))
        self._listed = None

    @torch.no_grad()
    def search(self, query: Tensor, k: int = 10, fingerprint: str | None = None) -> SearchResult:
        """The k entries with the largest cosine to each of query [Q, dim]; ties: what was added first."""
        if fingerprint is not None:
            self.check(fingerprint)
        self._warn_unchecked()
        if query.dim() != 2 or query.shape[1] != self.dim:
            raise ValueError(f"VectorStore: query must be [Q, {self.dim}], got {list(query.shape)}")
        if not 1 <= k <= len(self):
            raise ValueError(f"VectorStore: k must be from 1 to the number of entries {len(self)}, got {k}")
        bank = self.vectors
        real = torch.float64 if self.dtype == torch.float64 else torch.float32
        scores, rows = ops.topk_search(unit(query.to(real)), bank, k)
        if self._listed is None:
            ids = self.ids
            self._listed = ids if isinstance(ids[0], str) else torch.tensor(ids, device=rows.device)
        if isinstance(self._listed, list):
            return SearchResult(scores, [[self._listed[i] for i in row] for row in rows.tolist()])
        return SearchResult(scores, self._listed[rows])

    def save(self, folder: str | os.PathLike) -> None:
        """vectors.safetensors and mmbal.json; the folder takes its name when it is complete."""
        ids = self.ids
        named = bool(ids) and isinstance(ids[0], str)
        tensors = {"vectors": self.vectors.contiguous()}
        if not named:
            tensors["ids"] = torch.tensor(ids, dtype=torch.int64)
        description = {
            "format_version": FORMAT_VERSION,
            "kind": "VectorStore",
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "count": len(self),
            "fingerprint": self.fingerprint,
        } | ({"ids": ids} if named else {})
        with atomic_folder(folder, _is_store, "those of a store") as partial:
            save_file(tensors, partial / "vectors.safetensors")
            (partial / "mmbal.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike, fingerprint: str | None = None, mismatch: str = "refuse") -> VectorStore:
        """What :meth:`save` wrote. A fingerprint, that of the weights in use, is compared with the store's: vectors of
        other weights are refused, or (``mismatch="warn"``) loaded with a warning."""
        folder = Path(folder)
        try:
            description = json.loads((folder / "mmbal.json").read_text("utf-8"))
            if not isinstance(description, dict) or not isinstance(description["fingerprint"], str):
                raise ValueError("mmbal.json must be of a store")
            if (description["kind"], description["format_version"]) != ("VectorStore", FORMAT_VERSION):
                raise ValueError(f"kind and format_version must be VectorStore and {FORMAT_VERSION}")
            tensors = load_file(folder / "vectors.safetensors")
            store = cls(description["dim"], DTYPES[description["dtype"]], description["fingerprint"])
            named = "ids" in description
            ids = description["ids"] if named else tensors["ids"].tolist()
            if not isinstance(ids, list) or not isinstance(
                _as_ids(ids)[0] if ids else "", str if named else (int, str)
            ):
                raise ValueError("ids must be a list of strings in mmbal.json, or int64 numbers in vectors.safetensors")
            vectors = tensors["vectors"]
            if (
                vectors.shape != (description["count"], store.dim)
                or vectors.dtype != store.dtype
                or len(ids) != len(vectors)
            ):
                raise ValueError("vectors and ids are not those that mmbal.json describes")
            lengths = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
            off = ((lengths - 1).abs() > torch.finfo(store.dtype).eps ** 0.5) & (lengths != 0)
            if not lengths.isfinite().all() or off.any():
                raise ValueError("vectors must have the length 1")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise ValueError(f"VectorStore.load: {folder} cannot be read: {error!r}") from None
        if fingerprint is not None:
            store.check(fingerprint, mismatch)
        store._warn_unchecked()
        store._ids, store._parts = dict.fromkeys(ids), [vectors]
        return store


def _as_ids(given: Iterable) -> list[int] | list[str]:
    """Different int64 numbers or strings, all of one kind, as Python's."""
    ids = [str(i) if isinstance(i, str) else int(i) if _is_integer(i) else i for i in given]
    if wrong := [i for i in ids if not isinstance(i, str) and not (_is_integer(i) and -(2**63) <= i < 2**63)]:
        raise ValueError(f"VectorStore: ids must be int64 numbers or strings, got {wrong[0]!r}")
    if len({type(i) for i in ids}) > 1:
        raise ValueError("VectorStore: ids must be all integers or all strings")
    if len(set(ids)) < len(ids):
        raise ValueError("VectorStore: ids must be different, got some twice")
    return ids


def _is_integer(value) -> bool:
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def unit(x: Tensor) -> Tensor:
    """Rows with the length 1; zero stays zero. The square of a row's length may be beyond the range of the dtype: the
    row is brought near 1 before, by a power of two, which changes no other bit."""
    if x.shape[0] == 0:
        return x
    largest = x.abs().amax(1, keepdim=True)
    exponent = torch.frexp(largest).exponent.where(largest.isfinite(), 0)
    first = exponent.div(2, rounding_mode="floor")  # two factors, as 2^-exponent of the smallest is beyond the range
    for part in (first, exponent - first):
        x = x * torch.exp2(-part.to(x.dtype))
    return F.normalize(x, dim=1)
