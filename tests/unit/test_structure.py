"""The house keeps its rules: floors, names, silent imports, no way to run code from a file."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "mosaicbert_ds"
MODULES = sorted(
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


LINT = "from importlinter.cli import lint_imports_command as lint; lint()"


def test_a_file_imports_only_from_floors_below_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " kept, 0 broken." in done.stdout


def test_no_name_in_the_root_hides_another_package() -> None:
    """`deepspeed mosaicbert_ds/pretrain.py` puts the package's folder first on Python's path."""
    ours = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert {"data", "training", "pretrain"} <= ours
    theirs = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    assert {"logging", "torch", "yaml"} <= theirs
    assert not ours & theirs


IMPORT_ALL = """
import importlib, os, sys
before = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not {"deepspeed", "tensorflow", "matplotlib"} & set(sys.modules), "heavy packages wait for their use"
import torch
assert not torch.distributed.is_initialized()
assert torch.initial_seed() == torch.default_generator.initial_seed()
"""


def test_importing_any_module_prints_nothing_and_needs_no_gpu() -> None:
    done = _python(IMPORT_ALL, *MODULES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_answers_without_loading_torch() -> None:
    done = _python(
        "import mosaicbert_ds.cli, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def _python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPO,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
    )


# -- no file, name or variable can run code

# Of pickle itself only the name of its error is of use here.
PICKLES = {"_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"extractall", "system", "popen", "unsafe_load", "full_load", "save_pretrained_pickle"}


def hazards(source: str) -> list[str]:
    """What in `source` reads pickles, runs text as code, hands text to a shell or unpacks anywhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            found += [f"{line}: import {name}" for name in names if name.split(".")[0] in PICKLES]
            if ast.unparse(node) != "import pickle" and "pickle" in names:
                found.append(f"{line}: {ast.unparse(node)}")
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pickle."):
            found += [f"{line}: {ast.unparse(node)}"] if node.attr != "UnpicklingError" else []
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if call in CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in ATTRIBUTES):
            found.append(f"{line}: {call}")
        if call in ("torch.load", "load") and keywords.get("weights_only") != "True":
            found.append(f"{line}: {call} without weights_only=True")
        if call == "torch.save" or call.endswith("broadcast_object_list"):
            found.append(f"{line}: {call} writes a pickle")
        if call == "yaml.load":
            found.append(f"{line}: yaml.load")
        for name, safe in (("shell", "False"), ("allow_pickle", "False")):
            if keywords.get(name, safe) != safe:
                found.append(f"{line}: {call} with {name}={keywords[name]}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(data)",
        "import pickle\nload = pickle.Unpickler",
        "from pickle import loads",
        "import os, pickle as p",
        "from _pickle import loads",
        "import joblib.numpy_pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.save(model, path)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "os.system(text)",
        "tarfile.open(path).extractall(folder)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "def f():\n    if x:\n        return lambda: eval(x)",
    ],
)
def test_the_search_for_hazards_finds(source: str) -> None:
    assert hazards(source)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nothing_here_runs_code_from_a_file(path: Path) -> None:
    assert hazards(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "script", sorted([*REPO.glob("launch/**/*.sh"), *REPO.glob("launch/**/*.sbatch"), REPO / ".ci" / "run"])
)
def test_shell_scripts_parse(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
