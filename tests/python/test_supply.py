"""Promise: what xorz is built of is what deny.toml allows, comes from the registry with its checksum, and is listed whole: with
its licences in the wheel, and in the SBOM."""

import copy
import importlib.util
import json
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("supply", ROOT / "tests/supply/supply.py")
supply = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(supply)


@pytest.fixture(scope="module")
def state():
    pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML; newer ones look at the same files")
    if shutil.which("cargo") is None:
        pytest.skip("cargo is missing, so that nothing can be said of what it builds")
    return supply.toml(ROOT / "deny.toml"), supply.metadata(), supply.locked()


def named(packages) -> set[tuple[str, str]]:
    return {(p["name"], p["version"]) for p in packages}


def test_the_policy_is_kept(state):
    policy, data, lock = state
    assert supply.objections(policy, lock, supply.reached(data, shipped=False)) == []
    if shutil.which("cargo-deny"):
        checks = ["cargo", "deny", "--offline", "check", "licenses", "bans", "sources"]
        subprocess.run(checks, cwd=ROOT, check=True)


def test_what_the_policy_forbids_is_noticed(state):
    policy, data, lock = state
    built = supply.reached(data, shipped=False)
    place = next(i for i, p in enumerate(lock) if p["name"] == "half")
    for change, word in [
        ({"source": "git+https://example.org/half"}, "git+https"),
        ({"source": "registry+https://example.org/index"}, "example.org"),
        ({"source": None}, "from a folder"),
        ({"checksum": ""}, "no checksum"),
        ({"name": "openssl-sys"}, "openssl-sys"),
    ]:
        bad = copy.deepcopy(lock)
        bad[place] |= change
        assert any(word in text for text in supply.objections(policy, bad, built)), word
    one = next(p for p in built if p["name"] == "half")
    for licence in ("GPL-3.0-only", "MIT AND GPL-3.0-only", None, "MIT OR", "(MIT"):
        bad = [*[p for p in built if p is not one], one | {"license": licence}]
        assert any("half" in text for text in supply.objections(policy, lock, bad)), licence
    twice = [*built, one | {"version": "1.0.0"}]
    assert any("half is there in versions" in text for text in supply.objections(policy, lock, twice))


def test_licence_expressions_are_read_as_they_are_meant():
    assert supply.terms("(MIT OR Apache-2.0) AND Unicode-3.0") == [
        ["MIT", "Unicode-3.0"],
        ["Apache-2.0", "Unicode-3.0"],
    ]
    assert supply.terms("Apache-2.0 WITH LLVM-exception OR MIT") == [
        ["Apache-2.0 WITH LLVM-exception"],
        ["MIT"],
    ]
    assert supply.chosen("GPL-2.0-only OR BSD-3-Clause AND MIT", ["BSD-3-Clause", "MIT"]) == [
        "BSD-3-Clause",
        "MIT",
    ]
    assert supply.chosen("GPL-2.0-only", ["MIT"]) is None


def test_every_package_in_the_wheel_is_listed_with_its_licence(state):
    policy, data, _ = state
    shipped = named(supply.reached(data, shipped=True))
    # By another way: from xorz along what is linked, as the packages' own lists say. Features that only tests ask for add some.
    packages = {p["id"]: p for p in data["packages"]}
    nodes = {n["id"]: n for n in data["resolve"]["nodes"]}
    seen, todo = set(), [data["resolve"]["root"]]
    while todo:
        here = todo.pop()
        if here in seen or any("proc-macro" in target["kind"] for target in packages[here]["targets"]):
            continue
        seen.add(here)
        todo += [e["pkg"] for e in nodes[here]["deps"] if any(k["kind"] is None for k in e["dep_kinds"])]
    linked = named(packages[i] for i in seen) - {("xorz", "0.1.0")}
    assert shipped <= linked and len(linked - shipped) <= 4, linked - shipped
    assert {"zstd-sys", "sha2", "clap", "cxx", "cudarc"} <= {name for name, _ in shipped}
    text = supply.NOTICE.read_text()
    assert text == supply.notice(data, policy["licenses"]["allow"]), "make licenses"
    for name, version in shipped:
        assert f"\n{name} {version} (" in text
    wheel = metadata.distribution("xorz")
    copies = [f for f in wheel.files if f.name == supply.NOTICE.name]
    assert [Path(wheel.locate_file(f)).read_text() for f in copies] == [text], (
        "the wheel has another list, or none"
    )


def test_the_sbom_is_complete(state, tmp_path):
    _, data, lock = state
    document = supply.sbom(data, lock)
    assert json.dumps(document) == json.dumps(supply.sbom(data, list(reversed(lock)))), "the order is chance"
    parts = {c["purl"]: c for c in document["components"]}
    assert len(parts) == len(document["components"])
    others = [p for p in lock if p["name"] != "xorz"]
    urls = {f"pkg:cargo/{p['name']}@{p['version']}": p for p in others}
    assert set(parts) - set(urls) == {"pkg:generic/zstd@1.5.7"}
    assert set(urls) <= set(parts)
    for url, package in urls.items():
        assert parts[url]["hashes"] == [{"alg": "SHA-256", "content": package["checksum"]}]
    required = {(c["name"], c["version"]) for u, c in parts.items() if c["scope"] == "required" and u in urls}
    assert required == named(supply.reached(data, shipped=True))
    assert all("licenses" in c for c in parts.values() if c["scope"] == "required")
    assert document["bomFormat"] == "CycloneDX" and document["specVersion"] == "1.5"
