"""Test installation: wheel, source distribution, editable install, uninstalled checkout, and a foreign `kernels`.

Nothing is downloaded: the virtual environments see the packages of this environment, but not its editable install. The
extension is compiled once, from the source distribution. `layer_norm` is its only kernel, to keep this fast.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gpt_fast import _extension
from gpt_fast._levels import LEVELS

ROOT = Path(__file__).resolve().parents[2]
SITE = sysconfig.get_path("purelib")
# Prints from where each part was loaded, after checking that layer_norm works.
PROBE = """
import json, sys, torch, gpt_fast, gpt_fast.kernels.layer_norm as kernels
from gpt_fast import _extension
from gpt_fast.ops._library import serving
y = gpt_fast.ops.layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2), 1e-5)
assert torch.allclose(y, torch.tensor([[-1.0, 1.0]]), atol=1e-4), y
extension = sys.modules.get("gpt_fast._C")
print(json.dumps({
    "package": gpt_fast.__file__,
    "kernels": kernels.__file__,
    "extension": extension and extension.__file__,
    "compiled": extension and extension.build_info(),
    "record": _extension.build_info(),
    "choice": _extension.choice() and _extension.choice()[::2],
    "serving": serving("layer_norm", "cpu"),
}))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the extension and Triton are built for Linux")


def environment(**extra: str) -> dict[str, str]:
    dropped = (
        "PYTHONPATH", "TRITON_INTERPRET", "GPT_FAST_ISA", "GPT_FAST_NO_CPP", "GPT_FAST_PORTABLE", "GPT_FAST_SANITIZE",
    )  # fmt: skip
    return {name: value for name, value in os.environ.items() if name not in dropped} | extra


def run(*command: object, cwd: Path, fails: bool = False, **extra: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], check=False, cwd=cwd, env=environment(**extra), capture_output=True, text=True
    )
    assert (result.returncode != 0) == fails, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr if fails else result.stdout


class Environment:
    """Virtual environment that also sees the packages in `SITE`, but not its editable installs.

    Python does not read the .pth files in `SITE`, which make the editable installs.
    """

    def __init__(self, folder: Path, packages: str = SITE) -> None:
        venv.create(folder, symlinks=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.site = next(folder.glob("lib/python*/site-packages"))
        (self.site / "packages.pth").write_text(packages + "\n")

    def install(self, *arguments: object, **extra: str) -> None:
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python, "install")
        run(*pip, "--no-index", "--no-deps", "--no-build-isolation", *arguments, cwd=self.folder, **extra)

    def probe(self, cwd: Path | None = None, **extra: str) -> dict:
        return json.loads(run(self.python, "-c", PROBE, cwd=cwd or self.folder, **extra).splitlines()[-1])


def copy_tree(target: Path) -> Path:
    """Copy the files of the package that a clone would have: with the symlink, and without anything that was built."""
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    for name in ("csrc", "gpt_fast", "gpt_fast_cli", "gpt_fast_settings", "kernels"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignored)
    for source in (target / "csrc" / "cpu").rglob("*.cpp"):
        if source.name != "layer_norm.cpp":
            source.unlink()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    run(sys.executable, "setup.py", "sdist", cwd=tree)
    return next((tree / "dist").glob("*.tar.gz"))


