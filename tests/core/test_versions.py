"""Private names of JAX are in one module; a JAX that does not fit says so at import."""

import ast
import json
import pathlib
import re
import tomllib
import types

import jax
import pytest
from support import run_python

import quake_jax
from quake_jax._core import versions

ROOT = pathlib.Path(__file__).parents[2]
# Of the package that is tested, which need not be that of the checkout.
PACKAGE = pathlib.Path(quake_jax.__file__).parent

_PRIVATE = (
    *("jax._src", "jax.interpreters", "jax.extend", "jax.experimental", "jaxlib"),
    # Public, but they have come and gone.
    *("jax.config", "jax.core", "jax.lib", "jax.make_user_context"),
)
_QUESTIONS = ("hasattr", "getattr")


def _private_uses(source: str) -> list[str]:
    """Uses of what may change from one JAX to the next: private names, and what asks for names."""

    def is_private(name: str) -> bool:
        return name.startswith(_PRIVATE)

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += filter(is_private, names)
        elif isinstance(node, ast.Attribute) and is_private(ast.unparse(node)):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _QUESTIONS:
            about = ast.unparse(node.args[0])
            if re.match(r"(jax|jnp|lax)(\.|$)", about):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import jax._src.core",
        "from jax._src import core",
        "from jax import _src",
        "from jax.interpreters import mlir",
        "from jax.experimental import pallas",
        "from jax import extend",
        "import jax\njax.extend.core.Primitive('p')",
        "import jaxlib",
        "from jaxlib import xla_client",
        "import jax.lib",
        "from jax.core import Tracer",
        "import jax\nisinstance(x, jax.core.Tracer)",
        "import jax\njax.make_user_context(None)",
        "import jax\njax.config.jax_use_shardy_partitioner",
        "import jax\nhasattr(jax, 'Inline')",
        "import jax\ngetattr(jax.nn, 'gelu', None)",
    ],
)
def test_the_search_finds(source):
    assert _private_uses(source)


@pytest.mark.parametrize(
    "source", ["import jax", "from jax import lax", "import jax\njax.nn.gelu", "getattr(x, 'jax')"]
)
def test_the_search_leaves(source):
    assert not _private_uses(source)


def test_private_names_of_jax_are_in_one_module():
    uses = {p.relative_to(PACKAGE).as_posix(): _private_uses(p.read_text()) for p in _modules()}
    assert uses.pop("_core/jax_names.py")
    assert {name: found for name, found in uses.items() if found} == {}


def _modules():
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 30
    return modules


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("0.10.2", (0, 10, 2)),
        ("0.12.0.1", (0, 12, 0, 1)),
        ("0.13.0.dev20261121+abc", (0, 13, 0)),
        ("0.13.0rc1", (0, 13, 0)),
        ("unknown", ()),
    ],
)
def test_release(version, numbers):
    assert versions.release(version) == numbers


@pytest.mark.parametrize("version", [versions.OLDEST, "0.11.0", versions.NEWEST_TESTED])
def test_tested_versions_import_silently(version, monkeypatch, recwarn):
    monkeypatch.setattr(jax, "__version__", version)
    versions.refuse_older(version)
    versions.warn_of_newer()
    assert not recwarn.list


@pytest.mark.parametrize("version", ["0.12.0.2", "0.12.1", "0.13.0.dev20261121", "1.0"])
def test_newer_versions_warn(version, monkeypatch):
    monkeypatch.setattr(jax, "__version__", version)
    versions.refuse_older(version)
    with pytest.warns(UserWarning, match=re.escape(f"not been tested with jax {version}, only")):
        versions.warn_of_newer()


@pytest.mark.parametrize("name", ["jax", "jaxlib"])
@pytest.mark.parametrize("version", ["0.4.38", "0.10.1", "0.10"])
def test_older_versions_are_refused(version, name, monkeypatch):
    monkeypatch.setattr(jax, "__version__", version if name == "jax" else versions.OLDEST)
    message = (
        f"needs jax and jaxlib {versions.OLDEST} or newer .*; {name} here is {version}: run "
        f"`pip install 'jax>={versions.OLDEST}' 'jaxlib>={versions.OLDEST}'`"
    )
    with pytest.raises(ImportError, match=message):
        versions.refuse_older(version if name == "jaxlib" else versions.OLDEST)


# Imports quake_jax beside a JAX that calls itself 99.0, and prints the warnings.
_IMPORT_BESIDE_NEWER = """
import json, sys, warnings
import jax
jax.__version__ = "99.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    if "ignore" in sys.argv[1:]:
        warnings.filterwarnings("ignore", "quake_jax", UserWarning)
    import quake_jax
    import quake_jax.linen, quake_jax.nnx
found = [(w.category.__name__, w.lineno, str(w.message)) for w in caught]
print(json.dumps([w for w in found if "quake_jax" in w[2]]))
"""


