"""What one torch makes of the library, for `run.py` to compare with the others; runs inside that torch's
environment.

    check.py inputs FILE               matrices and rows in every dtype and encoding, the same for every torch
    check.py write INPUTS FOLDER       every op on them; leaves outputs, archives and a package in FOLDER, prints JSON
    check.py read FOLDER NAME...       loads these archives of another torch's FOLDER, prints JSON: whether the bits agree

Only the library is loaded here, with torch.ops.load_library, unless a check is about the Python package.
"""

import copy
import functools
import hashlib
import importlib.util
import json
import os
import platform
import sys
import traceback
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# The library by its place in the installed package, without importing that.
PACKAGE = Path(importlib.util.find_spec("xorz").origin).parent
LIBRARY = PACKAGE / "libxorz_torch.so"
torch.ops.load_library(LIBRARY)
ops = torch.ops.xorz
F = torch.nn.functional

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ENCODINGS = ("unchanged", "sparse", "exponent", "raw")
PREFER = {"unchanged": "speed", "sparse": "speed", "exponent": "memory", "raw": "memory"}
MODES = ("fast", "deterministic", "exact")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def write_inputs(path: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
    from conftest import fine_tune, random_weight

    tensors = {}
    for name, dtype in DTYPES.items():
        for encoding in ENCODINGS:
            base = random_weight(96, 200, dtype)
            tuned = fine_tune(base, encoding)
            if encoding == "raw":
                tuned = torch.nan_to_num(tuned, posinf=1, neginf=1).clamp(-1e3, 1e3)
            tensors[f"{name}.{encoding}.base"] = base
            tensors[f"{name}.{encoding}.tuned"] = tuned.contiguous()
        tensors[f"{name}.x"] = random_weight(40, 200, dtype, seed=3)
        tensors[f"{name}.grad"] = random_weight(40, 96, dtype, seed=4)
        tensors[f"{name}.bias"] = random_weight(1, 96, dtype, seed=5)[0]
    save_file(tensors, path)


def load_inputs(path: str) -> dict[str, torch.Tensor]:
    # Cloned into torch's own aligned memory: a file's tensors start anywhere, and MKL's f32 products, hence
    # F.linear, give other bits for the same numbers at another alignment.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def cases(inputs):
    for name in DTYPES:
        for encoding in ENCODINGS:
            case = f"{name}.{encoding}"
            yield (
                case,
                encoding,
                *(inputs[f"{case}.{k}"] for k in ("base", "tuned")),
                *(inputs[f"{name}.{k}"] for k in ("x", "grad", "bias")),
            )


class Checks:
    """Each method is one row of the table: it returns nothing, or raises with what is wrong."""

    def __init__(self, inputs: dict, folder: Path) -> None:
        self.inputs = inputs
        self.folder = folder
        self.outputs: dict[str, torch.Tensor] = {}

    def every_op_bit_for_bit(self) -> None:
        for case, encoding, base, tuned, x, grad, bias in cases(self.inputs):
            delta = ops.delta_encode(base, tuned, prefer=PREFER[encoding])
            assert int(delta[10]) == ENCODINGS.index(encoding), case
            ops.delta_check(delta, base)
            assert same(ops.delta_restore(base, delta), tuned), case
            mine = base.clone()
            ops.delta_apply_(mine, delta)
            assert same(mine, tuned), case
            rows = ops.delta_slice(delta, base, 0, 16, 80), ops.delta_slice(delta, base, 0, 80, 96)
            parts = [base[16:80].clone(), base[80:].clone()]
            assert same(ops.delta_restore(parts[0], rows[0]), tuned[16:80]), case
            joined = ops.delta_concat(list(rows), parts, 0)
            assert same(ops.delta_restore(base[16:].clone(), joined), tuned[16:]), case
            self.outputs.update({f"{case}.delta": delta, f"{case}.rows": rows[0], f"{case}.joined": joined})
            for m in (1, 7, 40):
                for b in (None, bias):
                    want = F.linear(x[:m], tuned, b)
                    exact = ops.delta_linear(x[:m], base, b, delta, mode="exact")
                    assert same(exact, want), (case, m, "exact")
                    for mode in ("fast", "deterministic"):
                        y = ops.delta_linear(x[:m], base, b, delta, mode=mode)
                        double = F.linear(x[:m].double(), tuned.double(), None if b is None else b.double())
                        scale = x[:m].double().abs() @ tuned.double().abs().T + 1
                        limit = 4 * torch.finfo(y.dtype).eps
                        assert ((y.double() - double).abs() <= limit * scale).all(), (case, m, mode)
                        self.outputs[f"{case}.{m}.{b is not None}.{mode}"] = y
                self.outputs[f"{case}.{m}.grad"] = ops.delta_linear_grad_input(grad[:m], base, delta)
        covered = {
            "delta_encode", "delta_check", "delta_restore", "delta_apply_", "delta_slice", "delta_concat",
            "delta_linear", "delta_linear_grad_input", "delta_linear_grouped", "delta_linear_grouped_grad_input",
            "delta_embedding",
        }  # fmt: skip
        there = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("xorz::")}
        assert there == {f"xorz::{name}" for name in covered}, there

    def many_tenants_in_one_batch(self) -> None:
        for name in DTYPES:
            base, x, grad = (self.inputs[f"{name}.{k}"] for k in ("sparse.base", "x", "grad"))
            deltas = []
            for encoding in ENCODINGS:
                words = self.inputs[f"{name}.{encoding}.tuned"]
                deltas.append(ops.delta_encode(base, words, prefer=PREFER[encoding]))
            arena = torch.cat([torch.cat([d, d.new_zeros(-d.numel() % 64)]) for d in deltas])
            sizes = [d.numel() for d in deltas]
            starts = [sum(n + -n % 64 for n in sizes[:i]) for i in range(len(sizes))]
            slots = torch.tensor([starts, sizes]).T.contiguous()
            tenants = torch.arange(40, dtype=torch.int32) % 5 - 1
            y = ops.delta_linear_grouped(x, base, None, arena, slots, tenants, mode="deterministic")
            g = ops.delta_linear_grouped_grad_input(grad, base, arena, slots, tenants)
            unchanged = ops.delta_encode(base, base)
            for row, tenant in enumerate(tenants.tolist()):
                delta = unchanged if tenant < 0 else deltas[tenant]
                alone = ops.delta_linear(x[row : row + 1], base, None, delta, mode="deterministic")
                assert same(y[row : row + 1], alone), (name, row)
            self.outputs.update({f"{name}.grouped": y, f"{name}.grouped.grad": g})
            indices = torch.arange(40) * 7 % base.size(0)
            looked_up = ops.delta_embedding(indices, base, arena, slots, tenants)
            for row, tenant in enumerate(tenants.tolist()):
                table = base if tenant < 0 else ops.delta_restore(base, deltas[tenant])
                assert same(looked_up[row], table[indices[row]]), (name, row)

    def a_whole_model_attached(self) -> None:
        import xorz

        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Embedding(50, 32),
            torch.nn.LayerNorm(32),
            torch.nn.Linear(32, 32),
            torch.nn.Linear(32, 50),
        )
        model = model.bfloat16().eval()
        tenants, tuned = xorz.attach(copy.deepcopy(model), mode="exact"), {None: model}
        for seed in (1, 2):
            other = tuned[f"t{seed}"] = copy.deepcopy(model)
            with torch.no_grad():
                for p in other.parameters():
                    p.add_(0.05 * (torch.rand(p.shape) < 0.2) * seed)
            tenants.load(f"t{seed}", xorz.diff(model, other))
        ids, who = torch.arange(20).view(4, 5), ["t2", None, "t1", "t2"]
        with torch.no_grad(), tenants.use(who):
            mixed = tenants.model(ids)
        for row, name in enumerate(who):
            with torch.no_grad(), tenants.use(name):
                alone = tenants.model(ids[row : row + 1])
            assert same(alone, tuned[name](ids[row : row + 1]).detach()), name
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0.05, atol=0.05)
        assert same(tenants.detach()(ids).detach(), model(ids).detach())

    def every_misuse_in_our_words(self) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
        from test_misuse import misuses

        said = {}
        for name, call, *_ in misuses():
            try:
                call()
                said[name] = "accepted"
            except Exception as error:
                said[name] = str(error)
        assert len(said) > 30 and all(s.startswith("xorz::") for s in said.values()), said
        (self.folder / "misuses.json").write_text(json.dumps(said, indent=1, sort_keys=True))

    def _module(self, dtype: str = "bf16"):
        from xorz import XorDeltaLinear

        layers = []
        for case, encoding, base, tuned, _x, _grad, bias in cases(self.inputs):
            if case.startswith(dtype):
                linear = torch.nn.Linear(200, 96, dtype=base.dtype)
                linear.load_state_dict({"weight": base, "bias": bias})
                delta = ops.delta_encode(base, tuned, prefer=PREFER[encoding])
                mode = MODES[len(layers) % 2]  # not exact: it follows each torch's own F.linear
                layers.append(XorDeltaLinear.from_linear(linear, delta, mode=mode))
        return Stack(layers).eval()

    def autograd(self) -> None:
        import xorz  # registers the gradients

        for case, encoding, base, tuned, x, grad, bias in cases(self.inputs):
            delta = ops.delta_encode(base, tuned, prefer=PREFER[encoding])
            x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
            y = xorz.delta_linear(x, base, delta, bias)
            y.backward(grad)
            assert same(x.grad, ops.delta_linear_grad_input(grad, base, delta)), case
            assert torch.allclose(bias.grad.double(), grad.double().sum(0), rtol=0.02, atol=1e-3), case

    def opcheck(self) -> None:
        import xorz  # noqa: F401  registers the fakes

        for case, encoding, base, tuned, x, grad, bias in cases(self.inputs):
            delta = ops.delta_encode(base, tuned, prefer=PREFER[encoding])
            if not case.startswith("f32"):
                continue
            check = torch.library.opcheck
            check(ops.delta_linear.default, (x.clone().requires_grad_(), base, bias, delta))
            check(ops.delta_linear_grad_input.default, (grad, base, delta))
            check(ops.delta_restore.default, (base, delta))
            check(ops.delta_apply_.default, (base.clone(), delta))
            check(ops.delta_check.default, (delta, base))
            check(ops.delta_encode.default, (base, tuned))
            check(ops.delta_slice.default, (delta, base, 0, 0, 16))
            check(ops.delta_concat.default, ([delta], [base], 0))

    def torchscript(self) -> None:
        module, x = self._module(), self.inputs["bf16.x"]
        with torch.no_grad():
            want = module(x)
            for how, saved in (
                ("script", torch.jit.script(module)),
                ("trace", torch.jit.trace(module, x)),
                ("freeze", torch.jit.freeze(torch.jit.script(module))),
            ):
                path = self.folder / f"{how}.pt"
                saved.save(str(path))
                assert same(torch.jit.load(str(path))(x), want), how
        self.outputs["module"] = want

    def compile_fullgraph_dynamic(self) -> None:
        module, x = self._module("f32"), self.inputs["f32.x"].clone().requires_grad_()
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        for m in (40, 7, 3):
            assert torch.allclose(compiled(x[:m]), module(x[:m]), rtol=1e-5, atol=1e-5), m
        (ours,) = torch.autograd.grad(compiled(x).sum(), x)
        (want,) = torch.autograd.grad(module(x).sum(), x)
        assert torch.allclose(ours, want, rtol=1e-5, atol=1e-5)

    def export_dynamic_batch(self) -> None:
        module, x = self._module(), self.inputs["bf16.x"]
        with torch.no_grad():
            program = torch.export.export(
                module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2, max=1024)}}
            )
        path = self.folder / "export.pt2"
        torch.export.save(program, str(path))
        again = torch.export.load(str(path)).module()
        for m in (2, 7, 40):
            assert same(again(x[:m]), module(x[:m])), m

    def package(self) -> None:
        import xorz

        def state(kind):
            return {k.removesuffix(f".{kind}"): v for k, v in self.inputs.items() if k.endswith(f".{kind}")}

        base, tuned = self.folder / "base.safetensors", self.folder / "tuned.safetensors"
        save_file(state("base"), str(base))
        save_file(state("tuned"), str(tuned))
        xorz.pack(base, tuned, self.folder / "package.xorz")
        read_package(self.folder)


