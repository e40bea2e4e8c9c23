"""What xorz is built of: held against the policy in deny.toml, listed with its licences, and as a CycloneDX SBOM.

    make supply          check the policy, and that THIRD-PARTY-LICENSES is complete
    make licenses        write THIRD-PARTY-LICENSES anew, after a change of Cargo.lock
    make sbom            write build/xorz.cdx.json

Nothing is fetched: Cargo.lock says what there is, and cargo's own folder of sources, without which nothing builds, the rest.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOTICE = ROOT / "THIRD-PARTY-LICENSES"
TARGET = "x86_64-unknown-linux-gnu"

# Which licence of several is taken, and the file of a crate that holds its text.
TEXTS = {
    "MIT": r"LICEN[CS]E[-.]MIT|LICEN[CS]E|COPYING",
    "BSD-3-Clause": r"LICEN[CS]E[-.]BSD-3-Clause|LICEN[CS]E[-.]BSD|LICEN[CS]E",
    "BSD-2-Clause": r"LICEN[CS]E[-.]BSD-2-Clause|LICEN[CS]E[-.]BSD|LICEN[CS]E",
    "BSL-1.0": r"LICEN[CS]E",
    "ISC": r"LICEN[CS]E",
    "Zlib": r"LICEN[CS]E[-.]ZLIB|LICEN[CS]E",
    "Unicode-3.0": r"LICEN[CS]E[-.]UNICODE|LICEN[CS]E",
    "Apache-2.0": r"LICEN[CS]E[-.]APACHE|LICEN[CS]E",
    "Apache-2.0 WITH LLVM-exception": r"LICEN[CS]E[-.]Apache-2.0_WITH_LLVM-exception",
}


def toml(path: Path) -> dict[str, Any]:
    """A TOML file. Python 3.10 has no reader of its own."""
    import tomllib

    return tomllib.loads(path.read_text())


def locked() -> list[dict[str, Any]]:
    """Every package of Cargo.lock, for every platform and purpose."""
    return toml(ROOT / "Cargo.lock")["package"]


def metadata() -> dict[str, Any]:
    """What cargo knows of the packages that are built here."""
    command = (
        f"cargo metadata --offline --locked --format-version 1 --filter-platform {TARGET} --features bridge"
    )
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"supply: {command}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def tree(edges: str, *more: str) -> set[tuple[str, str]]:
    """Names and versions of what cargo says that xorz is made of, along such edges."""
    command = [
        "cargo",
        "tree",
        "--offline",
        "--locked",
        "--target",
        TARGET,
        "--prefix",
        "none",
        "-e",
        edges,
        *more,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"supply: {' '.join(command)}: {done.stderr.strip()}")
    lines = (line.split()[:2] for line in done.stdout.splitlines() if line)
    return {(name, version.removeprefix("v")) for name, version in lines if name != "xorz"}


def reached(data: dict[str, Any], shipped: bool) -> list[dict[str, Any]]:
    """The packages that xorz is made of, in order of their names: those whose code is in the library or the command
    (`shipped`), or those that build and test them, too.
    """
    # Two builds make a wheel: the command with what is usual, the library with its door and without the command's needs.
    inside = tree("normal,no-proc-macro") | tree(
        "normal,no-proc-macro", "--no-default-features", "--features", "bridge"
    )
    every = [p for p in data["packages"] if p["name"] != "xorz"]
    found = [p for p in every if not shipped or (p["name"], p["version"]) in inside]
    return sorted(found, key=lambda p: (p["name"], p["version"]))


def terms(expression: str) -> list[list[str]]:
    """An SPDX expression as alternatives, each the licences that it asks for together."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))
    place = 0

    def either() -> list[list[str]]:
        nonlocal place
        out = both()
        while place < len(tokens) and tokens[place] == "OR":
            place += 1
            out = out + both()
        return out

    def both() -> list[list[str]]:
        nonlocal place
        out = one()
        while place < len(tokens) and tokens[place] == "AND":
            place += 1
            out = [a + b for b in one() for a in out]
        return out

    def one() -> list[list[str]]:
        nonlocal place
        if place < len(tokens) and tokens[place] == "(":
            place += 1
            out = either()
            if place >= len(tokens) or tokens[place] != ")":
                raise ValueError(f"`{expression}` is no licence expression")
            place += 1
            return out
        if place >= len(tokens) or tokens[place] in ("OR", "AND", "WITH", ")"):
            raise ValueError(f"`{expression}` is no licence expression")
        name = tokens[place]
        place += 1
        if tokens[place : place + 1] == ["WITH"]:
            name, place = f"{name} WITH {tokens[place + 1]}", place + 2
        return [[name]]

    out = either()
    if place != len(tokens):
        raise ValueError(f"`{expression}` is no licence expression")
    return out


def chosen(expression: str, allowed: list[str]) -> list[str] | None:
    """The licences under which a package is taken: those of the shortest alternative that is allowed; None if there is none."""
    order = list(TEXTS)
    good = [t for t in terms(expression) if all(name in allowed and name in order for name in t)]
    return min(good, key=lambda t: (len(t), [order.index(name) for name in t]), default=None)


