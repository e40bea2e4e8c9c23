"""Promise: what the README shows runs as it stands, and is shown before line 30."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_the_readme_s_first_code_runs_and_comes_early():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert block, "no Python in the README"
    assert text[: block.start()].count("\n") < 30
    done = subprocess.run([sys.executable, "-W", "error", "-c", block[1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_paths_that_the_readme_links_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 3
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
