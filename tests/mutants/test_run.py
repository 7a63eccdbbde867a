from pathlib import Path

import pytest

from tests.mutants.run import FOLDER, Mutant, judge, load, mutate, outcome, sample


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package whose one test sees that `double` doubles."""
    (tmp_path / "src/tlk").mkdir(parents=True)
    (tmp_path / "src/tlk/__init__.py").write_text("def double(x):\n    return 2 * x  # x + x\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_double.py").write_text(
        "from tlk import double\n\n\ndef test_double():\n    assert double(2) == 4\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("replace", "by", "select", "expected"),
    [
        ("2 * x", "3 * x", "", "killed"),
        ("2 * x", "x * x", "", "survived"),
        ("def double", "def double(", "", "tests did not run"),
        ("2 * x", "3 * x", "test_triple", "no test selected"),
        ("4 * x", "3 * x", "", "cannot be planted"),
    ],
)
def test_judge(project, replace, by, select, expected):
    mutant = Mutant("toy", "m", "tests/test_double.py", "src/tlk/__init__.py", replace, by, select)
    assert judge(mutant, project).outcome == expected
    assert "return 2 * x" in (project / "src/tlk/__init__.py").read_text()


def test_judge_sees_when_other_sources_are_imported(project):
    (project / "src/tlk").rename(project / "src/other")
    mutant = Mutant("toy", "m", "tests/test_double.py", "src/other/__init__.py", "2 * x", "3 * x")
    assert judge(mutant, project).outcome == "not imported"


def test_mutate_wants_one_occurrence(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("x x")
    with pytest.raises(ValueError, match=r"exactly once in a\.py, occurs 2 times"):
        mutate(source, "x", "y")


def test_an_error_outside_of_the_test_kills_nothing():
    assert outcome(1, "FAILED tests/a.py::test_a - assert 0") == "killed"
    assert outcome(1, "ERROR tests/a.py::test_a - fixture") == "tests did not run"


def test_sample_is_spread_and_repeatable():
    mutants = [Mutant(g, str(i), "t", "f", "a", "b") for g in "abc" for i in range(5)]
    chosen = sample(mutants, 7, "seed")
    assert chosen == sample(mutants, 7, "seed") and chosen != sample(mutants, 7, "other")
    counts = sorted(sum(m.group == g for m in chosen) for g in "abc")
    assert counts == [2, 2, 3] and len(set(chosen)) == 7


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda p: p.stem)
def test_every_mutant_can_be_planted(path):
    root = FOLDER.parents[1]
    mutants = load(path)
    stale = [m.name for m in mutants if (root / m.file).read_text().count(m.replace) != 1]
    assert not stale, f"what these replace does not occur exactly once: {stale}"
    assert all((root / m.tests).exists() and m.replace != m.by for m in mutants)
