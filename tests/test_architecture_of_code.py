"""The rooms of the program and the direction of their imports (docs/architecture.md)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "loft_hpc"
# From top to bottom: a room imports only from itself and from rooms below it.
ROOMS = ["cli", "jobs", "tickets", "filterwise", "pipeline", "analysis", "training", "runs", "data", "models", "comm"]
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file):
    room = file.relative_to(PACKAGE).parts[0]
    for module in imports(file):
        if module.startswith("loft_hpc.") and module.split(".")[1] in ROOMS:
            assert ROOMS.index(module.split(".")[1]) >= ROOMS.index(room), f"{room} imports {module}"


def test_horovod_and_mpi4py_stay_in_comm():
    for file in FILES:
        modules = {module.split(".")[0] for module in imports(file)}
        assert file.relative_to(PACKAGE).parts[0] == "comm" or "mpi4py" not in modules, file
        assert file.relative_to(PACKAGE).as_posix() == "comm/engines/horovod.py" or "horovod" not in modules, file


def test_the_command_line_computes_nothing():
    for file in (PACKAGE / "cli").glob("*.py"):
        assert not {module.split(".")[0] for module in imports(file)} & {"torch", "numpy", "scipy"}, file


def test_environment_variables_are_read_in_comm_and_cli_alone():
    for file in FILES:
        if file.relative_to(PACKAGE).parts[0] not in ("comm", "cli"):
            assert not re.search(r"\benviron\b|getenv", file.read_text()), file


def test_json_is_written_in_one_place():
    """loft_hpc/jsontext.py, which refuses what is not finite."""
    for file in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        writes = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dump", "json.dumps")]
        writes += [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "json"]
        assert not writes or file.name == "jsontext.py", file


def test_nothing_is_unpickled_from_files():
    for file in FILES:
        assert not re.search(r"torch\.load|pickle\.load\(|yaml\.load", file.read_text()), file


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]), ids=lambda page: page.name)
def test_links_in_the_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
