"""Promise: `trust="sha256"` compares the words of a base with those that were packed against, by whatever way a package is
used, and refuses packages that cannot tell."""

import hashlib
import json
import re
import struct

import pytest
import torch
import xorz
from safetensors.torch import save_file
from torch import nn


def words(seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {"0.weight": torch.randn(48, 32, generator=made), "1.weight": torch.randn(16, 48, generator=made)}


@pytest.fixture
def pair(tmp_path):
    base = words(1)
    tuned = {name: tensor + 1e-3 * (tensor > 1) for name, tensor in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return base, tuned, tmp_path


def model(base: dict[str, torch.Tensor]) -> nn.Module:
    out = nn.Sequential(nn.Linear(32, 48, bias=False), nn.Linear(48, 16, bias=False))
    out.load_state_dict(base)
    return out


def forged(path, name: str):
    """The package with the sha256 of another base: the digests still fit, as those of a made base would."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    table = start + json.loads(data[8:start])["xorz:table"]["data_offsets"][0]
    entry = next(e for e in xorz.inspect(path)["entries"] if e["name"] == name)
    mine = bytes.fromhex(entry["base_sha256"])
    assert data[table:].count(mine) == 1
    changed = data[table + 16 :].replace(mine, hashlib.sha256(b"another base").digest())
    out = path.with_name("forged.xorz")
    out.write_bytes(data[: table + 16] + changed)
    # Who forges computes the table's digest; here the refusal says what it would be.
    with pytest.raises(ValueError, match="the table is damaged") as refusal:
        xorz.inspect(out)
    right = re.search(r"its digest is ([0-9a-f]{32})", str(refusal.value))[1]
    out.write_bytes(data[:table] + bytes.fromhex(right) + changed)
    xorz.inspect(out)
    return out


def test_a_package_that_was_packed_so_is_used_by_every_way(pair):
    base, tuned, folder = pair
    package = folder / "p.xorz"
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    packed = [
        lambda: xorz.pack(*paths, package, trust="sha256"),
        lambda: xorz.pack(base, tuned, package, trust="sha256"),
        lambda: xorz.pack_fleet(paths[0], {paths[1]: package}, trust="sha256"),
    ]
    for pack in packed:
        pack()
        entries = {e["name"]: e for e in xorz.inspect(package)["entries"]}
        for name, entry in entries.items():
            assert entry["base_sha256"] == hashlib.sha256(base[name].numpy().tobytes()).hexdigest()
        xorz.unpack(paths[0], package, folder / "out.safetensors", trust="sha256")
        xorz.verify(paths[0], package, trust="sha256")
        back = xorz.restore(base, package, trust="sha256")
        assert all(torch.equal(back[name], tuned[name]) for name in tuned)
        for old in (paths[0], base):
            deltas = xorz.load_deltas(old, package, trust="sha256")
            assert all(torch.equal(xorz.delta_restore(base[n], d), tuned[n]) for n, d in deltas.items())
        served = model(base)
        tenants = xorz.attach(served, trust="sha256")
        tenants.load("alice", str(package))
        x = torch.randn(3, 32)
        with torch.no_grad(), tenants.use("alice"):
            torch.testing.assert_close(served(x), model(tuned)(x))


def test_a_base_of_another_sha256_is_refused_by_every_way_though_its_digests_fit(pair):
    base, tuned, folder = pair
    path, package = folder / "base.safetensors", folder / "p.xorz"
    xorz.pack(base, tuned, package, codec="resident", trust="sha256")
    made = forged(package, "1.weight")
    # The digests alone let it pass.
    xorz.load_deltas(path, made)
    xorz.load_deltas(base, made)
    xorz.verify(path, made)
    xorz.attach(model(base)).load("alice", str(made))
    sha256 = {"trust": "sha256"}
    ways = [
        lambda: xorz.unpack(path, made, folder / "no.safetensors", **sha256),
        lambda: xorz.verify(path, made, **sha256),
        lambda: xorz.restore(base, made, **sha256),
        lambda: xorz.load_deltas(path, made, **sha256),
        lambda: xorz.load_deltas(base, made, **sha256),
        lambda: xorz.load_deltas(base, made, prefer=None, **sha256),
        lambda: xorz.attach(model(base), **sha256).load("alice", str(made)),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r"1\.weight.*sha256"):
            way()
    assert not (folder / "no.safetensors").exists()


def test_packages_without_are_refused_and_other_words_for_trust_are_named(pair):
    base, tuned, folder = pair
    path, package = folder / "base.safetensors", folder / "p.xorz"
    xorz.pack(base, tuned, package)
    for way in (
        lambda: xorz.unpack(path, package, folder / "no.safetensors", trust="sha256"),
        lambda: xorz.verify(path, package, trust="sha256"),
        lambda: xorz.restore(base, package, trust="sha256"),
        lambda: xorz.load_deltas(path, package, trust="sha256"),
        lambda: xorz.attach(model(base), trust="sha256").load("alice", str(package)),
    ):
        with pytest.raises(ValueError, match="--trust sha256"):
            way()
    tenants = xorz.attach(model(base), trust="sha256")
    with pytest.raises(ValueError, match="sha256"):
        tenants.load("bob", dict(xorz.load_deltas(base, package)))
    tenants.load("carol", xorz.diff(base, tuned))
    for way in (
        lambda: xorz.pack(base, tuned, package, trust="md5"),
        lambda: xorz.pack_fleet(path, {folder / "tuned.safetensors": package}, trust="md5"),
        lambda: xorz.verify(path, package, trust="md5"),
        lambda: xorz.load_deltas(path, package, trust="md5"),
        lambda: xorz.attach(model(base), trust="md5"),
    ):
        with pytest.raises(ValueError, match="'md5'"):
            way()


def test_a_tie_that_the_model_does_not_have_is_refused(pair):
    base, tuned, folder = pair
    package = folder / "tied.xorz"
    base = {"0.weight": base["0.weight"], "1.weight": base["0.weight"].T.contiguous()}
    tuned = {**base, "0.weight": tuned["0.weight"]}
    tuned["head.weight"] = tuned["0.weight"]
    xorz.pack({**base, "head.weight": base["0.weight"]}, tuned, package, trust="sha256")

    class Headed(nn.Module):
        def __init__(self, head: torch.Tensor) -> None:
            super().__init__()
            self.add_module("0", nn.Linear(32, 48, bias=False))
            self.add_module("1", nn.Linear(48, 32, bias=False))
            self.head = nn.Linear(32, 48, bias=False)
            self.load_state_dict({**base, "head.weight": head})

    xorz.attach(Headed(base["0.weight"]), trust="sha256").load("alice", str(package))
    with pytest.raises(ValueError, match=r"head\.weight"):
        xorz.attach(Headed(base["0.weight"] + 1), trust="sha256").load("alice", str(package))


def test_a_chain_of_versions_takes_and_makes_only_steps_whose_parents_sha256_fits(pair):
    base, tuned, folder = pair
    sha256 = {"trust": "sha256"}
    run = xorz.Versions(base, folder / "run", keyframe=2, **sha256)
    run.publish(tuned)
    last = {name: tensor * 2 for name, tensor in tuned.items()}
    run.publish(last)
    for number, want in ((1, tuned), (2, last)):
        entries = xorz.inspect(run.path(number))["entries"]
        parent = base if number == 1 else tuned
        for entry in entries:
            assert entry["base_sha256"] == hashlib.sha256(parent[entry["name"]].numpy().tobytes()).hexdigest()
        got = run.state_dict(number)
        assert all(torch.equal(got[name], want[name]) for name in want)
    # A step whose digests fit, but which was made from another tensor.
    step = folder / "step.xorz"
    xorz.pack(base, tuned, step, codec="resident", trust="sha256")
    made = forged(step, "1.weight")
    xorz.Versions(base, folder / "by_digest").append(made)
    wary = xorz.Versions(base, folder / "by_sha256", **sha256)
    with pytest.raises(ValueError, match=r"1\.weight.*sha256"):
        wary.append(made)
    assert wary.head == 0
    assert wary.append(step) == 1
    # A chain whose steps keep none.
    xorz.Versions(base, folder / "plain").publish(tuned)
    with pytest.raises(ValueError, match="--trust sha256"):
        xorz.Versions(base, folder / "plain", **sha256).state_dict(1)
    with pytest.raises(ValueError, match="'md5'"):
        xorz.Versions(base, folder / "other", trust="md5")
