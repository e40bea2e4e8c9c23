"""A base, two fine-tunes of it and an attached copy that serves them, held against the plain models. No
promise is tested here."""

import copy

import torch
import xorz


def tuned_of(base, seed, scale=0.5):
    """A fine-tune that changes every floating tensor, far enough to be told apart."""
    out, g = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Of what a checkpoint holds.
        for t in {id(t): t for t in out.state_dict(keep_vars=True).values()}.values():
            if t.is_floating_point():
                t.add_(scale * torch.rand(t.shape, generator=g).to(t.dtype) + 0.05)
    return out


class Case:
    """A base, fine-tunes a and b, and an attached copy of the base that serves them."""

    def __init__(self, model, **options):
        self.base = model.eval()
        self.plain = {None: self.base, "a": tuned_of(model, 1), "b": tuned_of(model, 2)}
        self.model = copy.deepcopy(self.base)
        self.tenants = xorz.attach(self.model, **options)
        for name in "ab":
            self.tenants.load(name, xorz.diff(self.base, self.plain[name]))

    def check_alone(self, *inputs, call=None):
        """Each tenant in turn, twice over, gives what the plain model gives; they differ."""
        call = call or (lambda m: m(*inputs))
        with torch.no_grad():
            seen = []
            for name in (None, "a", "b", "a", None):
                want = call(self.plain[name])
                with self.tenants.use(name):
                    got = call(self.model)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
                seen.append(torch.cat([t.double().flatten() for t in tensors(want)]))
            assert not torch.allclose(seen[0], seen[1], rtol=1e-2) and not torch.allclose(
                seen[1], seen[2], rtol=1e-2
            )

    def check_mixed(self, x, dim=0, call=None):
        """Right for every row, or an error of ours; says which."""
        names = (["a", None, "b", "a"] * 9)[: x.size(0)]
        call = call or (lambda m, x: m(x))
        with torch.no_grad():
            try:
                with self.tenants.use(names):
                    got = call(self.model, x)
            except RuntimeError as error:
                assert "xorz: " in str(error), error
                return "refused"
            for row, name in enumerate(names):
                want = call(self.plain[name], x)
                torch.testing.assert_close(got[row], want[row], rtol=1e-4, atol=1e-5)
        return "right"


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in tensors(v)]
