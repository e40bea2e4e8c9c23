"""Promise: a checkpoint packed against its base comes back bit for bit from state_dicts and from files; another base or a
broken package is refused by name; every error is of the class that Python users expect."""

import json
import os
from pathlib import Path

import pytest
import torch
import xorz
from conftest import ENCODINGS, fine_tune, random_weight, same_bits

safetensors_torch = pytest.importorskip("safetensors.torch")


def checkpoint(dtype=torch.bfloat16):
    base = {f"layer.{e}.weight": random_weight(40, 70, dtype, i) for i, e in enumerate(ENCODINGS)}
    tuned = {f"layer.{e}.weight": fine_tune(base[f"layer.{e}.weight"], e) for e in ENCODINGS}
    for name, value in {
        "scalar": torch.tensor(3.5),
        "ids": torch.arange(10),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "cube": torch.randn(2, 3, 4),
        "double": torch.randn(3, dtype=torch.float64),
    }.items():
        base[name], tuned[name] = value, value.clone()
    tuned["ids"] = tuned["ids"] + 1
    base["resized"], tuned["resized"] = torch.randn(4, 4), torch.randn(5, 4)
    base["retyped"], tuned["retyped"] = torch.randn(4), torch.randn(4).half()
    base["only.base"] = torch.randn(3)
    tuned["only.tuned"] = torch.randn(6, 2)
    return base, tuned


