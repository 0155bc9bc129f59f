"""What comes after a search: the graph of who is near whom, re-rankers on it, lists fused."""

from .diffusion import Diffusion
from .fusion import Fusion, combined_sum, rank_correlation, reciprocal_rank_fusion, select, selection_scores
from .graph import KNNGraph, quality
from .k_reciprocal import KReciprocal
from .query_expansion import QueryExpansion
from .rank_flow import RankFlow

__all__ = [
    "Diffusion",
    "Fusion",
    "KNNGraph",
    "KReciprocal",
    "QueryExpansion",
    "RankFlow",
    "combined_sum",
    "quality",
    "rank_correlation",
    "reciprocal_rank_fusion",
    "select",
    "selection_scores",
]
