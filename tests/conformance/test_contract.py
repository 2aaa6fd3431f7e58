"""What torch asks of operators: schemas, fakes, graphs, autocast; and the words of refusals."""

import pytest
import torch

from plain import product
from tolerance import assert_composition_close

from .backends import EMULATED, INTERPRETER
from .calls import bound, call, opcheck, prepared, schema
from .cases import case
from .data import arguments
from .test_inputs import laid_out, turned

OPERATORS = (
    "materialize",
    "materialize_out",
    "core_grad_dense",
    "core_grad_tokens",
    "core_of_packed",
    "cur_linear",
    "w_eff_linear",
)
WITH_GRADIENTS = ("x", "grad_y", "grad", "core")


def checked(backend):
    """Calls of every operator, each with and without what it may go without."""
    sizes = (3, (4, 5, 2)) if backend.few == INTERPRETER else (5, (6, 9, 2))
    n3, tokens = sizes[0], (7,)
    where = {"first": n3 - 2, "slices": 2, "tokens": tokens}
    yield case("materialize", *sizes, weights="layers")
    yield case("materialize", *sizes, weights="none", elements=(torch.bfloat16,))
    yield case("materialize_out", *sizes, weights="layers")
    yield case("materialize_out", *sizes, weights="beside", counts=(n3 - 1, 1))
    yield case("core_grad_dense", *sizes)
    yield case("core_grad_tokens", *sizes, **where)
    yield case("core_grad_tokens", *sizes, **where, packed=True)
    yield case("core_of_packed", *sizes, count=3)
    yield case("cur_linear", *sizes, **where, bias=True)
    yield case("cur_linear", *sizes, **where, transposed=True)
    yield case("w_eff_linear", *sizes, **where)
    if backend.few is None:
        yield case("w_eff_linear", *sizes, **where, z=True)
        yield case("core_grad_tokens", *sizes, **where, way="z")
        yield case("core_grad_tokens", *sizes, first=2, tokens=tokens, way="dense")
    if backend.few != INTERPRETER:
        rows = {"tokens": (6, 3), "ids": "mixed", "first": n3 - 2, "slices": 2}
        yield case("core_grad_tokens", *sizes, **rows)
        yield case("cur_linear", *sizes, **rows)
        yield case("cur_linear", *sizes, **rows, z=True)
        yield case("cur_linear", *sizes, **rows, transposed=True)


@pytest.mark.once
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layout", [turned, torch.clone], ids=["permuted", "contiguous"])
def test_opcheck(backend, name, layout):
    """With derivatives where there are some."""
    if backend.few == INTERPRETER and layout is turned:
        pytest.skip("test_layouts has them, and the rest does not depend on strides")
    found = 0
    for each in checked(backend):
        if each.operator != name:
            continue
        given = laid_out(arguments(each)[0], layout)
        given = {key: backend.place(value) for key, value in given.items()}
        if not each.get("packed") and name != "materialize_out":
            for key in set(WITH_GRADIENTS) & set(given):
                if given[key] is not None:
                    given[key] = given[key].detach().clone().requires_grad_()
        if "out" in given:
            given["out"] = torch.zeros_like(given["out"])
        opcheck(name, backend.languages["ieee"], **given)
        found += 1
    assert found


@pytest.mark.once
def test_schemas_are_those_of_the_reference(backend):
    """Arguments, their order, their defaults."""
    for name in OPERATORS:
        for language in backend.languages.values():
            pairs = zip(
                schema(name, language).arguments, schema(name, "reference").arguments, strict=True
            )
            for ours, theirs in pairs:
                assert (ours.name, ours.default_value) == (theirs.name, theirs.default_value)
                types = [str(each.type).replace("SymInt", "int") for each in (ours, theirs)]
                assert types[0] == types[1]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_helper_of_the_suite_leaves_nothing_out(name):
    """What a case is not given is not filled in, and what there is no argument for is refused."""
    sizes = {"tokens": (3,), "count": 2}
    given = arguments(case(name, 4, (6, 9, 2), **sizes))[0]
    bound(name, "reference", given)
    with pytest.raises(TypeError, match=r"unknown arguments \['colour'\]"):
        bound(name, "reference", {**given, "colour": 1})
    required = [a.name for a in schema(name, "reference").arguments if not a.has_default_value()]
    for absent in required:
        with pytest.raises(TypeError, match=rf"missing \['{absent}'\]"):
            bound(name, "reference", {k: v for k, v in given.items() if k != absent})


