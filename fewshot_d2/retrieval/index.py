"""Nearest vectors by cosine similarity: exact, or approximate with faiss (extra ``faiss``).

Letters: M vectors in the index, Q queries, D numbers in a vector, k hits wanted.
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import atomic_path, write_tensors

_FORMAT = "fewshot_d2/exact_index"
_VERSION = 1


class VectorIndex(ABC):
    """Vectors with ids, to be searched by cosine similarity. Lengths do not matter; a zero vector is unlike all."""

    def add(self, ids: Tensor, vectors: Tensor) -> None:
        """Put vectors in.

        Args:
            ids (int64[M]): unique, not negative and not in the index yet.
            vectors (float[M, D]): finite.

        Raises:
            ValueError: an argument is not so, or D is not that of the vectors before.
        """
        if ids.dtype != torch.int64 or vectors.dim() != 2 or ids.shape != vectors.shape[:1]:
            raise ValueError(
                f"ids must be int64[M] for vectors [M, D], "
                f"got {ids.dtype}{list(ids.shape)} and {list(vectors.shape)}"
            )
        merged = torch.cat([self.ids, ids.cpu()])
        if len(merged.unique()) != len(merged) or (ids < 0).any():
            raise ValueError("ids must be unique and not negative, got one twice or below 0")
        if len(ids):
            self._add(ids.cpu(), self._unit(vectors))

    def search(
        self, queries: Tensor, k: int, exclude: Sequence[Collection[int]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k most similar vectors of each query.

        Args:
            queries (float[Q, D]): finite.
            k: at least 1.
            exclude: ids that are no hits, for each query.

        Returns:
            float32[Q, k] similarities, falling, and int64[Q, k] ids, of equal similarities the lowest first. A query
            with fewer hits ends in -inf and -1. On the CPU.

        Raises:
            ValueError: an argument does not fit.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        exclude = [()] * len(queries) if exclude is None else exclude
        if len(exclude) != len(queries):
            raise ValueError(f"exclude must have {len(queries)} entries, got {len(exclude)}")
        queries = self._unit(queries)
        scores = torch.full((len(queries), k), -torch.inf)
        ids = torch.full((len(queries), k), -1)
        # What is excluded takes places away, so that many more are asked for.
        wanted = min(len(self), k + max(map(len, exclude), default=0))
        if not wanted or not len(queries):
            return scores, ids
        for row, found in enumerate(zip(*self._search(queries, wanted), exclude, strict=True)):
            kept_scores, kept_ids = _kept(*found, k)
            scores[row, : len(kept_ids)], ids[row, : len(kept_ids)] = kept_scores, kept_ids
        return scores, ids

    def _unit(self, vectors: Tensor) -> Tensor:
        """Check the vectors and give them length 1, as float32."""
        size = self.dimension or vectors.shape[-1]
        if vectors.dim() != 2 or vectors.shape[1] != size or not vectors.isfinite().all():
            raise ValueError(
                f"vectors must be finite and of shape [M, {size}], got {list(vectors.shape)}"
            )
        return F.normalize(vectors.detach().float(), dim=1)

    @abstractmethod
    def __len__(self) -> int:
        """Number of vectors."""

    @property
    @abstractmethod
    def dimension(self) -> int | None:
        """D, unknown while the index is empty."""

    @property
    @abstractmethod
    def ids(self) -> Tensor:
        """int64[M], on the CPU, in the order in which they were added."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the index atomically.

        Raises:
            ValueError: it is empty.
        """

    @abstractmethod
    def _add(self, ids: Tensor, vectors: Tensor) -> None:
        """``add`` for unit vectors."""

    @abstractmethod
    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and ids [Q, k] in any order, on the CPU; -1 for no hit."""


