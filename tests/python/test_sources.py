"""Promise: a tenant is wherever users keep it: a file, a folder, a repository of the Hub, an address of fsspec. It is fetched
once for each version of it, resumed where it was cut, checked before use, and nothing else is taken for one.
"""

import importlib
import json
import os
import subprocess
import sys

import hub as hubs
import pytest
import torch
import xorz
from torch import nn
from xorz import sources

BASE = "org/base"


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 96)).bfloat16()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """(a package's path, the fine-tune that it gives)."""
    base = model()
    g = torch.Generator().manual_seed(1)
    tuned = {
        n: (w.float() + 0.02 * torch.randn(w.shape, generator=g)).bfloat16()
        for n, w in base.state_dict().items()
    }
    path = tmp_path_factory.mktemp("sources") / "alice.xorz"
    xorz.pack(base.state_dict(), tuned, path)
    return path, tuned


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A loopback server in the Hub's place, in this process and in those that are started."""
    pytest.importorskip("huggingface_hub")
    with hubs.running() as (hub, address):
        for name, value in {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_test",
            "XORZ_CACHE_DIR": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setenv(name, value)
        # What it read from the environment when it was imported.
        constants = importlib.import_module("huggingface_hub.constants")
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        hub.address = address
        yield hub


def right(source, tuned):
    """Whether a tenant that is loaded from there computes as the plain fine-tune."""
    served, plain = model(), model()
    plain.load_state_dict(tuned)
    tenants = xorz.attach(served, mode="exact")
    tenants.load("alice", source)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.inference_mode(), tenants.use("alice"):
        got = served(x)
    with torch.inference_mode():
        assert torch.equal(got, plain(x)) and not torch.equal(got, model()(x))
    return True


def test_a_folder_with_one_package_is_that_package(package, tmp_path):
    path, tuned = package
    folder = xorz.save_folder(path, tmp_path / "alice", BASE)
    assert (
        sources.located(folder) == folder / "alice.xorz"
        and right(folder, tuned)
        and right(str(folder), tuned)
    )
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    with pytest.raises(ValueError, match=r"empty is a folder that holds no package \(\.xorz\); `xorz pack"):
        (tmp_path / "empty").mkdir()
        sources.located(tmp_path / "empty")
    (folder / "bob.xorz").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"holds 2 packages \(alice.xorz, bob.xorz, ...\); name one of them"):
        sources.located(folder)
    with pytest.raises(ValueError, match=r"holds (bob|alice)\.xorz already"):
        xorz.save_folder(path, folder, BASE, name="carol")
    # macOS's droppings and what is half written are no packages.
    (folder / "bob.xorz").unlink()
    (folder / "._alice.xorz").write_bytes(b"x")
    assert sources.located(folder).name == "alice.xorz"


def test_the_card_says_what_inspect_says(package, tmp_path):
    path, _ = package
    folder = xorz.save_folder(path, tmp_path / "alice", BASE, license="apache-2.0")
    text, about = (folder / "README.md").read_text(), xorz.inspect(path)
    assert (
        f"base_model: {BASE}\n" in text and "license: apache-2.0\n" in text and "library_name: xorz\n" in text
    )
    assert f"{about['changed']:,} of {about['words']:,}" in text
    assert f"{about['package_bytes']:,} bytes" in text and about["entries"][0]["base"] in text
    # A tensor's name, which anyone may choose, stays in its cell.
    evil = {"a|`<script>\n# b": torch.ones(64, 64)}
    xorz.pack(evil, {n: w + 1 for n, w in evil.items()}, tmp_path / "evil.xorz")
    text = (xorz.save_folder(tmp_path / "evil.xorz", tmp_path / "evil", BASE) / "README.md").read_text()
    assert "<script>" not in text and "\n# b" not in text


def test_a_repository_of_the_hub_is_a_tenant_fetched_once_for_each_version(package, hub):
    path, tuned = package
    hub.files["org/alice"] = {
        "alice.xorz": path.read_bytes(),
        "adapter_config.json": b"{}",
        "model.safetensors": b"z" * 999,
    }
    assert (
        right("org/alice", tuned)
        and right("hf://org/alice", tuned)
        and right("hf://org/alice/alice.xorz@main", tuned)
    )
    bodies = [p for method, p, size in hub.served if method == "GET" and p.endswith("alice.xorz")]
    assert len(bodies) == 1, hub.served
    assert not [p for _, p, _ in hub.served if "safetensors" in p], "weights were fetched"
    other = {n: w + 1 for n, w in tuned.items()}
    xorz.pack(model().state_dict(), other, path.with_name("new.xorz"))
    hub.files["org/alice"]["alice.xorz"] = path.with_name("new.xorz").read_bytes()
    assert right("org/alice", other)


