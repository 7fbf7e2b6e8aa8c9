"""The fewest cycles that a kernel can take on AMD's Zen 5, counted from its instructions.

The kernels are compiled as CMakeLists.txt says, disassembled, and the instructions of each inner
loop are added up by what they occupy. The installed extension will not do: it has no symbols.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.environment import ROOT, cpu_family
from benchmarks.ops.cases import Case
from benchmarks.ops.operators import UNARY

# The CMake targets of an instruction set; what a later one has too, it takes the place of.
TARGETS = {"avx512": ("avx512",), "avx512bf16": ("avx512", "avx512bf16")}
CPU_FAMILY = 26  # Zen 5

STORAGE = {"float32": ("float", 4), "bfloat16": ("bfloat16", 2), "float16": ("float16", 2)}

# The model: how many operations of each class a core can start in a cycle. Measured by loops of one
# instruction, without dependencies, on AMD EPYC of the 9005 series (Zen 5, 512-bit units).
# Vector: all of the first three together, and others.
PER_CYCLE = {"multiply": 2, "add": 2, "permute": 2, "vector": 4}
PER_CYCLE |= {"load": 2, "store": 1, "instruction": 8}
# Classes by the beginning of the name (the first that fits), and how many operations each is.
# What is not listed may run in any of the four vector units.
CLASSES = (
    (("vfm", "vfnm", "vmulp", "vrcp14", "vrsqrt14"), "multiply", 1.0),
    (("vdivp",), "multiply", 5.0),
    (("vreduce", "vscalef"), "add", 2.0),
    (("vcvtne2ps2bf16", "vcvtneps2bf16", "vcvtps2ph", "vcvtph2ps"), "add", 1.6),
    (("vaddp", "vsubp", "vmaxp", "vminp", "vrange", "vcmp", "vpcmp", "vfixup"), "add", 1.0),
    (("vrndscale", "vgetexp", "vgetmant", "vcvt", "vpsll", "vpsrl", "vpsra"), "add", 1.0),
    (("vperm", "vpmov", "vpunpck", "vpack", "vshuf", "vpshuf", "vpermi"), "permute", 1.0),
    (("vinsert", "vextract", "valign"), "permute", 1.0),
)
_MOVES = ("vmovup", "vmovap", "vmovdq", "vbroadcast", "vpbroadcast", "vmovnt")
_NARROWING = ("vpmovdw", "vcvtps2ph")
_BYTES = {"x": 16, "y": 32, "z": 64}


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    name: str
    operands: tuple[str, ...]  # in AT&T's order, the destination last
    target: int | None = None  # of a jump

    @property
    def stores(self) -> int:
        """Bytes that it writes to memory, if it writes a whole vector (no mask in its way)."""
        if not (self.name.startswith("v") and self.operands and self.operands[-1].endswith(")")):
            return 0
        register = re.search(r"%([xyz])mm", " ".join(self.operands[:-1]))
        return _BYTES[register[1]] // (1 + self.name.startswith(_NARROWING)) if register else 0

    @property
    def results(self) -> int:
        """Bytes of the result that it writes: not past the caches, and no register on the stack."""
        spilled = bool(self.operands) and "(%rsp" in self.operands[-1]
        return 0 if self.streams or spilled else self.stores

    @property
    def streams(self) -> bool:
        return self.name.startswith("vmovnt")


_HEADING = re.compile(r"[0-9a-f]+ <(.*)>:")
_LINE = re.compile(r"\s*([0-9a-f]+):\t(\S+)\s*([^#<]*)")


def parse(listing: Iterable[str]) -> dict[str, list[Instruction]]:
    """Read what `objdump --disassemble --demangle --no-show-raw-insn` prints: the instructions of
    each kernel of `elementwise/map-inl.h`, by its name and template arguments without namespaces,
    `map<Tanh, float, 3>`.
    """
    kernels: dict[str, list[Instruction]] = {}
    current = None
    for line in listing:
        if heading := _HEADING.match(line):
            name = heading[1].replace("(anonymous namespace)::", "").replace("quake::", "")
            kernel = re.match(r"void (map(?:_binary)?<.*>)\([^)]*\)$", name)
            current = kernels.setdefault(kernel[1], []) if kernel else None
        elif current is not None and (parts := _LINE.match(line)):
            address, name, operands = int(parts[1], 16), parts[2], parts[3].strip()
            jump = name.startswith("j") and re.fullmatch("[0-9a-f]+", operands)
            split = tuple(re.split(r",\s*(?![^(]*\))", operands)) if operands else ()
            current.append(Instruction(address, name, split, int(operands, 16) if jump else None))
    return kernels


def hot_loop(instructions: list[Instruction]) -> list[Instruction]:
    """Find the innermost loop that computes the most on whole vectors.

    A branch for stores past the caches is no part of it: arrays in the cache do not take it.
    """
    loops = []
    for jump in instructions:
        if jump.target is not None and jump.target <= jump.address:
            body = [i for i in instructions if jump.target <= i.address <= jump.address]
            if any(i.results for i in body):
                loops.append(body)

    def holds(body: list[Instruction], other: list[Instruction]) -> bool:
        starts, ends = body[0].address <= other[0].address, other[-1].address <= body[-1].address
        return other is not body and starts and ends

    inner = [body for body in loops if not any(holds(body, other) for other in loops)]
    best = max(inner, key=lambda body: sum("%zmm" in " ".join(i.operands) for i in body))
    return [i for i in best if not i.streams]


def operations(loop: list[Instruction]) -> Counter:
    """Add up what a loop occupies, by the classes of `PER_CYCLE`."""
    total: Counter = Counter(instruction=len(loop))
    for instruction in loop:
        name, operands = instruction.name, instruction.operands
        if not name.startswith("v"):
            continue
        in_memory = any("(" in operand for operand in operands)
        if instruction.stores:
            total["store"] += instruction.stores / 64
        elif in_memory:
            total["load"] += 1
        masked = any("{%k" in operand for operand in operands)
        if name.startswith(_MOVES) and (in_memory or not masked):
            continue  # a load or a store, or a copy of a register, which renaming does
        found = (known for names, *known in CLASSES if name.startswith(names))
        kind, count = next(found, ("vector", 1.0))
        total["vector"] += count
        if kind != "vector":
            total[kind] += count
    return total


def bound(instructions: list[Instruction], element_bytes: int) -> float:
    """The fewest cycles per 16 elements of a kernel's inner loop."""
    loop = hot_loop(instructions)
    elements = sum(i.results for i in loop) / element_bytes
    total = operations(loop)
    return max(total[kind] / rate for kind, rate in PER_CYCLE.items()) * 16 / elements


