"""Vectors of targets, kept and searched once training is over."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmbal._library import ops
from mmbal.checkpoint import atomic_folder
from mmbal.methods.rows import choose

FORMAT_VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class SearchResult(NamedTuple):
    """The best k entries of each query, best first."""

    scores: Tensor  # [Q, k], cosines
    ids: Tensor | list[list[str]]  # [Q, k], as they were added


def fingerprint_of(*modules: nn.Module | None) -> str:
    """Changes with any bit of the modules' weights and buffers, and with their names; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(b"\0")
        for name, value in sorted(module.state_dict().items() if module is not None else ()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class VectorStore:
    """Unit vectors with ids, searched by cosine.

        store = mmbal.VectorStore(connector.cl_dim, fingerprint=connector.fingerprint("text", text_encoder))
        store.add(ids, connector.target(tokens, "text").cl)
        store.save("captions")
        store = mmbal.VectorStore.load("captions", connector.fingerprint("text", text_encoder))
        scores, ids = store.search(connector(image, "image", "text").cl, k=10)

    Parameters
    ----------
    dim : width of the vectors.
    dtype : in which they are kept. Of float16 and bfloat16 scores are summed in float32 all the same.
    fingerprint : of the weights that the vectors come from, :meth:`mmbal.MoEConnector.fingerprint`.
    """

    def __init__(self, dim: int, dtype: torch.dtype = torch.float32, fingerprint: str = ""):
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"VectorStore: dim must be an integer of at least 1, got {dim!r}")
        choose("VectorStore", "dtype", dtype, list(DTYPES.values()))
        self.dim, self.dtype, self.fingerprint = dim, dtype, fingerprint
        self._parts: list[Tensor] = []
        self._ids: dict[int | str, None] = {}

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

    def check(self, fingerprint: str, mismatch: str = "refuse") -> None:
        """Whether vectors here come from the weights with this fingerprint; if not, an error, or a warning ("warn")."""
        choose("VectorStore", "mismatch", mismatch, ("refuse", "warn"))
        if fingerprint == self.fingerprint:
            return
        text = (
            f"VectorStore: fingerprint must be {fingerprint}, got {self.fingerprint!r}: these vectors come from other "
            "weights of encoder or connector; make them anew"
        )
        if mismatch == "refuse":
            raise ValueError(text)
        warnings.warn(text, stacklevel=3)

    @torch.no_grad()
    def add(self, ids: Sequence[int | str] | Tensor, vectors: Tensor, fingerprint: str | None = None) -> None:
        """ids: integers or strings that are not there yet, one for each of vectors [n, dim], which get the length 1. A
        fingerprint is checked against that of the store."""
        if fingerprint is not None:
            self.check(fingerprint)
        ids = ids.tolist() if isinstance(ids, Tensor) else [i if isinstance(i, str) else int(i) for i in ids]
        if vectors.dim() != 2 or vectors.shape != (len(ids), self.dim):
            raise ValueError(f"VectorStore: vectors must be {[len(ids), self.dim]}, got {list(vectors.shape)}")
        kinds = {type(i) for i in (*ids, *list(self._ids)[:1])}
        if len(kinds) > 1:
            raise ValueError("VectorStore: ids must be all integers or all strings")
        if len(set(ids)) < len(ids):
            raise ValueError("VectorStore: ids must be different, got some twice")
        if known := [i for i in ids if i in self._ids]:
            raise ValueError(f"VectorStore: ids must be new, got {known[:5]}")
        real = vectors if vectors.dtype == torch.float64 else vectors.float()
        if not real.isfinite().all():
            raise ValueError("VectorStore: vectors must be finite")
        self._ids.update(dict.fromkeys(ids))
        self._parts.append(F.normalize(real, dim=1).to(self.dtype))

    @torch.no_grad()
    def search(self, query: Tensor, k: int = 10, fingerprint: str | None = None) -> SearchResult:
        """The k entries with the largest cosine to each of query [Q, dim]; ties: what was added first."""
        if fingerprint is not None:
            self.check(fingerprint)
        if query.dim() != 2 or query.shape[1] != self.dim:
            raise ValueError(f"VectorStore: query must be [Q, {self.dim}], got {list(query.shape)}")
        if not 1 <= k <= len(self):
            raise ValueError(f"VectorStore: k must be from 1 to the number of entries {len(self)}, got {k}")
        bank = self.vectors
        real = torch.float64 if self.dtype == torch.float64 else torch.float32
        scores, rows = ops.topk_search(F.normalize(query.to(real), dim=1), bank, k)
        ids = self.ids
        if isinstance(ids[0], str):
            return SearchResult(scores, [[ids[i] for i in row] for row in rows.tolist()])
        return SearchResult(scores, torch.tensor(ids, device=rows.device)[rows])

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
        with atomic_folder(folder) as partial:
            save_file(tensors, partial / "vectors.safetensors")
            (partial / "mmbal.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike, fingerprint: str | None = None, mismatch: str = "refuse") -> VectorStore:
        """What :meth:`save` wrote. A fingerprint, that of the weights in use, is compared with the store's: vectors of
        other weights are refused, or (``mismatch="warn"``) loaded with a warning."""
        folder = Path(folder)
        try:
            description = json.loads((folder / "mmbal.json").read_text("utf-8"))
            if (description["kind"], description["format_version"]) != ("VectorStore", FORMAT_VERSION):
                raise ValueError(f"kind and format_version must be VectorStore and {FORMAT_VERSION}")
            tensors = load_file(folder / "vectors.safetensors")
            store = cls(description["dim"], DTYPES[description["dtype"]], description["fingerprint"])
            ids = description["ids"] if "ids" in description else tensors["ids"].tolist()
            vectors = tensors["vectors"]
            if (
                vectors.shape != (description["count"], store.dim)
                or vectors.dtype != store.dtype
                or len(ids) != len(vectors)
            ):
                raise ValueError("vectors and ids are not those that mmbal.json describes")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"VectorStore.load: {folder} cannot be read: {error!r}") from None
        if fingerprint is not None:
            store.check(fingerprint, mismatch)
        store._ids, store._parts = dict.fromkeys(ids), [vectors]
        return store
