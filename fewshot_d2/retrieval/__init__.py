"""Instance search: regions of images, their vectors, an index of them, and the rank lists that come of it."""

from .detector import RetrievalDetector
from .index import ExactIndex, FaissIndex, VectorIndex
from .regions import ProposalRegions, SalientRegions, describe_regions
from .search import GalleryRegions, expand_queries, rank, rerank

__all__ = [
    "ExactIndex",
    "FaissIndex",
    "GalleryRegions",
    "ProposalRegions",
    "RetrievalDetector",
    "SalientRegions",
    "VectorIndex",
    "describe_regions",
    "expand_queries",
    "rank",
    "rerank",
]
