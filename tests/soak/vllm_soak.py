"""vLLM's server for hours in minutes: `make soak-vllm MINUTES=60`.

A server with slots for two tenants at once and memory for four, in mode "deterministic". Threads ask for the base and for six
tenants, and each answer is compared, token by token, with what an engine over the plain fine-tuned model has said before.
Meanwhile tenants are unloaded and loaded again, a name is given to another package in place, and packages that are cut,
damaged, of another base or no packages are loaded, which must be refused to who asks and seen by nobody else. At the end what
the server's processes hold must not have grown since the first fifth, and no file of a tenant that is gone may be open.
"""

import collections
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "vllm"))

import engines
import models
from test_server import Server, held

KIND, NAMES = "llama", "ABCDEF"
PROMPTS = (*engines.PROMPTS, "versions of a policy", "Order of virtues: never silently wrong")
MIB = 1 << 20
# What vLLM and its allocators keep of requests goes up and down by this.
MOST_GROWN = 48 * MIB


def family(root: int) -> list[int]:
    """A process and all that it has begun."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
    out = [root]
    for pid in out:
        out += [child for child, parent in parents.items() if parent == pid]
    return out


def anonymous(root: int) -> int:
    """Bytes that these processes hold and no file is behind."""
    total = 0
    for pid in family(root):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(
            1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:")
        )
    return total


class Soak:
    """One server, and everything that is asked of it."""

    def __init__(self, folder: Path) -> None:
        made = {name: models.tenant(KIND, name, engines.FOLDER, seed=500 + i) for i, name in enumerate(NAMES)}
        self.packages = {}
        for name, (_full, package) in made.items():
            self.packages[name] = folder / f"{name}.xorz"
            shutil.copy(package, self.packages[name])
        paths = [models.base(KIND, engines.FOLDER), *(full for full, _ in made.values())]
        said = engines.references(paths, PROMPTS)
        self.want = {
            name: [answer.tokens for answer in answers]
            for name, answers in zip(("base", *NAMES), said, strict=True)
        }
        assert len({tuple(tokens) for each in self.want.values() for tokens in each}) == len(said) * len(
            PROMPTS
        )
        self.bad = self.make_bad(folder)
        self.counts, self.wrong = collections.Counter(), []
        self.lock, self.done = threading.Lock(), threading.Event()
        # Who may be asked for: E and F come and go, and `news` is E or F, whichever was published last.
        self.server = Server(paths[0], folder / "server.log")
        for name in NAMES[:4]:
            status, text = self.server.load(name, self.packages[name])
            assert status == 200, text

    def make_bad(self, folder: Path) -> list[Path]:
        """Packages that must be refused."""
        good = self.packages["A"].read_bytes()
        middle = len(good) // 2
        texts = {
            "cut": good[:middle],
            "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "header": good[:40] + b"?" + good[41:],
            "empty": b"",
            "text": b"no package" * 100,
        }
        for name, content in texts.items():
            (folder / f"{name}.xorz").write_bytes(content)
        other = models.tenant("qwen3", "A", engines.FOLDER)[1]
        return [*(folder / f"{name}.xorz" for name in texts), other, folder / "none.xorz", folder]

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def ask(self, pick: random.Random) -> None:
        """A thread: one prompt of one tenant, again and again."""
        while not self.done.is_set():
            name, i = pick.choice(("base", *NAMES[:4], "E", "news")), pick.randrange(len(PROMPTS))
            status, text = self.server.post(
                "/v1/completions",
                model=name,
                prompt=PROMPTS[i],
                max_tokens=engines.NEW,
                temperature=0,
                return_token_ids=True,
                ignore_eos=True,
            )
            if status == 404 and name in ("E", "news"):
                self.count("not there")
                continue
            got = json.loads(text)["choices"][0]["token_ids"] if status == 200 else (status, text)
            if got not in [self.want[who][i] for who in ("EF" if name == "news" else (name,))]:
                self.wrong.append(f"{name}, prompt {i}: {got}")
            self.count("answers")

    def change(self, pick: random.Random) -> None:
        """A thread: E comes and goes, `news` gets another package, bad ones are tried."""
        here = False
        while not self.done.is_set():
            match pick.randrange(3):
                case 0:
                    route, what = ("unload", "unloads") if here else ("load", "loads")
                    body = {"lora_name": "E"} | ({} if here else {"lora_path": str(self.packages["E"])})
                    status, text = self.server.post(f"/v1/{route}_lora_adapter", **body)
                    here = not here
                    self.expect(status == 200, f"{route}: {status} {text}")
                    self.count(what)
                case 1:
                    path = self.packages["E"].with_name("news.xorz")
                    shutil.copy(self.packages[pick.choice("EF")], path.with_suffix(".part"))
                    path.with_suffix(".part").rename(path)
                    status, text = self.server.load("news", path, load_inplace=True)
                    self.expect(status == 200, f"news: {status} {text}")
                    self.count("published in place")
                case _:
                    bad, name = pick.choice(self.bad), pick.choice(("new", "A"))
                    status, text = self.server.load(name, bad, load_inplace=name == "A")
                    self.expect(
                        status in (400, 404) and "xorz" in text, f"{bad.name} as {name}: {status} {text}"
                    )
                    self.count("refused")
            time.sleep(0.02)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)

    def guard(self, job, pick: random.Random) -> None:
        try:
            job(pick)
        except BaseException as error:
            self.wrong.append(repr(error))
            self.done.set()
            raise

    def run(self, seconds: float) -> None:
        """All of it for so long."""
        jobs = [self.ask] * 4 + [self.change]
        threads = [
            threading.Thread(target=self.guard, args=(job, random.Random(i))) for i, job in enumerate(jobs)
        ]
        for thread in threads:
            thread.start()
        self.done.wait(seconds / 5)
        before, grown = anonymous(self.server.process.pid), 0
        end = time.monotonic() + 0.8 * seconds
        while not self.done.is_set() and not self.wrong and time.monotonic() < end:
            self.done.wait(min(60.0, max(0.1, end - time.monotonic())))
            grown = anonymous(self.server.process.pid) - before
            print(f"{dict(self.counts)}; {before / MIB:.0f} MiB, {grown / MIB:+.1f}", flush=True)
        self.done.set()
        for thread in threads:
            thread.join()
        self.expect(grown <= MOST_GROWN, f"the server holds {grown / MIB:.1f} MiB more")
        self.server.post("/v1/unload_lora_adapter", lora_name="E")
        deadline = time.monotonic() + 120
        while held(self.packages["E"]) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.expect(held(self.packages["E"]) == 0, "the package of a tenant that is gone is still open")


def main(minutes: float) -> None:
    """Soak, and say what happened; exit 1 if anything was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        try:
            soak.run(60 * minutes)
        except OSError as error:
            soak.wrong.append(f"the server does not answer: {error!r}")
        finally:
            soak.server.stop()
        if soak.wrong:
            print(soak.server.log.read_text()[-20_000:])
        print(f"answers as the plain models': {dict(soak.counts)}")
        print("wrong:", soak.wrong[:3] or "nothing")
        sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
