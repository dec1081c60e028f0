"""Compile a kernel as a launch would, on a machine without a GPU, and read its machine code.

A launch specialises a kernel on its arguments: pointers and integers divisible by 16 allow wide loads and asynchronous
copies. Compiled without those hints it is another kernel. So the wrapper itself is run here, on CPU tensors that are
never touched, and each launch in it becomes a compilation for the architecture asked for.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels import guard
from kernels.timing import tensors

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
TENSOR_CORE = re.compile(r"[HIQDOB]G?MMA|UTC\w*MMA")
DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x\d+x(?:f16|bf16|i8|f8\w*)[,>]")  # the first operand
SERIALIZED = re.compile(r"\((C75\d\d)\)")  # the assembler: "Potential Performance Loss: wgmma ... serialized due to"
WIDTHS = {"8": 8, "16": 16, "64": 64, "128": 128, "256": 256}


class AbsentGPU(DriverBase):
    """The least of a Triton driver: it names the architecture to compile for and runs nothing."""

    def __init__(self, arch: int):
        super().__init__()
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        """Never chosen by itself."""
        return False

    def get_current_target(self) -> GPUTarget:
        """The architecture, as Triton's compiler wants to hear it."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Triton keeps its kernels by device; one device per architecture keeps them apart."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """No stream: nothing is launched."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where helper tensors are made."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable:
        """An autotuner's timer: calls each configuration once, so that all are compiled and recorded."""

        def benchmark(call: Callable[[], Any], **_: Any) -> list[float]:
            call()
            return [0.0, 0.0, 0.0]

        return benchmark

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Only launchers need C++ types, and none is built."""
        return ty


@dataclass
class Launch:
    """One kernel that a wrapper launched: Triton's compiled kernel, its grid and the bytes of its tensor arguments.

    made_bytes are those of tensors that the wrapper made and no earlier launch took: outputs, and parts of outputs.
    """

    kernel: Any
    grid: tuple[int, ...]
    argument_bytes: int
    made_bytes: int
    count: int = 1


@contextlib.contextmanager
def recorded_launches(arch: int, inputs: Iterable[Any] = ()) -> Iterator[list[Launch]]:
    """Within it, launches are compiled for `arch` and recorded, a kernel launched again counted; nothing runs.

    inputs: what the wrapper is called with; it made all other tensors itself.
    """
    if guard.interpreting():
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    launches: list[Launch] = []
    known = {tensor.untyped_storage().data_ptr(): tensor for tensor in _tensors(inputs)}
    compile_or_launch = JITFunction.run

    def compile_and_record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel: Any = compile_or_launch(self, *args, grid=grid, warmup=True, **kwargs)
        bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
        bound.apply_defaults()
        taken = _tensors(bound.arguments.values())
        made = [tensor for tensor in taken if tensor.untyped_storage().data_ptr() not in known]
        known.update({tensor.untyped_storage().data_ptr(): tensor for tensor in made})  # held: no address comes again
        for launch in launches:
            if launch.kernel.metadata.hash == kernel.metadata.hash:
                launch.count += 1
                return kernel
        sizes: Any = grid(bound.arguments) if callable(grid) else grid
        launches.append(Launch(kernel, tuple(sizes), _bytes(taken), _bytes(made)))
        return kernel

    driver.set_active(AbsentGPU(arch))
    with patch.object(JITFunction, "run", compile_and_record), patch.object(guard, "COMPILE_ONLY", True):
        yield launches


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """The distinct tensors among arguments; a tensor descriptor counts as its tensor."""
    found = tensors([getattr(argument, "base", argument) for argument in arguments])
    return [*{tensor.data_ptr(): tensor for tensor in found}.values()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """What they hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compiler_version(arch: int) -> str:
    """Triton and the assembler that made the machine code; registers differ between versions."""
    return f"triton {triton.__version__}, ptxas {get_ptxas(arch).version}"


def dot_rows(ttir: str) -> int:
    """Rows of the tallest product of 16-bit or 8-bit tiles in a kernel's intermediate code; 0 if there is none."""
    return max((int(rows) for rows in DOT.findall(ttir)), default=0)


@functools.cache
def serialized(ptx: str, arch: int) -> tuple[str, ...]:
    """Codes of the assembler's warnings that each wgmma waits for the one before, such as ("C7515",).

    Triton throws the assembler's log away and keeps its kernels on disk, so PTX with wgmma is assembled once more.
    """
    if "wgmma.mma_async" not in ptx:
        return ()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-lineinfo", f"--gpu-name={sm_arch_from_capability(arch)}", str(source)]
        command += ["-v", "-o", str(source.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(sorted(set(SERIALIZED.findall(log.stdout + log.stderr))))


@functools.cache
def machine_code(cubin: bytes) -> dict[str, Any]:
    """Registers, spills, load widths and special instructions of a compiled kernel's binary.

    Spilled bytes are the widths of all loads from and stores to local memory, per thread, which is what `ptxas -v`
    reports. Counts are of instructions in the code, not of their executions.
    """
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(binary)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", listing)}
    return {"registers": usage["REG"], "stack": usage["STACK"], **summary(Counter(INSTRUCTION.findall(listing)))}


def summary(instructions: Counter[str]) -> dict[str, Any]:
    """What the instruction counts say, for example of {"LDG.E.128": 4, "HMMA.16816.F32.BF16": 64}.

    A TMA copy moves at least 16 bytes at a time and counts as 128 bits.
    """
    loads, stores, local = (_widths(instructions, names) for names in ("LDG|LDGSTS", "STG", "LDL|STL"))
    bulk_loads, bulk_stores = (_count(instructions, names) for names in ("UTMALDG|UBLKCP", "UTMASTG|UTMAREDG"))
    wide = _bits(Counter({width: count for width, count in loads.items() if width >= 128}))
    return {
        "spill_bytes": _bits(local) // 8,
        "load_bits": max(loads, default=128 if bulk_loads else 0),
        "wide_load_share": wide / _bits(loads) if loads else float(bulk_loads > 0),
        "store_bits": max(stores, default=128 if bulk_stores else 0),
        "async_copies": _count(instructions, "LDGSTS"),
        "bulk_copies": bulk_loads + bulk_stores,
        "tensor_instructions": _tensor_core(instructions),
    }


def _bits(widths: Counter[int]) -> int:
    """Bits that instructions of these widths move in all."""
    return sum(width * count for width, count in widths.items())


def _count(instructions: Counter[str], names: str) -> int:
    """How many instructions have one of the names, a regular expression for the part before the first dot."""
    return sum(count for name, count in instructions.items() if re.fullmatch(names, name.split(".")[0]))


def _widths(instructions: Counter[str], names: str) -> Counter[int]:
    """Bits per thread of the memory instructions with these names: LDG.E.128 moves 128, LDG.E.U16 16, LDG.E 32."""
    counts: Counter[int] = Counter()
    for instruction, count in instructions.items():
        name, *modifiers = instruction.split(".")
        if re.fullmatch(names, name):
            width = next((WIDTHS[m.lstrip("US")] for m in modifiers if m.lstrip("US") in WIDTHS), 32)
            counts[width] += count
    return counts


def _tensor_core(instructions: Counter[str]) -> dict[str, int]:
    """Tensor-core instructions by kind: HMMA and IMMA are mma.sync, HGMMA and IGMMA wgmma, UTC*MMA tcgen05."""
    kinds: Counter[str] = Counter()
    for instruction, count in instructions.items():
        name = instruction.split(".")[0]
        if TENSOR_CORE.fullmatch(name):
            kinds[name] += count
    return dict(sorted(kinds.items()))
