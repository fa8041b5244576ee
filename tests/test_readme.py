"What the README shows is what its code prints, and its figures are those of the committed results."
import re
import subprocess
import sys


def test_the_tour_prints_what_the_readme_shows(root):
    code, shown = re.search(
        r"<!-- tour -->\n```python\n(.*?)```\n\n```\n(.*?)```", (root / "README.md").read_text(), re.S
    ).groups()
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown


def test_the_figures_are_those_of_the_committed_results(root):
    from benchmarks.readme import MARKS, block
    text = (root / "README.md").read_text(encoding="utf-8")
    folder = re.search(r"benchmarks/results/([^/)]+)/decode\.json", text)[1]
    assert MARKS.search(text)[0] == f"<!-- bench -->\n{block(folder)}<!-- /bench -->", (
        "run `python -m benchmarks.readme` after a new measurement"
    )
