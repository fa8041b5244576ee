"Attention of one query over pages, and the launch that fills them: interpreted on a CPU, compiled on a GPU."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, as_accurate, guarded, randn, rejects

from llm_workbench.architecture.attention import attention as plain_attention
from llm_workbench.architecture.rope import inverse_frequencies, rope_tables
from llm_workbench.errors import InputError
from llm_workbench.kernels import paged_decode as pd
from llm_workbench.kernels.launching import resources

pytestmark = pytest.mark.triton
NARROW = [torch.int8, torch.float8_e4m3fn]
ONE = pd.Config(16)                       # 16 keys at a time: a few tokens are several tiles


def pages_of(B, M, page, K, D, dtype=torch.float32, kv=None, seed=0, spare=2):
    "Random pages, their scales, and a table that uses them in no order."
    P = B * M + spare
    table = torch.randperm(P, generator=torch.Generator().manual_seed(seed))[: B * M].view(B, M).to(DEVICE, torch.int32)
    x = randn(P, page, K, D, dtype=dtype, seed=seed + 1)
    if kv is None: return x, None, table
    codes, scale = pd.quantize_heads(x, kv)
    return codes, scale, table


def case(B=2, M=3, page=4, H=4, K=2, D=16, Dv=16, dtype=torch.float32, kv=None, seed=0):
    "Everything that `paged_attention` takes; rows of 1, all, and some tokens."
    q = randn(B, 1, H, D, dtype=dtype, seed=seed + 9)
    k, ks, table = pages_of(B, M, page, K, D, dtype, kv, seed)
    v, vs, _ = pages_of(B, M, page, K, Dv, dtype, kv, seed + 3)
    lengths = torch.tensor([1, M * page, M * page - 3][:B], device=DEVICE)
    return (q, k, v, table, lengths), dict(k_scale=ks, v_scale=vs)


def checked(mine, args, scales, config=ONE, **options):
    "The kernel against the gathered form in float64, as accurate as that in the same dtype."
    with guarded(pd): got = mine(*args, **scales, **options, config=config)
    wide = lambda x: x.double() if x is not None and x.is_floating_point() and x.itemsize > 1 else x
    numbers = {n: wide(s) for n, s in scales.items()}
    sinks = {n: wide(o) if torch.is_tensor(o) else o for n, o in options.items()}
    want = pd.plain_paged(args[0].double(), *map(wide, args[1:3]), *args[3:], **numbers, **sinks)
    return as_accurate(got, want, pd.plain_paged(*args, **scales, **options), floor=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [
    dict(), dict(B=3, H=3, K=3, D=20, Dv=12, page=3), dict(B=1, H=9, K=1, D=40, Dv=40, M=5, page=8)],
    ids=["plain", "odd", "nine heads share one"])
def test_paged_attention(shape, dtype): checked(pd.paged_attention, *case(**shape, dtype=dtype))


