"""Promise: no row of a batch is computed with another row's tenant, whatever sizes happen to be alike: tables, learned
queries, prompts and masks as long as the batch has rows, rows that change places or multiply, states of recurrent layers.
Every expectation is the plain fine-tuned model's.
"""

import copy

import pytest
import torch
import xorz
from cases import Case, tensors, tuned_of
from torch import nn

F = nn.functional


class Tabled(nn.Module):
    """[batch, length, 6] beside a table [n, 6] that belongs to no row; `how` says where the table goes."""

    def __init__(self, n, how, own):
        super().__init__()
        self.how, self.n, self.first, self.proj = how, n, nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.embed = nn.LayerNorm(6), nn.Embedding(n, 6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.own = nn.Parameter(torch.randn(n, 6)) if own else None

    def table(self):
        return self.own if self.own is not None else torch.arange(self.n * 6.0).view(self.n, 6).sin()

    def forward(self, x):
        return HOW[self.how](self, self.first(x), self.table())


def prompts(m, h, table):
    """Learned prompts before the tokens, through a layer of their own."""
    own = m.proj(table)
    return torch.cat([own[None].expand(h.size(0), -1, -1), h], 1)


def queries(m, h, table):
    """Learned queries, as Perceiver has them."""
    return m.attend(m.proj(table)[None].expand(h.size(0), -1, -1), h, h, need_weights=False)[0]


def written(m, h, table):
    """As BERT's embeddings are summed: in place, positions and all."""
    h = h + 0
    h += m.embed(torch.arange(h.size(1))[None] % m.n)
    return h.mul_(m.norm.weight)


HOW = {
    "in place": written,
    "linear": lambda m, h, t: h + torch.softmax(h @ m.proj(t).T, -1) @ t,
    "two layers": lambda m, h, t: h + torch.softmax(h @ m.proj(F.gelu(m.proj(t))).T, -1) @ t,
    "norm": lambda m, h, t: torch.softmax(h @ m.norm(t).T, -1) @ t,
    "meets a weight": lambda m, h, t: torch.softmax(h @ (t * m.norm.weight).T, -1) @ t,
    "positions": lambda m, h, t: h @ m.embed(torch.arange(m.n)).T + h @ (m.embed(torch.arange(m.n)) + t).T,
    "one row of them": lambda m, h, t: torch.softmax(h @ m.embed(torch.arange(m.n)[None])[0].T, -1) @ t,
    "mean of them": lambda m, h, t: h + m.embed(torch.arange(m.n)[None]).mean(0).sum(0),
    "prompts": prompts,
    "queries": queries,
}


@pytest.mark.parametrize("own", [False, True], ids=["made", "learned"])
@pytest.mark.parametrize("how", HOW)
def test_a_table_as_long_as_the_batch_is_a_table(how, own):
    torch.manual_seed(0)
    for n in (4, 3):
        case = Case(Tabled(n, how, own))
        case.check_alone(torch.randn(2, 5, 6))
        for length in (5, 4, n):
            assert case.check_mixed(torch.randn(4, length, 6)) == "right", (n, length)


def test_a_table_is_a_table_whichever_tensors_a_tenant_changes():
    """Of the table's own layer, of the table, or of what comes before: each alone."""
    torch.manual_seed(0)
    base, x = Tabled(4, "linear", True).eval(), torch.randn(4, 4, 6)
    plain = {None: base}
    tenants = xorz.attach(copy.deepcopy(base))
    for name, changed in {"layer": "proj.weight", "table": "own", "before": "first.bias"}.items():
        plain[name] = copy.deepcopy(base)
        with torch.no_grad():
            plain[name].get_parameter(changed).add_(0.5)
        tenants.load(name, xorz.diff(base, plain[name]))
    with torch.no_grad():
        for names in (
            ["layer", None, "table", "before"],
            ["layer", None, None, "layer"],
            [None, "table", None, "table"],
        ):
            with tenants.use(names):
                got = tenants.model(x)
            for row, name in enumerate(names):
                torch.testing.assert_close(got[row], plain[name](x)[row], rtol=1e-4, atol=1e-5)


def forward_replaced(model):
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    return model


def hook_of_accelerate(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    torch._dynamo.reset()
    model.compile(backend="eager")
    return model


AROUND = {f.__name__: f for f in (forward_replaced, hook_of_accelerate, compiled, compiled_in_place)}


@pytest.mark.parametrize("own", [False, True], ids=["made", "learned"])
@pytest.mark.parametrize("how", ["linear", "positions", "prompts"])
@pytest.mark.parametrize("around", AROUND)
def test_a_table_is_a_table_whatever_was_put_around_the_model_before_attach(around, how, own):
    torch.manual_seed(0)
    for n in (4, 3):
        base = Tabled(n, how, own).eval()
        plain = {None: base, "a": tuned_of(base, 1), "b": tuned_of(base, 2)}
        model = AROUND[around](copy.deepcopy(base))
        tenants = xorz.attach(model)
        for name in "ab":
            tenants.load(name, xorz.diff(base, plain[name]))
        x, names = torch.randn(4, 5, 6), ["a", None, "b", "a"]
        with torch.no_grad():
            try:
                with tenants.use(names):
                    got = model(x)
            except Exception as error:
                assert "compiled" in around and "run it without torch.compile" in str(error), error
                continue
            for row, name in enumerate(names):
                torch.testing.assert_close(got[row], plain[name](x)[row], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


class Moves(nn.Module):
    """Rows that do not stay where they were."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how

    def forward(self, x):
        h = self.first(x)
        if self.how == "turned":
            return self.second(h.flip(0)).flip(0)
        if self.how == "sequence first":
            return self.second(h.transpose(0, 1)).transpose(0, 1)
        if self.how == "tokens":
            return self.second(h.reshape(-1, 6)).view(h.shape)
        if self.how == "tokens by place":
            return self.second(h.transpose(0, 1).reshape(-1, 6)).view(h.size(1), h.size(0), 6).transpose(0, 1)
        return h + self.second(h.mean(0, keepdim=True) + h)  # rows that see each other


@pytest.mark.parametrize("how", ["turned", "sequence first", "tokens", "tokens by place", "mixed"])
def test_rows_that_change_places_are_followed_or_refused(how):
    torch.manual_seed(0)
    case = Case(Moves(how))
    for length in (4, 5, 1):
        said = case.check_mixed(torch.randn(4, length, 6))
        assert said == ("refused" if how == "mixed" else "right")


def test_an_input_that_is_no_rows_is_not_cut():
    """A table that is given to the model, as long as the batch, through a layer, or beside what runs tenant by tenant."""

    class Given(nn.Module):
        def __init__(self, strange):
            super().__init__()
            self.first, self.proj, self.strange = nn.Linear(6, 6), nn.Linear(6, 6), strange

        def forward(self, x, table):
            h = self.first(x)
            if self.strange:
                h = h + torch.einsum("btk,k->bt", h, self.proj.bias)[..., None]
            return h + torch.softmax(h @ self.proj(table).T, -1) @ table

    torch.manual_seed(0)
    for strange in (False, True):
        case, table = Case(Given(strange)), torch.randn(4, 6)
        said = case.check_mixed(torch.randn(4, 5, 6), call=lambda m, x, table=table: m(x, table))
        assert strange or said == "right"


def test_rows_that_hardly_differ_are_rows():
    """As what Whisper's decoder takes of the encoder, while it attends to everything alike."""

    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            mean = torch.softmax(1e-5 * x, -1)
            return torch.relu(self.out(torch.tanh(self.layer(mean))))

    torch.manual_seed(0)
    case = Case(Faint())
    case.check_alone(torch.randn(2, 5, 6))
    assert case.check_mixed(torch.randn(4, 5, 6)) == "right"


def test_a_row_has_its_tenant_in_code_that_was_compiled_first():
    torch.manual_seed(0)
    for n in (4, 3):
        case, x = Case(Tabled(n, "linear", False)), torch.randn(4, 5, 6)
        names = ["a", None, "b", "a"]
        torch._dynamo.reset()
        compiled = torch.compile(case.model, backend="eager")
        with torch.no_grad():
            try:
                with case.tenants.use(names):
                    got = compiled(x)
            except Exception as error:
                assert "xorz" in str(error), error
                continue
        for row, name in enumerate(names):
            torch.testing.assert_close(got[row], case.plain[name](x)[row], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_step_that_is_given_all_words_and_cuts_them_by_its_cache_is_another_kind_of_batch():
    """As CPM-Ant generates: the same inputs, and [batch, 1] inside where there was [batch, length]."""

    class Cache:
        def __init__(self):
            self.sums = None

        def get_seq_length(self):
            return 0 if self.sums is None else self.length

    class Cuts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer, self.norm = nn.Embedding(50, 6), nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, ids, cache):
            h = self.norm(self.layer(self.embed(ids)[:, cache.get_seq_length() :]))
            cache.sums = h.sum(1) if cache.sums is None else cache.sums + h.sum(1)
            cache.length = ids.size(1)
            return cache.sums

    torch.manual_seed(0)
    case, ids, names = Case(Cuts()), torch.randint(0, 50, (4, 8)), ["a", None, "b", "a"]
    cache = Cache()
    for length in (5, 6, 7, 8):
        with torch.no_grad(), case.tenants.use(names):
            got = case.model(ids[:, :length], cache)
        for row, name in enumerate(names):
            with torch.no_grad():
                want = case.plain[name](ids[row : row + 1, :length], Cache())
            torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-4)


WINDOWS = {
    "swin": ("SwinConfig", "SwinForImageClassification"),
    "swin v2": ("Swinv2Config", "Swinv2ForImageClassification"),
}


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_over_images_are_their_images_tenants(kind, mode):
    """Shifted windows [batch * windows, ...], padded ones too, as many windows as rows, and tables of relative positions."""
    transformers = pytest.importorskip("transformers")
    config, model = (getattr(transformers, name) for name in WINDOWS[kind])
    for size, window in ((16, 2), (28, 3)):
        torch.manual_seed(0)
        sizes = {"image_size": size, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
        base = model(config(**sizes, window_size=window, num_labels=5)).eval()
        plain = {None: base, "a": tuned_of(base, 1, 0.1), "b": tuned_of(base, 2, 0.1)}
        tenants = xorz.attach(copy.deepcopy(base), mode=mode)
        for name in "ab":
            tenants.load(name, xorz.diff(base, plain[name]))
        x = torch.randn(4, 3, size, size)
        with torch.no_grad():
            for names in (["a", None, "b", "b"], ["b", "a", None, "a"]):
                with tenants.use(names):
                    got = tenants.model(x).logits
                for row, name in enumerate(names):
                    want = plain[name](x).logits
                    assert float((got - want)[row].abs().max()) <= 1e-4 * float(want.abs().max())
            each = [plain[n](x).logits for n in plain]
            assert not torch.allclose(each[1], each[2], rtol=1e-2)


def test_nothing_is_left_of_the_runs_that_find_rows():
    """Caches, random numbers and the model's own counts are as if it had run once."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)
            self.calls, self.past, self.kept = 0, [], {}
            self.register_buffer("sums", torch.zeros(()), persistent=False)

        def forward(self, x, cache):
            cache.append(x)
            self.calls += 1
            self.past.append(x)
            self.kept[len(self.kept)] = x
            self.sums += 1
            times = len(cache) + self.calls + len(self.past) + len(self.kept) + self.sums
            return self.drop(self.layer(x)) * times

    torch.manual_seed(0)
    case, x, names = Case(Counts()), torch.randn(4, 5, 6), ["a", None, "b", "a"]
    for model in (*case.plain.values(), case.model):
        model.train()
    cache = [1]
    with torch.no_grad(), case.tenants.use(names):
        torch.manual_seed(3)
        got = case.model(x, cache)
    assert len(cache) == 2
    for row, name in enumerate(names):
        torch.manual_seed(3)
        want = copy.deepcopy(case.plain[name])(x, [1])[row]
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_give_each_row_its_outputs_and_states(kind, first):
    torch.manual_seed(0)
    names = ["a", None, "b"]
    # As many layers and steps as rows, where sizes tell nothing.
    case = Case(kind(8, 6, num_layers=3, batch_first=first))
    x, state = torch.randn(3, 3, 8), torch.randn(3, 3, 6)
    state = (state, state + 1) if kind is nn.LSTM else state
    with torch.no_grad():
        for given in (None, state):
            case.check_alone(call=lambda m, given=given: m(x, given))
            with case.tenants.use(names):
                out, last = case.model(x, given)
            for row, name in enumerate(names):
                want, end = case.plain[name](x, given)
                take = (lambda t, row=row: t[row]) if first else (lambda t, row=row: t[:, row])
                torch.testing.assert_close(take(out), take(want), rtol=1e-4, atol=1e-5)
                for mine, theirs in zip(tensors(last), tensors(end), strict=True):
                    assert mine.shape == theirs.shape
                    torch.testing.assert_close(mine[:, row], theirs[:, row], rtol=1e-4, atol=1e-5)
        with case.tenants.use(names), pytest.raises(RuntimeError, match="4 sequences"):
            case.model(torch.randn(4, 4, 8))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x, mask):
        y = x * self.scale
        return torch.softmax(y @ y.transpose(1, 2) + mask, -1) @ y


class Strange(Masked):
    """Nothing that is known row by row."""

    def forward(self, x, mask):
        weights = torch.softmax(torch.einsum("btk,k,bsk->bts", x, self.scale, x) + mask, -1)
        return weights @ x


@pytest.mark.parametrize("kind", [Masked, Strange])
def test_a_mask_whose_size_is_the_batchs_is_never_cut(kind):
    torch.manual_seed(0)
    case, mask = Case(kind()), torch.full((4, 4), float("-inf")).triu(1)
    x = torch.randn(4, 4, 6)
    case.check_alone(x, mask)
    said = case.check_mixed(x, call=lambda m, x: m(x, mask))
    # Where sizes tell, it is served.
    other = torch.full((5, 5), float("-inf")).triu(1)
    assert case.check_mixed(torch.randn(4, 5, 6), call=lambda m, x: m(x, other)) == "right"
    assert said == "right"


def test_positions_as_many_as_rows_are_positions():
    """[T] position numbers where T is the batch: their embeddings are not one for each row."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.place = nn.Embedding(9, 6), nn.Embedding(9, 6)

        def forward(self, ids):
            return self.embed(ids) + self.place(torch.arange(ids.size(1)))

    class Labels(Positions):
        def forward(self, ids):
            return self.place(ids[:, 0])

    case = Case(Positions())
    for length in (4, 3):
        assert case.check_mixed(torch.randint(0, 9, (4, length))) == "right"
    assert Case(Labels()).check_mixed(torch.randint(0, 9, (4, 2))) == "right"


@pytest.mark.parametrize("mode", ["fast", "deterministic"])
def test_positions_are_looked_up_in_whatever_shape_and_module(mode):
    """[1, T] numbers, also of a part that is called on its own (`generate` does so with encoders), and sinusoids that no
    checkpoint holds.
    """

    class Sinusoids(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.sin(torch.arange(54.0)).view(9, 6), persistent=False)

        def forward(self, numbers):
            return self.table[numbers]

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.place, self.waves = nn.Embedding(9, 6), nn.Embedding(9, 6), Sinusoids()

        def forward(self, ids):
            numbers = torch.arange(ids.size(1))[None]
            return self.embed(ids) + self.place(numbers) + self.waves(numbers)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.layer = Part(), nn.Linear(6, 6)

        def forward(self, ids):
            return self.layer(self.part(ids))

    torch.manual_seed(0)
    case = Case(Whole(), mode=mode)
    case.check_alone(torch.randint(0, 9, (2, 5)))
    for length in (5, 4, 3):
        ids = torch.randint(0, 9, (4, length))
        assert case.check_mixed(ids, call=lambda m, ids: m.part(ids)) == "right"
        assert case.check_mixed(ids) == "right"
    assert case.tenants.apart is None


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "temperature": 1e-4}],
                         ids=["beams", "returned"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generate_expands_the_names_of_prompts(family, options):
    from models import Family

    made = Family(family, torch.float32)
    ids = made.tokens(2, 6)
    with made.attached("deterministic") as (model, tenants), torch.no_grad():
        run = {"max_new_tokens": 5, "attention_mask": torch.ones_like(ids), **options}
        each = options.get("num_return_sequences", 1)
        with tenants.use(["ann", "bob"]):
            together = model.generate(ids, **run)
            # Afterwards they are the prompts' again.
            assert model(**made.inputs(ids)).logits.size(0) == 2
        for row, name in enumerate(("ann", "bob")):
            want = made.tuned[name].generate(
                ids[row : row + 1], **{**run, "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
            )
            assert torch.equal(together[row * each : (row + 1) * each], want), name