@pytest.mark.once
def test_fullgraph_with_two_shapes_and_one_compilation(backend):
    if not backend.traced:
        pytest.skip("one language of the kernels' own tells of all that are opaque to a graph")
    one = arguments(case("cur_linear", 5, (6, 9, 2), tokens=(7,), first=1))[0]
    every = arguments(case("materialize", 5, (6, 9, 2)))[0]
    exact_of = arguments(case("materialize", 5, (6, 9, 2)))[1]
    core = backend.place(one["core"]).requires_grad_()
    weight = every["weights"][0]
    one = {**one, "weight": backend.place(weight[1])}

    language = backend.languages["ieee"]
    placed = [{name: backend.place(value) for name, value in each.items()} for each in (one, every)]
    linear = prepared("cur_linear", language, ("x", "core"), **placed[0])
    materialize = prepared("materialize", language, ("core",), **placed[1])

    def step(x, core):
        y, w = linear(x, core), materialize(core)
        return y.square().sum() + w.square().sum()

    def plain(x, dtype):
        leaves = [t.detach().cpu().to(dtype, copy=True).requires_grad_() for t in (x, core)]
        lateral, horizontal = (exact_of[n].to(dtype) for n in ("lateral_hat", "horizontal_hat"))
        lateral, horizontal = unpacked(lateral, horizontal, 5)
        w = weight.to(dtype) + 0.5 * product(lateral, leaves[1], horizontal)
        loss = (leaves[0] @ w[1].T).square().sum() + w.square().sum()
        return torch.autograd.grad(loss, leaves)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 11):
            x = backend.place(torch.randn(tokens, 9)).requires_grad_()
            for function in (step, compiled):
                actual = [g.cpu() for g in torch.autograd.grad(function(x, core), (x, core))]
                assert_composition_close(
                    actual, lambda x=x: plain(x, torch.float32), plain(x, torch.float64)
                )


def unpacked(lateral_hat, horizontal_hat, n3):
    """C and R of their packed spectra."""
    from tcur_kernels.operators import reference

    lateral = lateral_hat.reshape(lateral_hat.shape[0], n3, -1).movedim(0, 1)
    horizontal = horizontal_hat.reshape(n3, -1, horizontal_hat.shape[1])
    return [
        reference.from_half_spectrum(reference.unpack(each), n3) for each in (lateral, horizontal)
    ]


@pytest.mark.once
def test_autocast_does_not_reach_inside(backend):
    given = arguments(case("cur_linear", 5, (6, 9, 2), tokens=(7,), first=1))[0]
    given = {name: backend.place(value) for name, value in given.items()}

    def run():
        core = given["core"].detach().clone().requires_grad_()
        y = backend.run("cur_linear", **{**given, "core": core})
        return y, *torch.autograd.grad(y.sum(), core)

    wanted = run()
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        found = run()
    assert all(map(torch.equal, found, wanted))