def build_wheel(source: Path, target: Path, **extra: str) -> Path:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel")
    run(*pip, "--no-index", "--no-deps", "--no-build-isolation", "-w", target, source, cwd=target, **extra)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel with the extension from the source distribution, which must therefore be complete."""
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("pure"), GPT_FAST_NO_CPP="1")


@pytest.fixture
def checkout(tmp_path: Path, wheel: Path) -> Callable[..., Path]:
    """Return a function that makes another checkout, with or without the built extension."""

    def make(name: str, extension: bool) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        copy_tree(folder)
        if extension:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [member for member in archive.namelist() if "/_C." in member])
        return folder

    return make


@pytest.fixture
def env(tmp_path: Path) -> Iterator[Environment]:
    """Yield a virtual environment with another package named `kernels`, as Hugging Face's, and check it afterwards.

    No install of this library may touch that package.
    """
    made = Environment(tmp_path / "env")
    (made.site / "kernels").mkdir()
    (made.site / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'\n")
    yield made
    assert [path.name for path in (made.site / "kernels").glob("*.py")] == ["__init__.py"]
    found = run(made.python, "-c", "import kernels, gpt_fast; print(kernels.OWNER)", cwd=ROOT)
    assert found.strip() == "somebody else"


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, pure_wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(pure_wheel) as pure:
        names, pure_names = set(archive.namelist()), set(pure.namelist())
        for kernel in (ROOT / "kernels").glob("*.py"):
            assert archive.read(f"gpt_fast/kernels/{kernel.name}") == kernel.read_bytes()
        assert (
            "gpt-fast = gpt_fast_cli.__main__:main"
            in archive.read("gpt_fast-0.1.0.dist-info/entry_points.txt").decode()
        )
    assert {name.split("/")[0] for name in names} == {
        "gpt_fast", "gpt_fast_cli", "gpt_fast_settings", "gpt_fast-0.1.0.dist-info",
    }  # fmt: skip
    built = {name for name in names if name.startswith("gpt_fast/_C.")}
    assert built == {"gpt_fast/_C.json", f"gpt_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"}
    assert {name for name in names if name.startswith("gpt_fast/")} - built == {
        name for name in pure_names if name.startswith("gpt_fast/")
    }
    assert not [name for name in names if "__pycache__" in name]
    assert pure_wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf reads what the linker wrote")
def test_extension_is_hardened(wheel: Path, tmp_path: Path) -> None:
    """The extension has read-only relocations, binds all symbols at load, and has stack canaries."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(f"gpt_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}", tmp_path)
    assert "GNU_RELRO" in run("readelf", "-lW", library, cwd=tmp_path)
    assert "BIND_NOW" in run("readelf", "-dW", library, cwd=tmp_path)
    assert "__stack_chk_fail" in run("readelf", "-sW", library, cwd=tmp_path)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf reads what the linker wrote")