@pytest.mark.parametrize("options", [dict(window=3), dict(softcap=2.0), dict(scale=0.3), "sinks"], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_options_and_splits(options, splits):
    args, scales = case(B=3, M=4, page=8)
    if options == "sinks": options = dict(sinks=randn(4, seed=5))
    checked(pd.paged_attention, args, scales, pd.Config(16, splits=splits), **options)


@pytest.mark.parametrize("kv", NARROW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_codes(kv, dtype):
    args, scales = case(B=3, kv=kv, dtype=dtype)
    checked(pd.paged_attention, args, scales)


@pytest.mark.parametrize("options", [dict(), dict(window=9, softcap=2.0)], ids=str)
@pytest.mark.parametrize("kv", NARROW, ids=str)
def test_codes_read_four_at_a_time(kv, options):
    args, scales = case(B=3, M=3, page=8, D=64, Dv=64, kv=kv, dtype=torch.bfloat16)
    for config in (pd.Config(16, splits=2), pd.Config(16, words=False)):
        checked(pd.paged_attention, args, scales, config, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_attention_reads_the_keys_once(dtype):
    (q, k, _, table, lengths), _ = case(H=6, K=1, D=24, dtype=dtype)
    with guarded(pd): got = pd.paged_attention(q, k, None, table, lengths, value_dim=16, config=ONE)
    want = lambda t: pd.plain_paged(q.to(t), k.to(t), None, table, lengths, value_dim=16)
    as_accurate(got, want(torch.float64), want(dtype), floor=4)


@settings(max_examples=3 if DEVICE == "cuda" else 12, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    B, M, page, K, G, D, Dv = draw(1, 3), draw(1, 4), draw(1, 9), draw(1, 2), draw(1, 18), draw(1, 40), draw(1, 40)
    (q, k, v, table, _), _ = case(B, M, page, K * G, K, D, Dv, seed=draw(0, 9))
    lengths = torch.tensor([draw(0, M * page) for _ in range(B)], device=DEVICE)
    options = dict(window=data.draw(st.sampled_from([None, 1, 5, 100])), softcap=data.draw(st.sampled_from([None,
                                                                                                            3.0])))
    checked(pd.paged_attention, (q, k, v, table.long(), lengths), {}, pd.Config(16, splits=draw(1, 4)), **options)


def test_scores_that_overflow_a_careless_softmax():
    (q, k, v, table, lengths), scales = case(B=3)
    checked(pd.paged_attention, (q * 1e3, k * 1e2, v, table, lengths), scales, pd.Config(16, splits=2))
    sinks = torch.tensor([float("-inf"), 1e4, -1e4, 0.0], device=DEVICE)
    checked(pd.paged_attention, (q, k, v * 1e30, table, lengths), scales, pd.Config(16, splits=2), sinks=sinks)


def test_rows_of_nothing_are_zero_and_pages_beyond_are_not_read():
    (q, k, v, table, lengths), scales = case(B=3)
    k, v = k.clone(), v.clone()
    lengths = torch.tensor([0, 5, 2], device=DEVICE)
    used = {table[b, t // 4].item() * 4 + t % 4 for b, n in enumerate(lengths.tolist()) for t in range(n)}
    for pages in (k, v):
        flat = pages.view(-1, *pages.shape[2:])
        flat[[i for i in range(len(flat)) if i not in used]] = float("nan")
    with guarded(pd): got = pd.paged_attention(q, k, v, table, lengths, config=pd.Config(16, splits=2))
    assert not got.isnan().any() and (got[0] == 0).all() and (got[1:] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_without_pages(dtype):
    q, kv = randn(3, 1, 6, 16, dtype=dtype), randn(3, 11, 2, 2, 16, dtype=dtype, seed=1)
    k, v = kv.unbind(2)                                                          # strided: keys and values side by side
    lengths = torch.tensor([11, 4, 0], device=DEVICE)
    for given in (lengths, None):
        with guarded(pd): got = pd.decode_attention(q, k, v, given, config=ONE)
        want = lambda t: plain_attention(q.to(t), k.to(t), v.to(t), lengths=given)
        as_accurate(got, want(torch.float64), want(dtype), floor=4)
    assert pd.decode_attention(q[:0], k[:0], v[:0]).shape == (0, 1, 6, 16)


def test_the_drop_in_hands_on_what_it_does_not_take():
    q, k, v = randn(2, 3, 4, 16), randn(2, 7, 2, 16, seed=1), randn(2, 7, 2, 16, seed=2)
    options = dict(causal=True, window=4)
    assert (pd.attention(q, k, v, **options) - plain_attention(q, k, v, **options)).abs().max() < 1e-5
    assert (pd.attention(q[:, :1], k, v, **options) - plain_attention(q[:, :1], k, v, **options)).abs().max() < 1e-5
    graded = q[:, :1].clone().requires_grad_()
    pd.attention(graded, k, v).sum().backward()
    assert graded.grad is not None


# ----------------------------------------------------------------------------------------------------------- append
def to_append(N=7, K=2, D=16, Dv=12, R=16, page=4, dtype=torch.float32, kv=None):
    "Arguments of `append` with fresh pages: tokens of two rows out of order, one of them nowhere."
    M = 3
    kind = kv or dtype
    empty = lambda d: torch.zeros(2 * M + 1, page, K, d, device=DEVICE).to(kind)
    k, v = randn(N, K, D, dtype=dtype), randn(N, K, Dv, dtype=dtype, seed=1)
    positions = torch.tensor([0, 11, 3, -1, 4, 7, 8][:N], device=DEVICE)
    cos, sin = (t.to(DEVICE)[:, :R] for t in rope_tables(positions.cpu().clamp(min=0), inverse_frequencies(max(R, 2))))
    table = torch.randperm(2 * M, generator=torch.Generator().manual_seed(3)).view(2, M).to(DEVICE, torch.int32)
    rows = torch.tensor([0, 1, 1, 0, 0, 1, 0][:N], device=DEVICE)
    pages = [empty(D), empty(Dv)]
    scales = {n: torch.zeros(2 * M + 1, page, K, device=DEVICE, dtype=torch.float16) for n in ("k_scale", "v_scale")}
    return (k, v, *((cos, sin) if R else (None, None)), *pages, table, rows, positions), scales if kv else {}


@pytest.mark.parametrize("kv", [None, *NARROW], ids=str)
@pytest.mark.parametrize("R", [16, 8, 0])
def test_append_writes_what_the_plain_form_writes(R, kv):
    dtype = torch.bfloat16
    mine, theirs = to_append(R=R, kv=kv, dtype=dtype), to_append(R=R, kv=kv, dtype=dtype)
    pd.append(*mine[0], **mine[1], block=4)
    pd.plain_append(*theirs[0], **theirs[1])
    bits = lambda x: x.view(torch.uint8) if x.itemsize == 1 else x
    for a, b in zip([*mine[0][4:6], *mine[1].values()], [*theirs[0][4:6], *theirs[1].values()]):
        assert torch.equal(bits(a), bits(b)), f"{(bits(a) != bits(b)).sum()} of {a.numel()} differ"
    written = (bits(mine[0][5]) != 0).flatten(2).any(-1).sum().item()
    assert written == 6, "six tokens have a place, the seventh has none"


def test_append_of_keys_alone_and_of_nothing():
    (k, _, cos, sin, pages, _, table, rows, positions), _ = to_append()
    theirs = pages.clone()
    strided = torch.stack([k, k], 3)[..., 0]  # every other number of a larger tensor
    pd.append(strided, None, cos.bfloat16(), sin.bfloat16(), pages, None, table.long(), rows.int(), positions.int())
    pd.plain_append(k, None, cos.bfloat16(), sin.bfloat16(), theirs, None, table, rows, positions)
    assert torch.equal(pages, theirs) and pages.any()
    pd.append(k[:0], None, None, None, pages, None, table, rows[:0], positions[:0])
    assert torch.equal(pages, theirs)


def check_appended(**wrong):
    "Pages as the plain form writes them, `wrong` arguments given to the kernel."
    args, scales = to_append(kv=torch.int8, dtype=torch.float32)
    names = ["k", "v", "cos", "sin", "k_pages", "v_pages", "table", "rows", "positions"]
    theirs, their_scales = to_append(kv=torch.int8, dtype=torch.float32)
    pd.append(**dict(zip(names, args)) | wrong, **scales)
    pd.plain_append(*theirs, **their_scales)
    for a, b in zip([*args[4:6], *scales.values()], [*theirs[4:6], *their_scales.values()]): assert torch.equal(a, b)


def test_wrong_appends_are_rejected():
    check_appended()
    (k, v, cos, sin, *_, positions), _ = to_append(dtype=torch.float32)
    assert rejects(check_appended, sin=-sin)                                      # turned the other way
    assert rejects(check_appended, v=v * 1.01)                                    # another scale
    assert rejects(check_appended, positions=positions.roll(1))                   # the neighbour's place


# ----------------------------------------------------------------------------------- the chip, torch, and bad input
def test_hopper_code_spills_nothing():
    launches = [pd.decode_launch(d) for d in DTYPES] + [pd.decode_launch(kv=kv) for kv in NARROW]
    launches += [pd.decode_launch(page=None), pd.decode_launch(D=64, Dv=64, group=3)]
    launches += [pd.decode_launch(D=576, Dv=512, group=g, latent=True) for g in (16, 128)]
    launches += [pd.append_launch(kv=kv) for kv in (None, *NARROW)] + [pd.append_launch(values=False, R=64)]
    launches += [pd.merge_launch(4, pdl=True),
                                                                       pd.merge_launch(128)]
    table = resources(*launches)
    assert (table[["stack", "spills"]] == 0).all().all(), table
    assert (table.shared <= 227 * 1024).all(), table


def test_torch_accepts_the_op():
    (q, k, v, table, lengths), _ = case()
    torch.library.opcheck(pd.paged_attention_op, (q, k, v, table, lengths, *[None] * 7))
    args, scales = to_append(kv=torch.int8)
    torch.library.opcheck(pd.append_op, (*args, *scales.values()))
    torch.library.opcheck(pd.decode_attention_op, (q, randn(2, 5, 2, 16), randn(2, 5, 2, 16), lengths, *[None] * 4))


def wrong_last(q, k, v, table, lengths, **options):        # the newest key is forgotten
    return pd.paged_attention(q, k, v, table, (lengths - 1).clamp(min=1), **options)
def wrong_order(q, k, v, table, lengths, **options):       # pages in the order of memory
    return pd.paged_attention(q, k, v, table.sort(1).values, lengths, **options)
def wrong_heads(q, k, v, table, lengths, **options):       # heads that share a KV head are dealt in turns
    return pd.paged_attention(q.view(2, 1, 2, 2, -1).transpose(2, 3).flatten(2, 3), k, v, table, lengths, **options)


@pytest.mark.parametrize("wrong", [wrong_last, wrong_order, wrong_heads])
def test_wrong_variants_are_rejected(wrong): assert rejects(checked, wrong, *case())


def test_a_wrong_scale_is_rejected():
    args, scales = case(kv=torch.int8)
    def wrong(*a, k_scale, v_scale, **o): return pd.paged_attention(*a, k_scale=k_scale.roll(1, 1), v_scale=v_scale,
                                                                    **o)
    assert rejects(checked, wrong, args, scales)


def changed(**new):
    (q, k, v, table, lengths), scales = case()
    named = dict(q=q, k_pages=k, v_pages=v, table=table, lengths=lengths) | scales | new
    return lambda: pd.paged_attention(**named)


@pytest.mark.parametrize("call", [
    changed(q=randn(2, 2, 4, 16)), changed(q=randn(2, 1, 3, 16)), changed(q=randn(2, 1, 4, 8)), changed(window=0),
    changed(k_scale=randn(8, 4, 2)), changed(lengths=randn(2)), changed(table=randn(2, 3)), changed(v_pages=None),
    changed(sinks=randn(3)), changed(q=randn(2, 1, 4, 16, dtype=torch.float64)),
                                  changed(k_pages=randn(8, 4, 2, 16).int())])
def test_bad_input_is_named(call):
    with pytest.raises(InputError, match="takes"): call()


def test_bad_appends_are_named():
    args, scales = to_append(kv=torch.int8)
    for at, new in [(0, args[0].double()), (2, None), (2, args[2][:, :7]), (4, args[4].int()), (7, args[7].float()),
                    (8, args[8][:3])]:
        with pytest.raises(InputError, match="append takes"): pd.append(*args[:at], new, *args[at + 1:], **scales)
    with pytest.raises(InputError, match="append takes"): pd.append(*args)


@pytest.mark.cuda
def test_real_shapes_on_a_gpu():
    for dtype, kv in [(torch.bfloat16, None), (torch.bfloat16, torch.float8_e4m3fn), (torch.float16, torch.int8)]:
        args, scales = case(B=3, M=40, page=16, H=32, K=8, D=128, Dv=128, dtype=dtype, kv=kv)
        checked(pd.paged_attention, args, scales, config=None)
        for config in (pd.Config(64, 5, pdl=True), pd.Config(128, 1, warps=8)): checked(pd.paged_attention, args,
                                                                                        scales, config)
    q, k, table = randn(2, 1, 128, 576, dtype=torch.bfloat16), randn(20, 64, 1, 576, dtype=torch.bfloat16,
        seed=1), torch.arange(20, device=DEVICE).view(2, 10)
    lengths = torch.tensor([640, 301], device=DEVICE)
    want = [pd.plain_paged(q.to(t), k.to(t), None, table, lengths, value_dim=512)
            for t in (torch.float64, torch.bfloat16)]
    for config in (None, pd.Config(64, 3, warps=8, stages=2)):
        as_accurate(pd.paged_attention(q, k, None, table, lengths, value_dim=512, config=config), *want)