#: Calls past the Python layer, which are refused and not read out of bounds: the operator, what is
#: changed of a good call, and the words of compiled kernels and of all others. Where there are
#: none, the kernels of that language take it.
SMALL = (4, (6, 9, 2))
IDS = torch.zeros(2, dtype=torch.int64)
#: Tokens to which torch adds a bias by a sum of its own, which takes any dtype.
OF_A_LAYER = {"x": lambda _: torch.zeros(2, 9, 3).mT, "weight": lambda _: torch.zeros(6, 9)}
REFUSED = [
    ("materialize", {"core": lambda t: t[:, :1]}, "core", r"core: expected \[4, 2, 2\]"),
    ("materialize", {"core": lambda t: t.double()}, "core", r"core: expected dtype"),
    (
        "materialize_out",
        {"weights": lambda t: [each.flatten() for each in t]},
        "weights must be",
        r"weights: expected \[6, slices \* 9\]",
    ),
    ("materialize", {"weights": lambda t: [t[0][:, :3]]}, "weights", "weights"),
    ("materialize", {"weights": lambda t: list(t[0][:3])}, "tcur: ", "weights: expected 4"),
    (
        "materialize",
        {"weights": lambda t: [t[0][3], t[0][2], t[0][1], t[0][0].half()]},
        "weights has an unexpected dtype",
        r"weights: expected dtype torch\.float",
    ),
    (
        "materialize",
        {"weights": lambda t: [t[0].long()]},
        "weights",
        "weights: expected a floating dtype",
    ),
    (
        "core_grad_dense",
        {"grad": lambda t: t.long()},
        "grad",
        "grad: expected a floating dtype",
    ),
    ("core_grad_tokens", {"x": lambda t: t.long()}, None, "x: expected a floating dtype"),
    (
        "core_grad_tokens",
        {"x": lambda t: t.to_sparse()},
        None,
        "x: expected a (strided|dense)",
    ),
    ("cur_linear", {"x": lambda t: t.long()}, "x ", "x: expected a floating dtype"),
    ("core_grad_dense", {"horizontal_hat": lambda t: t[:3]}, "must be", "horizontal_hat"),
    (
        "core_grad_dense",
        {"horizontal_hat": lambda t: t.to_sparse()},
        None,
        "horizontal_hat: expected a strided tensor",
    ),
    (
        "core_grad_dense",
        {"lateral_hat": lambda t: t[:0], "grad": lambda t: t[:, :0]},
        "no empty axis",
        "lateral_hat: .*no empty axis",
    ),
    (
        "core_grad_tokens",
        {"adapter_ids": lambda _: torch.zeros(3, dtype=torch.int64)},
        "adapter_ids must have one entry",
        "adapter_ids: expected int64 for rows of equal length of 2",
    ),
    (
        "cur_linear",
        {"core": lambda t: t[None], "adapter_ids": lambda _: IDS[None]},
        r"adapter_ids must be int64 \[rows\]",
        "adapter_ids: expected int64 for rows",
    ),
    (
        "cur_linear",
        {**OF_A_LAYER, "bias": lambda _: torch.zeros(6, 1)},
        "bias has an unexpected shape",
        r"bias: expected \[6\], got \[6, 1\]",
    ),
    ("w_eff_linear", {"slice_index": lambda _: 4}, "slice_index", "slice_index: expected 0"),
    (
        "w_eff_linear",
        {"w_eff": lambda t: t[:, :8]},
        "w_eff",
        r"w_eff: expected \[6, 9\], got \[6, 8\]",
    ),
    ("core_grad_tokens", {"slice_index": lambda _: 4}, "slice_index", "slice_index"),
    ("core_grad_tokens", {"grad_y": lambda _: torch.ones(3, 6)}, "same tokens", "grad_y"),
    (
        "core_grad_tokens",
        {"adapter_ids": lambda _: IDS, "packed": lambda _: True},
        "adapter_ids goes without packed gradients",
        "packed: expected False with adapter_ids",
    ),
    (
        "core_grad_tokens",
        {"x": lambda _: torch.ones(6, 9), "grad_y": lambda _: None, "adapter_ids": lambda _: IDS},
        r"adapter_ids goes .*without a dense gradient",
        "adapter_ids: expected None without grad_y",
    ),
    (
        "core_of_packed",
        {"packed": lambda _: torch.ones(2, 4, 2, 3)},
        r"packed must be \[m",
        r"packed: expected \[2, 4, 2, 2\]",
    ),
    ("core_of_packed", {"packed": lambda t: t[0]}, r"packed must be \[m", r"packed: .*\[m"),
    ("core_of_packed", {"packed": lambda t: t.bfloat16()}, "packed ", "packed: expected f"),
    ("core_of_packed", {"packed": lambda t: t.half()}, "packed ", "packed: expected f"),
    ("cur_linear", {"x": lambda t: t[:, :8]}, "x has", "x"),
    (
        "cur_linear",
        {**OF_A_LAYER, "bias": lambda _: torch.zeros(6).half()},
        "bias has an unexpected dtype",
        r"bias: expected dtype torch\.float",
    ),
    (
        "cur_linear",
        {**OF_A_LAYER, "weight": lambda _: torch.zeros(6, 9).half()},
        "weight has an unexpected dtype",
        r"weight: expected dtype torch\.float",
    ),
    (
        "cur_linear",
        {"core": lambda t: t[..., :1]},
        "core has an unexpected shape",
        "core|hat",
    ),
    (
        "cur_linear",
        {"core": lambda t: t[None], "adapter_ids": lambda _: torch.zeros(3, dtype=torch.int64)},
        "adapter_ids must have one entry",
        "adapter_ids",
    ),
    (
        "cur_linear",
        {"core": lambda t: t[None], "adapter_ids": lambda _: torch.tensor([0.5])},
        r"adapter_ids must be int64 \[rows\]",
        "adapter_ids",
    ),
    (
        "cur_linear",
        {"adapter_ids": lambda _: IDS[:1]},
        r"core must be \[n3",
        r"core: expected \[4, 2, 2\], or \[adapters, ",
    ),
    (
        "cur_linear",
        {
            "core": lambda t: t[None],
            "adapter_ids": lambda _: IDS,
            "dense_grad": lambda _: True,
        },
        "adapter_ids goes by the factors",
        "adapter_ids: expected None with dense_grad",
    ),
]