class ExactIndex(VectorIndex):
    """All similarities by one matrix product; enough for about a million vectors."""

    def __init__(self, *, device: str = "cpu", max_scores: int = 1 << 26):
        """Empty index.

        Args:
            device: that holds the vectors and computes.
            max_scores: similarities in memory at a time.
        """
        self._device, self._max_scores = torch.device(device), max_scores
        self._ids = torch.zeros(0, dtype=torch.int64)
        self._vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def dimension(self) -> int | None:
        """See ``VectorIndex``."""
        return None if self._vectors is None else self._vectors.shape[1]

    @property
    def ids(self) -> Tensor:
        """See ``VectorIndex``."""
        return self._ids

    def _add(self, ids: Tensor, vectors: Tensor) -> None:
        vectors = vectors.to(self._device)
        self._ids = torch.cat([self._ids, ids])
        known = [] if self._vectors is None else [self._vectors]
        self._vectors = torch.cat([*known, vectors])

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = queries.to(self._device)
        step = max(1, self._max_scores // len(queries))
        best_scores = queries.new_zeros(len(queries), 0)
        best_rows = torch.zeros(len(queries), 0, dtype=torch.int64, device=self._device)
        for start in range(0, len(self), step):
            part = queries @ self._vectors[start : start + step].T
            scores, rows = part.topk(min(k, part.shape[1]), dim=1)
            scores = torch.cat([best_scores, scores], dim=1)
            rows = torch.cat([best_rows, rows + start], dim=1)
            best_scores, places = scores.topk(min(k, scores.shape[1]), dim=1)
            best_rows = rows.gather(1, places)
        return best_scores.cpu(), self._ids[best_rows.cpu()]

    def save(self, path: str | Path) -> None:
        """See ``VectorIndex``."""
        if self._vectors is None:
            raise ValueError(f"an index must have vectors to be saved, got none for {path}")
        content = {"ids": self._ids, "vectors": self._vectors.cpu()}
        write_tensors(path, {"format": _FORMAT, "version": _VERSION, **content})

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> "ExactIndex":
        """Read an index; ``settings`` as of the constructor.

        Raises:
            ValueError: the file holds no exact index; the message names it.
        """
        content = read_tensors(path, _FORMAT, _VERSION, {"ids", "vectors"})
        index = cls(**settings)
        try:
            index.add(content["ids"], content["vectors"])
        except ValueError as error:
            raise ValueError(f"{path} must be an exact index, got: {error}") from error
        # Unit vectors made unit once more differ in the last bit; a search must not depend on being saved.
        index._vectors = content["vectors"].to(index._device)
        return index


class FaissIndex(VectorIndex):
    """Any faiss index by its factory string; those that need training learn from the first vectors added."""

    def __init__(self, factory: str = "Flat", *, num_probes: int = 16):
        """Empty index.

        Args:
            factory: such as "Flat" or "IVF256,PQ32".
            num_probes: cells that an inverted file (IVF) looks into; a low number gives fewer and worse hits.

        Raises:
            ModuleNotFoundError: faiss is not installed.
        """
        _faiss()
        self._factory, self._num_probes = factory, num_probes
        self._index: Any = None

    def __len__(self) -> int:
        return 0 if self._index is None else self._index.ntotal

    @property
    def dimension(self) -> int | None:
        """See ``VectorIndex``."""
        return None if self._index is None else self._index.d

    @property
    def ids(self) -> Tensor:
        """See ``VectorIndex``."""
        if self._index is None:
            return torch.zeros(0, dtype=torch.int64)
        if not hasattr(self._index, "id_map"):
            raise ValueError(
                "an index that was made elsewhere does not tell its ids: it is complete"
            )
        return torch.from_numpy(_faiss().vector_to_array(self._index.id_map))

    def _add(self, ids: Tensor, vectors: Tensor) -> None:
        index = self._made(vectors.shape[1]) if self._index is None else self._index
        vectors = vectors.cpu().numpy()
        try:
            if not index.is_trained:
                index.train(vectors)
            index.add_with_ids(vectors, ids.numpy())
        except RuntimeError as error:
            raise ValueError(
                f"the first vectors must be enough to train {self._factory!r}, got {len(ids)}: {error}"
            ) from error
        self._index = index

    def _made(self, dimension: int) -> Any:
        faiss = _faiss()
        try:
            index = faiss.index_factory(
                dimension, f"IDMap,{self._factory}", faiss.METRIC_INNER_PRODUCT
            )
        except RuntimeError as error:
            raise ValueError(
                f"factory must be one of faiss for {dimension} numbers, got {self._factory!r}: {error}"
            ) from error
        self._set_probes(index)
        return index

    def _set_probes(self, index: Any) -> None:
        inverted_file = _faiss().try_extract_index_ivf(index)
        if inverted_file is not None:
            inverted_file.nprobe = min(self._num_probes, inverted_file.nlist)

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, ids = self._index.search(queries.cpu().numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(ids)

    def save(self, path: str | Path) -> None:
        """See ``VectorIndex``."""
        if self._index is None:
            raise ValueError(f"an index must have vectors to be saved, got none for {path}")
        with atomic_path(path) as temporary:
            _faiss().write_index(self._index, str(temporary))

    @classmethod
    def load(cls, path: str | Path, *, num_probes: int = 16) -> "FaissIndex":
        """Read an index that ``save`` wrote.

        Raises:
            ValueError: the file holds none or is missing; the message names it.
        """
        faiss, index = _faiss(), cls(num_probes=num_probes)
        try:
            found = faiss.read_index(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} must be a faiss index, got: {error}") from error
        inner = found.metric_type == faiss.METRIC_INNER_PRODUCT
        if not (inner and isinstance(found, faiss.IndexIDMap)):
            raise ValueError(f"{path} must have ids and inner products, got {type(found).__name__}")
        index._set_probes(found)
        index._index = found
        return index

    @classmethod
    def wrap(cls, index: Any) -> "FaissIndex":
        """Search an index that was made elsewhere: merged, on disk or sharded; nothing can be added.

        Args:
            index: of faiss, with ids, complete and with its number of probes set.

        Raises:
            ValueError: it does not compare by inner product.
        """
        if index.metric_type != _faiss().METRIC_INNER_PRODUCT:
            raise ValueError(f"index must be of inner products, got metric {index.metric_type}")
        wrapped = cls()
        wrapped._index = index
        return wrapped


def read_tensors(path: str | Path, kind: str, version: int, keys: set[str]) -> dict[str, Tensor]:
    """Read a file that ``write_tensors`` wrote: a dict with format, version and tensors of these names.

    Raises:
        ValueError: the file is none; the message names it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} must be a file of tensors, got: {error}") from error
    header = content if isinstance(content, dict) else {}
    if header.get("format") != kind or header.get("version") != version:
        raise ValueError(f"{path} must have format {kind} version {version}")
    tensors = {key: value for key, value in header.items() if isinstance(value, Tensor)}
    if tensors.keys() != keys:
        raise ValueError(f"{path} must have the tensors {sorted(keys)}, got {sorted(tensors)}")
    return tensors


def _kept(scores: Tensor, ids: Tensor, exclude: Collection[int], k: int) -> tuple[Tensor, Tensor]:
    """The k best hits of a query that are none and not excluded, best first."""
    kept = ids >= 0
    if exclude:
        kept &= ~torch.isin(ids, torch.tensor(list(exclude)))
    scores, ids = scores[kept], ids[kept]
    order = ids.argsort()
    order = order[scores[order].argsort(descending=True, stable=True)][:k]
    return scores[order], ids[order]


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "FaissIndex needs faiss: pip install fewshot_d2[faiss], or use ExactIndex"
        ) from error
    return faiss