def equal(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("codec", [None, "xor", "resident", "resident-zstd", "planes"])
@pytest.mark.parametrize("prefer", ["speed", "memory"])
def test_state_dicts_come_back_bit_for_bit(tmp_path, codec, prefer):
    base, tuned = checkpoint()
    report = xorz.pack(base, tuned, tmp_path / "t.xorz", prefer=prefer, codec=codec)
    assert report["tensors"] == len(tuned) and report["removed"] == 1 and report["alone"] == 3
    back = xorz.restore(base, tmp_path / "t.xorz")
    assert set(back) == set(tuned) and all(equal(back[n], tuned[n]) for n in tuned)
    description = xorz.inspect(tmp_path / "t.xorz")
    assert description["removed_names"] == ["only.base"] and len(description["entries"]) == len(tuned)
    # Any safetensors reader opens it.
    assert safetensors_torch.load_file(tmp_path / "t.xorz")


@pytest.mark.parametrize("prefer", ["speed", "memory", None])
def test_loaded_deltas_compute(tmp_path, prefer):
    base, tuned = checkpoint()
    xorz.pack(base, tuned, tmp_path / "t.xorz")
    deltas = xorz.load_deltas(base, tmp_path / "t.xorz", prefer=prefer)
    for encoding in ENCODINGS:
        name = f"layer.{encoding}.weight"
        linear = torch.nn.Linear(70, 40, bias=False)
        linear.weight = torch.nn.Parameter(base[name])
        module = xorz.XorDeltaLinear.from_linear(linear, deltas[name])
        assert same_bits(module.to_linear().weight, tuned[name])
        xorz.delta_check(deltas[name], base[name])
        if prefer == "speed" and encoding in ("unchanged", "sparse"):
            assert xorz.delta_info(deltas[name]).encoding == encoding
    for name in ("resized", "retyped", "only.tuned"):
        assert equal(deltas[name], tuned[name])


@pytest.mark.parametrize("codec", [None, "xor", "planes", "resident"])
@pytest.mark.parametrize("prefer", ["speed", "memory", None])
def test_deltas_loaded_against_a_base_on_disk_are_those_of_the_base_in_memory(tmp_path, prefer, codec):
    base, tuned = checkpoint()
    safetensors_torch.save_file(base, tmp_path / "base.safetensors")
    xorz.pack(base, tuned, tmp_path / "t.xorz", codec=codec)
    memory = xorz.load_deltas(base, tmp_path / "t.xorz", prefer=prefer)
    disk = xorz.load_deltas(tmp_path / "base.safetensors", tmp_path / "t.xorz", prefer=prefer)
    assert set(disk) == set(memory) == set(tuned)
    assert all(equal(disk[n], memory[n]) for n in memory)
    base["layer.sparse.weight"][0, 0] = 7
    safetensors_torch.save_file(base, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"layer.sparse.weight.*another base.*digest"):
        xorz.load_deltas(tmp_path / "other.safetensors", tmp_path / "t.xorz", prefer=prefer)
    del base["layer.sparse.weight"]
    safetensors_torch.save_file(base, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"the base has no tensor `layer\.sparse\.weight`"):
        xorz.load_deltas(tmp_path / "less.safetensors", tmp_path / "t.xorz", prefer=prefer)
    with pytest.raises(OSError, match="nowhere"):
        xorz.load_deltas(tmp_path / "nowhere", tmp_path / "t.xorz", prefer=prefer)


def test_jobs_change_nothing_that_is_loaded_and_the_first_bad_tensor_is_named(tmp_path):
    base = {f"t{i}": torch.randn(40 - i, 64).bfloat16() for i in range(9)}
    tuned = {n: (t.float() * (1 + 2**-7)).bfloat16() for n, t in base.items()}
    xorz.pack(base, tuned, tmp_path / "t.xorz", prefer="memory")
    one, many = (xorz.load_deltas(base, tmp_path / "t.xorz", jobs=jobs) for jobs in (1, 5))
    assert list(one) == list(many) == list(base)
    assert all(torch.equal(one[name], many[name]) for name in base)
    other = dict(base, t3=base["t3"] + 1, t7=base["t7"] + 1)
    for jobs in (1, 5, None):
        with pytest.raises(ValueError, match=r"`t3`.*digest"):
            xorz.load_deltas(other, tmp_path / "t.xorz", jobs=jobs)
    for jobs, error in ((0, ValueError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match="jobs must be"):
            xorz.load_deltas(base, tmp_path / "t.xorz", jobs=jobs)


def test_files_come_back_byte_for_byte(tmp_path):
    base, tuned = checkpoint()
    a, b = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    safetensors_torch.save_file(base, a)
    safetensors_torch.save_file(tuned, b, metadata={"made": "by a test"})
    report = xorz.pack(str(a), b, tmp_path / "t.xorz")
    assert report["package_bytes"] == os.path.getsize(tmp_path / "t.xorz")
    xorz.unpack(a, str(tmp_path / "t.xorz"), tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == b.read_bytes()
    xorz.verify(a, tmp_path / "t.xorz", b)
    back = xorz.restore(base, tmp_path / "t.xorz")
    assert all(equal(back[n], tuned[n]) for n in tuned)
    with pytest.raises(ValueError):
        xorz.verify(a, tmp_path / "t.xorz", a)


def test_another_base_is_refused_by_name(tmp_path):
    base, tuned = checkpoint()
    package = tmp_path / "t.xorz"
    xorz.pack(base, tuned, package)
    name = "layer.sparse.weight"
    other = {**base, name: base[name].clone()}
    other[name][0, 0] += 1
    for call in (xorz.restore, xorz.load_deltas):
        with pytest.raises(ValueError, match=rf"`{name}`.*digest [0-9a-f]{{32}}.*digest [0-9a-f]{{32}}"):
            call(other, package)
        with pytest.raises(KeyError, match=name):
            call({k: v for k, v in base.items() if k != name}, package)
        with pytest.raises(ValueError, match=rf"`{name}`.*F32.*BF16"):
            call({**base, name: base[name].float()}, package)
        with pytest.raises(ValueError, match=rf"`{name}`.*\[39, 70\].*\[40, 70\]"):
            call({**base, name: base[name][:39]}, package)
        with pytest.raises(TypeError, match=f"{name} must be a tensor, but is list"):
            call({**base, name: []}, package)
    with pytest.raises(TypeError, match="base must be a state_dict"):
        xorz.restore("base.safetensors", package)


def test_errors_are_of_the_expected_class(tmp_path):
    base, tuned = checkpoint()
    package = tmp_path / "t.xorz"
    with pytest.raises(OSError, match="no such"):
        xorz.pack(base, tuned, tmp_path / "no such" / "t.xorz")
    with pytest.raises(ValueError, match="prefer must be one of 'speed', 'memory', 'auto', but is 'size'"):
        xorz.pack(base, tuned, package, prefer="size")
    with pytest.raises(ValueError, match=r"codec must be one of .* but is 'zip'"):
        xorz.pack(base, tuned, package, codec="zip")
    with pytest.raises(ValueError, match=r"fast .* codec is 'planes'"):
        xorz.pack(base, tuned, package, codec="planes", fast=True)
    with pytest.raises(TypeError, match="fast must be a bool, but is str"):
        xorz.pack(base, tuned, package, fast="yes")
    with pytest.raises(TypeError, match="base and fine_tuned must both be"):
        xorz.pack(base, "tuned.safetensors", package)
    with pytest.raises(TypeError, match="base must be a state_dict or a path, but is list"):
        xorz.pack([], tuned, package)
    with pytest.raises(TypeError, match="w must be a tensor, but is int"):
        xorz.pack({}, {"w": 1}, package)
    with pytest.raises(TypeError, match="bits8"):
        xorz.pack({}, {"w": torch.empty(2, dtype=torch.bits8)}, package)
    with pytest.raises(TypeError, match="dense tensor with data"):
        xorz.pack({}, {"w": torch.zeros(2, device="meta")}, package)
    with pytest.raises(ValueError, match="zero byte"):
        xorz.pack({}, {"w\0x": torch.zeros(2)}, package)
    with pytest.raises(TypeError, match="must be a str"):
        xorz.pack({}, {3: torch.zeros(2)}, package)
    assert not package.exists() and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"t\.xorz"):
        xorz.restore(base, package)
    package.write_bytes(b"not a package at all")
    with pytest.raises(ValueError):
        xorz.restore(base, package)
    safetensors_torch.save_file(base, package)
    with pytest.raises(ValueError, match="not a xorz package"):
        xorz.restore(base, package)


def test_a_damaged_package_is_refused_or_right(tmp_path):
    base = {"w": random_weight(16, 30, torch.bfloat16)}
    tuned = {"w": fine_tune(base["w"], "sparse")}
    package, broken = tmp_path / "t.xorz", tmp_path / "b.xorz"
    xorz.pack(base, tuned, package)
    data = package.read_bytes()
    refused = 0
    for i in range(0, len(data), 7):
        for damaged in (data[:i], data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :]):
            broken.write_bytes(damaged)
            try:
                assert same_bits(xorz.restore(base, broken)["w"], tuned["w"])
            except (ValueError, KeyError):
                refused += 1
    assert refused > len(data) // 7


def test_an_overwritten_package_appears_at_once_or_not_at_all(tmp_path):
    base, tuned = checkpoint()
    package = tmp_path / "t.xorz"
    xorz.pack(base, tuned, package)
    good = package.read_bytes()
    with pytest.raises(TypeError):
        xorz.pack(base, {**tuned, "last": 3}, package)
    assert package.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["t.xorz"]


def test_tensors_that_are_views_or_tied_are_packed_as_their_values(tmp_path):
    big = random_weight(20, 40, torch.float32)
    base = {"a": big[:, ::2], "b": big[:, ::2], "t": big.T}
    tuned = {"a": (big + 1)[:, ::2], "b": big[:, ::2], "t": (big * 2).T}
    xorz.pack(base, tuned, tmp_path / "t.xorz")
    back = xorz.restore(base, tmp_path / "t.xorz")
    assert all(equal(back[n], tuned[n].contiguous()) for n in tuned)


def test_other_python_threads_run_while_files_are_packed_and_unpacked(tmp_path):
    import threading
    import time

    # Some 100 MB, so that each job takes many turns of the interpreter's lock.
    base = {"w": random_weight(7000, 7000, torch.bfloat16)}
    tuned = {"w": fine_tune(base["w"], "sparse")}
    a, b, package = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "t.xorz"
    safetensors_torch.save_file(base, a)
    safetensors_torch.save_file(tuned, b)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for job in (
            lambda: xorz.pack(a, b, package, jobs=1),
            lambda: xorz.unpack(a, package, tmp_path / "out", jobs=1),
            lambda: xorz.verify(a, package, b, jobs=1),
            lambda: xorz.pack(base, tuned, tmp_path / "u.xorz"),
        ):
            start = time.perf_counter()
            job()
            end = time.perf_counter()
            inside = [t for t in ticks if start < t < end]
            # Evenly, too: a lock held for most of the job would leave a gap as long.
            gaps = [y - x for x, y in zip([start, *inside], [*inside, end], strict=True)]
            assert len(inside) > 3 and max(gaps) < 0.7 * (end - start), (len(inside), max(gaps), end - start)
    finally:
        stop.set()
        thread.join()


def files(tmp_path):
    base, tuned = checkpoint()
    a, b = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    safetensors_torch.save_file(base, a)
    safetensors_torch.save_file(tuned, b)
    return a, b, tmp_path / "t.xorz", tmp_path / "out.safetensors"


@pytest.mark.parametrize("jobs", [1, 2, None])
@pytest.mark.parametrize("sha256", [True, False])
def test_jobs_and_sha256_change_no_byte(tmp_path, jobs, sha256):
    a, b, package, out = files(tmp_path)
    xorz.pack(a, b, package, jobs=1)
    first = package.read_bytes()
    xorz.pack(a, b, package, jobs=jobs)
    assert package.read_bytes() == first
    xorz.unpack(a, package, out, jobs=jobs, sha256=sha256)
    assert out.read_bytes() == b.read_bytes()
    assert xorz.verify(a, package, b, jobs=jobs, sha256=sha256)["tensors"] == xorz.inspect(package)["tensors"]
    with pytest.raises(ValueError, match="digest"):
        xorz.verify(b, package, jobs=jobs, sha256=sha256)


def folders(tmp_path):
    """A base in one file, a fine-tune in two shards with index, config and tokenizer, and a tied head."""
    base, tuned = checkpoint()
    base["head"] = base["layer.sparse.weight"].clone()
    tuned["head"] = tuned["layer.sparse.weight"].clone()
    a, b = tmp_path / "base", tmp_path / "tuned"
    (b / "tokenizer").mkdir(parents=True)
    a.mkdir()
    safetensors_torch.save_file(base, a / "model.safetensors")
    names = sorted(tuned)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, own in shards.items():
        safetensors_torch.save_file({n: tuned[n] for n in own}, b / shard, metadata={"format": "pt"})
    index = {"weight_map": {n: shard for shard, own in shards.items() for n in own}}
    (b / "model.safetensors.index.json").write_text(json.dumps(index))
    (b / "config.json").write_text('{"a": 1}\n')
    (b / "tokenizer" / "vocab.txt").write_bytes(bytes(range(256)))
    return base, tuned, a, b


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_folder_comes_back_as_the_same_folder(tmp_path, jobs):
    base, tuned, a, b = folders(tmp_path)
    package, out = tmp_path / "t.xorz", tmp_path / "out"
    report = xorz.pack(a, str(b), package, jobs=jobs)
    assert report["folder"] and {f["path"] for f in report["files"]} == set(contents(b))
    assert xorz.unpack(a / "model.safetensors", package, out, jobs=jobs) == report
    assert contents(out) == contents(b)
    xorz.verify(a, package, b, jobs=jobs)
    xorz.verify(a, package, out)
    assert {e["name"] for e in xorz.inspect(package)["entries"]} == set(tuned)
    # The same package serves state_dicts.
    back, deltas = xorz.restore(base, package), xorz.load_deltas(base, package)
    assert set(back) == set(tuned) and all(equal(back[n], tuned[n]) for n in tuned)
    assert set(deltas) == set(tuned)
    assert same_bits(xorz.delta_restore(base["head"], deltas["head"]), tuned["head"])


def test_folders_that_do_not_fit_are_refused(tmp_path):
    _, _, a, b = folders(tmp_path)
    package, out = tmp_path / "t.xorz", tmp_path / "out"
    xorz.pack(a, b, package)
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(ValueError, match="out"):
        xorz.unpack(a, package, out)
    assert contents(out) == {"precious": b"x"}
    with pytest.raises(ValueError, match="digest"):
        xorz.verify(b, package)
    with pytest.raises(ValueError):
        xorz.verify(a, package, a)
    (b / "config.json").write_text('{"a": 2}\n')
    with pytest.raises(ValueError, match=r"config\.json"):
        xorz.verify(a, package, b)
    (b / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-2\.safetensors"):
        xorz.pack(a, b, tmp_path / "u.xorz")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"PK" + bytes(2 << 20))
    with pytest.raises(ValueError, match="safe_serialization=True"):
        xorz.pack(a, tmp_path / "pickled", tmp_path / "u.xorz")
    assert not (tmp_path / "u.xorz").exists()


def test_bad_jobs_and_paths_are_refused(tmp_path):
    a, b, package, out = files(tmp_path)
    for jobs, error in (
        (0, ValueError),
        (-1, ValueError),
        (10**6, ValueError),
        (1.5, TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="jobs must be"):
            xorz.pack(a, b, package, jobs=jobs)
        with pytest.raises(error, match="jobs must be"):
            xorz.unpack(a, package, out, jobs=jobs)
    with pytest.raises(ValueError, match="zero byte"):
        xorz.pack(a, b, str(package) + "\0.txt")
    with pytest.raises(TypeError):
        xorz.unpack(a, 3, out)
    assert not package.exists() and not out.exists()


def test_errors_are_those_of_the_command_line(tmp_path):
    import subprocess
    import sysconfig
    from pathlib import Path

    command = Path(sysconfig.get_path("scripts")) / "xorz"
    a, b, package, out = files(tmp_path)
    xorz.pack(a, b, package)
    cut = tmp_path / "cut.xorz"
    cut.write_bytes(package.read_bytes()[:-1])
    missing, nowhere = tmp_path / "missing", tmp_path / "no" / "where"
    for code, error, args, call in [
        (1, ValueError, ("verify", b, package), lambda: xorz.verify(b, package)),
        (3, ValueError, ("verify", a, cut), lambda: xorz.verify(a, cut)),
        (3, ValueError, ("unpack", a, b, "-o", out), lambda: xorz.unpack(a, b, out)),
        (2, ValueError, ("pack", a, b, "-o", a), lambda: xorz.pack(a, b, a)),
        (4, OSError, ("inspect", missing), lambda: xorz.inspect(missing)),
        (4, OSError, ("pack", a, b, "-o", nowhere), lambda: xorz.pack(a, b, nowhere)),
        (4, OSError, ("pack", missing, b, "-o", out), lambda: xorz.pack(missing, b, out)),
    ]:
        done = subprocess.run([command, *args], capture_output=True, text=True)
        with pytest.raises(error) as caught:
            call()
        text = done.stderr.removeprefix("xorz: ").rstrip("\n")
        # The command line may add what to type.
        assert done.returncode == code and text.startswith(str(caught.value)), (text, str(caught.value))
    assert not out.exists()


@pytest.fixture
def fleet(tmp_path):
    """Two bases and three fine-tunes, of the first, the second and the first."""
    generator = torch.Generator().manual_seed(31)
    bases = [{"w": 0.02 * torch.randn(300, 200, generator=generator)} for _ in range(2)]
    for name, state in (("one", bases[0]), ("two", bases[1])):
        safetensors_torch.save_file(state, tmp_path / name)
    for name, base in (("a", bases[0]), ("b", bases[1]), ("c", bases[0])):
        (tmp_path / name).mkdir()
        tuned = {key: w + 1e-4 * torch.randn(w.shape, generator=generator) for key, w in base.items()}
        safetensors_torch.save_file(tuned, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


def test_a_fleet_is_packed_as_each_of_it_alone_against_the_nearest_base(fleet):
    packages = {fleet / name: fleet / f"{name}.xorz" for name in "abc"}
    for jobs in (1, 3, None):
        found = xorz.pack_fleet([fleet / "one", fleet / "two"], packages, jobs=jobs, prefer="speed")
        assert [Path(line["base"]).name for line in found] == ["one", "two", "one"]
        for line, name in zip(found, "abc", strict=True):
            near, far = sorted(line["distances"])
            assert 0 < near < 0.7 < far <= 1
            report = xorz.pack(line["base"], fleet / name, fleet / "alone", prefer="speed")
            assert line["report"] == report and line["fine_tuned"] == str(fleet / name)
            assert Path(line["package"]).read_bytes() == (fleet / "alone").read_bytes()
            xorz.unpack(line["base"], line["package"], fleet / f"{name}.{jobs}")
            assert (fleet / f"{name}.{jobs}" / "model.safetensors").read_bytes() == (
                fleet / name / "model.safetensors"
            ).read_bytes()
    assert xorz.pack_fleet(fleet / "one", {}) == []


def test_of_a_fleet_the_failed_ones_are_raised_when_all_others_are_packed(fleet):
    cut = (fleet / "b" / "model.safetensors").read_bytes()[:-40]
    (fleet / "b" / "model.safetensors").write_bytes(cut)
    packages = {str(fleet / name): str(fleet / f"{name}.xorz") for name in ("a", "b", "c", "absent")}
    with pytest.raises(ValueError, match=r"2 of 4 checkpoints were not packed: .*b/model.*absent") as raised:
        xorz.pack_fleet(fleet / "one", packages)
    lines = raised.value.packages
    assert ["error" in line for line in lines] == [False, True, False, True]
    assert "absent" in lines[3]["error"]
    assert sorted(p.name for p in fleet.glob("*.xorz")) == ["a.xorz", "c.xorz"]
    with pytest.raises(OSError, match=r"1 of 1 .*absent"):
        xorz.pack_fleet(fleet / "one", {fleet / "absent": fleet / "x.xorz"})
    with pytest.raises(OSError, match="nothing"):
        xorz.pack_fleet([fleet / "one", fleet / "nothing"], packages)
    with pytest.raises(ValueError, match="two packages would go"):
        xorz.pack_fleet(fleet / "one", {fleet / "a": fleet / "x", fleet / "c": fleet / "x"})
    with pytest.raises(ValueError, match="no base"):
        xorz.pack_fleet([], packages)
    for wrong in ((5, packages), ([5], packages), (fleet / "one", [fleet / "a"])):
        with pytest.raises(TypeError, match="path"):
            xorz.pack_fleet(*wrong)


def test_fast_leaves_slow_codecs_out_of_state_dicts_files_and_fleets(tmp_path):
    torch.manual_seed(2)
    base = {"w": torch.randn(256, 512).bfloat16()}
    tuned = {"w": base["w"] + 1e-3 * torch.randn(256, 512).bfloat16()}
    safetensors_torch.save_file(base, tmp_path / "base")
    safetensors_torch.save_file(tuned, tmp_path / "tuned")
    paths = tmp_path / "base", tmp_path / "tuned"
    for fast in (False, True):
        found = [
            xorz.pack(base, tuned, tmp_path / "a", fast=fast),
            xorz.pack(*paths, tmp_path / "b", fast=fast),
            xorz.pack_fleet(paths[0], {paths[1]: tmp_path / "c"}, fast=fast)[0]["report"],
        ]
        assert [("predicted" in report["codecs"]) for report in found] == [not fast] * 3, found
        for name in "abc":
            assert torch.equal(xorz.restore(base, tmp_path / name)["w"], tuned["w"])
    report = xorz.pack(base, tuned, tmp_path / "a", codec="predicted")
    assert list(report["codecs"]) == ["predicted"]
