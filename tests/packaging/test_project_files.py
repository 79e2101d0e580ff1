# SPDX-License-Identifier: Apache-2.0
"""What the project says of itself in several places agrees, and its examples run."""

import re

import pytest

import children

ROOT = children.ROOT
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
needs_checkout = pytest.mark.skipif(
    not (ROOT / "Makefile").exists(), reason="needs the checkout's files"
)


@needs_checkout
def test_pre_commit_has_the_makefiles_versions():
    pinned = dict(re.findall(r"\b(ruff|clang-format)==(\S+)", (ROOT / "Makefile").read_text()))
    hooks = re.findall(
        r"repo: \S+/(?:mirrors-)?(ruff|clang-format)(?:-pre-commit)?\n +rev: v(\S+)",
        (ROOT / ".pre-commit-config.yaml").read_text(),
    )
    assert len(pinned) == 2
    assert dict(hooks) == pinned


@needs_checkout
def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    assert set(re.search(r"^\.PHONY: (.*)", makefile, re.M)[1].split()) == targets | {"FORCE"}
    named = {}
    # As a command is written: at the start of a line, or in backquotes.
    command = re.compile(r"(?:^ *(?:- run: )?|`(?:[A-Z]+=\S+ )?)make((?: [a-z-]+)+)", re.M)
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    for path in (ROOT / ".ci" / "run", ROOT / "README.md", ROOT / "CONTRIBUTING.md", *workflows):
        found = set(" ".join(command.findall(path.read_text())).split())
        assert found <= targets, path
        named[path.name] = found
    assert {"lint", "integrations", "test-all"} <= named["run"]
    assert named["lint.yml"] == {"lint"}
    assert named["wheels.yml"] == {"wheel", "sdist"}
    matrix = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert set(re.findall(r"target: ([a-z-]+)", matrix)) == {"test", "test-all"}


@needs_checkout
def test_workflows_and_other_yaml_files_are_valid():
    # In no extra of this package: what pre-commit, GitHub and citation tools read it with.
    yaml = pytest.importorskip("yaml")
    files = [ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"]
    files += sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert len(files) > 2
    for path in files:
        content = yaml.safe_load(path.read_text())
        if path.parent.name != "workflows":
            continue
        assert content["permissions"] == {"contents": "read"}, path
        assert "concurrency" in content, path
        for job in content["jobs"].values():
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step), (path, step)
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/x@v1")), step


def run(arguments):
    done = children.python(arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    assert len(path.read_text().splitlines()) < 40
    run([str(path)])


@needs_checkout
def test_the_readmes_code_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    run(["-c", "\n".join(blocks)])