def objections(policy: dict[str, Any], lock: list[dict[str, Any]], built: list[dict[str, Any]]) -> list[str]:
    """What the policy has against the packages of a lock file, and those `built` of it."""
    out = []
    banned = {entry["crate"] for entry in policy["bans"]["deny"]}
    skipped = {entry["crate"] for entry in policy["bans"].get("skip", [])}
    for package in lock:
        name = f"{package['name']} {package['version']}"
        source = package.get("source")
        if package["name"] in banned:
            out.append(f"{name} is banned")
        if source is None:
            if package["name"] != "xorz":
                out.append(f"{name} comes from a folder")
        elif not (source.startswith("registry+") and source.endswith("/crates.io-index")):
            out.append(f"{name} comes from {source}")
        elif not re.fullmatch(r"[0-9a-f]{64}", package.get("checksum", "")):
            out.append(f"{name} has no checksum")
    versions: dict[str, list[str]] = {}
    for package in built:
        parts = package["version"].split(".")
        if f"{package['name']}@{'.'.join(parts[: 2 if parts[0] == '0' else 1])}" not in skipped:
            versions.setdefault(package["name"], []).append(package["version"])
        try:
            if chosen(package["license"] or "", policy["licenses"]["allow"]) is None:
                out.append(f"{package['name']} {package['version']} is under {package['license']}")
        except ValueError as error:
            out.append(f"{package['name']} {package['version']}: {error}")
    out += [f"{name} is there in versions {', '.join(v)}" for name, v in versions.items() if len(v) > 1]
    return out


def texts(package: dict[str, Any], names: list[str]) -> list[str]:
    """The texts of a package's licences; ValueError where its folder has none."""
    folder = Path(package["manifest_path"]).parent
    files = sorted(f for f in os.listdir(folder) if (folder / f).is_file())
    out = []
    for name in names:
        patterns = TEXTS[name].split("|")
        ordered = (f for p in patterns for f in files if re.fullmatch(p + r"(\.(md|txt))?", f, re.IGNORECASE))
        path = next(ordered, None)
        if path is None:
            raise ValueError(
                f"{package['name']} {package['version']}: no text of {name} in {', '.join(files)}"
            )
        text = (folder / path).read_text(errors="replace")
        out.append("\n".join(line.rstrip() for line in text.strip().splitlines()))
    return out


HEAD = """What the xorz wheel contains of others
=====================================

The library and the command are linked with the Rust packages below, and with the Rust standard library (MIT OR Apache-2.0, The
Rust Project Developers; LICENSE-APACHE beside this file). xorz itself is under LICENSE-APACHE or LICENSE-MIT.
`make licenses` writes this file from Cargo.lock.
"""


def notice(data: dict[str, Any], allowed: list[str]) -> str:
    """THIRD-PARTY-LICENSES: every shipped package, and each text once."""
    groups: dict[str, list[str]] = {}
    for package in reached(data, shipped=True):
        names = chosen(package["license"], allowed)
        if names is None:
            raise ValueError(f"{package['name']} {package['version']} is under {package['license']}")
        for name, text in zip(names, texts(package, names), strict=True):
            groups.setdefault(text, []).append(f"{package['name']} {package['version']} ({name})")
    parts = [HEAD]
    for text, packages in sorted(groups.items(), key=lambda item: item[1]):
        parts.append("-" * 79 + "\n" + "\n".join(packages) + "\n\n" + text + "\n")
    return "\n".join(parts)


def sbom(data: dict[str, Any], lock: list[dict[str, Any]]) -> dict[str, Any]:
    """A CycloneDX document of every package in Cargo.lock; scope `required` is in the wheel, `excluded` builds or tests it."""
    known = {(p["name"], p["version"]): p for p in data["packages"]}
    inside = {(p["name"], p["version"]) for p in reached(data, shipped=True)}
    components, version = [], ""
    for package in lock:
        key = package["name"], package["version"]
        if "source" not in package:
            version = package["version"]
            continue
        url = f"pkg:cargo/{key[0]}@{key[1]}"
        component = {
            "type": "library",
            "bom-ref": url,
            "name": key[0],
            "version": key[1],
            "purl": url,
            "scope": "required" if key in inside else "excluded",
            "hashes": [{"alg": "SHA-256", "content": package["checksum"]}],
        }
        if key in known:
            component["licenses"] = [{"expression": known[key]["license"].replace("/", " OR ")}]
        components.append(component)
        if bundled := re.fullmatch(r".*\+zstd\.(.*)", key[1]):
            # The C library that the package brings along.
            url = f"pkg:generic/zstd@{bundled[1]}"
            components.append(
                {
                    "type": "library",
                    "bom-ref": url,
                    "name": "zstd",
                    "version": bundled[1],
                    "purl": url,
                    "scope": component["scope"],
                    "licenses": [{"expression": "BSD-3-Clause"}],
                }
            )
    own = {"type": "library", "bom-ref": "xorz", "name": "xorz", "version": version}
    own["licenses"] = [{"expression": "Apache-2.0 OR MIT"}]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": own},
        "components": sorted(components, key=lambda c: c["purl"]),
    }


def main() -> None:
    """Do what was asked; exit with what is wrong."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--licenses", action="store_true", help="write THIRD-PARTY-LICENSES")
    options.add_argument("--sbom", type=Path, metavar="FILE", help="write the SBOM")
    asked = options.parse_args()
    policy, data, lock = toml(ROOT / "deny.toml"), metadata(), locked()
    wrong = objections(policy, lock, reached(data, shipped=False))
    text = notice(data, policy["licenses"]["allow"]) if not wrong else ""
    if asked.licenses and not wrong:
        NOTICE.write_text(text)
    if asked.sbom:
        asked.sbom.parent.mkdir(parents=True, exist_ok=True)
        asked.sbom.write_text(json.dumps(sbom(data, lock), indent=2) + "\n")
    if not wrong and (not NOTICE.exists() or NOTICE.read_text() != text):
        wrong.append(f"{NOTICE.name} is not what the wheel contains; make licenses")
    if wrong:
        sys.exit("supply: " + "\nsupply: ".join(wrong))
    shipped = reached(data, shipped=True)
    print(f"supply: {len(lock) - 1} packages, {len(shipped)} of them in the wheel: all as deny.toml allows")


if __name__ == "__main__":
    main()
