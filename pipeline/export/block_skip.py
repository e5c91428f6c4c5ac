"""The custom ops of linear layers: what is traced for a factored one, and the bodies that specify.

    BlockSkipLinear(x, a, b):               y = (x1 + x2 a) b,  [x1 x2] = x
    BlockSkipLinearIndexed(x, a, b, index): the same on Gather(x, index), on the last axis
    BlockSkipLinearA4B8Indexed(x, a, a_scale, b, b_scale, index): a and b are codes
    LinearQuantized4(x, b, b_scale):        y = x b, of codes

x [..., n], a [n - r, r] = A'^T, b [r, m] = B'^T, index int32 [n], y [..., m]. Names rather than
optional inputs, because a function body cannot leave an input out, and because TensorRT's parser
looks functions up by name alone. A bias is an Add behind the node.

Codes are int8 tensors, for TensorRT's plugins take no INT4: `8` has one to a byte, signed, and `4`
two neighbours of a row, the even one in the low half, both signed: [rows, (columns + 1) / 2], which
for even columns are the bytes of ONNX's INT4. Scales [(rows + block - 1) / block, columns] are of
the type of x; the attributes block_a and block_b are the rows that share one. TensorRT builds no
body that reads codes ("quantized constant is only allowed before DQ or PLUGIN"): without the plugin
it is given DequantizeLinear (`pipeline/engine/dequantized.py`).

BlockSkipLinearFewBits and its Indexed form are what that becomes: of the body of the first two,
with an a or b out of a DequantizeLinear, and a name of their own because no plugin should take
them: it would be given numbers, written out of the codes before every product.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx.parser
import onnx_ir as ir

from pipeline.export.contract import (
    BLOCK_A,
    BLOCK_B,
    BLOCK_SKIP_OPS,
    BYTES,
    DEQUANTIZED_SKIP_OPS,
    DOMAIN,
    LINEAR_QUANTIZED,
    NIBBLES,
    NUMBERS,
    OP_VERSION,
    block_skip_op,
)

# What TensorRT looks for in its plugin registry; without the plugin it takes the function body.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(OP_VERSION)}


def is_block_skip(node: ir.Node) -> bool:
    """Whether a node is one of the two ops whose factors are numbers."""
    return node.domain == DOMAIN and node.op_type in BLOCK_SKIP_OPS


_ORDERED = "ordered = Gather <axis = -1> (x, index)\n"
_MIXED = """
    rank = Shape <start = 0, end = 1> ({b})
    rest = Shape <start = 0, end = 1> ({a})
    widths = Concat <axis = 0> (rank, rest)
    x1, x2 = Split <axis = -1> ({x}, widths)
    mixed = MatMul (x2, {a})
    z = Add (x1, mixed)
"""
_CONSTANTS = """
    zero = Constant <value_ints: ints = [0]> ()
    one = Constant <value_ints: ints = [1]> ()
    last = Constant <value_ints: ints = [-1]> ()
    flat = Constant <value_ints: ints = [0, -1]> ()
    eight = Constant <value_float: float = 8.0> ()
    sixteen = Constant <value_float: float = 16.0> ()
"""
_CODES = {
    BYTES: "{w}_codes = Cast <to = 1> ({w})\n",
    # A byte is 16 high + low, high signed, and low 0 to 15.
    NIBBLES: """
    {w}_bytes = Cast <to = 1> ({w})
    {w}_sixteenths = Div ({w}_bytes, sixteen)
    {w}_high = Floor ({w}_sixteenths)
    {w}_upper = Mul ({w}_high, sixteen)
    {w}_low = Sub ({w}_bytes, {w}_upper)
    {w}_eighths = Div ({w}_low, eight)
    {w}_negative = Floor ({w}_eighths)
    {w}_turn = Mul ({w}_negative, sixteen)
    {w}_signed = Sub ({w}_low, {w}_turn)
    {w}_even = Unsqueeze ({w}_signed, last)
    {w}_odd = Unsqueeze ({w}_high, last)
    {w}_pairs = Concat <axis = -1> ({w}_even, {w}_odd)
    {w}_both = Reshape ({w}_pairs, flat)
    {w}_codes = Slice ({w}_both, zero, {w}_columns, one)
""",
}
_SCALED = """
    {w}_block_rows = Constant <value_int: int = @{block}> ()
    {w}_block = Reshape ({w}_block_rows, one)
    {w}_repeats = Concat <axis = 0> (one, {w}_block, one)
    {w}_apart = Unsqueeze ({w}_scale, one)
    {w}_repeated = Expand ({w}_apart, {w}_repeats)
    {w}_tall = Concat <axis = 0> (last, {w}_columns)
    {w}_joined = Reshape ({w}_repeated, {w}_tall)
    {w}_rows = Shape <start = 0, end = 1> ({w})
    {w}_fitting = Slice ({w}_joined, zero, {w}_rows, zero)
    {w}_scales = Cast <to = 1> ({w}_fitting)
    {w}_exact = Mul ({w}_codes, {w}_scales)
    {w}_numbers = CastLike ({w}_exact, x)
"""
_BLOCKS = {"a": BLOCK_A, "b": BLOCK_B}


def function_bodies(opset: int, used: Collection[str]) -> dict[str, ir.Function]:
    """The ops of some names as ONNX functions over the default domain, by op type."""
    texts = {name: text for name, text in _texts(opset).items() if name in used}
    protos = {name: onnx.parser.parse_function(text) for name, text in texts.items()}
    return {name: ir.serde.deserialize_function(proto) for name, proto in protos.items()}


def _texts(opset: int) -> dict[str, str]:
    """Every op's body, by its name."""
    forms = (NUMBERS, BYTES, NIBBLES)
    texts = {
        block_skip_op(a, b, indexed): _text(
            opset, block_skip_op(a, b, indexed), {"a": a, "b": b}, indexed
        )
        for a in forms
        for b in forms
        for indexed in (False, True)
    }
    texts |= {
        name: _text(opset, name, {"a": NUMBERS, "b": NUMBERS}, bool(indexed))
        for indexed, name in enumerate(DEQUANTIZED_SKIP_OPS)
    }
    for form in (BYTES, NIBBLES):
        name = LINEAR_QUANTIZED + form
        texts[name] = _text(opset, name, {"b": form}, False)
    return texts


def _text(opset: int, name: str, forms: dict[str, str], indexed: bool) -> str:
    """The body of one op: codes to numbers, x in order, the mix, and the product."""
    coded = [w for w, form in forms.items() if form]
    inputs = ["x", *(n for w in forms for n in ([w, f"{w}_scale"] if w in coded else [w]))]
    attributes = f" <{', '.join(_BLOCKS[w] for w in coded)}>" if coded else ""
    matrices = {w: f"{w}_numbers" if w in coded else w for w in forms}
    lines = [_CONSTANTS] if coded else []
    for w in coded:
        lines.append(f"{w}_columns = Shape <start = 1, end = 2> ({w}_scale)\n")
        lines.append((_CODES[forms[w]] + _SCALED).format(w=w, block=_BLOCKS[w]))
    if indexed:
        inputs.append("index")
        lines.append(_ORDERED)
    mixes = "a" in forms
    if mixes:
        lines.append(_MIXED.format(x="ordered" if indexed else "x", **matrices))
    lines.append(f"y = MatMul ({'z' if mixes else 'x'}, {matrices['b']})\n")
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{name}{attributes} ({', '.join(inputs)}) => (y)\n{{\n{''.join(lines)}}}\n"
    )