class Bounds:
    """The bounds of all kernels on this machine; `left_out` says why there are none."""

    def __init__(self, isa: str):
        self._kernels: dict[str, list[Instruction]] = {}
        missing = [tool for tool in ("cmake", "objdump") if shutil.which(tool) is None]
        self.left_out = None
        if isa not in TARGETS or cpu_family() != CPU_FAMILY or platform.machine() != "x86_64":
            self.left_out = "the model is of Zen 5 with AVX-512"
        elif missing:
            self.left_out = f"{' and '.join(missing)} not installed"
        else:
            try:
                for target in TARGETS[isa]:
                    self._kernels.update(_disassembled(target))
            except subprocess.CalledProcessError as error:
                self.left_out = f"{error.cmd[0]} failed"

    def cycles(self, case: Case, order: int) -> float | None:
        """The fewest cycles per 16 elements, or None for what is not one loop."""
        functor = case.operator.functor
        loop = "map" if case.operator.kind == UNARY else "map_binary"
        storage, element_bytes = STORAGE[case.dtype]
        kernel = self._kernels.get(f"{loop}<{functor}, {storage}, {order}>")
        return bound(kernel, element_bytes) if functor and kernel else None


def _disassembled(isa: str) -> dict[str, list[Instruction]]:
    # One folder per checkout and user; make compiles again what has changed since.
    key = hashlib.sha256(f"{ROOT} {os.getuid()}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"quake_jax_kernels_{key}"
    target = f"quake_{isa}"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DQUAKE_PYTHON_MODULE=OFF"]
    for command in (configure, ["cmake", "--build", str(folder), "--target", target]):
        subprocess.run(command, capture_output=True, check=True)
    compiled = folder / "CMakeFiles" / f"{target}.dir" / "cpu_kernels" / "isa" / f"{isa}.cc.o"
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(compiled)]
    listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return parse(listing.splitlines())
