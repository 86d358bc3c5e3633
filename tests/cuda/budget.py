"""Instructions that the ring kernels issue for a pair of logits, read off their sm_90 code; no GPU is needed.

    python tests/cuda/budget.py [--library FILE] [--json FILE] [--check] [--docs FILE]

A count is of one row, of the loop over rows: each block of instructions times how often a warp runs it. Marks in the
source say how often. From the count follows the issue ceiling, the share of the memory bandwidth that a kernel can
reach which issues that many; above 100 % issue slots are left over.

Instructions that a predicate turns off are issued, too. So a mark under a predicate says nothing: there is no branch
around what it marked, and every warp issues it.

Not counted: what is before and after the loop, where BRA.DIV leads (a warp whose threads came apart), a second try of a
wait, a division's slow path.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

CSRC = Path(__file__).resolve().parents[2] / "csrc"
VOCABULARIES = (1000, 4096, 32_000, 50_257, 58_000, 128_256, 151_936, 256_000)
NUM_ROWS = 8192
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes; in the order of DType
WARP = 32

# Multiprocessors, GHz, TB/s of a copy. Those of the B200 are assumed.
DEVICES = {"H100": (132, 1.98, 3.0), "H200": (132, 1.98, 4.3), "B200": (148, 1.85, 7.0)}
ISSUED_PER_CYCLE = 4 * WARP  # by one multiprocessor, thread instructions

# Marks. `pmevent K` is PMTRIG 1 << K in the code. It holds for its block and all that only this leads to:
#
#     0       not counted
#     1       by one warp of a block; a loop there counts once
#     2       by one warp of a block, once in 32 rows
#     3       where a row has a cluster; then what the branch skips is not counted
#     4       where a block has more than one warp; likewise
#     5       for each piece of a warp beyond those that are unrolled: the body of a loop. Of a kernel that keeps
#             nothing, and so unrolls nothing, loops without a mark are these
#     7       once a row; so does the loop around it, whose own few instructions count once
#     8 + k   by the warps that have piece k; k < 7, and for any k `pmevent.mask 0x8000 + k`. Without such marks,
#             branches in a row around code that does the same are taken for pieces
RARE, ONE_WARP, ONE_IN_32, CLUSTER, WARPS, LOOP, _, ONCE = range(8)
PIECE = 8

# What is counted, by operation. LD and ST without a space are a peer's shared memory.
KINDS = {
    "instructions": r"",
    "exponentials": r"MUFU\.EX2\b",
    "global": r"(LDG|STG|LDGSTS|UBLKCP)\b",
    "shared": r"(LDS|LDSM|STS|STAS|LD|ST)\b",
    "shuffles": r"SHFL\b",
    "barriers_per_row": r"BAR\b|SYNCS\S*TRYWAIT|UCGABAR_WAIT\b",
}

# Of bfloat16. jsd at 256,000, where nothing is kept, is to be 60, too, which is not reached: this holds what is.
LIMITS = {
    divergence: dict(zip(VOCABULARIES, limits, strict=True))
    for divergence, limits in {
        "forward_kl": (60, 45, 32, 32, 32, 32, 40, 40),
        "reverse_kl": (60, 45, 32, 32, 32, 32, 40, 40),
        "jsd": (60, 60, 60, 60, 60, 60, 60, 83),
    }.items()
}
EXPONENTIALS_LIMIT, EXPONENTIALS_UP_TO = 2.1, 163_000

Entry = dict[str, Any]
Table = dict[str, dict[str, dict[str, Entry | None]]]
Planner = Callable[[str, int, int], "Plan | None"]


@dataclass(frozen=True)
class Plan:
    """How a row is divided: what plan.cpp's reptile_ext_cuda_plan says of a shape."""

    threads: int  # of a row, in a block
    blocks: int  # of a row: the cluster
    block_threads: int
    grid_blocks: int
    pieces: int  # of a row, 16 bytes of an operand each
    share: int  # of these, a block's
    ring_rows: int = 0
    shared_bytes: int = 0
    keeps: int = 1  # whether exponentials are kept
    ring_pieces: int = 0  # pieces of an operand in the ring


