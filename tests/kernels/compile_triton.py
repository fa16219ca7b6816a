"""Compile the fused kernel for NVIDIA chips without one; prints a JSON line per build.

Run by test_triton_compile.py in a process of its own: where Triton was imported with its
interpreter on, as tests/conftest.py does, nothing can be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evdit_opt.kernels import triton_forward

KERNEL = triton_forward.tile_attention_kernel
DATA = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
TYPES = {"lse_ptr": "*fp32", "bias_ptr": "*fp32", "weights_ptr": "*fp32", "tiles_ptr": "*i32",
         "ranges_ptr": "*i32", "scale": "fp32"}  # fmt: skip


def build(capability: int, head_dim: int, masked: bool) -> dict[str, object]:
    """Compile the default bfloat16 configuration; ``masked``: with padding mask and weights."""
    config = triton_forward.default_config(divmod(capability, 10), head_dim, torch.bfloat16)
    first, second = triton_forward.split_head_dim(head_dim)
    constants = {
        "HEAD_DIM": head_dim, "PART_0": first, "PART_1": second, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "HAS_BIAS": masked, "HAS_WEIGHTS": masked,
    }  # fmt: skip
    if not masked:
        constants["bias_ptr"] = None
    names = KERNEL.arg_names
    types = {name: "*bf16" if name in DATA else TYPES.get(name, "i32") for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    # As the launcher finds them: pointers and strides that are multiples of 16.
    strides = ("stride_q", "stride_k", "stride_v", "stride_o")
    aligned = [
        name
        for name in names
        if name not in constants and (name.endswith("_ptr") or name.startswith(strides))
    ]
    source = ASTSource(
        KERNEL,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = resources(compiled.asm["cubin"])
    return {
        "capability": capability, "head_dim": head_dim, "masked": masked, "registers": registers,
        "spilled_bytes": stack, "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"), "triton": triton.__version__,
    }  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a cubin; nothing here uses the stack but spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print(json.dumps(build(*case)), flush=True)
