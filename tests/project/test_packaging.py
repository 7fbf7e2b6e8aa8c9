"""What the wheels, the workflows and the site are made from agrees with the repository.

Building wheels takes minutes and is behind `python tools/check_wheel.py`; here its checks are shown
to find what they are for.
"""

import importlib.util
import pathlib
import re
import tomllib
import zipfile

import pytest

import quake_jax
from quake_jax._core import extension

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _yaml(path: pathlib.Path):
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):
        """Reads MkDocs' !ENV as its default."""

    Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[-1])
    return yaml.load(path.read_text(), Loader)


@pytest.fixture(scope="module")
def check_wheel():
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / "tools" / "check_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_versions_agree():
    assert PROJECT["project"]["version"] == quake_jax.__version__
    assert quake_jax.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_python_versions_that_are_stated_are_those_of_the_wheels():
    stated = re.findall(r"Python :: 3\.(\d+)", str(PROJECT["project"]["classifiers"]))
    assert stated[0] == "11" and PROJECT["project"]["requires-python"] == ">=3.11"
    # 3.11 by itself, what comes after by the wheel for the stable ABI.
    assert PROJECT["tool"]["cibuildwheel"]["build"] == ["cp311-*", "cp312-*"]
    assert PROJECT["tool"]["scikit-build"]["wheel"]["py-api"] == "cp312"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow(path):
    workflow = _yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job, name
        assert job.get("permissions", {}) in ({}, {"id-token": "write"}), name
        for step in job["steps"]:
            if "uses" in step:
                assert re.search(r"@(v\d+|release/v\d+)$", step["uses"]), step
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            # Values from outside reach a shell by the environment alone.
            assert "${{" not in step.get("run", ""), step
            for script in re.findall(r"python (\S+\.py)", step.get("run", "")):
                assert (ROOT / script).exists(), script


def test_the_tests_run_on_every_platform_that_has_wheels():
    if not WORKFLOWS:
        pytest.skip("an sdist has no workflows")
    tests, wheels = (_yaml(WORKFLOWS[0].parent / f"{name}.yml") for name in ("tests", "wheels"))
    platforms = tests["jobs"]["tests"]["strategy"]["matrix"]["os"]
    assert platforms == wheels["jobs"]["wheels"]["strategy"]["matrix"]["os"]
    assert len(platforms) == 3


def test_the_site_has_every_page():
    def pages(item):
        if isinstance(item, str):
            yield item
        else:
            for value in item.values() if isinstance(item, dict) else item:
                yield from pages(value)

    site = _yaml(ROOT / "mkdocs.yml")
    from_root = {name for name in pages(site["nav"]) if not (ROOT / "docs" / name).exists()}
    assert {name.upper() for name in from_root} <= {
        "CHANGELOG.MD",
        "CONTRIBUTING.MD",
        "SECURITY.MD",
    }
    docs = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert docs == set(pages(site["nav"])) - from_root
    # The browser of a reader is sent to nobody else's server.
    assert site["theme"]["font"] is False


METADATA = "Metadata-Version: 2.4\nName: quake_jax\nVersion: 0.1.0\nRequires-Python: >=3.11\n"
_INFO = "quake_jax-0.1.0.dist-info/"


@pytest.fixture
def wheel(tmp_path, check_wheel):
    """Makes a wheel that passes but for the files that are given, where None removes one."""

    def make(tag: str = "cp312-abi3", extension: str = "_quake_jax_cpu.abi3.so", **changed):
        files = dict.fromkeys(check_wheel.package_files(), b"")
        files |= {extension: b"\x7fELF", f"{_INFO}METADATA": METADATA.encode()}
        files |= {f"{_INFO}licenses/LICENSE": b"Apache"}
        path = tmp_path / f"quake_jax-0.1.0-{tag}-linux_x86_64.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (files | changed).items():
                if content is not None:
                    archive.writestr(name, content)
        return path

    return make


def test_a_good_wheel_passes(wheel, check_wheel, capsys):
    check_wheel.inspect_contents(wheel())
    check_wheel.inspect_contents(wheel("cp311-cp311", "_quake_jax_cpu.cpython-311-x86.so"))
    assert capsys.readouterr().out.count("LICENSE among them") == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tag": "cp312-cp312"}, "unexpected tag"),
        ({"extension": "_quake_jax_cpu.cpython-312-x86.so"}, "_quake_jax_cpu.cpython-312"),
        ({"_quake_jax_cpu.abi3.so": None}, "extension modules"),
        ({f"{_INFO}licenses/LICENSE": None}, "no licence"),
        ({"tests/test_api.py": b""}, "tests/test_api.py"),
        ({"cpu_kernels/table.h": b""}, "cpu_kernels/table.h"),
        ({"quake_jax/py.typed": None}, "quake_jax/py.typed"),
        ({"_quake_jax_cpu.abi3.so": b"\0/home/me/quake/cpu_kernels/a.cc\0"}, "paths of the build"),
        ({"_quake_jax_cpu.abi3.so": b"\0.debug_info\0"}, "debugging information"),
        ({"_quake_jax_cpu.abi3.so": bytes(5_000_001)}, "more than 5,000,000"),
        ({f"{_INFO}METADATA": METADATA.replace("3.11", "3.8").encode()}, ">=3.8"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_wheel_is_found(wheel, check_wheel, changed, message):
    with pytest.raises(check_wheel.CheckError, match=re.escape(message)):
        check_wheel.inspect_contents(wheel(**changed))


@pytest.mark.parametrize(
    ("tag", "served"),
    [("cp311-cp311", [(3, 11)]), ("cp312-abi3", [(3, 12), (3, 13), (3, 14)])],
)
def test_which_python_a_wheel_serves(check_wheel, tag, served):
    path = pathlib.Path(f"quake_jax-0.1.0-{tag}-linux_x86_64.whl")
    versions = [(3, minor) for minor in range(10, 15)]
    assert [version for version in versions if check_wheel.serves(path, version)] == served


def test_a_package_without_sources_beside_it_is_not_stale(tmp_path, monkeypatch):
    """As an installed wheel, whatever the sources were."""
    file = tmp_path / "quake_jax" / "_core" / "extension.py"
    monkeypatch.setattr(extension, "__file__", str(file))
    extension._refuse_stale_build()
    (tmp_path / "cpu_kernels").mkdir()
    (tmp_path / "CMakeLists.txt").touch()
    with pytest.raises(ImportError, match="stale"):
        extension._refuse_stale_build()