def test_an_untested_jax_gives_one_warning(tmp_path):
    ((category, line, message),) = json.loads(run_python(_IMPORT_BESIDE_NEWER, tmp_path).stdout)
    assert category == "UserWarning"
    # Where the user's program imports quake_jax.
    assert "import quake_jax" in _IMPORT_BESIDE_NEWER.splitlines()[line - 1]
    assert "jax 99.0" in message and versions.OLDEST in message
    assert f"pip install 'jax<={versions.NEWEST_TESTED}'" in message
    assert "QUAKE_JAX_SILENCE_VERSION_WARNING=1" in message


def test_the_warning_can_be_silenced(tmp_path):
    silent = run_python(_IMPORT_BESIDE_NEWER, tmp_path, QUAKE_JAX_SILENCE_VERSION_WARNING="1")
    assert json.loads(silent.stdout) == []
    filtered = "import sys; sys.argv.append('ignore')\n" + _IMPORT_BESIDE_NEWER
    assert json.loads(run_python(filtered, tmp_path).stdout) == []


def test_a_jax_that_does_not_fit_is_an_import_error_that_says_so(tmp_path):
    names = _private_names()
    assert len(names) > 20
    code = f"""
import importlib, json, sys
import jax

def fails():
    for name in [n for n in sys.modules if n.split(".")[0] == "quake_jax"]:
        del sys.modules[name]
    try:
        import quake_jax
    except ImportError as error:
        return str(error)

messages = []
for module, name in {names}:
    module = importlib.import_module(module)
    value = getattr(module, name)
    delattr(module, name)
    messages.append(fails())
    setattr(module, name, value)
jax.__version__ = "0.9.0"
print(json.dumps([messages, fails()]))
"""
    lacking, old = json.loads(run_python(code, tmp_path).stdout)
    for (module, name), message in zip(names, lacking, strict=True):
        assert f"quake_jax does not work with jax {jax.__version__}" in message
        assert name in message and module in message
        assert versions.TESTED in message and versions.NEWEST_TESTED in message
    assert f"needs jax and jaxlib {versions.OLDEST} or newer" in old and "0.9.0" in old


def _tried() -> list[ast.stmt]:
    """The statements of jax_names.py whose failure is reported as a JAX that does not fit."""
    tree = ast.parse((PACKAGE / "_core" / "jax_names.py").read_text())
    return [line for node in tree.body if isinstance(node, ast.Try) for line in node.body]


def _imports() -> list[tuple[str, str, object]]:
    """Module, name and value of what jax_names.py imports from JAX's modules."""
    return [
        (line.module, alias.name, getattr(__import__(line.module, fromlist=["_"]), alias.name))
        for line in _tried()
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    ]


def _modules_of_jax() -> dict[str, str]:
    """The whole modules among them, by the name in jax_names.py."""
    return {
        name: value.__name__ for _, name, value in _imports() if isinstance(value, types.ModuleType)
    }


def _names_of_modules(trees) -> set[tuple[str, str]]:
    """Module and name of what is looked up in these modules, as `mlir.x` or `jax_names.mlir.x`."""
    modules = _modules_of_jax()
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    uses = ((ast.unparse(node.value).removeprefix("jax_names."), node.attr) for node in nodes)
    return {(modules[module], name) for module, name in uses if module in modules}


def _private_names() -> list[tuple[str, str]]:
    """Module and name of all that jax_names.py looks up when it is imported."""
    names = [
        (module, name)
        for module, name, value in _imports()
        if not isinstance(value, types.ModuleType)
    ]
    return names + sorted(_names_of_modules(_tried()))


def test_names_that_are_looked_up_later_are_looked_up_at_import_too():
    trees = [ast.parse(path.read_text()) for path in _modules()]
    assert _names_of_modules(trees) == _names_of_modules(_tried()) != set()


def test_other_files_state_the_same_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = {f"{name}>={versions.OLDEST}" for name in ("jax", "jaxlib")}
    assert oldest <= set(project["project"]["dependencies"])
    assert f"jax=={versions.OLDEST}" in project["build-system"]["requires"]
    tested = {(versions.OLDEST, versions.NEWEST_TESTED)}
    texts = {
        name: (ROOT / name).read_text()
        for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
    }
    # What released versions were tested with is history.
    texts["CHANGELOG.md"] = _unreleased(texts["CHANGELOG.md"])
    for name, text in texts.items():
        stated = set(re.findall(r"jax (\d+\.[\d.]*\d) to (\d+\.[\d.]*\d)", text))
        assert stated <= tested, name
        assert stated or name in ("CONTRIBUTING.md", "CHANGELOG.md"), name
    workflow = ROOT / ".github" / "workflows" / "tests.yml"
    if workflow.exists():  # not in an sdist
        assert f"jax=={versions.OLDEST} jaxlib=={versions.OLDEST}" in workflow.read_text()


def _unreleased(changelog: str) -> str:
    (section,) = re.findall(r"^## Unreleased$(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    return section


def test_released_versions_do_not_count():
    log = "# Changelog\n\n## Unreleased\n\n### Added\n\n- New.\n\n## 0.1.0\n\n- Old.\n"
    assert "New" in _unreleased(log) and "Old" not in _unreleased(log)
