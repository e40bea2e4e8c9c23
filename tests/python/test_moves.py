"""Promise: rows that stayed in their places in the first batch of a kind, and are put elsewhere by what is in the next one
(tokens that a mask keeps, rows sorted by their lengths, tokens that a router sends away), are each their own tenant's, or
refused; what only picks positions within each row is served. Every expectation is the plain fine-tuned model's.
"""

import pytest
import torch
from cases import Case
from torch import nn

BATCH, LENGTH = 4, 6


class Kept:
    """What a model gives beside its output, so that the whole model cannot be run once for each tenant."""


class Inner(nn.Module):
    """[batch, length, 8] and what says where its tokens go; `how` says how."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inner, self.gate = how, nn.Linear(8, 8), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x, where):
        return HOW[self.how](self, x, where)


class Around(nn.Module):
    """The module between layers, in a model that cannot be run once per tenant as a whole, or can."""

    def __init__(self, how, kept):
        super().__init__()
        self.first, self.middle, self.last, self.kept = nn.Linear(8, 8), Inner(how), nn.Linear(8, 8), kept

    def forward(self, x, where):
        out = self.last(self.middle(self.first(x), where))
        return (out, Kept()) if self.kept else (out, None)


def masked(m, x, mask):
    """Tokens that are not padding, as unpadding does it."""
    out = torch.zeros_like(x)
    out[mask.bool()] = m.inner(x[mask.bool()])
    return out


def by_number(m, x, mask):
    """The same by numbers of positions."""
    flat, index = x.reshape(-1, 8), mask.reshape(-1).nonzero()[:, 0]
    return torch.zeros_like(flat).index_copy(0, index, m.inner(flat.index_select(0, index))).view_as(x)


def selected(m, x, mask):
    """The same by masked_select and masked_scatter."""
    wide = mask.bool()[..., None].expand_as(x)
    return torch.zeros_like(x).masked_scatter(wide, m.inner(x.masked_select(wide).view(-1, 8)))


def gathered(m, x, mask):
    """The same by gather and scatter."""
    flat, index = x.reshape(-1, 8), mask.reshape(-1).nonzero()[:, :1].expand(-1, 8)
    return torch.zeros_like(flat).scatter(0, index, m.inner(flat.gather(0, index))).view_as(x)


def ragged(m, x, mask):
    """The same by lengths that Python reads."""
    lengths = mask.sum(1).tolist()
    flat = m.inner(torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]))
    out = torch.zeros_like(x)
    for row, part in enumerate(flat.split(lengths)):
        out[row, : len(part)] = part
    return out


def itemwise(m, x, mask):
    """The same by numbers that Python reads one by one."""
    lengths = [int(n) for n in mask.sum(1)]
    flat = m.inner(torch.cat([x[row, :n] for row, n in enumerate(lengths)]))
    out, at = torch.zeros_like(x), 0
    for row, n in enumerate(lengths):
        out[row, :n] = flat[at : at + n]
        at += n
    return out


def by_length(m, x, mask):
    """Rows in the order of their lengths, and back."""
    order = mask.sum(1).argsort(descending=True, stable=True)
    return m.inner(x[order])[order.argsort()] * mask[..., None]


def listed_order(m, x, mask):
    """The same, in an order that Python makes."""
    lengths = mask.sum(1).tolist()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    back = sorted(range(len(order)), key=lambda i: order[i])
    return m.inner(x[torch.tensor(order)])[torch.tensor(back)] * mask[..., None]


def python_order(m, x, mask):
    """The same, by a list as the index."""
    lengths = mask.sum(1).tolist()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    back = sorted(range(len(order)), key=lambda i: order[i])
    return m.inner(x[order])[back] * mask[..., None]


def stacked_order(m, x, mask):
    """The same, row by row."""
    lengths = [int(n) for n in mask.sum(1)]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    back = sorted(range(len(order)), key=lambda i: order[i])
    done = m.inner(torch.stack([x[i] for i in order]))
    return torch.stack([done[i] for i in back]) * mask[..., None]


def distinct(m, x, mask):
    """Rows in the order that `unique` gives them, of which none is there twice, and back to their places."""
    first = -(mask * torch.tensor([32, 16, 8, 4, 2, 0])).sum(1).to(x.dtype)
    rows, inverse = torch.cat([first[:, None, None].expand(-1, 1, 8), x], 1).unique(
        dim=0, return_inverse=True
    )
    done = m.inner(rows[:, 1:])
    return torch.zeros_like(x).index_copy(0, inverse.argsort(), done) * mask[..., None]


def routed(m, x, mask):
    """All tokens of the first batch go to one expert."""
    flat, chosen = x.reshape(-1, 8), 1 - mask.reshape(-1)
    out = torch.zeros_like(flat)
    for number, expert in enumerate(m.experts):
        token = (chosen == number).nonzero()[:, 0]
        if len(token):
            out.index_add_(0, token, expert(flat[token]))
    return out.view_as(x)


def compacted(m, x, mask):
    """Tokens in the order of their masks within the flattened batch."""
    flat = x.reshape(-1, 8)
    order = (1 - mask.reshape(-1)).sort(stable=True).indices
    done = m.inner(flat[order])
    return torch.empty_like(done).index_copy(0, order, done).view_as(x)


def last_token(m, x, mask):
    """The last token of each row, as classifiers pool."""
    return m.inner(x[torch.arange(x.size(0)), mask.sum(1) - 1])[:, None].expand_as(x)


def strongest(m, x, mask):
    """The strongest tokens of each row."""
    index = x.norm(dim=-1).topk(3, dim=1).indices.sort(dim=1).values
    return m.inner(x.gather(1, index[..., None].expand(-1, -1, 8))).mean(1, keepdim=True).expand_as(x)


ORDERED = (by_length, listed_order, python_order, stacked_order)
MOVING = (masked, by_number, selected, gathered, ragged, itemwise, *ORDERED, routed, compacted, distinct)
STAYING = (last_token, strongest)
HOW = {f.__name__: f for f in (*MOVING, *STAYING)}

WHOLE = torch.ones(BATCH, LENGTH, dtype=torch.long)
# As many tokens as the batch has rows, times four: not four of each row.
LENGTHS = torch.tensor([2, 3, 6, 5])
UNEVEN = (torch.arange(LENGTH) < LENGTHS[:, None]).long()
SORTED = (torch.arange(LENGTH) < torch.tensor([6, 5, 4, 3])[:, None]).long()


def check(case, x, mask):
    """Right for every row, or an error of ours; says which."""
    names = ["a", None, "b", "a"]
    with torch.no_grad():
        try:
            with case.tenants.use(names):
                got = case.model(x, mask)[0]
        except RuntimeError as error:
            assert "xorz: " in str(error), error
            return "refused"
        for row, name in enumerate(names):
            want = case.plain[name](x, mask)[0]
            torch.testing.assert_close(got[row], want[row], rtol=1e-4, atol=1e-5)
    return "right"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("first", [WHOLE, SORTED], ids=["whole", "sorted"])
@pytest.mark.parametrize("how", [f.__name__ for f in MOVING])
def test_rows_that_stayed_and_move_in_the_next_batch_are_their_own_tenants_or_refused(how, first, kept):
    torch.manual_seed(0)
    case = Case(Around(how, kept))
    if how == "distinct":
        # Where only the last token of a row is another one, `unique` leaves these in their order.
        first = (torch.arange(LENGTH) < torch.tensor([5, 4, 3, 2])[:, None]).long()
    said = [
        check(case, torch.randn(BATCH, LENGTH, 8), mask) for mask in (first, UNEVEN, WHOLE, SORTED, UNEVEN)
    ]
    if HOW[how] not in ORDERED:
        # What is written back to its places is proven to be there, so that only the module runs once per tenant.
        assert said == ["right"] * 5
    x = torch.randn(BATCH, LENGTH, 8)
    case.check_alone(call=lambda m: m(x, UNEVEN)[0])


@pytest.mark.parametrize("first", [WHOLE, SORTED, UNEVEN], ids=["whole", "sorted", "uneven"])
@pytest.mark.parametrize("how", [f.__name__ for f in STAYING])
def test_what_picks_positions_within_each_row_is_served(how, first):
    torch.manual_seed(0)
    case = Case(Around(how, True))
    said = [check(case, torch.randn(BATCH, LENGTH, 8), mask) for mask in (first, UNEVEN, WHOLE, SORTED)]
    assert said == ["right"] * 4
