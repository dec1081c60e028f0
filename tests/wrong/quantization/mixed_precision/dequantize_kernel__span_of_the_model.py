"""kernels.quantization.mixed_precision.dequantize_kernel: counts the span from the first layer on."""


@triton.jit
def dequantize_kernel(
    packed_ptr, table_ptr, scale_ptr, zero_ptr, out_ptr, layers, GROUP: tl.constexpr, LAYERS: tl.constexpr
):
    program = tl.program_id(0)
    candidate = tl.arange(0, LAYERS)
    first = tl.load(table_ptr + candidate * 4, mask=candidate < layers, other=2**31 - 1)
    row = table_ptr + (tl.sum((first <= program).to(tl.int32)) - 1) * 4
    span = program
    bits, end = tl.load(row + 3), tl.load(row + 4 + 2)
    octet = tl.load(row + 2) + span * (OCTETS * LANES) + tl.arange(0, LANES)
    packed_ptr += (tl.load(row + 1) + span * bits * LANES) * 4
    if bits == 2:
        expand_span(packed_ptr, scale_ptr, zero_ptr, out_ptr, octet, end, 2, GROUP)
    elif bits == 3:
        expand_three(packed_ptr, scale_ptr, zero_ptr, out_ptr, octet, end, GROUP)
    elif bits == 4:
        expand_span(packed_ptr, scale_ptr, zero_ptr, out_ptr, octet, end, 4, GROUP)
    else:
        expand_span(packed_ptr, scale_ptr, zero_ptr, out_ptr, octet, end, 8, GROUP)