def test_extension_needs_no_symbol_that_rhel_9_lacks(wheel: Path, tmp_path: Path) -> None:
    """GCC 12 has a new version of `condition_variable::wait`, which would need manylinux_2_35 instead of 2_34."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(f"gpt_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}", tmp_path)
    symbols = run("readelf", "--dyn-syms", "-W", library, cwd=tmp_path)
    assert "_ZNSt18condition_variableD1Ev" in symbols
    assert "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE" not in symbols


def test_wheel_with_the_extension(env: Environment, wheel: Path) -> None:
    env.install(wheel)
    found = env.probe()
    for part in ("package", "kernels", "extension"):
        assert Path(found[part]).is_relative_to(env.site / "gpt_fast"), found[part]
    assert found["serving"] == "cpp"
    assert found["compiled"]["vector"] == found["record"]["vector"]
    assert found["compiled"]["vector_bytes"] == {"AVX512": 64, "AVX2": 32}.get(found["record"]["vector"], 16)
    assert (env.folder / "bin" / "gpt-fast").exists()


def test_pure_wheel_runs_the_reference(env: Environment, pure_wheel: Path) -> None:
    env.install(pure_wheel)
    found = env.probe()
    assert Path(found["kernels"]).is_relative_to(env.site / "gpt_fast")
    assert (found["serving"], found["extension"], found["record"]) == ("reference", None, None)


def test_make_dist_builds_all_three() -> None:
    """`make dist` builds the sources, a portable wheel and a pure wheel. Other tests build with the two variables."""
    commands = run("make", "-n", "dist", "VENV=/nowhere", cwd=ROOT).splitlines()
    built = [line for line in commands if " -m build " in line]
    assert [("--sdist" in line, "GPT_FAST_PORTABLE=1" in line, "GPT_FAST_NO_CPP=1" in line) for line in built] == [
        (True, False, False), (False, True, False), (False, False, True),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 is what has portable levels")
def test_portable_wheel_runs_on_any_x86_64_v3(env: Environment, sdist: Path, tmp_path: Path) -> None:
    """A portable wheel has one extension module for each instruction set level, whatever this CPU supports."""
    (tmp_path / "portable").mkdir()
    wheel = build_wheel(sdist, tmp_path / "portable", GPT_FAST_PORTABLE="1")
    with zipfile.ZipFile(wheel) as archive:
        built = {name for name in archive.namelist() if "/_C." in name}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert built == {f"gpt_fast/_isa/{level}/_C{end}" for level in LEVELS for end in (".json", suffix)}
    env.install(wheel)
    best = env.probe()
    assert best["serving"] == "cpp" and best["choice"][0] in LEVELS
    found = env.probe(GPT_FAST_ISA="avx2")
    assert found["serving"] == "cpp" and found["record"]["vector"] == found["compiled"]["vector"] == "AVX2"
    assert "-march=x86-64-v3" in found["record"]["flags"] and "-march=native" not in found["record"]["flags"]
    level = {"pni", "ssse3", "sse4_1", "sse4_2", "popcnt", "abm", "movbe", "bmi1", "bmi2", "f16c", "fma", "avx", "avx2"}
    assert set(found["record"]["cpu_flags"]) <= level
    typed = run(
        env.python, "-c", "import gpt_fast, pathlib; print(pathlib.Path(gpt_fast.__file__).parent)", cwd=tmp_path
    )
    assert (Path(typed.strip()) / "py.typed").is_file()


def test_editable_install_is_the_checkout(env: Environment, checkout: Callable[..., Path]) -> None:
    folder = checkout("mine", extension=True)
    env.install("--editable", folder, GPT_FAST_NO_CPP="1")
    found = env.probe()
    assert found["package"] == str(folder / "gpt_fast" / "__init__.py")
    assert Path(found["kernels"]).samefile(folder / "kernels" / "layer_norm.py")
    assert Path(found["extension"]).parent == folder / "gpt_fast"
    assert found["serving"] == "cpp"


def test_uninstalled_checkout_does_not_borrow_the_extension_of_an_installed_one(
    env: Environment, checkout: Callable[..., Path]
) -> None:
    """The finder of an editable install offers its own `gpt_fast._C` to any other checkout that has no extension."""
    installed, bare, built = checkout("installed", True), checkout("bare", False), checkout("built", True)
    env.install("--editable", installed, GPT_FAST_NO_CPP="1")
    found = env.probe(PYTHONPATH=str(bare))
    assert found["package"] == str(bare / "gpt_fast" / "__init__.py")
    assert (found["extension"], found["serving"]) == (None, "reference")
    found = env.probe(PYTHONPATH=str(built))
    assert Path(found["extension"]).parent == built / "gpt_fast"
    assert Path(found["kernels"]).samefile(built / "kernels" / "layer_norm.py")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"torch": "1.0.0"}, "built against torch 1.0.0, but this is torch", id="another torch"),
        pytest.param(
            {"cpu_flags": ["avx4096"]}, "built for a CPU with avx4096, which this one lacks", id="another CPU"
        ),
    ],
)
def test_extension_that_cannot_run_here_is_refused(
    checkout: Callable[..., Path], change: dict[str, object], message: str
) -> None:
    folder = checkout("moved", extension=True)
    record = folder / "gpt_fast" / "_C.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    output = run(sys.executable, "-c", "import gpt_fast", cwd=folder, fails=True, PYTHONPATH=str(folder))
    assert f"ImportError: gpt_fast._C was {message}" in output
    assert "make install" in output


@pytest.mark.parametrize("patch", ["99", "99+cu999"])
def test_other_builds_of_a_minor_release_are_taken(checkout: Callable[..., Path], env: Environment, patch: str) -> None:
    """Patch releases and builds for other devices have the same C++ symbols, so the extension loads."""
    folder = checkout("moved", extension=True)
    record = folder / "gpt_fast" / "_C.json"
    minor = ".".join(torch.__version__.split(".")[:2])
    record.write_text(json.dumps(json.loads(record.read_text()) | {"torch": f"{minor}.{patch}"}))
    assert env.probe(PYTHONPATH=str(folder))["serving"] == "cpp"


@pytest.mark.parametrize(
    ("built", "running", "expected"),
    [
        pytest.param("2.13.0+cpu", "2.13.0+cu130", True, id="another device"),
        pytest.param("2.13.0", "2.13.2", True, id="a later patch"),
        pytest.param("2.13.0+cpu", "2.14.1+cu130", True, id="a later minor release that was measured"),
        pytest.param("2.14.0", "2.13.0", False, id="an earlier minor release"),
        pytest.param("2.1.0", "2.13.0", False, id="a minor release that begins alike"),
        pytest.param("2.13.0", "3.13.0", False, id="another major release"),
    ],
)
def test_which_pytorch_an_extension_serves(built: str, running: str, expected: bool) -> None:
    assert _extension._serves(built, running) == expected


@pytest.fixture
def levels(checkout: Callable[..., Path]) -> Path:
    """Return a checkout with one extension module for each level. No CPU meets the requirements of the best level."""
    folder = checkout("levels", extension=True)
    package = folder / "gpt_fast"
    record = json.loads((package / "_C.json").read_text())
    for level in LEVELS:
        place = package / "_isa" / level
        place.mkdir(parents=True)
        shutil.copy(next(package.glob("_C*.so")), place)
        needs = ["avx4096"] if level == list(LEVELS)[-1] else []
        (place / "_C.json").write_text(json.dumps(record | {"cpu_flags": needs}))
    for path in package.glob("_C.*"):
        path.unlink()
    return folder


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the CPU does not tell what it has")
def test_best_level_that_the_cpu_runs_is_loaded(levels: Path, env: Environment) -> None:
    found = env.probe(PYTHONPATH=str(levels))
    assert Path(found["extension"]).parent == levels / "gpt_fast" / "_isa" / "avx512"
    assert found["choice"][0] == "avx512" and "avx512_bf16 needs avx4096" in found["choice"][1]
    found = env.probe(PYTHONPATH=str(levels), GPT_FAST_ISA="avx2")
    assert Path(found["extension"]).parent == levels / "gpt_fast" / "_isa" / "avx2"
    assert found["choice"] == ["avx2", "GPT_FAST_ISA forces it"]


@pytest.mark.parametrize(
    ("isa", "message"),
    [
        ("avx512_bf16", "gpt_fast._C was built for a CPU with avx4096, which this one lacks"),
        ("sse", "GPT_FAST_ISA is 'sse'; expected one that is built: avx512_bf16, avx512, avx2"),
    ],
)
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the CPU does not tell what it has")
def test_level_that_cannot_be_loaded_is_refused(levels: Path, isa: str, message: str) -> None:
    output = run(
        sys.executable, "-c", "import gpt_fast", cwd=levels, fails=True, PYTHONPATH=str(levels), GPT_FAST_ISA=isa
    )
    assert f"ImportError: {message}" in output


def test_portable_builds_know_their_levels(tree: Path) -> None:
    command = (sys.executable, "setup.py", "--name")
    output = run(*command, cwd=tree, fails=True, GPT_FAST_PORTABLE="sse")
    assert (
        output.splitlines()[-1]
        == "gpt-fast: GPT_FAST_PORTABLE is 'sse'; expected 1 or one of avx2, avx512, avx512_bf16"
    )


def test_interpreter_leaves_the_cpu_to_triton(checkout: Callable[..., Path]) -> None:
    folder = checkout("interpreted", extension=True)
    code = "import sys, gpt_fast; print('gpt_fast._C' in sys.modules)"
    output = run(sys.executable, "-c", code, cwd=folder, PYTHONPATH=str(folder), TRITON_INTERPRET="1")
    assert output.split() == ["False"]


def test_building_without_torch_says_what_to_do(tmp_path: Path, tree: Path) -> None:
    """A build without torch, as in pip's isolated build environment, fails with a message that says what to do."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in (*Path(SITE).glob("setuptools*"), *Path(SITE).glob("wheel*"), Path(SITE, "_distutils_hack")):
        (packages / path.name).symlink_to(path)
    env = Environment(tmp_path / "bare", packages=str(packages))
    output = run(env.python, "setup.py", "bdist_wheel", "-d", tmp_path, cwd=tree, fails=True)
    assert "--no-build-isolation" in output
    assert "make install" in output
    assert "Traceback" not in output
    run(env.python, "setup.py", "sdist", "-d", tmp_path, cwd=tree)
    run(env.python, "setup.py", "bdist_wheel", "-d", tmp_path, cwd=tree, GPT_FAST_NO_CPP="1")