class Stack(torch.nn.Module):
    def __init__(self, layers) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros([x.size(0), 96], dtype=x.dtype)
        for layer in self.layers:
            out = out + layer(x)
        return out


def read_package(folder: Path) -> None:
    import xorz

    xorz.unpack(folder / "base.safetensors", folder / "package.xorz", folder / f"again-{os.getpid()}")
    again = folder / f"again-{os.getpid()}"
    assert again.read_bytes() == (folder / "tuned.safetensors").read_bytes()
    again.unlink()


def read(folder: Path, name: str) -> None:
    if name == "package":
        return read_package(folder)
    outputs = load_file(str(folder / "outputs.safetensors"))
    x = load_inputs(str(folder.parent / "inputs.safetensors"))["bf16.x"]
    if name == "export":
        import xorz  # noqa: F401  registers the fakes, which loading a program asks for

        module = torch.export.load(str(folder / "export.pt2")).module()
    else:
        module = torch.jit.load(str(folder / f"{name}.pt"))
    with torch.no_grad():
        assert same(module(x), outputs["module"]), "other bits"


def write(inputs: str, folder: Path) -> dict:
    checks = Checks(load_inputs(inputs), folder)
    table = {}
    for name in [n for n in vars(Checks) if not n.startswith("_")]:
        try:
            functools.partial(getattr(Checks, name), checks)()
            table[name] = "ok"
        except Exception as error:
            traceback.print_exc()
            table[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    digests = {
        k: hashlib.sha256(v.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for k, v in checks.outputs.items()
    }
    save_file(
        {k: v.detach().contiguous() for k, v in checks.outputs.items()}, str(folder / "outputs.safetensors")
    )
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "library": hashlib.sha256(LIBRARY.read_bytes()).hexdigest(),
        "checks": table,
        "digests": digests,
    }


def main(command: str, *args: str) -> None:
    # torch's own deprecations (TorchScript) are no news here.
    warnings.simplefilter("ignore")
    if command == "inputs":
        write_inputs(*args)
    elif command == "write":
        print(json.dumps(write(args[0], Path(args[1]))))
    elif command == "read":
        said = {}
        for name in args[1:]:
            try:
                read(Path(args[0]), name)
                said[name] = "ok"
            except Exception as error:
                said[name] = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps(said))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