@pytest.mark.once
@pytest.mark.parametrize("index", range(len(REFUSED)), ids=lambda i: f"{REFUSED[i][0]}-{i}")
def test_bad_arguments_are_refused(backend, index):
    name, changes, *words = REFUSED[index]
    message = dict(zip(("compiled", "python"), words, strict=True))[backend.checks]
    if message is None:
        pytest.skip("not looked at in this language")
    sizes = {"tokens": (2,), "count": 2}
    given = {**arguments(case(name, *SMALL, **sizes))[0]}
    for argument, change in changes.items():
        given[argument] = change(given.get(argument))
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        backend.run(name, **given)


@pytest.mark.once
def test_triton_sums_fp32_alone(backend):
    if not backend.languages["ieee"].startswith("triton"):
        pytest.skip("other languages sum fp64, too")
    packed = arguments(case("core_of_packed", *SMALL, count=2))[0]["packed"].double()
    with pytest.raises(TypeError, match="packed: expected float32"):
        backend.run("core_of_packed", packed=packed, scale=1.0)


@pytest.mark.parametrize("name", OPERATORS)
def test_none_is_no_tensor(name):
    """torch takes it for any tensor."""
    given = arguments(case(name, *SMALL, tokens=(2,), count=2))[0]
    tensors = [a.name for a in schema(name, "reference").arguments if str(a.type) == "Tensor"]
    assert tensors
    for each in tensors:
        with pytest.raises(TypeError, match=f"{each}: expected a torch.Tensor, got None"):
            call(name, "reference", **{**given, each: None})


@pytest.mark.parametrize("language", ["reference", ""])
@pytest.mark.parametrize(
    ("name", "elsewhere"),
    [("core_grad_dense", "grad"), ("core_grad_dense", "panels"), ("materialize", "panels")],
)
def test_numbers_that_are_elsewhere_are_refused(name, elsewhere, language):
    """On meta, where a result on the CPU would be memory that nobody has written."""
    given = arguments(case(name, *SMALL))[0]
    given[elsewhere] = given.get(elsewhere, torch.ones(9)).to("meta")
    with pytest.raises(ValueError, match=f"{elsewhere}: expected a tensor on cpu, got one on meta"):
        call(name, language, **given)


@pytest.mark.once
def test_no_cores_serve_no_rows(backend):
    """Without rows they are not asked for; a row must not read past the end."""
    if backend.few == INTERPRETER:
        pytest.skip("it has no ids")
    none, ids = torch.zeros(0, 4, 2, 2), torch.zeros(0, dtype=torch.int64)
    given = arguments(case("cur_linear", *SMALL, tokens=(2,)))[0]
    of_none = {**given, "core": none, "adapter_ids": ids, "x": given["x"][:0]}
    assert backend.run("cur_linear", **of_none).shape == (0, 6)
    back = {**of_none, "x": torch.zeros(0, 6), "weight": None, "transposed": True}
    assert backend.run("cur_linear", **back).shape == (0, 9)
    grads = arguments(case("core_grad_tokens", *SMALL, tokens=(2,)))[0]
    grads |= {"x": grads["x"][:0], "grad_y": grads["grad_y"][:0], "adapter_ids": ids, "adapters": 0}
    assert backend.run("core_grad_tokens", **grads).shape == (0, 4, 2, 2)
    whole = arguments(case("core_grad_tokens", *SMALL, tokens=(2,)))[0]
    for name, rows in (
        ("cur_linear", {**of_none, "x": given["x"]}),
        ("core_grad_tokens", {**whole, "adapters": 0}),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"adapter_ids.* out of range"):
            backend.run(name, **{**rows, "adapter_ids": IDS})


@pytest.mark.once
def test_a_negative_number_of_cores_is_refused(backend):
    if backend.checks != "compiled" or backend.few == EMULATED:
        pytest.skip("not looked at in this language")
    given = arguments(case("core_grad_tokens", *SMALL, tokens=(2,)))[0]
    with pytest.raises(RuntimeError, match="adapters must not be negative"):
        backend.run("core_grad_tokens", **{**given, "adapter_ids": IDS, "adapters": -1})