# ------------------------------------------------------------------------------------------------------ disassembler


def disassembler() -> tuple[Path, dict[str, str]]:
    """cuobjdump, and an environment in which it finds nvdisasm."""
    folders = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    for compiler in filter(None, (os.environ.get("CUDACXX"), shutil.which("nvcc"))):
        folders.append(Path(compiler).resolve().parent)
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    for package, pattern in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            folders += sorted(Path(folder).glob(pattern))
    path = os.pathsep.join(map(str, folders))
    found = shutil.which("cuobjdump", path=path)
    if found is None or shutil.which("nvdisasm", path=path) is None:
        raise SystemExit(
            "cuobjdump and nvdisasm are needed, and not on the PATH, next to nvcc, in NVIDIA's wheels or triton's:\n"
            "    pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm     # 5 MB"
        )
    return Path(found), {**os.environ, "PATH": path}


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    operation: str
    operands: str

    @property
    def base(self) -> str:
        return self.operation.split(".")[0]

    @property
    def ends_block(self) -> bool:
        return self.base in ("BRA", "JMP", "BRX", "JMX", "EXIT", "RET", "CALL")

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        return not self.ends_block or self.base == "CALL" or bool(self.predicate) or "," in self.operands

    @property
    def target(self) -> int | None:
        found = re.findall(r"0x[0-9a-f]+", self.operands) if self.base in ("BRA", "JMP", "CALL") else None
        return int(found[-1], 16) if found else None


