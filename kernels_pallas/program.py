"""What a compiler is given, as text that is the same for the same program wherever it was written.

A kernel lies in the program's text as MLIR's bytecode, in which file, line and column of every
operation are written; these name the machine's folders too, and no compiled code depends on them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

from jax.extend.mlir import ir

# Bytecode of Mosaic GPU's kernels and its hash; of Mosaic TPU's, and where that was written.
_BYTECODE = re.compile(r'(\b(?:kernel_hash|module) = )"(?:\\.|[^"\\])*"'
                       r"|(\\22(?:body|debug_locations)\\22: )\\22[^\\]*")


def _kernels(lowered: Any) -> list[bytes]:
    """Return the bytecode of all kernels, in the order of the text."""
    found: list[bytes] = []

    def visit(op: Any) -> Any:
        for attribute in op.attributes.values() if op.name == "stablehlo.custom_call" else ():
            if isinstance(attribute, ir.DictAttr):
                named: Any = attribute
                found.extend([named["module"].value_bytes] if "module" in named else [])
            elif isinstance(attribute, ir.StringAttr) and attribute.value.startswith("{"):
                body = json.loads(attribute.value).get("custom_call_config", {}).get("body")
                found.extend([base64.b64decode(body)] if body else [])
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    return found


def _readable(kernel: bytes) -> str:
    from jax.experimental.mosaic.gpu import dialect

    context = ir.Context()
    context.allow_unregistered_dialects = True
    dialect.register_dialect(context)  # whose barriers are of types that memory is made of
    with context:
        module = ir.Module.parse(kernel)
        return str(module.operation.get_asm(enable_debug_info=False, print_generic_op_form=True))


def digest(lowered: Any) -> str:
    """Return a digest of a lowered program, its kernels too, without where it was written."""
    text = _BYTECODE.sub(r"\1\2", lowered.as_text())
    parts = [text, *map(_readable, _kernels(lowered))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
