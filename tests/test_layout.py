"""The rooms of the package: who imports whom, what files are called, which names are public."""

import ast
from pathlib import Path

import pytest

import tcq_hf

PACKAGE = Path(tcq_hf.__file__).parent

# Room: rooms it may import; in the second set for types only; a dotted name is that one module.
TABLE = {
    "model": (set(), set()),
    "index": (set(), {"model"}),
    "rerank": ({"index"}, set()),
    "evaluation": ({"index", "rerank", "model"}, set()),
    "hub": ({"model", "index"}, set()),
    "training": ({"model", "index", "hub", "evaluation.metrics", "rerank.graph"}, set()),
}
# Rooms that may import everything but `cli`.
FREE = {"demo", "cli", "__init__", "__main__"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "misc"}


def modules():
    """Dotted names below the package and their files."""
    return {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in files()}


def files():
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def imports(name, source):
    """Names below the package that a module imports, and whether for types only, as pairs."""
    tree = ast.parse(source)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        for target in targets(node, ["tcq_hf", *name.split(".")][:-1]):
            if target.split(".")[0] == "tcq_hf" and (target != "tcq_hf.__version__" or name.startswith("model.")):
                found.add((target.removeprefix("tcq_hf").lstrip("."), id(node) in guarded))
    return found


def targets(node, package):
    """Absolute dotted names that an import statement may bind."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        start = package[: len(package) - node.level + 1] if node.level else []
        origin = ".".join([*start, *(node.module or "").split(".")]).strip(".")
        return [f"{origin}.{alias.name}" for alias in node.names]
    return []


def outside(name, source):
    """Imports of a module that the table does not allow."""
    room = name.split(".")[0]
    at_run, for_types = TABLE.get(room, (set(), set()))
    wrong = []
    for target, type_only in imports(name, source):
        other = target.split(".")[0]
        allowed = at_run | for_types if type_only else at_run
        one_of_ours = room not in FREE and other != room
        if other == "cli" and room != "cli":
            wrong.append(target)
        elif (
            one_of_ours
            and other not in allowed
            and not any(f"{target}.".startswith(f"{dotted}.") for dotted in allowed)
        ):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("name", modules())
def test_the_import_table_is_kept(name):
    assert outside(name, modules()[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("model.modeling_tcq", "from ..index import encoding"),
        ("model.modeling_tcq", "import tcq_hf.hub"),
        ("model.modeling_tcq", "from tcq_hf import TCQModel"),
        ("index.encoding", "from tcq_hf.model.modeling_tcq import TCQModel"),
        ("index.encoding", "def late():\n    from ..model import modeling_tcq"),
        ("index.encoding", "from .. import hub"),
        ("index.encoding", "if TYPE_CHECKING:\n    from ..evaluation import metrics"),
        ("index.encoding", "if TYPE_CHECKING:\n    pass\nelse:\n    from ..model import modeling_tcq"),
        ("evaluation.metrics", "from ..training import trainer"),
        ("hub", "from .evaluation import metrics"),
        ("training.trainer", "from ..evaluation.report import html"),
        ("training.trainer", "from ..evaluation.metrics_more import curve"),
        ("demo", "from .cli import main"),
        ("__init__", "from . import cli"),
    ],
)
def test_the_table_catches_what_it_forbids(name, source):
    assert outside(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("model.modeling_tcq", "import torch\nfrom .configuration_tcq import TCQConfig"),
        ("index.encoding", "if TYPE_CHECKING:\n    from tcq_hf.model.modeling_tcq import TCQModel"),
        ("index.dataset_index", "from .encoding import encode_pictures\nfrom tcq_hf.index import encoding"),
        ("hub", "from .index.code_cache import weights_digest\nfrom .model import modeling_tcq"),
        ("training.trainer", "from ..evaluation.metrics import mean_average_precision"),
        ("cli.search", "from . import main\nfrom .. import search\nimport tcq_hf.hub"),
    ],
)
def test_the_table_lets_through_what_it_allows(name, source):
    assert outside(name, source) == []


def test_every_module_is_in_a_known_room():
    assert {name.split(".")[0] for name in modules()} <= {*TABLE, *FREE}


LIGHT = (
    "code_index",
    "fast_index",
    "shadow",
    "faiss_index",
    "gpu_index",
    "ivf_index",
    "locks",
    "row_ids",
    "sample_queries",
    "stored_codes",
    "tensor_files",
    "transform_steps",
    "transforms",
    "writing",
)


@pytest.mark.parametrize("module", LIGHT)
def test_the_index_itself_needs_faiss_and_numpy_only(module):
    tree = ast.parse((PACKAGE / "index" / f"{module}.py").read_text(encoding="utf-8"))
    named = {target for node in ast.walk(tree) for target in targets(node, ["tcq_hf", "index"])}
    # The siblings are held to this too.
    found = {name.split(".")[0] for name in named if not name.startswith(tuple(f"tcq_hf.index.{n}" for n in LIGHT))}
    assert not found & {"torch", "transformers", "timm", "datasets", "tcq_hf"}


@pytest.mark.parametrize("file", ["metrics.py", "ranking.py", "list_metrics.py"])
def test_metrics_need_numpy_only(file):
    tree = ast.parse((PACKAGE / "evaluation" / file).read_text(encoding="utf-8"))
    named = {target for node in ast.walk(tree) for target in targets(node, ["tcq_hf", "evaluation"])}
    # The only sibling is itself held to this.
    found = {target.split(".")[0] for target in named if not target.startswith("tcq_hf.evaluation.ranking")}
    assert found <= {"numpy", "typing", "collections", "math", "dataclasses", "concurrent"}


def test_no_file_has_a_vague_name():
    assert not [path for path in files() if VAGUE & set(path.stem.split("_"))]


@pytest.mark.parametrize("name", tcq_hf.__all__)
def test_every_public_name_resolves(name):
    assert getattr(tcq_hf, name) is not None
    assert name in dir(tcq_hf)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tcq_hf.nothing