def code_of(library: Path, wanted: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The sm_90 code of each kernel whose name contains `wanted`."""
    program, environment = disassembler()
    command = [program, "-sass", *(() if library.suffix == ".cubin" else ("-arch", "sm_90")), library]
    line = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        name, code = "", list[Instruction]()
        for text in process.stdout:
            if "Function :" in text:
                if code:
                    yield name, code
                name, code = text.split()[-1], []
            elif wanted in name and (found := line.match(text)):
                code.append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4]))
        if code:
            yield name, code
    if process.returncode:
        raise SystemExit(f"{program} cannot read {library}")


# ------------------------------------------------------------------------------------------------------------- count


class Kernel:
    """The loop over rows of one kernel: its blocks, what leads where, and the marks that hold for each."""

    def __init__(self, name: str, code: list[Instruction], keeps: bool = True) -> None:
        self.name = name
        self.blocks: dict[int, list[Instruction]] = {}
        self.next: dict[int, list[int]] = {}
        self.calls: dict[int, int] = {}
        self._divide(code)
        self.counts = {
            b: Counter(kind for kind, form in KINDS.items() for i in code if re.match(form, i.operation))
            for b, code in self.blocks.items()
        }
        rare, never = {b for b in self.blocks if RARE in self._marks_of(b)}, self._retries() | self._slow_paths()
        self.called = {b: self._reach(function, rare | never) for b, function in self.calls.items()}
        loops, with_rare = (self._loops(self._reach(code[0].address, dead)) for dead in (rare | never, never))
        # The loop over rows is the largest.
        self.header = max(loops, key=lambda header: len(loops[header]), default=-1)
        loop = loops.pop(self.header, set())
        if 4 * len(loop) <= max(map(len, with_rare.values()), default=0):
            raise SystemExit(
                f"{name}: no row gets past the marks of what is rare (0): {', '.join(map(hex, sorted(rare)))}"
            )
        latches = {b for b in loop if self.header in self.next[b]}
        self.next = {b: [n for n in self.next[b] if n in loop and n != self.header] for b in loop}
        inner = {header: blocks for header, blocks in loops.items() if header in loop}
        self.marks: dict[int, set[int]] = {}  # of a block: those that it bears itself
        self.regions: list[tuple[int, set[int]]] = []  # a mark, and the blocks that it holds for
        for b in loop:
            without = self._reach(self.header, {b})
            is_conditional = bool(latches & without)
            # What every warp runs bears no condition, whatever a mark says.
            self.marks[b] = {m for m in self._marks_of(b) if is_conditional or m == LOOP}
            for mark in self.marks[b]:
                around = [blocks for blocks in inner.values() if b in blocks] if mark == LOOP else []
                self.regions.append((mark, (loop - without).intersection(*around)))
        if keeps and all(mark < PIECE for mark, _ in self.regions):
            for k, b in self._bare_pieces():
                self.marks[b].add(PIECE + k)
                self.regions.append((PIECE + k, loop - self._reach(self.header, {b})))
        for header, blocks in inner.items():
            by_one = any(blocks <= region for mark, region in self.regions if mark in (ONE_WARP, ONE_IN_32))
            if not keeps and not by_one and not self._has_known_trips(blocks):
                self.marks[header].add(LOOP)  # nothing is unrolled there: the rows' loops are those over pieces
                self.regions.append((LOOP, blocks))
            elif not by_one and not self._has_known_trips(blocks):
                raise SystemExit(f"{name}: the loop at {header:#x} has no mark: is it rare (0) or of pieces (5)?")

    def _bare_pieces(self) -> list[tuple[int, int]]:
        """Number and block of pieces without marks: three branches or more in a row around code that does the same. Of
        several such rows, one a pass, the longest."""
        bodies: dict[int, tuple[int, int, Counter[str]]] = {}  # by the block that branches: body, join, counts
        for b, following in self.next.items():
            for body, join in itertools.permutations(following, 2):
                region = self.next.keys() - self._reach(self.header, {body})
                if {n for r in region for n in self.next[r]} - region == {join} and not self.marks[body]:
                    bodies[b] = body, join, sum((self.counts[r] for r in region), Counter[str]())

        def alike(a: Counter[str], b: Counter[str]) -> bool:
            same = all(a[kind] == b[kind] for kind in ("exponentials", "global", "shared"))
            return same and a["instructions"] >= 8 and 0.8 < a["instructions"] / b["instructions"] < 1.25

        runs: list[list[int]] = []
        for b in sorted(bodies):
            last = runs[-1][-1] if runs else b
            if bodies[last][1] == b and alike(bodies[last][2], bodies[b][2]):
                runs[-1].append(b)
            else:
                runs.append([b])
        length = max(map(len, runs), default=0)
        return [(k, bodies[b][0]) for run in runs if len(run) == length > 2 for k, b in enumerate(run)]

    def _divide(self, code: list[Instruction]) -> None:
        starts = {i.target for i in code} | {b.address for a, b in itertools.pairwise(code) if a.ends_block}
        joins = {int(i.operands.split("0x")[1], 16) for i in code if i.base == "BSSY"}
        start = code[0].address
        for here, after in zip(code, [*code[1:], None], strict=True):
            if here.address in starts:
                start = here.address
            self.blocks.setdefault(start, []).append(here)
            self.next.setdefault(start, [])
            if here.base == "BSYNC" and (after is None or after.address not in joins):
                raise SystemExit(f"{self.name}: BSYNC at {here.address:#x} does not go on to where its BSSY says")
            if after is not None and here.goes_on and (here.ends_block or after.address in starts):
                self.next[start].append(after.address)
            if here.target is not None and here.base == "CALL":
                self.calls[start] = here.target
            elif here.target is not None and not here.operation.startswith("BRA.DIV"):
                self.next[start].append(here.target)

    def _marks_of(self, block: int) -> set[int]:
        masks = [int(i.operands, 16) for i in self.blocks[block] if i.base == "PMTRIG" and not i.predicate]
        return {PIECE + m % 0x8000 if m & 0x8000 else m.bit_length() - 1 for m in masks}

    def _reach(self, start: int, without: set[int], taken: Mapping[int, int] = MappingProxyType({})) -> set[int]:
        """Blocks from `start` on, without some, and with the branches `taken`."""
        reached, todo = set[int](), [start]
        while todo:
            if (block := todo.pop()) not in reached and block not in without:
                reached.add(block)
                todo += [taken[block]] if block in taken else self.next[block]
        return reached

    def _loops(self, alive: set[int]) -> dict[int, set[int]]:
        """By the block that a loop begins with: its blocks. A block closes a loop if it leads to one that a depth-first
        search has come through on its way there."""
        closed, done, before = [], set[int](), defaultdict[int, list[int]](list)
        path = {min(alive): iter(self.next[min(alive)])}
        while path:
            block = next(reversed(path))
            following = next(path[block], None)
            if following is None:
                done.add(block)
                del path[block]
            elif following in alive:
                before[following].append(block)
                if following in path:
                    closed.append((block, following))
                elif following not in done:
                    path[following] = iter(self.next[following])
        loops: dict[int, set[int]] = {}
        for latch, header in closed:
            loop, todo = loops.setdefault(header, {header}), [latch]
            while todo:
                if (block := todo.pop()) not in loop:
                    loop.add(block)
                    todo += before[block]
        return loops

    def _waits(self, block: int) -> set[str]:
        return {i.operands for i in self.blocks[block] if re.match(r"SYNCS\S*TRYWAIT", i.operation)}

    def _retries(self) -> set[int]:
        """Blocks that wait again for what every block before them has waited for."""
        found = set()
        for b in self.blocks:
            waits = [self._waits(other) for other, following in self.next.items() if b in following]
            if b in self.next[b] and self._waits(b) and len(waits) > 1 and all(self._waits(b) <= w for w in waits):
                found.add(b)
        return found

    def _slow_paths(self) -> set[int]:
        """Calls directly behind a branch: ours are inlined, so what is called is a division's or a root's slow path."""
        straight = {n for following in self.next.values() if len(following) == 1 for n in following}
        return {b for b in self.calls if not self._marks_of(b)} - straight - {min(self.blocks)}

    def _has_known_trips(self, loop: set[int]) -> bool:
        """One: a wait, or the threads that ELECT goes through, of which there is one. Or a marked loop's."""
        code = [i for b in loop for i in self.blocks[b]]
        waits = any(self._waits(b) for b in loop) and len(code) < WARP
        marks = set().union(*map(self._marks_of, loop))
        return waits or any(i.base == "ELECT" for i in code) or LOOP in marks or ONCE in marks

    def _weights(self, plan: Plan, pieces: int) -> dict[int, float]:
        """How often a warp runs each block for a row, of which the warp's block has that many pieces."""
        warps, row_warps = plan.block_threads / WARP, max(plan.threads // WARP, 1)

        def has(k: int) -> float:  # share of the warps that have piece k
            return min(max(math.ceil((pieces - k * plan.threads) / WARP), 0), row_warps) / row_warps

        unrolled = max((mark + 1 - PIECE for mark, _ in self.regions), default=0)
        trips = sum(has(k) for k in range(max(unrolled, 0), math.ceil(pieces / plan.threads)))
        times = {CLUSTER: plan.blocks > 1, WARPS: warps > 1, LOOP: trips}
        shares = {ONE_WARP: 1 / warps, ONE_IN_32: 1 / warps / WARP}
        shares |= {mark: has(mark - PIECE) for mark, _ in self.regions if mark >= PIECE}
        never = {b for b, marks in self.marks.items() if any((times | shares).get(m) == 0 for m in marks)}
        always = {b for b, marks in self.marks.items() if any(m in (CLUSTER, WARPS) for m in marks)} - never
        taken = {b: n for b, following in self.next.items() for n in following if n in always}
        weights = {}
        for b in self._reach(self.header, never, taken):
            marks = [mark for mark, region in self.regions if b in region]
            weights[b] = min((shares.get(m, 1) for m in marks), default=1) * math.prod(times.get(m, 1) for m in marks)
        return weights

    def count(self, plan: Plan, vocab_size: int, size: int) -> Entry:
        """Thread instructions for a pair, of each kind; barriers for a row; the issue ceiling of each device."""
        total = defaultdict[str, float](float)  # of a warp, a row; summed over the cluster
        for block in range(plan.blocks):
            for b, weight in self._weights(plan, min(max(plan.pieces - block * plan.share, 0), plan.share)).items():
                for c in {b} | self.called.get(b, set()):
                    for kind, n in self.counts[c].items():
                        total[kind] += weight * n
        entry: Entry = {kind: round(total[kind] * plan.threads / vocab_size, 3) for kind in KINDS}
        entry["barriers_per_row"] = round(total["barriers_per_row"] / plan.blocks, 3)
        entry["ceiling"] = {d: round(allowed(d, size) / entry["instructions"], 3) for d in DEVICES}
        return entry


def exponentials_of(plan: Plan, vocab_size: int, size: int) -> float:
    """What forward KL takes for a pair of logits in rows that begin at 16 bytes, by the plan alone: two of every class
    that a warp's pieces have room for, twice where nothing is kept, and one of every thread to join the sets of a step.
    What is counted in the machine code, and what the tests' host executes, must agree with it."""
    warps, of_pieces = plan.block_threads // WARP, 0
    for block in range(plan.blocks):
        pieces = min(max(plan.pieces - block * plan.share, 0), plan.share)
        for begin in range(0, pieces, plan.threads):
            of_pieces += min(math.ceil((pieces - begin) / WARP), warps)
    of_classes = of_pieces * WARP * (16 // size) * (2 if plan.keeps else 4)
    of_steps = plan.blocks * plan.threads * ((warps > 1) + (plan.blocks > 1))
    return (of_classes + of_steps) / vocab_size


def allowed(device: str, size: int) -> float:
    """Thread instructions for a pair, two reads and a write of `size` bytes, at full bandwidth."""
    multiprocessors, ghz, terabytes = DEVICES[device]
    return ISSUED_PER_CYCLE * multiprocessors * ghz * 3 * size / (terabytes * 1000)


# ------------------------------------------------------------------------------------------------------------- table


def divergences() -> dict[str, tuple[str, int]]:
    """Name and number of each, by its functor; of divergence.h."""
    found = re.findall(r"^ +X\((\w+), (\w+)\)", (CSRC / "divergence.h").read_text(), re.M)
    return {functor: (name, number) for number, (name, functor) in enumerate(found)}


def planner() -> Planner:
    """plan.cpp's plan of a dtype, the divergence's number and V on sm_90; None where another kernel is taken."""
    with tempfile.TemporaryDirectory() as folder:
        command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-shared", "-fPIC", "-o", f"{folder}/plan.so"]
        subprocess.run([*command, CSRC / "cuda/plan.cpp"], check=True)
        function = ctypes.CDLL(f"{folder}/plan.so").reptile_ext_cuda_plan
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_int64, ctypes.c_int64, *[ctypes.c_int] * 4, ctypes.POINTER(ctypes.c_int64)]

    def plan_of(dtype: str, divergence: int, vocab_size: int) -> Plan | None:
        numbers = (ctypes.c_int64 * len(fields(Plan)))()
        name = function(NUM_ROWS, vocab_size, list(DTYPES).index(dtype), divergence, DEVICES["H100"][0], 1, numbers)
        return Plan(*numbers) if name.startswith(b"a ring") else None

    return plan_of


def functor_dtype_keeps(name: str) -> tuple[str, str, bool] | None:
    """Of a mangled name; None where it is not ring_kernel<functor, dtype, true, whether exponentials are kept>."""
    found = re.search(r"ring_kernelI\w*?\d+([A-Z][A-Za-z]+)I[fd]E\w*?DTypeE(\d)ELb1ELb([01])EE", name)
    return (found[1], list(DTYPES)[int(found[2])], found[3] == "1") if found else None


def table_of(library: Path, plan_of: Planner) -> Table:
    table: Table = defaultdict(lambda: defaultdict(dict))
    for mangled, code in code_of(library, "ring_kernel"):
        if found := functor_dtype_keeps(mangled):
            functor, dtype, keeps = found
            kernel = Kernel(mangled, code, keeps)
            divergence, number = divergences()[functor]
            for V in VOCABULARIES:
                plan = plan_of(dtype, number, V)
                table[divergence][dtype].setdefault(str(V), None)
                if plan and plan.keeps == keeps:
                    entry = kernel.count(plan, V, DTYPES[dtype])
                    entry["exponentials_by_plan"] = round(exponentials_of(plan, V, DTYPES[dtype]), 3)
                    table[divergence][dtype][str(V)] = entry
    if not table:
        raise SystemExit(f"{library} has no ring kernel for sm_90: build it with CMAKE_CUDA_ARCHITECTURES=90")
    return table


def excesses(table: Table) -> list[str]:
    """A line for each count above its limit, or missing."""
    lines = []
    for divergence, limits in LIMITS.items():
        for V, limit in limits.items():
            what = f"{divergence} bfloat16 V = {V}"
            entry = table.get(divergence, {}).get("bfloat16", {}).get(str(V))
            if entry is None:
                lines.append(f"{what}: the ring kernel is not taken, or not there")
                continue
            if entry["instructions"] > limit:
                lines.append(f"{what}: {entry['instructions']:.1f} instructions a pair, allowed {limit}")
            by_plan = entry.get("exponentials_by_plan", entry["exponentials"])
            if divergence == "forward_kl" and abs(entry["exponentials"] / by_plan - 1) > 0.01:
                lines.append(f"{what}: {entry['exponentials']:.2f} exponentials a pair, by the plan {by_plan:.2f}")
            may = EXPONENTIALS_LIMIT if V <= EXPONENTIALS_UP_TO else math.inf
            if entry["exponentials"] > may:
                lines.append(f"{what}: {entry['exponentials']:.2f} exponentials a pair, allowed {may}")
    return lines


def markdown(table: Table) -> str:
    """forward_kl's counts by V, and the instructions of all divergences."""

    def rows(*cells: Iterable[str]) -> list[str]:
        return [f"| {' | '.join(line)} |" for line in cells]

    devices = ", ".join(f"{d} {m} × {ghz} GHz, {tb} TB/s" for d, (m, ghz, tb) in DEVICES.items())
    kinds = [kind for kind in KINDS if kind != "barriers_per_row"]
    head = ["V", *kinds, "barriers a row", *(f"ceiling {device}" for device in DEVICES)]
    lines = [f"`forward_kl`, bfloat16, N = {NUM_ROWS:,}, for a pair of logits ({devices}; the B200's assumed):", ""]
    lines += rows(head, ["---"] * len(head))
    for V, entry in table.get("forward_kl", {}).get("bfloat16", {}).items():
        if entry:
            counts = [f"{entry[kind]:.2f}" for kind in kinds] + [f"{entry['barriers_per_row']:.1f}"]
            lines += rows([f"{int(V):,}", *counts, *(f"{share:.0%}" for share in entry["ceiling"].values())])
    head = ["instructions a pair", "dtype", *(f"{V:,}" for V in VOCABULARIES)]
    lines += ["", *rows(head, ["---"] * len(head))]
    for divergence, by_dtype in sorted(table.items()):
        for dtype, by_vocabulary in sorted(by_dtype.items()):
            counts = [f"{entry['instructions']:.1f}" if entry else "–" for entry in by_vocabulary.values()]
            lines += rows([f"`{divergence}`", dtype, *counts])
    return "\n".join(lines)


def into_docs(text: str, table: Table) -> str:
    begin, end = "<!-- budget -->", "<!-- /budget -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"the text has to have {begin} and, after it, {end}, once each")
    return f"{text.split(begin)[0]}{begin}\n\n{markdown(table)}\n\n{end}{text.split(end)[1]}"


def installed_library() -> Path:
    spec = importlib.util.find_spec("reptile_ext")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (library := Path(folder) / "_cuda.so").exists():
            return library
    raise SystemExit("no reptile_ext with CUDA kernels is installed: name a library or cubin by --library")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--library", type=Path, help="a library, object or cubin; otherwise the installed _cuda.so")
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--check", action="store_true", help="fail where a count is above its limit")
    parser.add_argument("--docs", type=Path, help="put the table between the marks of this Markdown file")
    options = parser.parse_args(arguments)
    table = table_of(options.library or installed_library(), planner())
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    if options.docs:
        options.docs.write_text(into_docs(options.docs.read_text(), table))
    print(markdown(table))
    found = excesses(table) if options.check else []
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
