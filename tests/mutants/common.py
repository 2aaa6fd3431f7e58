"""Mutants of what the kernels for CPUs share with those for GPUs."""

from .schemata import rows

CODELETS = rows(
    "common/codelets.h",
    ("1 is -1", "value = c > 0 ? «V(value + x)» : V(value - x);", "V(value - x)"),
    ("-1 is 1", "value = c > 0 ? V(value + x) : «V(value - x)»;", "V(value + x)"),
    ("a coefficient lost", "value = value + T(c) * «x»;", "V{}"),
    ("cosines: no fold", "sums[k] = a[k] + «a[half - k]»;", "a[k]"),
    ("cosines: sign", "differences[k] = «a[k] - a[half - k]»;", "a[half - k] - a[k]"),
    ("sines: sign of sums", "sums[k] = «b[k] + b[half - k]»;", "b[k] - b[half - k]"),
    ("sines: sign of differences", "differences[k] = «b[k] - b[half - k]»;", "b[k] + b[half - k]"),
    ("cosine for sine", "sum{V(T(«unit_sin(l, N)») * b[1])};", "unit_cos(l, N)"),
    ("real inverse: sign", "x[l + 1] = «e[l + 1] - o[l + 1]»;", "e[l + 1] + o[l + 1]"),
    ("real inverse: sign above", "x[N - 1 - l] = «e[l + 1] + o[l + 1]»;", "e[l + 1] - o[l + 1]"),
    ("real inverse: planes", "b[k + 1] = «x[2 * k + 2]»;", "x[2 * k + 1]"),
    ("forward: not folded", "a[k + 1] = «x[k + 1] + x[N - 1 - k]»;", "x[k + 1]"),
    ("forward: sign", "b[k + 1] = «x[k + 1] - x[N - 1 - k]»;", "x[k + 1] + x[N - 1 - k]"),
    ("forward: conjugate", "x[2 * k + 2] = «-o[k + 1]»;", "o[k + 1]"),
    ("complex: sign", "re[l + 1] = «e_re[l + 1] - o_im[l + 1]»;", "e_re[l + 1] + o_im[l + 1]"),
    (
        "complex: sign above",
        "im[N - 1 - l] = «e_im[l + 1] - o_re[l + 1]»;",
        "e_im[l + 1] + o_re[l + 1]",
    ),
    ("complex: planes of the middle", "im[half] = «e_im[half]»;", "e_re[half]"),
    ("shifted inverse: sign", "y[l] = «even.value - odd.value»;", "even.value + odd.value"),
    (
        "shifted inverse: sign above",
        "y[N - l] = «-even.value - odd.value»;",
        "even.value - odd.value",
    ),
    ("shifted forward: conjugate", "y[2 * k + 1] = «-odd.value»;", "odd.value"),
    ("cosines: wrong middle", "sums[half / 2] = a[«half / 2»];", "0"),
    (
        "shifted forward: sign",
        "differences[l + 1] = «x[l + 1] - x[N - 1 - l]»;",
        "x[l + 1] + x[N - 1 - l]",
    ),
)

TUBES = rows(
    "common/tubes.h",
    ("one pair too many", "return «(n3 - 1) / 2»;", "n3 / 2"),
    ("plane of a bin", "return bin == 0 ? 0 : 2 * bin - «1»;", "0"),
    ("bin of a plane", "return («plane + 1») / 2;", "plane"),
    ("no bin n3/2", "(n3 % 2 == 0 && «plane == n3 - 1»);", "false"),
    ("last pair is real", "is_pair = plane <= «2 * pairs(n3)»;", "2 * pairs(n3) - 2"),
    ("pairs counted once", "(is_real_plane(plane, n3) ? 1.0 : «2.0»)", "1.0"),
    ("turns the other way", "const double step = «2.0» * kPi", "-2.0"),
    ("next sine", "return sin_[«m» % n3_];", "(m + 1)"),
    ("frequencies", "return is_even() ? 2 * i + «1» : i + 1;", "3"),
    ("frequency 0", "return is_even() ? 2 * i + 1 : «i + 1»;", "i"),
    ("an output lost", "step, «half / 2», (half + 1) / 2 - 1};", "half / 2 - 1"),
    ("a row lost", "step, half / 2, (half + 1) / 2 - «1»};", "2"),
    ("first planes", "(i + 1) / 2 * (2 * outer) - «i % 2»;", "0"),
    ("last planes", "return («i / 2 * 2 + 1») * outer - 1 + i % 2;", "i + 1"),
    ("next rotation", "static_cast<T>(roots.sin(«k * l»))", "k * l + 1"),
    (
        "kernel: sign",
        "const double value = «roots.cos(power) - roots.sin(power)»;",
        "roots.cos(power) + roots.sin(power)",
    ),
    ("kernel: conjugate", "«im -= value * bins.sin(at);»", "im += value * bins.sin(at);"),
    ("kernel: weight", "inverse_weight(plane, length) / «2»;", "1"),
    ("sines of the first line", "roots.sin(k * made.frequency(«i»))", "0"),
    ("every length is prime", "if («n % d == 0») {", "false"),
)