def test_what_is_on_no_hub_and_in_no_folder_says_so(hub, tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="there is no 'org/nobody' here, and no repository of that name"
    ):
        sources.located("org/nobody")
    hub.files["org/other"] = {"config.json": b"{}"}
    with pytest.raises(ValueError, match="org/other is a folder that holds no package"):
        sources.located("org/other")
    hub.files["org/bad"] = {"bad.xorz": b"not a package"}
    with pytest.raises(ValueError, match="what org/bad gave is no package"):
        sources.located("org/bad")
    with pytest.raises(ValueError, match="is not hf://owner/name"):
        sources.located("hf://alice")
    # A path that is here is never looked for elsewhere.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "other").mkdir(parents=True)
    asked = len(hub.served)
    with pytest.raises(ValueError, match="org/other is a folder that holds no package"):
        sources.located("org/other")
    assert sources.located("nothing.xorz").name == "nothing.xorz" and len(hub.served) == asked


def test_an_address_of_fsspec_is_fetched_once_and_again_when_it_changes(package, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("XORZ_CACHE_DIR", str(tmp_path / "cache"))
    path, tuned = package
    files = fsspec.filesystem("memory")
    files.pipe("/tenants/alice/alice.xorz", path.read_bytes())
    for address in ("memory://tenants/alice/alice.xorz", "memory://tenants/alice"):
        assert right(address, tuned)
    assert len(list((tmp_path / "cache" / "fetched").glob("*.xorz"))) == 1
    other = {n: w + 1 for n, w in tuned.items()}
    xorz.pack(model().state_dict(), other, tmp_path / "other.xorz")
    files.pipe("/tenants/alice/alice.xorz", (tmp_path / "other.xorz").read_bytes())
    assert right("memory://tenants/alice", other)
    files.pipe("/tenants/bad/bad.xorz", b"\x00" * 64)
    with pytest.raises(ValueError, match="gave is no package"):
        sources.located("memory://tenants/bad")
    assert not list((tmp_path / "cache" / "fetched").glob("*.part"))
    with pytest.raises(FileNotFoundError):
        sources.located("memory://tenants/nobody.xorz")


class Cut:
    """A file system that ends a file early, once."""

    def __init__(self, files, after):
        self.files, self.after, self.read = files, after, []

    def __getattr__(self, name):
        return getattr(self.files, name)

    def open(self, path, mode):
        source, outer = self.files.open(path, mode), self

        class Reader:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                source.close()

            def seek(self, at):
                source.seek(at)

            def read(self, size):
                left = size if outer.after is None else outer.after - source.tell()
                block = source.read(max(0, min(size, left)))
                outer.read.append(len(block))
                return block

        return Reader()


def test_a_transfer_that_was_cut_goes_on_where_it_ended(package, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("XORZ_CACHE_DIR", str(tmp_path / "cache"))
    path, tuned = package
    files = fsspec.filesystem("memory")
    files.pipe("/cut/alice.xorz", path.read_bytes())
    cut, size = Cut(files, 1000), path.stat().st_size
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda text: (cut, "/cut/alice.xorz"))
    with pytest.raises(OSError, match=f"ended after 1,000 of {size:,} bytes; what came is kept"):
        sources.located("memory://cut/alice.xorz")
    assert not list((tmp_path / "cache" / "fetched").glob("*.xorz"))
    cut.after, cut.read = None, []
    assert right("memory://cut/alice.xorz", tuned) and sum(cut.read) == size - 1000


def test_http_is_an_address_too(package, hub):
    pytest.importorskip("aiohttp")
    path, tuned = package
    hub.files["org/alice"] = {"alice.xorz": path.read_bytes()}
    assert right(f"{hub.address}/org/alice/resolve/main/alice.xorz", tuned)


def test_a_cache_that_others_may_write_to_is_not_believed(package, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    path, _ = package
    fsspec.filesystem("memory").pipe("/mine/alice.xorz", path.read_bytes())
    folder = tmp_path / "cache" / "fetched"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("XORZ_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(PermissionError, match="others may write to it"):
        sources.located("memory://mine/alice.xorz")
    monkeypatch.setenv("XORZ_CACHE_DIR", "")
    with pytest.raises(FileNotFoundError, match="XORZ_CACHE_DIR is empty"):
        sources.located("memory://mine/alice.xorz")


def test_push_makes_a_repository_that_loads(package, hub, tmp_path):
    path, tuned = package
    with pytest.raises(ValueError, match="does not say what its base is"):
        xorz.push(path, "org/alice")
    assert xorz.push(path, "org/alice", BASE).startswith(hub.address)
    assert sorted(hub.files["org/alice"]) == ["README.md", "adapter_config.json", "alice.xorz"]
    assert hub.files["org/alice"]["alice.xorz"] == path.read_bytes()
    assert right("org/alice", tuned)
    folder = xorz.save_folder(path, tmp_path / "bob", BASE, name="bob")
    (folder / "README.md").write_text("mine")
    (folder / "model.safetensors").write_bytes(b"weights")
    command = [sys.executable, "-m", "xorz", "push", str(folder), "org/bob"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and done.stdout.startswith(hub.address), done.stderr
    assert hub.files["org/bob"]["README.md"] == b"mine" and "model.safetensors" not in hub.files["org/bob"]
    assert right("org/bob", tuned)
    done = subprocess.run(
        [*command[:4], str(tmp_path), "org/none"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 1 and done.stderr.startswith("xorz: ") and "holds no package" in done.stderr