def test_building_without_the_headers_of_python_says_what_to_do(tree: Path, tmp_path: Path) -> None:
    """Without Python.h, a separate package in Debian, the build fails with one line instead of compiler errors."""
    nowhere = "import sysconfig; path = sysconfig.get_path; "
    nowhere += "sysconfig.get_path = lambda name, *more: '/nowhere' if name == 'include' else path(name, *more)"
    (tmp_path / "sitecustomize.py").write_text(nowhere)
    build = (sys.executable, "setup.py", "bdist_wheel", "-d", tmp_path / "dist")
    output = run(*build, cwd=tree, fails=True, PYTHONPATH=str(tmp_path))
    assert output.splitlines()[-1] == (
        "gpt-fast: Python's header /nowhere/Python.h was not found; install it (Debian and Ubuntu: apt install "
        "python3-dev), or set GPT_FAST_NO_CPP=1 for a pure-Python install without the extension"
    )
    assert "Traceback" not in output


def test_building_without_a_compiler_says_what_to_do(tree: Path, tmp_path: Path) -> None:
    """Without a compiler the build fails with one line that says what to do.

    The source distribution and the pure wheel need no compiler.
    """
    build = (sys.executable, "setup.py", "bdist_wheel", "-d", tmp_path)
    output = run(*build, cwd=tree, fails=True, CXX="no-such-compiler")
    assert output.splitlines()[-1] == (
        "gpt-fast: the C++ compiler 'no-such-compiler' was not found; install one (Debian and Ubuntu: apt install g++),"
        " or set GPT_FAST_NO_CPP=1 for a pure-Python install without the extension"
    )
    assert "Traceback" not in output
    run(sys.executable, "setup.py", "sdist", "-d", tmp_path, cwd=tree, CXX="no-such-compiler")
    run(*build, cwd=tree, CXX="no-such-compiler", GPT_FAST_NO_CPP="1")