PLACES = rows(
    "common/slice_places.h",
    ("first slice of a stack", "data + «l» * s.n1 * s.n2 * weights[0]", "0"),
    ("stack of fp32", "s.n1 * s.n2 * «weights[0].element_size()», 1, 0});", "4"),
    ("first slice of a matrix", "data + «index» * s.n2 * weight.element_size()", "0"),
    ("slices by their rows", "data + index * «s.n2» * weight.element_size()", "s.n1"),
    ("matrices of fp32", "data + index * s.n2 * «weight.element_size()», count", "4"),
    ("slices alone", "weight.element_size(), «count», index});", "1"),
    ("slices over each other", "weight.element_size(), count, «index»});", "0"),
    ("none beside another", "places.any_beside || «count > 1»;", "false"),
    ("base of fp32", "places.element = «element_of(weights[0])»;", "Element::f32"),
    ("slices missing", "«static_cast<int64_t>(places.all.size()) == s.n3»,", "true"),
    ("dtypes mixed", '«check_dtype("weights", weight, weights[0].scalar_type());»', ""),
    ("matrices of other shapes", '«check_shape("weights", weight, {s.n1, count * s.n2});»', ""),
    ("strided out", "STD_TORCH_CHECK(«out.is_contiguous()»", "true"),
    ("out of another shape", '«check_shape("out", out, {s.n3, s.n1, s.n2});»', ""),
    ("flat out of another size", '«check_shape("out", out, {s.n3 * s.n1 * s.n2});»', ""),
)

TOKEN_PRODUCTS = rows(
    "common/token_products.h",
    ("no bias", "linear(a.x, *a.weight, «a.bias»);", "std::optional<Tensor>()"),
    ("base not transposed back", "return «a.transposed» ? torch::stable::matmul", "!a.transposed"),
    (
        "operands not rounded",
        "a.bf16_operands ? «cast(rows, ScalarType::BFloat16)» : rows;",
        "rows",
    ),
    ("operands always rounded", "= «a.bf16_operands» ? cast(rows", "true"),
    ("z not taken", "if («a.z.has_value()») {", "false"),
    ("update in its own dtype", "cast(update, «a.x.scalar_type()»)", "update.scalar_type()"),
    ("width of one slice", "shape.back() = «sizes.out_features»;", "sizes.n1"),
    ("strided C without dy", "return «torch::stable::contiguous(a.lateral_hat)»;", "a.lateral_hat"),
    (
        "strided p",
        "return «torch::stable::contiguous("
        "torch::stable::matmul(operand(a, rows), a.lateral_hat))»;",
        "torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose("
        "torch::stable::matmul(operand(a, rows), a.lateral_hat), 0, 1)), 0, 1)",
    ),
    (
        "gradient of bf16",
        "= «compute_dtype(a.lateral_hat.scalar_type())»;",
        "a.lateral_hat.scalar_type()",
    ),
    ("gradient of one core", "shape.insert(shape.begin(), «a.adapters»);", "1"),
    ("forward as transposed", "if («a.transposed») {\n    const Tensor rows", "!a.transposed"),
)
