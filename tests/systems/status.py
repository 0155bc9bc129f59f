"""Outcomes of the tests of the systems in, the table of docs/systems.md out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tcq_hf.evaluation.report import markdown_table

TESTS = Path(__file__).parent
PAGE = TESTS.parents[1] / "docs" / "systems.md"
START, END = "<!-- what follows is written by `pytest --write-systems` -->", "<!-- end -->"
NOT_YET = "not yet"


@dataclass(frozen=True)
class System:
    """A published system: its relation to the paper holds once its tests pass."""

    number: int
    name: str
    source: str
    relation: str
    call: str

    @property
    def file(self) -> Path | None:
        """Its tests, if there are any."""
        return next(TESTS.glob(f"test_s{self.number:02d}_*.py"), None)


SYSTEMS = (
    System(
        *(0, "TransClippedCLR", "ICIP 2024, arXiv 2401.15362"),
        *("follows", '`TCQTrainer`, `TCQTrainingArguments(negative_filter="fraction")`'),
    ),
    System(
        *(1, "PyRetri, re-ranking and PCA", "Hu et al., ACM MM 2020"),
        *("reproduces", "[its options and ours](pyretri.md)"),
    ),
    System(2, "MPFA, prominent features by masks", "Wang et al., ICIP 2019", "in the spirit of", ""),
    System(3, "Similar lighting conditions", "Serrano et al., ICPR 2010", "in the spirit of", ""),
    System(4, "WV-Net, radar pictures of the sea", "Glaser et al., AIES 2025, arXiv 2406.18765", "follows", ""),
    System(
        *(5, "RFE, Rank Flow Embedding", "Valem et al., IEEE TIP 2023, arXiv 2304.12448"),
        *("reproduces", "`RankFlow`"),
    ),
    System(6, "Possibilistic clustering and propagation", "Ismail, Louisville 2011", "in the spirit of", ""),
    System(7, "Denoising auto-encoders for loop closure", "Ding et al., CAC 2018", "follows", ""),
    System(8, "Contrastive retrieval in fashion", "Liu, 2024 (a review)", "in the spirit of", ""),
    System(
        *(9, "TPW, of UTRL and TPW", "Zhang et al., IEEE TNNLS 2025"),
        *("reproduces", "`fit_chain(twice_pca_whitening(dim), ...)`"),
    ),
    System(10, "UAIR, adversarial retrieval", "Huang et al., MIPR 2019", "in the spirit of", ""),
    System(
        *(11, "UDH with adaptive features", "Zhu et al., IEEE SPL 2019"),
        *("in the spirit of", '`PseudoLabelCallback`, `negative_filter="auto"`'),
    ),
    System(12, "Semantic regions and flatness", "Li, Gu et al., ICME 2020", "in the spirit of", ""),
    System(
        *(13, "Bagging trees, selected projections", "Fakhr et al., NCAA 2018"),
        *("follows", "`bagging_trees`, `selected_projections`"),
    ),
    System(14, "FullHN, cross-modal triplets", "Mallea et al., Machine Learning 2025", "reproduces", ""),
    System(
        *(15, "Selective rank fusion", "Valem and Pedronette, PRL 2020; USRF, Neurocomputing 2020"),
        *("reproduces", "`quality`, `rank_correlation`, `select`, `reciprocal_rank_fusion`"),
    ),
)


def status(system: System, outcomes: Iterable[str]) -> str:
    """Relation of a system of which at least one test passed and all others did too, or need a GPU."""
    outcomes = set(outcomes)
    return system.relation if "passed" in outcomes and outcomes <= {"passed", "needs a GPU"} else NOT_YET


def outcome(report: pytest.TestReport) -> str:
    """Outcome of a test: of a skipped one whether a GPU is missing, of one that may fail whether it does not."""
    if hasattr(report, "wasxfail"):
        return "failed"
    missing = report.skipped and isinstance(report.longrepr, tuple) and "GPU" in report.longrepr[2]
    return "needs a GPU" if missing else report.outcome


def table(outcomes: Mapping[str, Iterable[str]]) -> str:
    """The table, from the outcomes of the tests of each file."""
    lines = []
    for system in SYSTEMS:
        found = status(system, outcomes.get(system.file.name, ()) if system.file else ())
        there = found != NOT_YET
        lines.append(
            {
                "": f"S{system.number}",
                "system": f"{system.name} ({system.source})",
                "status": found,
                "call": system.call if there else "",
                "test": f"`{system.file.relative_to(TESTS.parents[1])}`" if there else "",
            }
        )
    return markdown_table(lines)


def page_with(table: str) -> str:
    """The page with this table in place of its own."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return f"{before}{START}\n\n{table}\n\n{END}{rest.partition(END)[2]}"
