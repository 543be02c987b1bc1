"""linear for XLA, with its own vjp.

Autodiff writes the weight gradient as a contraction over one transposed dim, which XLA:CPU runs
at 50 to 100 GFLOP/s in bfloat16. Transposed first, or contracted over two dims at once (rows
split in chunks), it becomes the fast matmul: 500 to 800 GFLOP/s on the same core (jax 0.12).
"""

import jax
import jax.numpy as jnp

from kernels_pallas import device

# Rows per chunk of the split contraction; 256 to 512 measured best at widths 256 to 512.
_CHUNK = 512


def split_rows(rows: int) -> int:
    """How many equal chunks `rows` are contracted in: near _CHUNK rows each, at least two."""
    for chunks in range(max(2, rows // _CHUNK), rows + 1):
        if rows % chunks == 0:
            return chunks if rows // chunks >= 8 else 1
    return 1


# Widest left operand that is transposed by a product with the identity.
_IDENTITY = 512


def contract_rows(x_TxD, y_TxF, out_dtype):
    """x^T y over the rows, accumulated in float32.

    XLA:CPU transposes the left operand element by element, and at row counts that are powers of
    two its strided writes share cache sets: 6 ms for 8192 x 256. AMX does it in 2 as a product with
    the identity, exactly; that pays while the operand is narrow. Wider ones, and all without AMX
    (AVX-512: 770 GFLOP/s against 530, 2048 x 256 x 768), are contracted over two dims. The narrower
    operand stands on the left; the barrier keeps XLA from folding the result's transpose back into
    the product.
    """
    D, F = x_TxD.shape[1], y_TxF.shape[1]
    if D > 2 * F:
        return jax.lax.optimization_barrier(contract_rows(y_TxF, x_TxD, out_dtype)).T
    f32 = jnp.float32
    on_amx = device.platform() == "cpu" and device.has_amx()
    if on_amx and x_TxD.dtype == jnp.bfloat16 and D <= _IDENTITY:
        x_DxT = jnp.einsum("ij,tj->it", jnp.eye(D, dtype=x_TxD.dtype), x_TxD)
        return jnp.einsum("dt,tf->df", x_DxT, y_TxF, preferred_element_type=f32).astype(out_dtype)
    chunks = split_rows(x_TxD.shape[0])
    if chunks == 1:
        return jnp.einsum("td,tf->df", x_TxD, y_TxF, preferred_element_type=f32).astype(out_dtype)
    x, y = x_TxD.reshape(chunks, -1, D), y_TxF.reshape(chunks, -1, F)
    return jnp.einsum("btd,btf->df", x, y, preferred_element_type=f32).astype(out_dtype)


@jax.custom_vjp
def linear(x, w):
    """x @ w in x's dtype."""
    return jnp.matmul(x, w.astype(x.dtype))


def _forward(x, w):
    # The product itself and not `linear`: a remat policy that keeps products must see one here.
    return jnp.matmul(x, w.astype(x.dtype)), (x, w)


def _backward(residuals, dy):
    x, w = residuals
    dy = dy.astype(x.dtype)
    dx = jnp.einsum("...f,df->...d", dy, w.astype(x.dtype))
    rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dx, contract_rows(*rows, out_dtype=w.dtype)


linear.defvjp(_forward, _backward)
