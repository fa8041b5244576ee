"What the README shows is what its code prints, and what it links to exists."
import re
import subprocess
import sys


def test_the_tour_prints_what_the_readme_shows(root):
    code, shown = re.search(r"<!-- tour -->\n```python\n(.*?)```\n\n```\n(.*?)```", (root / "README.md").read_text(), re.S).groups()
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown


def test_links_and_pictures_exist(root):
    for page in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#]+)\)", (root / page).read_text())
        missing = [link for link in links if not link.startswith("http") and not (root / link).exists()]
        assert not missing, f"{page} links to what is not there: {missing}"


def test_every_chapter_is_in_the_map(root):
    readme = (root / "README.md").read_text()
    chapters = [str(p.relative_to(root)) for p in (root / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(root / "nbs").parts)]
    absent = [c for c in chapters if c not in readme]
    assert not absent, f"the README's map lacks {absent}"


def test_the_figures_are_those_of_the_committed_results(root):
    from benchmarks.readme import MARKS, block
    text = (root / "README.md").read_text(encoding="utf-8")
    folder = re.search(r"benchmarks/results/([^/)]+)/decode\.json", text)[1]
    assert MARKS.search(text)[0] == f"<!-- bench -->\n{block(folder)}<!-- /bench -->", "run `python -m benchmarks.readme` after a new measurement"
