"""Compile the fused kernels for NVIDIA chips without one; prints a JSON line per build.

Run by test_triton_compile.py in a process of its own: where Triton was imported with its
interpreter on, as tests/conftest.py does, nothing can be compiled.
"""

import contextlib
import dataclasses
import io
import json
import re
import sys

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evdit_opt.kernels.triton_backward import grad_kv_kernel, grad_q_kernel
from evdit_opt.kernels.triton_configs import LaunchConfig, default_config
from evdit_opt.kernels.triton_forward import forward_kernel
from evdit_opt.kernels.triton_launch import split_head_dim

KERNELS = {"forward": forward_kernel, "grad_q": grad_q_kernel, "grad_kv": grad_kv_kernel}
TYPES = {
    "lse_ptr": "*fp32", "delta_ptr": "*fp32", "bias_ptr": "*fp32", "weights_ptr": "*fp32",
    "tiles_ptr": "*i32", "ranges_ptr": "*i32", "scale": "fp32",
}  # fmt: skip
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def build(
    kernel: str,
    capability: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    masked: bool = False,
    grouped: bool = False,
    strides: str = "i32",
    use_tma: bool = False,
    config: LaunchConfig | None = None,
    **options: int,
) -> dict[str, object]:
    """Compile one kernel.

    Args:
        kernel: "forward", "grad_q" or "grad_kv".
        capability: 90 for sm_90.
        head_dim: of q, k and v.
        dtype: of q, k and v.
        masked: with a padding mask and weights.
        grouped: with several query heads a key head.
        strides: integer type of the strides; the launcher takes "i64" from 2**31.
        use_tma: the default configuration, but with TMA.
        config: None is the committed default.
        options: compiler options on top of the configuration's.
    """
    default = default_config(kernel, divmod(capability, 10), head_dim, dtype)
    config = config or dataclasses.replace(default, use_tma=use_tma)
    function = KERNELS[kernel]
    types = dict(TYPES)
    first, second = split_head_dim(head_dim)
    constants = {
        "HEAD_DIM": head_dim, "PART_0": first, "PART_1": second, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "HAS_BIAS": masked, "HAS_WEIGHTS": masked,
    }  # fmt: skip
    if not masked:
        constants["bias_ptr"] = None
    if not grouped:
        constants["heads_per_key_head"] = 1  # the launcher makes every 1 a constant
    if kernel == "forward":
        constants["USE_TMA"] = config.use_tma
        for name in ("k_tma_0", "k_tma_1", "v_tma_0", "v_tma_1"):
            part = (first, second)[int(name[-1])]
            if config.use_tma and part:
                data = POINTERS[dtype].removeprefix("*")
                types[name] = f"tensordesc<{data}[1, 1, {config.block_n}, {part}]>"
            else:
                constants[name] = None
    names = function.arg_names
    for name in names:
        default_type = POINTERS[dtype] if name.endswith("_ptr") else "i32"
        types.setdefault(name, strides if name.startswith("stride") else default_type)
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    # As the launcher finds them: pointers and strides that are multiples of 16.
    aligned = [
        name
        for name in names
        if name not in constants and (name.endswith("_ptr") or name.startswith("stride"))
    ]
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    launch = {
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
        **options,
    }  # fmt: skip
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    text = log.getvalue()
    spilled = re.search(r"(\d+) bytes spill stores", text)
    registers = re.search(r"Used (\d+) registers", text)
    assert spilled is not None, text
    assert registers is not None, text
    return {
        "registers": int(registers[1]), "spilled_bytes": int(spilled[1]),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "tma": compiled.asm["ptx"].count("cp.async.bulk.tensor"),
        "serialized": "C7512" in text, "triton": triton.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    # The log of ptxas is only there when it runs, not when its result comes from a cache.
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    for case in json.loads(sys.argv[1]):
        case["dtype"] = getattr(torch, case.get("dtype", "bfloat16"))
        result = build(**case)
        case["dtype"] = str(case["dtype"]).removeprefix("torch.")
        print(json.dumps(case | result), flush=True)
